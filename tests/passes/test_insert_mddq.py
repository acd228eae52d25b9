"""insert_mddq: integer weights and rounded activations, exactly where the configuration asks."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.config import activation_scheme, preset, resolve
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.activations import fake_quantize
from gaq_compile.numerics.packing import unpack_int4
from gaq_compile.numerics.weights import dequantize_weight, quantize_weight
from gaq_compile.passes.insert_mddq import insert_mddq

gaq, aten = torch.ops.gaq, torch.ops.aten
SPEC = "3x0e+2x1o -> 2x0e+3x1o"
STEPS = {"layer.a": torch.tensor([0.02, 0.03]), "layer.b": torch.tensor([0.05, 0.05])}


@pytest.fixture
def graph(with_weights):
    def function(self, x):
        y = gaq.irreps_linear.default(x, self.w, self.b, SPEC, False, "layer.a")
        return gaq.irreps_linear.default(y, self.v, None, "2x0e+3x1o -> 1x0e", False, "layer.b")

    torch.manual_seed(1)
    return with_weights(function, w=torch.randn(12), v=torch.randn(2), b=torch.randn(2))


@pytest.fixture
def x():
    return torch.randn(5, 9, generator=torch.Generator().manual_seed(2))


def test_before_and_after(graph, listing, x):
    assert listing(graph)[0] == "irreps_linear_default = gaq.irreps_linear(x, w, b, '3x0e+2x1o -> 2x0e+3x1o')"
    after = insert_mddq(graph, preset("w8a8"), STEPS)
    assert listing(after) == [
        "mddq_default = gaq.mddq(x, layer_a_steps, '3x0e+2x1o', 's8 m8d8')",
        "decode_weight_default = gaq.decode_weight(layer_a_codes, layer_a_scale, 8, "
        "'3x0e+2x1o -> 2x0e+3x1o')",
        "irreps_linear_default = gaq.irreps_linear(mddq_default, decode_weight_default, b, "
        "'3x0e+2x1o -> 2x0e+3x1o')",
        "mddq_default_1 = gaq.mddq(irreps_linear_default, layer_b_steps, '2x0e+3x1o', 's8 m8d8')",
        "decode_weight_default_1 = gaq.decode_weight(layer_b_codes, layer_b_scale, 8, '2x0e+3x1o -> 1x0e')",
        "irreps_linear_default_1 = gaq.irreps_linear(mddq_default_1, decode_weight_default_1, "
        "'2x0e+3x1o -> 1x0e')",
        "return irreps_linear_default_1",
    ]
    assert after.layer_a_codes.dtype == torch.int8 and torch.equal(after.layer_a_steps, STEPS["layer.a"])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "naive-w8a8", "exact-w4a8", "w8a16", "w8", "w4"])
def test_values(graph, assert_pure, x, scheme):
    """The graph computes what numerics says, layer by layer, in every scheme."""
    config = preset(scheme)
    after = assert_pure(lambda g: insert_mddq(g, config, STEPS), graph)
    y = x
    for weight, bias, text, label in ((graph.w, graph.b, SPEC, "layer.a"), (graph.v, None, None, "layer.b")):
        spec = linear_spec(text or "2x0e+3x1o -> 1x0e")
        if config.activation is not None:
            y = fake_quantize(y, STEPS[label], spec.irreps_in, activation_scheme(config.activation))
        rounded = dequantize_weight(*quantize_weight(weight, spec, config.weight_bits), spec)
        y = gaq.irreps_linear(y, rounded, bias, str(spec), False, "")
    assert torch.equal(after(x), y)


def test_four_bits_are_stored_packed(graph):
    after = insert_mddq(graph, preset("w4"), {})
    assert after.layer_a_codes.dtype == torch.uint8 and after.layer_a_codes.numel() == 6
    codes, _ = quantize_weight(graph.w, linear_spec(SPEC), 4)
    assert torch.equal(unpack_int4(after.layer_a_codes, 12), codes) and codes.abs().max() <= 7


def test_fp32_changes_nothing(graph, listing):
    assert listing(insert_mddq(graph, preset("fp32"), {})) == listing(graph)


def test_overrides(graph, listing):
    lines = listing(insert_mddq(graph, resolve("w8", {"layer.b": "fp32"}), STEPS))
    assert sum("decode_weight" in line.split("=")[0] for line in lines) == 1 and "layer_a_codes" in lines[0]


def test_missing_steps_are_not_guessed(graph):
    with pytest.raises(KeyError):
        insert_mddq(graph, preset("w8a8"), {"layer.a": STEPS["layer.a"]})


def test_other_readers_of_an_input_stay_in_float(with_weights, x):
    """Only the layer reads rounded numbers: a residual connection keeps its digits."""

    def function(self, x):
        return aten.add.Tensor(
            gaq.irreps_linear.default(x, self.w, None, "9x0e -> 9x0e", False, "layer.a"), x
        )

    after = insert_mddq(
        with_weights(function, w=torch.zeros(81)), preset("w8a8"), {"layer.a": torch.tensor([0.5])}
    )
    assert torch.equal(after(x), x)


def test_weights_computed_at_run_time_stay(with_weights, x):
    def function(self, x):
        w = aten.mul.Tensor(aten.sum.dim_IntList(x, [0]), self.w)
        return gaq.irreps_linear.default(x, w, None, "9x0e -> 1x0e", False, "layer.a")

    graph = with_weights(function, w=torch.randn(9))
    assert torch.equal(insert_mddq(graph, preset("w8"), {})(x), graph(x))
