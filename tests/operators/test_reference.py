"""The meaning of every operator against e3nn's modules in float64, and gradients against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from e3nn import nn as enn
from e3nn import o3
from torch import nn

from gaq_compile.capture.modules import (
    convert_gate,
    convert_linear,
    convert_radial,
    convert_spherical_harmonics,
    convert_tensor_product,
)
from gaq_compile.ir.layout import dim
from gaq_compile.ir.specs import gate_spec, in_half, linear_spec, tensor_product_spec
from gaq_compile.numerics.activations import activation_scheme, fake_quantize, fake_quantize_backward
from gaq_compile.numerics.gradients import fake_quantize_gradient
from gaq_compile.numerics.packing import pack_int4
from gaq_compile.operators import activations, reference
from gaq_compile.operators.registration import ops

SILU = nn.functional.silu


@pytest.fixture(autouse=True)
def _float64():
    """e3nn rounds its Wigner symbols to the default type when a module is made."""
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _same(ours: nn.Module | None, theirs: nn.Module, *inputs: torch.Tensor) -> None:
    """Equal values, and equal gradients with respect to every input."""
    assert ours is not None
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    expected, got = theirs(*leaves), ours(*leaves)
    assert got.dtype == torch.float64 and got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(expected)
    true = torch.autograd.grad(expected, leaves, grad)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), true, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


LINEARS = [
    ("8x0e", "5x0e", {}),
    ("4x0e+3x1o+2x2e", "5x0e+2x1o+6x2e", {}),
    ("4x0e+3x1o+2x0e+1x1o", "2x1o+5x0e+3x1o+1x0e", {}),  # repeated, unsorted
    ("2x0e+3x0e+2x1e+2x1o+1x1o", "4x0e+3x1e+2x1o", {}),  # neighbours that merge
    ("4x0e+2x1o", "3x0e+2x2e+2x1o", {}),  # an output that nothing reaches
    ("4x0e+2x0o+2x1o", "3x0e+2x1o+2x0e", {"biases": True}),
    ("0x0e+4x0e+3x1o", "2x0e+0x1o+3x1o", {}),
    ("4x0e+3x1o", "2x0e+3x1o+2x0e", {"path_normalization": "path"}),
    ("4x0e+3x1o+2x0e", "5x0e+3x1o", {"instructions": [(2, 0), (1, 1)]}),
]


@pytest.mark.parametrize(("irreps_in", "irreps_out", "options"), LINEARS)
def test_linear(irreps_in, irreps_out, options):
    theirs = o3.Linear(irreps_in, irreps_out, **options).double()
    if options.get("biases"):
        theirs.bias.data.normal_()
    _same(convert_linear(theirs, "linear"), theirs, torch.randn(6, theirs.irreps_in.dim, dtype=torch.float64))


def test_linear_with_weights_from_outside_stays():
    outside = o3.Linear("4x0e", "4x0e", internal_weights=False, shared_weights=False)
    assert convert_linear(outside, "linear") is None


def test_linear_with_some_biases_stays():
    assert convert_linear(o3.Linear("4x0e", "2x0e+3x0e", biases=[True, False]), "linear") is None


def test_linear_on_more_axes():
    theirs = o3.Linear("2x0e+3x1o", "4x1o").double()
    _same(convert_linear(theirs, "linear"), theirs, torch.randn(2, 5, 11, dtype=torch.float64))


X, SH = "4x0e+3x1o+2x2e", "1x0e+1x1o+1x2e"
PRODUCTS = {
    "sorted": ("4x0e+4x1o+4x2e", [(0, 0, 0, "uvu", True), (0, 1, 1, "uvu", True), (0, 2, 2, "uvu", True)]),
    "unsorted": (
        "3x1o+4x2e+3x0e+2x2e+3x2e+4x1o",
        [
            (0, 2, 1, "uvu", True, 0.3),
            (1, 0, 0, "uvu", True),
            (1, 1, 2, "uvu", True, 2.0),
            (2, 2, 3, "uvu", True),
            (1, 1, 4, "uvu", True),
            (0, 1, 5, "uvu", True),
        ],
    ),
    "one output for two paths": ("3x1o", [(1, 0, 0, "uvu", True), (1, 2, 0, "uvu", True, 0.7)]),
    "odd pseudo": ("3x1e+3x2o", [(1, 1, 0, "uvu", True), (1, 2, 1, "uvu", True)]),
}


@pytest.mark.parametrize("normalization", ["component", "norm"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_tensor_product(name, normalization):
    out, instructions = PRODUCTS[name]
    theirs = o3.TensorProduct(
        X,
        SH,
        out,
        instructions,
        shared_weights=False,
        internal_weights=False,
        irrep_normalization=normalization,
    ).double()
    ours = convert_tensor_product(theirs, "tp")
    shapes = (theirs.irreps_in1.dim, theirs.irreps_in2.dim, theirs.weight_numel)
    _same(ours, theirs, *(torch.randn(5, n, dtype=torch.float64) for n in shapes))


def test_tensor_product_with_equal_neighbours_in_sh():
    theirs = o3.TensorProduct(
        "2x0e", "1x1o+1x1o", "2x1o+2x1o", [(0, 0, 0, "uvu", True), (0, 1, 1, "uvu", True)],
        shared_weights=False, internal_weights=False,
    ).double()  # fmt: skip
    ours = convert_tensor_product(theirs, "tp") or theirs
    _same(ours, theirs, *(torch.randn(5, n, dtype=torch.float64) for n in (2, 6, 4)))


@pytest.mark.parametrize(
    ("irreps", "mode", "options"),
    [
        (("4x0e", "1x0e", "4x0e"), "uvw", {}),
        (("4x0e", "1x0e", "4x0e"), "uvu", {"internal_weights": True, "shared_weights": True}),
        (("4x0e", "2x0e", "4x0e"), "uvu", {}),
    ],
)
def test_tensor_product_that_is_not_understood(irreps, mode, options):
    settings = {"internal_weights": False, "shared_weights": False, **options}
    assert (
        convert_tensor_product(o3.TensorProduct(*irreps, [(0, 0, 0, mode, True)], **settings), "tp") is None
    )


def test_tensor_product_without_weights_stays():
    assert convert_tensor_product(o3.ElementwiseTensorProduct("3x1o", "3x0e"), "tp") is None
    plain = o3.TensorProduct("3x1o", "1x0e", "3x1o", [(0, 0, 0, "uvu", False)])
    assert convert_tensor_product(plain, "tp") is None


GATES = [
    ("6x0e", [SILU], "5x0e", [torch.sigmoid], "3x1o+2x2e"),
    ("6x0e", [torch.tanh], "3x0e+2x0e", [torch.sigmoid, torch.tanh], "3x1o+2x2e"),
    ("4x0e", [nn.functional.relu], "6x0e", [SILU], "2x1o+2x1e+2x2e"),
    ("4x0e+3x0e", [SILU, SILU], "2x0e", [torch.sigmoid], "2x1o"),
]


@pytest.mark.parametrize("arguments", GATES, ids=range(len(GATES)))
def test_gate(arguments):
    theirs = enn.Gate(*arguments).double()
    ours = convert_gate(theirs, "gate") or theirs
    _same(ours, theirs, torch.randn(7, theirs.irreps_in.dim, dtype=torch.float64))


def test_gate_that_is_not_understood():
    unsorted = enn.Gate("4x0e", [SILU], "4x0e", [torch.sigmoid], "2x1e+2x1o")
    odd = enn.Gate("4x0o", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o")
    softplus = enn.Gate("4x0e", [nn.functional.softplus], "2x0e", [torch.sigmoid], "2x1o")
    assert all(convert_gate(gate, "gate") is None for gate in (unsorted, odd, softplus))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("normalization", ["norm", "component", "integral"])
def test_spherical_harmonics_module(normalize, normalization):
    theirs = o3.SphericalHarmonics("1x0e+1x1o+1x2e+1x3o", normalize, normalization).double()
    ours = convert_spherical_harmonics(theirs, "sh")
    _same(ours, theirs, torch.randn(9, 3, dtype=torch.float64))


class ShiftedSoftPlus(nn.Module):
    """As the model packages define it."""

    def forward(self, x):
        return nn.functional.softplus(x) - torch.log(torch.tensor(2.0, dtype=x.dtype))


ACTIVATIONS = {
    "silu": SILU,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": nn.functional.relu,
    "ssp": ShiftedSoftPlus(),
    "SiLU": nn.SiLU(),
    "Tanh": nn.Tanh(),
    "none": None,
}


@pytest.mark.parametrize("out_act", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fully_connected_net(name, out_act):
    act = ACTIVATIONS[name]
    options = {"out_act": out_act} if act is not None else {}
    theirs = enn.FullyConnectedNet([5, 7, 6, 4], act, variance_in=2, variance_out=3, **options).double()
    _same(convert_radial(theirs, "net"), theirs, torch.randn(8, 5, dtype=torch.float64))


def test_fully_connected_net_that_is_not_understood():
    assert convert_radial(enn.FullyConnectedNet([5, 7, 4], nn.functional.gelu), "net") is None


# --- backward operators against autograd through the forward ------------------------------------------


def _double(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _close(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


LINEAR = "2x0e+3x1o+2x1o+1x0e -> 4x1o+2x0e+1x1o"
PRODUCT = (
    "3x0e+2x1o * 1x0e+1x1o+1x2e -> 2x1o+3x1o+2x0e+2x2e+2x1o | 1.0.0*0.5 0.1.1 1.1.2 1.1.3*2.0 1.2.4*-0.3"
)


@pytest.mark.parametrize("transpose", [False, True])
def test_linear_is_adjoint_to_its_transpose(transpose):
    spec = linear_spec(LINEAR)
    widths = [dim(spec.irreps_in), dim(spec.irreps_out)]
    n_in, n_out = reversed(widths) if transpose else widths
    x, grad = _double((4, n_in), (4, n_out))
    weight = torch.randn(spec.weight_numel, dtype=torch.float64)
    y = reference.irreps_linear(x, weight, None, LINEAR, transpose)
    _close(
        [reference.irreps_linear(grad, weight, None, LINEAR, not transpose)], torch.autograd.grad(y, x, grad)
    )
    assert torch.autograd.gradcheck(lambda v: ops.irreps_linear(v, weight, None, LINEAR, transpose, "l"), x)


def test_linear_bias():
    spec = linear_spec("2x0e+2x1o -> 2x0e+1x1o+3x0e")
    weight, bias = torch.zeros(spec.weight_numel), torch.arange(1.0, 6.0)
    y = reference.irreps_linear(torch.randn(2, 8), weight, bias, str(spec), False)
    assert torch.equal(y[0], torch.tensor([1.0, 2, 0, 0, 0, 3, 4, 5]))


def test_linear_weight_gradient_is_not_dropped():
    x, weight = torch.randn(4, 3), torch.randn(6, requires_grad=True)
    y = ops.irreps_linear(x, weight, None, "3x0e -> 2x0e", False, "l")
    (got,) = torch.autograd.grad(y.sum(), weight, allow_unused=True)
    assert got is not None and torch.allclose(got, x.sum(0)[:, None].expand(3, 2).flatten())


def test_tensor_product_backward():
    spec = tensor_product_spec(PRODUCT)
    widths = [dim(spec.irreps_x), dim(spec.irreps_sh), spec.weight_numel]
    x, sh, weight, grad = _double(*((5, n) for n in (*widths, dim(spec.irreps_out))))
    y = reference.tensor_product(x, sh, weight, PRODUCT)
    expected = torch.autograd.grad(y, (x, sh, weight), grad)
    _close(reference.tensor_product_backward(grad, x, sh, weight, PRODUCT), expected)
    inputs = [t.detach()[:2].requires_grad_(True) for t in (x, sh, weight)]
    assert torch.autograd.gradcheck(lambda *t: ops.tensor_product(*t, PRODUCT, "tp"), inputs)


SENDERS = torch.tensor([1, 0, 3, 3, 0, 1, 1])
RECEIVERS = torch.tensor([0, 1, 0, 0, 3, 0, 3])  # unsorted; atom 2 has no edge, an edge occurs twice


def test_conv_is_gather_product_scatter():
    spec = tensor_product_spec(PRODUCT)
    edges = reference.sort_edges(SENDERS, RECEIVERS, 4)
    x, sh, weight = _double((4, dim(spec.irreps_x)), (7, dim(spec.irreps_sh)), (7, spec.weight_numel))
    messages = reference.tensor_product(x[SENDERS], sh, weight, PRODUCT)
    expected = torch.zeros(4, messages.shape[1], dtype=torch.float64).index_add(0, RECEIVERS, messages)
    _close([reference.conv(x, sh, weight, edges, PRODUCT)], [expected])
    assert expected[2].abs().max() == 0
    grad = torch.randn_like(expected)
    true = torch.autograd.grad(expected, (x, sh, weight), grad)
    _close(reference.conv_backward(grad, x, sh, weight, edges, PRODUCT), true)
    through = torch.autograd.grad(ops.conv(x, sh, weight, edges, PRODUCT, "c"), (x, sh, weight), grad)
    _close(through, true)


def test_weights_of_bonds_have_the_gradient_of_both_edges():
    spec = tensor_product_spec(PRODUCT)
    senders, receivers = torch.cat([SENDERS, RECEIVERS]), torch.cat([RECEIVERS, SENDERS])
    edges = reference.sort_edges(senders, receivers, 4)
    x, sh, weight = _double((4, dim(spec.irreps_x)), (14, dim(spec.irreps_sh)), (7, spec.weight_numel))
    out = reference.conv(x, sh, weight.repeat(2, 1), edges, PRODUCT)
    grad = torch.randn_like(out)
    true = torch.autograd.grad(out, (x, sh, weight), grad)
    _close([reference.conv(x, sh, weight, edges, PRODUCT)], [out])
    _close(reference.conv_backward(grad, x, sh, weight, edges, PRODUCT), true)
    through = torch.autograd.grad(ops.conv(x, sh, weight, edges, PRODUCT, "c"), (x, sh, weight), grad)
    _close(through, true)


def test_conv_without_edges():
    spec = tensor_product_spec(PRODUCT)
    none = torch.zeros(0, dtype=torch.int64)
    edges = reference.sort_edges(none, none, 3)
    x, sh, weight = torch.randn(3, dim(spec.irreps_x)), torch.zeros(0, 9), torch.zeros(0, spec.weight_numel)
    out = reference.conv(x, sh, weight, edges, PRODUCT)
    assert out.shape == (3, dim(spec.irreps_out)) and out.abs().max() == 0
    gx, gsh, gw = reference.conv_backward(torch.ones_like(out), x, sh, weight, edges, PRODUCT)
    assert gx.abs().max() == 0 and gsh.shape == sh.shape and gw.shape == weight.shape


def test_sort_edges_is_a_stable_order():
    senders, receivers, rptr, rorder, sptr, sorder = reference.sort_edges(SENDERS, RECEIVERS, 4)
    assert all(t.dtype == torch.int32 for t in (senders, receivers, rptr, rorder, sptr, sorder))
    for index, pointer, order in ((RECEIVERS, rptr, rorder), (SENDERS, sptr, sorder)):
        for node in range(4):
            mine = order[pointer[node] : pointer[node + 1]].tolist()
            assert mine == torch.nonzero(index == node).flatten().tolist()


GATE_SPECS = [
    "3x0e ; 3x0e ; 2x1o+1x2e ; silu*1.67 ; sigmoid",
    "2x0e+1x0e ; 2x0e+1x0e ; 1x1o+1x1o+1x2e ; tanh,ssp ; relu,identity",
    "3x0e ; ; ; silu ; ",
    " ; 2x0e ; 2x1o ; ; tanh*1.5",
]


@pytest.mark.parametrize("text", GATE_SPECS)
def test_gate_backward(text):
    spec = gate_spec(text)
    x, grad = _double((5, dim(spec.irreps_in)), (5, dim(spec.irreps_out)))
    y = reference.gate(x, text)
    assert y.shape == grad.shape
    _close([reference.gate_backward(grad, x, text)], torch.autograd.grad(y, x, grad))
    assert torch.autograd.gradcheck(lambda v: ops.gate(v, text, "g"), x)


def test_relayout_gradient():
    (x,) = _double((3, 10))
    for to in ("ir_mul", "mul_ir"):
        assert torch.autograd.gradcheck(lambda v, to=to: ops.relayout(v, "1x0e+3x1o", to), x)


@pytest.mark.parametrize("name", activations.FUNCTIONS)
def test_derivatives_of_activations(name):
    x = torch.linspace(-30, 30, 401, dtype=torch.float64).requires_grad_(True)
    (true,) = torch.autograd.grad(activations.apply(f"{name}*1.3", x).sum(), x)
    got = activations.derivative(f"{name}*1.3", x.detach())
    assert torch.allclose(got, true, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8", "s8 m8d8 common"])
def test_mddq_operator_uses_the_straight_through_gradient(text):
    (x,) = _double((4, 10))
    scale = torch.tensor([0.02, 0.004, 0.011, 0.0031, 0.03, 0.009], dtype=torch.float64)
    grad, scheme = torch.randn(4, 10, dtype=torch.float64), activation_scheme(text)
    y = ops.mddq(x, scale, "4x0e+2x1o", text, "l")
    assert torch.equal(y, fake_quantize(x.detach(), scale, "4x0e+2x1o", scheme))
    expected = fake_quantize_backward(grad, x.detach(), scale, "4x0e+2x1o", scheme)
    _close(torch.autograd.grad(y, x, grad), [expected])


# --- integer weights ----------------------------------------------------------------------------------

INTEGERS = "3x0e+2x1o+4x1o+2x0e -> 4x1o+2x0e+1x1o"  # 11 channels, two blocks that merge
STEPS = torch.tensor([0.02, 0.003, 0.011, 0.007, 0.03, 0.0041, 0.009, 0.013, 0.0029, 0.05, 0.0053])


def _near(got, expected):
    """Scales and decoded weights are float32."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def _integers(bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes as they are stored, plain, and scales."""
    spec, top = linear_spec(INTEGERS), {8: 127, 4: 7}[bits]
    codes = torch.randint(-top, top + 1, (spec.weight_numel,)).to(torch.int8)
    return (
        pack_int4(codes) if bits == 4 else codes,
        codes,
        (0.001 + 0.01 * torch.rand(spec.scale_numel)).float(),
    )


def _meaning(codes: torch.Tensor, scale: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
    """``scale[path, w] C[u, w] / steps[u]``, weight by weight."""
    spec = linear_spec(INTEGERS)
    weight = torch.zeros(spec.weight_numel)
    for path in spec.paths:
        a, b = path.block_in, path.block_out
        for u in range(a.mul):
            for w in range(b.mul):
                i = path.offset + u * b.mul + w
                held = 1.0 if steps is None else float(steps[a.channel + u])
                weight[i] = float(scale[path.scale_offset + w]) * int(codes[i]) / held
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("steps", [None, STEPS], ids=["plain", "held"])
def test_decode_weight(bits, steps):
    stored, codes, scale = _integers(bits)
    got = ops.decode_weight(stored, scale, steps, bits, INTEGERS, "l")
    _near(got, _meaning(codes, scale, steps))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("s8 m8d8", 8), ("s8 c8", 8), ("s8 m8exact", 8), ("s8 m8d8 common", 4), ("s8 m8exact common", 8)],
)
def test_int_linear_is_the_float_linear_of_what_integers_stand_for(scheme, bits, transpose):
    stored, codes, scale = _integers(bits)
    common, spec = scheme.endswith("common"), linear_spec(INTEGERS)
    held = None if common else STEPS
    weight, bias = _meaning(codes, scale, held), torch.randn(2).float()
    x = torch.randn(6, dim(spec.irreps_out if transpose else spec.irreps_in)).float()
    if transpose:  # a gradient, float: the codes' steps are divided out
        got = ops.int_irreps_linear(x, held, stored, scale, None, INTEGERS, "f32", bits, True, "l")
        _near(got, reference.irreps_linear(x.double(), weight, None, INTEGERS, True))
        return
    got = ops.int_irreps_linear(x, STEPS, stored, scale, bias, INTEGERS, scheme, bits, False, "l")
    rounded = fake_quantize(x, STEPS, spec.irreps_in, activation_scheme(scheme))
    _near(got, reference.irreps_linear(rounded.double(), weight, bias.double(), INTEGERS, False))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("steps", [None, STEPS], ids=["plain", "held"])
def test_gradient_in_integers_is_divided_by_the_steps_that_codes_hold(bits, steps):
    stored, codes, scale = _integers(bits)
    spec = linear_spec(INTEGERS)
    grad = torch.randn(6, dim(spec.irreps_out)).float()
    got = ops.int_irreps_linear(grad, steps, stored, scale, None, INTEGERS, "g16", bits, True, "l")
    expected = torch.zeros(6, dim(spec.irreps_in))
    for path in spec.paths:
        a, b = path.block_in, path.block_out
        rows = reference.view(grad, b) * scale[path.scale_offset : path.scale_offset + b.mul]
        rows = fake_quantize_gradient(rows).double()
        matrix = codes[path.offset : path.offset + path.numel].view(a.mul, b.mul).double()
        held = torch.ones(a.mul) if steps is None else steps[a.channel : a.channel + a.mul]
        reference.view(expected, a).add_((rows @ matrix.T) / held)
    _near(got, expected)
    exact = reference.irreps_linear(grad.double(), _meaning(codes, scale, steps), None, INTEGERS, True)
    assert float((got - exact).abs().max()) <= 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_names_of_activations(scale):
    assert activations.name_of(SILU) == "silu" and activations.name_of(nn.Tanh()) == "tanh"
    assert activations.name_of(nn.functional.gelu) is None and activations.name_of(lambda x: x) is None
    assert activations.split(f"silu*{scale!r}") == ("silu", scale)


def test_activation_is_known_by_what_it_does_not_by_its_name():
    def silu(x):
        return x * torch.sigmoid(1.702 * x)

    assert activations.name_of(silu) is None


# --- sums by index ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [(), (3,), (2, 4)])
@pytest.mark.parametrize(("edges", "atoms"), [(0, 0), (0, 3), (7, 4), (50, 1), (200, 90)])
def test_sorted_sums_are_sums_of_rows(row, edges, atoms):
    """Atoms without edges get zeros; so does the operator of gaq that says which edges each atom has."""
    generator = torch.Generator().manual_seed(edges)
    senders, receivers = torch.randint(0, max(atoms, 1), (2, edges), generator=generator)
    values = torch.randn(edges, *row, dtype=torch.float64, generator=generator)
    _, _, *orders = ops.sort_edges(senders, receivers, atoms)
    for index, starts, order in ((receivers, *orders[:2]), (senders, *orders[2:])):
        expected = torch.zeros(atoms, *row, dtype=torch.float64)
        for n in range(atoms):
            expected[n] = values[order[starts[n] : starts[n + 1]].long()].sum(0)
        got = ops.sum_sorted(values, index, order, starts, atoms, "sum")
        assert got.dtype == values.dtype and got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(got, ops.sum_rows(values, index, atoms, math.prod(row), "sum"))


def test_sorted_sums_without_data_have_the_shape_and_type_of_real_ones():
    senders, receivers = SENDERS, RECEIVERS
    values = torch.randn(7, 2, 3)
    _, _, starts, order, _, _ = ops.sort_edges(senders, receivers, 4)
    real = ops.sum_sorted(values, receivers, order, starts, 4, "sum")
    empty = ops.sum_sorted(*(t.to("meta") for t in (values, receivers, order, starts)), 4, "sum")
    assert (empty.shape, empty.dtype) == (real.shape, real.dtype)
    arguments = (values, receivers, order, starts, 4, "sum")
    torch.library.opcheck(ops.sum_sorted, arguments, test_utils=("test_schema", "test_faketensor"))


def test_halves_are_rounded_and_so_are_their_gradients():
    x = torch.tensor(
        [1.0, 1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, 65519.0, 65520.0, 2.0**-25, -0.3], dtype=torch.float32
    )
    leaf = x.clone().requires_grad_()
    rounded = ops.round_half(leaf, 0, "conv")
    assert rounded.tolist() == [1.0, 1.0, 1.0 + 2.0**-9, 65504.0, math.inf, 0.0, -0.300048828125]
    rounded.backward(x)
    assert torch.equal(leaf.grad, (1024 * x).half().float() / 1024)
    assert leaf.grad.tolist() == [*rounded.tolist()[:3], math.inf, math.inf, 2.0**-25, leaf.grad.tolist()[-1]]
    assert torch.equal(ops.round_half(x.double(), 0, "conv"), rounded.double())


def test_a_half_precision_linear_is_the_rounded_one():
    stored, _, scale = _integers(8)
    spec = linear_spec(INTEGERS)
    x, grad = torch.randn(6, dim(spec.irreps_in)).float(), torch.randn(6, dim(spec.irreps_out)).float()
    arguments = (STEPS, stored, scale, None)
    plain = ops.int_irreps_linear(x, *arguments, INTEGERS, "s8 m8d8", 8, False, "l")
    half = ops.int_irreps_linear(x, *arguments, in_half(INTEGERS), "s8 m8d8", 8, False, "l")
    assert half.dtype == torch.float16 and torch.equal(half, plain.half())
    stored_grad = (1024 * grad).half()
    back = ops.int_irreps_linear(stored_grad, *arguments, in_half(INTEGERS), "g16", 8, True, "l")
    wanted = ops.int_irreps_linear(stored_grad.float() / 1024, *arguments, INTEGERS, "g16", 8, True, "l")
    assert back.dtype == torch.float32 and torch.equal(back, wanted)


def test_half_precision_operators_without_data_have_the_type_of_real_ones():
    stored, _, scale = _integers(8)
    spec = linear_spec(INTEGERS)
    for transpose, irreps in ((False, spec.irreps_in), (True, spec.irreps_out)):
        x = torch.randn(3, dim(irreps)).to(torch.float16 if transpose else torch.float32)
        scheme = "g16" if transpose else "f32"
        arguments = (x, None, stored, scale, None, in_half(INTEGERS), scheme, 8, transpose, "l")
        real = ops.int_irreps_linear(*arguments)
        empty = ops.int_irreps_linear(
            *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
        )
        assert (real.shape, real.dtype) == (empty.shape, empty.dtype)
