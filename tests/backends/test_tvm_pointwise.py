"""Every small kernel against the reference in float64, on outputs that begin as NaN."""

from __future__ import annotations

import json
import math
import platform

import pytest
import torch

pytest.importorskip("tvm")

from gaq_compile.backends.tvm import pointwise
from gaq_compile.backends.tvm.build import build_executable, compile_kernel, host_target
from gaq_compile.backends.tvm.emit import kernel_text, loop, vector
from gaq_compile.backends.tvm.gate_kernel import _activate
from gaq_compile.backends.tvm.row_kernel import Emitter
from gaq_compile.errors import IrrepsError, LoweringError
from gaq_compile.ir.layout import blocks, channels, dim
from gaq_compile.ir.specs import gate_spec, tensor_product_spec
from gaq_compile.numerics.activations import activation_scheme, fake_quantize, fake_quantize_backward
from gaq_compile.operators import activations, reference

ROWS = (1, 7, 1000)
SILU = "silu*1.6791767923989418"
GATES = (
    f"128x0e ; 96x0e ; 64x1e+32x2e ; {SILU} ; {SILU}",
    f"128x0e ;  ;  ; {SILU} ; ",
    "4x0e+3x0o+8x0e ; 6x0e+18x0e ; 16x1o+8x2e ; silu,tanh*1.2,ssp ; sigmoid,relu",
)
HARMONICS = (
    ("1x0e+1x1e+1x2e", True, "component"),
    ("1x0e+1x1e+1x2e", False, "component"),
    ("1x1o+1x2e+1x3o+1x4e", True, "integral"),
    ("1x1o+1x0e+1x1o", False, "norm"),
    ("1x0e", True, "norm"),
)
_ROOTS = [math.sqrt(n) for n in (3, 5, 7, 9)]
PRODUCTS = (
    "1x1o+1x2e+1x3o+1x4e * 1x0e -> 1x1o+1x2e+1x3o+1x4e | "
    + " ".join(f"{k}.0.{k}*{root!r}" for k, root in enumerate(_ROOTS)),
    "1x0e * 1x1o+1x2e+1x3o+1x4e -> 1x1o+1x2e+1x3o+1x4e | "
    + " ".join(f"0.{k}.{k}*{root!r}" for k, root in enumerate(_ROOTS)),
    # several paths into one block, odd channel counts, and blocks that no path reaches
    "16x0e+6x1o+2x2e * 1x0e+1x1o+1x2e -> 16x1o+6x1o+6x1e+2x0o | 0.1.0*0.5 1.0.1 1.2.1*0.3 1.1.2",
)
SCHEMES = ("s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8exact")
IRREPS = ("224x0e+384x1e+352x2e", "64x0e", "5x0e+3x1o+6x3o")
BASELINE_X86 = json.dumps({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"})
ARM = json.dumps({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"})


@pytest.fixture(autouse=True)
def _seeded(poisoned_memory):
    torch.manual_seed(0)


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape and result.dtype == torch.float32
    size = expected.norm()
    return float((result - expected).norm() / (size if size > 0 else 1.0))


def _check(run, meaning, widths: list[int], seed: int = 0) -> None:
    """``run`` on float32 agrees with ``meaning`` in float64; with no rows it returns no rows."""
    generator = torch.Generator().manual_seed(seed)
    for rows in ROWS:
        inputs = [torch.randn(rows, width, generator=generator) * 2 for width in widths]
        got, expected = run(*inputs), meaning(*(x.double() for x in inputs))
        if isinstance(got, torch.Tensor):
            got, expected = (got,), (expected,)
        for a, b in zip(got, expected, strict=True):
            assert _error(a, b) < 1e-6
    nothing = run(*(torch.empty(0, width) for width in widths))
    single = isinstance(nothing, torch.Tensor)
    assert all(t.shape[0] == 0 for t in ((nothing,) if single else nothing))


@pytest.mark.parametrize("spec", GATES)
def test_gate(spec):
    s, target = gate_spec(spec), host_target()
    width, out = dim(s.irreps_in), dim(s.irreps_out)
    _check(pointwise.lower_gate(spec, target), lambda x: reference.gate(x, spec), [width])
    run = pointwise.lower_gate_backward(spec, target)
    _check(run, lambda g, x: reference.gate_backward(g, x, spec), [out, width])


def test_gate_rejects_what_does_not_fit():
    with pytest.raises(IrrepsError):
        pointwise.gate_source("4x0e ; 3x0e ; 4x1o ; silu ; silu")
    with pytest.raises(IrrepsError):
        pointwise.gate_source("4x0e+2x0o ; ; ; silu,tanh,relu ; ")
    with pytest.raises(LoweringError):
        pointwise.gate_source("4x0e ; ; ; gelu ; ")


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("name", ["exp", "silu", "sigmoid", "tanh", "ssp"])
def test_polynomials(name, lanes):
    """Relative error of exp up to |x| = 80, of the rest absolute; finite at +-1000, NaN stays NaN."""
    e = Emitter(lanes)
    x = e.let(vector("x", f"i * {lanes}", lanes))
    value, slope = (e.exp(x),) * 2 if name == "exp" else _activate(e, name, x, True)
    lines = [f"{vector(out, f'i * {lanes}', lanes)} = {v}" for out, v in (("y", value), ("s", slope))]
    body = loop(f"i in T.serial(n // {lanes})", [*e.lines, *lines])
    kernel = compile_kernel(kernel_text([(b, "n", "float32") for b in "xys"], body), host_target())

    edges = torch.tensor([1000.0, -1000.0, 3e38, -3e38, 89.0, -89.0, 0.0, -0.0, torch.nan])
    points = torch.cat([edges, torch.linspace(-80, 80, 20023), torch.randn(30000)])
    y, s = torch.empty_like(points), torch.empty_like(points)
    kernel(points, y, s)
    assert y[8].isnan() and s[8].isnan() and (name == "exp" or s[:8].isfinite().all())
    points, y, s = points[9:], y[9:], s[9:]
    if name == "exp":
        assert ((y - points.double().exp()) / points.double().exp()).abs().max() < 1e-6
        return
    want = activations.apply(name, points.double())
    assert ((y - want).abs() / want.abs().clamp_min(1.0)).max() < 1e-6
    assert (s - activations.derivative(name, points.double())).abs().max() < 2e-6


def test_gate_is_finite_far_out():
    run = pointwise.lower_gate_backward("16x0e ; ; ; silu ; ", host_target())
    x = torch.tensor([[1000.0, -1000.0, 3e38, -3e38] * 4])
    torch.testing.assert_close(run(torch.ones(1, 16), x), torch.tensor([[1.0, 0.0] * 8]))
    y = pointwise.lower_gate("16x0e ; ; ; silu ; ", host_target())(x)
    torch.testing.assert_close(y, x.clamp_min(0))


@pytest.mark.parametrize("arguments", HARMONICS)
def test_harmonics(arguments):
    width = sum(b.components for b in blocks(arguments[0]))
    run = pointwise.lower_harmonics(*arguments, host_target())
    _check(run, lambda v: reference.spherical_harmonics(v, *arguments), [3])
    back = pointwise.lower_harmonics_backward(*arguments, host_target())
    _check(back, lambda g, v: reference.spherical_harmonics_backward(g, v, *arguments), [width, 3])


@pytest.mark.parametrize("arguments", HARMONICS)
def test_harmonics_of_zero(arguments):
    width = sum(b.components for b in blocks(arguments[0]))
    vec, grad = torch.zeros(5, 3), torch.randn(5, width)
    vec[3] = torch.tensor([1.0, -2.0, 0.5])
    got = pointwise.lower_harmonics(*arguments, host_target())(vec)
    torch.testing.assert_close(got, reference.spherical_harmonics(vec, *arguments))
    back = pointwise.lower_harmonics_backward(*arguments, host_target())(grad, vec)
    assert back.isfinite().all()
    torch.testing.assert_close(back, reference.spherical_harmonics_backward(grad, vec, *arguments))


def test_harmonics_reject_what_they_cannot_mean():
    with pytest.raises(IrrepsError):
        pointwise.harmonics_source("2x1o", True, "norm")
    with pytest.raises(IrrepsError):
        pointwise.harmonics_source("1x1o", True, "unit")


@pytest.mark.parametrize("spec", PRODUCTS)
def test_product(spec):
    s, target = tensor_product_spec(spec), host_target()
    widths = [dim(s.irreps_x), dim(s.irreps_sh), s.weight_numel]
    run = pointwise.lower_product(spec, target)
    _check(run, lambda *t: reference.tensor_product(*t, spec), widths)
    back = pointwise.lower_product_backward(spec, target)
    _check(back, lambda *t: reference.tensor_product_backward(*t, spec), [dim(s.irreps_out), *widths])


def _scales(irreps: str, scheme: str) -> torch.Tensor:
    """A step for every channel, of ranges 2 to 4: they clip a few of the values of _away_from_ties."""
    chosen, generator = activation_scheme(scheme), torch.Generator().manual_seed(4)
    tops = torch.tensor([chosen.qmax(b.l) for b in blocks(irreps) for _ in range(b.mul)])
    return (2.0 + 2.0 * torch.rand(channels(irreps), generator=generator)) / tops


def _away_from_ties(rows: int, irreps: str, scheme: str) -> torch.Tensor:
    """Random values, 0.05 steps and more from ties and from where clipping begins (scalars, magnitudes)."""
    parts, scale = [], _scales(irreps, scheme).double()
    for b in blocks(irreps):
        step = scale[b.channel : b.channel + b.mul]
        v = torch.randn(rows, b.components, b.mul, dtype=torch.float64)
        by_component = b.l == 0 or activation_scheme(scheme).vector == "component"
        m = v.abs() if by_component else v.norm(dim=1, keepdim=True)
        offset = torch.rand_like(m) * 0.4 + 0.05
        target = (m / step).floor() + torch.where(torch.rand_like(m) < 0.5, offset, 1 - offset)
        parts.append((v / m * target * step).flatten(1))
    return torch.cat(parts, 1).float()


@pytest.mark.parametrize("scheme", (*SCHEMES, "s8 m8d8 common", "s8 c8 common"))
@pytest.mark.parametrize("irreps", IRREPS)
def test_mddq_backward(irreps, scheme):
    scale = _scales(irreps, scheme)
    run = pointwise.lower_mddq_backward(irreps, scheme, scale, host_target())
    for rows in ROWS:
        x = _away_from_ties(rows, irreps, scheme)
        x[0] = 0.0
        grad = torch.randn_like(x)
        chosen = activation_scheme(scheme)
        expected = fake_quantize_backward(grad.double(), x.double(), scale.double(), irreps, chosen)
        assert _error(run(grad, x), expected) < 1e-6
    assert run(torch.empty(0, dim(irreps)), torch.empty(0, dim(irreps))).shape == (0, dim(irreps))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("irreps", IRREPS)
def test_mddq(irreps, scheme):
    """Equal to the reference, but for vectors with some rounding within float32 of a tie."""
    scale, chosen = _scales(irreps, scheme), activation_scheme(scheme)
    run = pointwise.lower_mddq(irreps, scheme, scale, host_target())
    for rows in ROWS:
        x = _away_from_ties(rows, irreps, scheme)
        x[-1] = 0.0
        got, exact = run(x), fake_quantize(x.double(), scale.double(), irreps, chosen)
        for b in blocks(irreps):
            a, e = reference.view(got, b), reference.view(exact, b)
            close = ((a - e).abs() <= 1e-6 * e.abs().amax()).all(1)
            assert close.double().mean() > (0.9 if rows == 1000 else 0.5)
            assert _error(a, e) < 1e-4
    assert run(torch.empty(0, dim(irreps))).shape == (0, dim(irreps))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mddq_takes_each_channel_s_own_step(scheme):
    """Unsimplified irreps, tiles that are not full, and steps from 2^-7 to 1: a wrong one would be seen."""
    irreps = "3x0e+20x0e+5x1o+14x1o"
    scale = 2.0 ** -(torch.arange(channels(irreps)) * 5 % 8).float()
    qmax, x = activation_scheme(scheme).qmax, torch.zeros(1, dim(irreps))
    forward = pointwise.lower_mddq(irreps, scheme, scale, host_target())
    backward = pointwise.lower_mddq_backward(irreps, scheme, scale, host_target())
    for codes in (1.0, 3.0):
        x[0, :23], x[0, 23:42] = codes * scale[:23], codes * scale[23:]  # along the first component
        assert torch.equal(forward(x), x)
        assert torch.equal(forward(0.4 / codes * x), torch.zeros_like(x))
        assert torch.equal(backward(torch.ones_like(x), x)[0, :42], torch.ones(42))
    x[0, :23], x[0, 23:42] = (qmax(0) + 1) * scale[:23], (qmax(1) + 1) * scale[23:]
    assert torch.equal(backward(torch.ones_like(x), x)[0, :42], torch.zeros(42))
    clipped = torch.cat([qmax(0) * scale[:23], qmax(1) * scale[23:]])
    torch.testing.assert_close(forward(x)[0, :42], clipped, rtol=1e-6, atol=0)


def test_mddq_keeps_nan_and_rounds_half_to_even():
    scale = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5, 1.0])
    run = pointwise.lower_mddq("4x0e+2x1o", "s8 m8exact", scale, host_target())
    x = torch.tensor([[0.5, 1.5, torch.nan, -1e9, torch.nan, 0.0, 0.0, 2.5, 0.0, 0.0]])
    expected = fake_quantize(x, scale, "4x0e+2x1o", activation_scheme("s8 m8exact"))
    torch.testing.assert_close(run(x), expected, equal_nan=True)
    assert run(x)[0, :2].tolist() == [0.0, 2.0]


def test_mddq_rejects_scales_that_do_not_fit():
    for lowered in (pointwise.lower_mddq, pointwise.lower_mddq_backward):
        for count in (2, 3, 7, 10):  # one per block, neither, and one per component
            with pytest.raises(IrrepsError, match="6 scales, one per channel"):
                lowered("4x0e+2x1o", "s8 c8", torch.ones(count), host_target())


def _sources() -> dict[str, str]:
    gate, harmonics, product = GATES[2], HARMONICS[2], PRODUCTS[2]
    return {
        "gate": pointwise.gate_source(gate),
        "gate_backward": pointwise.gate_backward_source(gate),
        "harmonics": pointwise.harmonics_source(*harmonics),
        "harmonics_backward": pointwise.harmonics_backward_source(*harmonics),
        "mddq": pointwise.mddq_source(IRREPS[2], SCHEMES[0]),
        "mddq_backward": pointwise.mddq_backward_source(IRREPS[2], SCHEMES[0]),
        "product": pointwise.product_source(product),
        "product_backward": pointwise.product_backward_source(product),
    }


def test_runs_as_baseline_x86():
    """What has no instruction there (rounding) is found in the C library."""
    if "x86" not in platform.machine():
        pytest.skip("needs an x86 machine")
    scale = _scales(IRREPS[2], SCHEMES[0])
    x = _away_from_ties(40, IRREPS[2], SCHEMES[0])
    grad = torch.randn_like(x)
    expected = fake_quantize_backward(grad, x, scale, IRREPS[2], activation_scheme(SCHEMES[0])).double()
    run = pointwise.lower_mddq_backward(IRREPS[2], SCHEMES[0], scale, BASELINE_X86)
    assert _error(run(grad, x), expected) < 1e-6
    gate = pointwise.lower_gate(GATES[2], BASELINE_X86)
    x = torch.randn(40, dim(gate_spec(GATES[2]).irreps_in))
    assert _error(gate(x), reference.gate(x.double(), GATES[2])) < 1e-6


@pytest.mark.parametrize("target", [BASELINE_X86, ARM], ids=["x86-64", "cortex-a72"])
@pytest.mark.parametrize("name", list(_sources()))
def test_compiles_for_other_cpus(name, target):
    build_executable(_sources()[name], target)
