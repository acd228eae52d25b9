"""fold_integers: one integer node computes what three float nodes computed."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.config import preset
from gaq_compile.passes.fold_integers import fold_integers
from gaq_compile.passes.insert_mddq import insert_mddq

gaq = torch.ops.gaq
SPEC = "3x0e+2x1o+2x0e -> 2x0e+3x1o"
STEPS = {"a": torch.tensor([0.02, 0.03, 0.01])}


@pytest.fixture
def graph(with_weights):
    def function(self, x):
        return gaq.irreps_linear.default(x, self.w, self.b, SPEC, False, "a")

    torch.manual_seed(1)
    return with_weights(function, w=torch.randn(16), b=torch.randn(2))


@pytest.fixture
def x():
    return torch.randn(40, 11, generator=torch.Generator().manual_seed(2))


def test_before_and_after(graph, listing):
    quantized = insert_mddq(graph, preset("w8a8"), STEPS)
    assert [line.split("gaq.")[1].split("(")[0] for line in listing(quantized)[:-1]] == [
        "mddq",
        "decode_weight",
        "irreps_linear",
    ]
    folded = fold_integers(quantized)
    assert listing(folded) == [
        "int_irreps_linear_default = gaq.int_irreps_linear(x, a_steps, a_codes, a_scale, b, "
        "'3x0e+2x1o+2x0e -> 2x0e+3x1o', 's8 m8d8', 8)",
        "return int_irreps_linear_default",
    ]
    node = next(n for n in folded.graph.nodes if n.op == "call_function")
    assert node.meta["bits"] == "s8 m8d8 · s8" and node.args[-1] == "a"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "naive-w8a8", "exact-w8a8", "w8a16", "w8", "w4", "fp32"])
def test_same_values(graph, x, scheme, assert_pure, listing):
    quantized = insert_mddq(graph, preset(scheme), STEPS)
    folded = assert_pure(fold_integers, quantized)
    assert torch.equal(folded(x), quantized(x))
    assert listing(fold_integers(folded)) == listing(folded)


@pytest.mark.parametrize("scheme", ["w8", "w4", "exact-w8a8", "exact-w4a8"])
def test_transposed_product_stays_float(with_weights, scheme):
    """The gradient of schemes that are exactly equivariant or conservative is not rounded."""

    def function(self, grad):
        return gaq.irreps_linear.default(grad, self.w, None, SPEC, True, "a")

    torch.manual_seed(1)
    forward = with_weights(
        lambda self, x: gaq.irreps_linear.default(x, self.w, None, SPEC, False, "a"), w=torch.randn(16)
    )
    quantized = insert_mddq(forward, preset(scheme), STEPS)
    node = next(n for n in quantized.graph.nodes if n.target is gaq.irreps_linear.default)
    node.args = (quantized.graph.find_nodes(op="placeholder")[0], *node.args[1:4], True, "a")
    quantized.recompile()
    grad = torch.randn(6, 11, generator=torch.Generator().manual_seed(3))
    folded = fold_integers(quantized)
    (call,) = (n for n in folded.graph.nodes if n.op == "call_function")
    assert call.target is gaq.int_irreps_linear.default and call.args[6] == "f32" and call.args[8] is True
    assert torch.equal(folded(grad), quantized(grad))


def test_a_rounded_input_with_other_readers_keeps_them(graph, x):
    quantized = insert_mddq(graph, preset("w8a8"), STEPS)
    rounded = next(n for n in quantized.graph.nodes if n.target is gaq.mddq.default)
    output = quantized.graph.output_node()
    output.args = ((output.args[0], rounded),)
    quantized.recompile()
    folded = fold_integers(quantized)
    for a, b in zip(folded(x), quantized(x), strict=True):
        assert torch.equal(a, b)


def test_float_layers_stay(graph, listing):
    assert listing(fold_integers(graph)) == listing(graph)
