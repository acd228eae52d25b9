"""scale_convolutions: a number that meets a convolution's whole result goes into its coefficients."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.passes.graph_tools import calls
from gaq_compile.passes.scale_convolutions import scale_convolutions

aten, gaq = torch.ops.aten, torch.ops.gaq
SPEC = "2x0e+1x1o * 1x0e+1x1o -> 2x0e+2x1o+1x0e | 0.0.0 0.1.1 1.1.2*0.5"
ATOMS, EDGES, OUT = 4, 7, 9


@pytest.fixture
def graph(with_weights):
    """``graph(after)``: a convolution of x and what ``after(module, out)`` makes of its result."""
    g = torch.Generator().manual_seed(0)
    ends = torch.randint(0, ATOMS, (2, EDGES), generator=g)
    tensors = {f"e{k}": t for k, t in enumerate(gaq.sort_edges(ends[0], ends[1], ATOMS))}
    tensors |= {"sh": torch.randn(EDGES, 4, generator=g), "weight": torch.randn(EDGES, 5, generator=g)}
    numbers = {"four": torch.tensor(4.0), "one_row": torch.tensor([[5.0]]), "zero": torch.zeros(1)}
    numbers |= {"columns": torch.rand(OUT, generator=g) + 1, "deep": torch.full((1, 1, 1), 2.0)}

    def make(after):
        def function(self, x):
            edges = [getattr(self, f"e{k}") for k in range(6)]
            return after(self, gaq.conv.default(x, self.sh, self.weight, edges, SPEC, "conv"))

        return with_weights(function, **tensors, **numbers)

    return make


def _coefficients(gm):
    return [str(conv.args[4]).partition("| ")[2] for conv in calls(gm, gaq.conv.default)]


def _same(gm, after):
    x = torch.randn(ATOMS, 5, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.atleast_1d(gm(x)), torch.atleast_1d(after(x)), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("after", "coefficients"),
    [
        (lambda m, y: aten.div.Tensor(y, m.four), "0.0.0*0.25 0.1.1*0.25 1.1.2*0.125"),
        (lambda m, y: aten.mul.Tensor(m.four, y), "0.0.0*4.0 0.1.1*4.0 1.1.2*2.0"),
        (lambda m, y: aten.mul.Tensor(aten.div.Tensor(y, m.one_row), 5.0), "0.0.0 0.1.1 1.1.2*0.5"),
    ],
    ids=["divided", "multiplied", "both"],
)
def test_a_number_becomes_part_of_the_coefficients(graph, after, coefficients, assert_pure):
    gm = graph(after)
    scaled = assert_pure(scale_convolutions, gm)
    assert _coefficients(gm) == ["0.0.0 0.1.1 1.1.2*0.5"]
    assert _coefficients(scaled) == [coefficients]
    assert not [*calls(scaled, aten.div.Tensor), *calls(scaled, aten.mul.Tensor)]
    _same(gm, scaled)


@pytest.mark.parametrize(
    "after",
    [
        lambda m, y: aten.div.Tensor(m.four, y),
        lambda m, y: aten.div.Tensor(y, m.columns),
        lambda m, y: aten.mul.Tensor(y, y),
        lambda m, y: aten.div.Tensor(y, m.deep),
        lambda m, y: aten.mul.Tensor(y, m.zero),
        lambda m, y: aten.add.Tensor(aten.div.Tensor(y, m.four), y),
        lambda m, y: aten.neg.default(y),
    ],
    ids=["over it", "by column", "by itself", "more axes", "zero", "read twice", "another operator"],
)
def test_everything_else_is_left_alone(graph, after, listing):
    gm = graph(after)
    assert listing(scale_convolutions(gm)) == listing(gm)
