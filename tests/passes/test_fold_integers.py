"""fold_integers: one integer node computes what three float nodes computed."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.config import preset
from gaq_compile.ir.layout import dim, view
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.gradients import fake_quantize_gradient
from gaq_compile.numerics.packing import unpack_int4
from gaq_compile.passes.calibrate import quantization_sites
from gaq_compile.passes.fold_integers import fold_integers
from gaq_compile.passes.insert_mddq import insert_mddq
from gaq_compile.passes.weigh_channels import ChannelCosts
from gaq_compile.passes.widen_activations import widen_activations

gaq = torch.ops.gaq
SPEC = "3x0e+2x1o+2x0e -> 2x0e+3x1o"
STEPS = {"a": torch.tensor([0.02, 0.007, 0.0031, 0.03, 0.0042, 0.01, 0.0027])}


def insert(graph, config):
    sites = quantization_sites(graph, config)
    return insert_mddq(graph, config, widen_activations(sites, STEPS, ChannelCosts(), None))


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
    quantized = insert(graph, preset("w8a8"))
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


def test_a_common_grid_is_folded_too(graph, listing):
    folded = fold_integers(insert(graph, preset("w4a8")))
    assert listing(folded) == [
        "int_irreps_linear_default = gaq.int_irreps_linear(x, a_steps, a_codes, a_scale, b, "
        "'3x0e+2x1o+2x0e -> 2x0e+3x1o', 's8 m8d8 common', 4)",
        "return int_irreps_linear_default",
    ]
    node = next(n for n in folded.graph.nodes if n.op == "call_function")
    assert node.meta["bits"] == "s8 m8d8 common · s4"


SCHEMES = ["w8a8", "w4a8", "naive-w8a8", "exact-w8a8", "exact-w4a8", "w8a16", "w4a16", "w8", "w4", "fp32"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_values(graph, x, scheme, assert_pure, listing):
    quantized = insert(graph, preset(scheme))
    folded = assert_pure(fold_integers, quantized)
    assert torch.equal(folded(x), quantized(x))
    assert listing(fold_integers(folded)) == listing(folded)


def _transposed(with_weights, scheme):
    """The gradient's product with a layer's integer weights, as derive_forces leaves it."""
    torch.manual_seed(1)
    forward = with_weights(
        lambda self, x: gaq.irreps_linear.default(x, self.w, None, SPEC, False, "a"), w=torch.randn(16)
    )
    quantized = insert(forward, preset(scheme))
    node = next(n for n in quantized.graph.nodes if n.target is gaq.irreps_linear.default)
    node.args = (quantized.graph.find_nodes(op="placeholder")[0], *node.args[1:4], True, "a")
    quantized.recompile()
    folded = fold_integers(quantized)
    (call,) = (n for n in folded.graph.nodes if n.op == "call_function")
    assert call.target is gaq.int_irreps_linear.default and call.args[8] is True
    held = preset(scheme).weight_bits == 8 and preset(scheme).activation is not None
    assert (call.args[1].target == "a_steps") if held else (call.args[1] is None)
    return quantized, folded, call


GRAD = torch.randn(6, 11, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scheme", ["w8", "w4", "exact-w8a8", "exact-w4a8"])
def test_transposed_product_stays_float(with_weights, scheme):
    """The gradient of schemes that are exactly equivariant or conservative is not rounded."""
    quantized, folded, call = _transposed(with_weights, scheme)
    assert call.args[6] == "f32"
    assert torch.equal(folded(GRAD), quantized(GRAD))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "naive-w8a8", "w8a16"])
def test_transposed_product_rounds_the_gradient(with_weights, scheme):
    """To 16 bits, times the scales of the weights; what comes out is divided by the steps they hold."""
    quantized, folded, call = _transposed(with_weights, scheme)
    assert call.args[6] == "g16" and folded.a_scale is not None
    spec, bits = linear_spec(SPEC), preset(scheme).weight_bits
    codes = unpack_int4(folded.a_codes, spec.weight_numel) if bits == 4 else folded.a_codes
    want = torch.zeros(6, dim(spec.irreps_in), dtype=torch.float64)
    for path in spec.paths:
        a, b = path.block_in, path.block_out
        scale = folded.a_scale[path.scale_offset : path.scale_offset + b.mul]
        rows = fake_quantize_gradient(view(GRAD, b) * scale).double()
        matrix = codes[path.offset : path.offset + path.numel].view(a.mul, b.mul).double()
        steps = STEPS["a"][a.channel : a.channel + a.mul] if bits == 8 else torch.ones(a.mul)
        view(want, a).add_(rows @ matrix.T / steps.double())
    torch.testing.assert_close(folded(GRAD).double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    plain = quantized(GRAD)
    torch.testing.assert_close(folded(GRAD), plain, rtol=0, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "exact-w8a8", "w8"])
def test_gradients_are_those_of_the_float_layer(graph, x, scheme):
    """Up to the rounding of weights, where nothing is clipped: held steps are taken out again."""
    quantized, grad = insert(graph, preset(scheme)), GRAD[:1].expand(40, -1)
    leaves = [(0.05 * x).requires_grad_(True) for _ in range(2)]
    (got,) = torch.autograd.grad(quantized(leaves[0]), leaves[0], grad)
    (plain,) = torch.autograd.grad(graph(leaves[1]), leaves[1], grad)
    scalars = [0, 1, 2, 9, 10]  # the gradient of vectors bends with their rounded magnitudes
    largest = float(plain[:, scalars].abs().max())
    tolerance = (0.02 if scheme[1] == "8" else 0.2) * largest
    torch.testing.assert_close(got[:, scalars], plain[:, scalars], rtol=0, atol=tolerance)


def test_a_rounded_input_with_other_readers_keeps_them(graph, x):
    quantized = insert(graph, preset("w8a8"))
    rounded = next(n for n in quantized.graph.nodes if n.target is gaq.mddq.default)
    output = quantized.graph.output_node()
    output.args = ((output.args[0], rounded),)
    quantized.recompile()
    folded = fold_integers(quantized)
    for a, b in zip(folded(x), quantized(x), strict=True):
        assert torch.equal(a, b)


def test_float_layers_stay(graph, listing):
    assert listing(fold_integers(graph)) == listing(graph)
