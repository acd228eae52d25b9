"""insert_mddq: integer weights and rounded activations, exactly where the configuration asks."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.config import activation_scheme, preset, resolve
from gaq_compile.errors import ConfigError
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.activations import fake_quantize
from gaq_compile.numerics.packing import unpack_int4
from gaq_compile.numerics.weights import dequantize_weight, quantize_weight, with_steps
from gaq_compile.passes.calibrate import quantization_sites
from gaq_compile.passes.graph_tools import calls, is_call
from gaq_compile.passes.insert_mddq import insert_mddq
from gaq_compile.passes.round_weights import round_weights
from gaq_compile.passes.weigh_channels import ChannelCosts
from gaq_compile.passes.widen_activations import widen_activations

gaq, aten = torch.ops.gaq, torch.ops.aten
SPEC = "3x0e+2x1o -> 2x0e+3x1o"
STEPS = {
    "layer.a": torch.tensor([0.02, 0.011, 0.003, 0.03, 0.0047]),
    "layer.b": torch.tensor([0.05, 0.0061, 0.04, 0.008, 0.023]),
}


def insert(graph, config, steps=STEPS):
    """insert_mddq with given steps for all that the configuration rounds."""
    sites = quantization_sites(graph, config)
    return insert_mddq(graph, config, widen_activations(sites, steps, ChannelCosts(), None))


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
    after = insert(graph, preset("w8a8"))
    assert listing(after) == [
        "mddq_default = gaq.mddq(x, layer_a_steps, '3x0e+2x1o', 's8 m8d8')",
        "decode_weight_default = gaq.decode_weight(layer_a_codes, layer_a_scale, layer_a_steps, 8, "
        "'3x0e+2x1o -> 2x0e+3x1o')",
        "irreps_linear_default = gaq.irreps_linear(mddq_default, decode_weight_default, b, "
        "'3x0e+2x1o -> 2x0e+3x1o')",
        "mddq_default_1 = gaq.mddq(irreps_linear_default, layer_b_steps, '2x0e+3x1o', 's8 m8d8')",
        "decode_weight_default_1 = gaq.decode_weight(layer_b_codes, layer_b_scale, layer_b_steps, 8, "
        "'2x0e+3x1o -> 1x0e')",
        "irreps_linear_default_1 = gaq.irreps_linear(mddq_default_1, decode_weight_default_1, "
        "'2x0e+3x1o -> 1x0e')",
        "return irreps_linear_default_1",
    ]
    assert after.layer_a_codes.dtype == torch.int8 and torch.equal(after.layer_a_steps, STEPS["layer.a"])


def test_four_bit_weights_meet_a_common_grid(graph, listing):
    after = insert(graph, resolve("w4a8", {"layer.b": "w8a8"}))
    lines = listing(after)
    assert lines[0] == "mddq_default = gaq.mddq(x, layer_a_steps, '3x0e+2x1o', 's8 m8d8 common')"
    assert lines[1].endswith("gaq.decode_weight(layer_a_codes, layer_a_scale, 4, '3x0e+2x1o -> 2x0e+3x1o')")
    assert lines[3].endswith("gaq.mddq(irreps_linear_default, layer_b_steps, '2x0e+3x1o', 's8 m8d8')")
    assert "layer_b_scale, layer_b_steps, 8" in lines[4]
    schemes = [n.meta["bits"] for n in after.graph.nodes if n.target is gaq.mddq.default]
    assert schemes == ["s8 m8d8 common", "s8 m8d8"]
    decoded = [n.args for n in after.graph.nodes if n.target is gaq.decode_weight.default]
    assert decoded[0][2] is None and decoded[1][2].target == "layer_b_steps"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "naive-w8a8", "exact-w4a8", "w8a16", "w4a16", "w8", "w4"])
def test_values(graph, assert_pure, x, scheme):
    """The graph computes what numerics says, layer by layer, in every scheme."""
    config = preset(scheme)
    after = assert_pure(lambda g: insert(g, config), graph)
    y = x
    for weight, bias, text, label in ((graph.w, graph.b, SPEC, "layer.a"), (graph.v, None, None, "layer.b")):
        spec = linear_spec(text or "2x0e+3x1o -> 1x0e")
        held = None
        if config.activation is not None:
            end = " common" if config.weight_bits == 4 else ""
            y = fake_quantize(y, STEPS[label], spec.irreps_in, activation_scheme(config.activation + end))
            held = None if end else STEPS[label]
        meant = weight if held is None else with_steps(weight, spec, held)
        rounded = dequantize_weight(*quantize_weight(meant, spec, config.weight_bits), spec, held)
        y = gaq.irreps_linear(y, rounded, bias, str(spec), False, "")
    assert torch.equal(after(x), y)
    if config.weight_bits == 8:
        torch.testing.assert_close(y, graph(x), rtol=0.0, atol=0.35)


@pytest.mark.parametrize("scheme", ["w8a8", "naive-w8a8", "exact-w8a8"])
def test_weights_that_hold_no_steps_meet_a_common_grid_whatever_their_bits(graph, listing, x, scheme):
    """As they are where they were rounded without any activations in mind."""
    config = preset(scheme)
    sites = widen_activations(quantization_sites(graph, config), STEPS, ChannelCosts(), None)
    weights = round_weights(graph, config, ChannelCosts())
    after = insert_mddq(graph, config, sites, weights)
    assert sum(f"'{config.activation} common'" in line for line in listing(after)) == 2
    spec = linear_spec(SPEC)
    scheme = activation_scheme(f"{config.activation} common")
    assert after.layer_a_codes.equal(quantize_weight(graph.w, spec, 8)[0])
    rounded = dequantize_weight(weights["layer.a"].codes, weights["layer.a"].scale, spec)
    y = gaq.irreps_linear(
        fake_quantize(x, STEPS["layer.a"], spec.irreps_in, scheme), rounded, graph.b, SPEC, False, ""
    )
    first = next(n for n in after.graph.nodes if n.target is gaq.irreps_linear.default)
    after.graph.output_node().args = (first,)
    after.recompile()
    assert torch.equal(after(x), y)


def test_four_bits_are_stored_packed(graph):
    after = insert(graph, preset("w4"))
    assert after.layer_a_codes.dtype == torch.uint8 and after.layer_a_codes.numel() == 6
    codes, _ = quantize_weight(graph.w, linear_spec(SPEC), 4)
    assert torch.equal(unpack_int4(after.layer_a_codes, 12), codes) and codes.abs().max() <= 7


def test_fp32_changes_nothing(graph, listing):
    assert listing(insert_mddq(graph, preset("fp32"), {})) == listing(graph)


def test_overrides(graph, listing):
    lines = listing(insert(graph, resolve("w8", {"layer.b": "fp32"})))
    assert sum("decode_weight" in line.split("=")[0] for line in lines) == 1 and "layer_a_codes" in lines[0]


def test_missing_steps_are_not_guessed(graph, listing):
    """A site without steps stays in float, and weights that hold some need them."""
    config, sites = preset("w8a8"), quantization_sites(graph, preset("w8a8"))
    all_, some = (widen_activations(s, STEPS, ChannelCosts(), None) for s in (sites, sites[:1]))
    after = insert_mddq(graph, config, some)
    assert sum("gaq.mddq" in line for line in listing(after)) == 1
    weights = round_weights(graph, config, ChannelCosts(), all_)
    with pytest.raises(ConfigError, match="not rounded"):
        insert_mddq(graph, config, some, weights)


def test_other_readers_of_an_input_stay_in_float(with_weights, x):
    """Only the layer reads rounded numbers: a residual connection keeps its digits."""

    def function(self, x):
        return aten.add.Tensor(
            gaq.irreps_linear.default(x, self.w, None, "9x0e -> 9x0e", False, "layer.a"), x
        )

    steps = {"layer.a": torch.linspace(0.1, 0.5, 9)}
    after = insert(with_weights(function, w=torch.zeros(81)), preset("w8a8"), steps)
    assert torch.equal(after(x), x)


def test_weights_computed_at_run_time_stay(with_weights, x):
    def function(self, x):
        w = aten.mul.Tensor(aten.sum.dim_IntList(x, [0]), self.w)
        return gaq.irreps_linear.default(x, w, None, "9x0e -> 1x0e", False, "layer.a")

    graph = with_weights(function, w=torch.randn(9))
    assert torch.equal(insert_mddq(graph, preset("w8"), {})(x), graph(x))


def test_float_weights_meet_steps_that_nothing_holds(with_weights, listing, x):
    """Where weights are computed at run time, activations keep a step per channel all the same."""

    def function(self, x):
        w = aten.mul.Tensor(aten.sum.dim_IntList(x, [0]), self.w)
        return gaq.irreps_linear.default(x, w, None, "9x0e -> 1x0e", False, "layer.a")

    graph = with_weights(function, w=torch.randn(9))
    steps = torch.linspace(0.01, 0.09, 9)
    after = insert(graph, preset("w4a8"), {"layer.a": steps})
    assert any("'9x0e', 's8 m8d8')" in line for line in listing(after))
    rounded = fake_quantize(x, steps, "9x0e", activation_scheme("s8 m8d8"))
    expected = gaq.irreps_linear(rounded, x.sum(0) * graph.w, None, "9x0e -> 1x0e", False, "")
    assert torch.equal(after(x), expected)


@pytest.mark.parametrize(
    ("scheme", "rounded"),
    [("w8a8", True), ("w4a8", True), ("exact-w8a8", True), ("w8a16", False), ("w8", False), ("fp32", False)],
)
def test_radial_weights_are_halves_where_activations_have_few_bits(with_weights, scheme, rounded):
    def function(self, x):
        weight = gaq.irreps_linear.default(x, self.w, None, "3x0e -> 2x0e", False, "layer.a")
        return gaq.conv.default(self.x, self.sh, weight, [], "2x0e * 1x0e -> 2x0e | 0.0.0", "conv")

    torch.manual_seed(1)
    graph = with_weights(function, w=torch.randn(6), x=torch.randn(4, 2), sh=torch.randn(5, 1))
    after = insert(graph, preset(scheme), {"layer.a": torch.tensor([0.02, 0.011, 0.003])})
    conv = next(calls(after, gaq.conv.default))
    assert (conv.args[2].target is gaq.round_half.default) == rounded
    assert is_call(conv.args[2].args[0] if rounded else conv.args[2], gaq.irreps_linear.default)
