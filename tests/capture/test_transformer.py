"""The reference model's recipe: its own values, and nothing that kernels cannot take."""

from __future__ import annotations

import pytest
import torch

import gaq_compile
from gaq_compile.capture.graphs import collate
from gaq_compile.capture.transformer import TransformerRecipe, form_of
from gaq_compile.datasets import example_structures
from gaq_compile.models import EuclideanTransformer, TransformerConfig
from gaq_compile.passes.graph_tools import calls


def _model(attention: str, l_max: int = 2) -> EuclideanTransformer:
    torch.manual_seed(5)
    sizes = {"channels": 8, "heads": 2, "layers": 2, "radial": 6, "l_max": l_max}
    model = EuclideanTransformer(TransformerConfig((1, 6, 8), attention=attention, **sizes))
    model.set_scales([-13.0, -1000.0, -2000.0], 1.5, 7.0)
    return model.eval()


@pytest.mark.parametrize("l_max", [1, 2, 3])
def test_lengths_in_the_other_layout_are_the_same(l_max: int) -> None:
    model = _model("normalized", l_max)
    tensors = collate(example_structures("ethanol")[:2], form_of(model))
    ours = TransformerRecipe().energy_model(model).module
    torch.testing.assert_close(ours(**tensors), model(**tensors), rtol=0, atol=2e-4)  # of 2,000 eV


@pytest.mark.parametrize(("attention", "scheme"), [("normalized", "w4a8"), ("plain", "fp32")])
def test_every_operator_has_a_kernel(attention: str, scheme: str) -> None:
    """No conversion of layouts is left, no gradient of a slice, and no sum that torch must do."""
    pytest.importorskip("tvm_ffi")
    frames = example_structures("ethanol")[:2]
    potential = gaq_compile.quantize(_model(attention), frames, scheme, measure=False, progress=False)
    assert potential.report.to_dict()["nodes"]["fallback"] == []
    assert not list(calls(potential.graphs["lower"], torch.ops.aten.slice_backward.default))
    assert not list(calls(potential.graphs["tag_irreps"], torch.ops.gaq.relayout.default))
    for conv in calls(potential.graphs["tag_irreps"], torch.ops.gaq.conv.default):
        assert "1x0e+1x1o+1x2e+1x0e+1x1o+1x2e" in str(conv.args[4])  # harmonics for each of two heads
