"""Activation integers: their definition, their equivariance bound, their gradient."""

from __future__ import annotations

import math

import pytest
import torch
from e3nn.o3 import Irrep
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.errors import IrrepsError
from gaq_compile.ir.layout import permutation
from gaq_compile.numerics.activations import (
    ActivationScheme,
    activation_blocks,
    activation_scheme,
    fake_quantize,
    fake_quantize_backward,
    quantize_block,
)
from gaq_compile.numerics.codebooks import IntegerGrid

IRREPS = "4x0e+2x0o+3x1o+2x2e+1x3o"
TEXTS = ["s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8exact", "s6 m4d5"]
VECTORS = st.sampled_from([3, 5, 7]).flatmap(
    lambda size: st.lists(st.floats(-1, 1), min_size=size, max_size=size)
)
ANGLES = st.tuples(*[st.floats(0, 2 * math.pi)] * 3)


def example(seed: int = 0, n: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = sum(b.mul * b.components for b in activation_blocks(IRREPS))
    return torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)


def steps(scheme: ActivationScheme, reach: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([reach / scheme.qmax(b.l) for b in activation_blocks(IRREPS)], dtype=dtype)


def by_definition(v: list[float], degree: int, s: float, scheme: ActivationScheme) -> list[float]:
    """xhat of one channel, in plain Python (whose ``round`` is half to even)."""
    qmax = scheme.qmax(degree)
    if degree == 0 or scheme.vector == "component":
        return [s * max(-qmax, min(qmax, round(c / s))) for c in v]
    m = math.sqrt(sum(c * c for c in v))
    q = min(qmax, round(m / s))
    if q == 0:
        return [0.0 for _ in v]
    if scheme.vector == "exact":
        return [c * (s * q / m) for c in v]
    n = [round(c / m * scheme.direction_levels) for c in v]
    length = math.sqrt(sum(c * c for c in n))
    f = scheme.fraction_bits
    return [s * 2.0**-f * round(q * c / length * 2**f) for c in n]


@pytest.mark.parametrize("text", TEXTS)
def test_fake_quantize_follows_the_definition_channel_by_channel(text: str) -> None:
    scheme, x = activation_scheme(text), example()
    scale = steps(scheme)
    got = fake_quantize(x, scale, IRREPS, scheme)[:, list(permutation(IRREPS, "mul_ir"))]
    rows = x[:, list(permutation(IRREPS, "mul_ir"))].tolist()
    want: list[list[float]] = []
    for row in rows:
        out: list[float] = []
        for b, block in enumerate(activation_blocks(IRREPS)):
            for _ in range(block.mul):
                channel = row[len(out) : len(out) + block.components]
                out += by_definition(channel, block.l, float(scale[b]), scheme)
        want.append(out)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", TEXTS)
def test_operand_times_step_is_the_fake_quantized_block(text: str, dtype: torch.dtype) -> None:
    scheme, x = activation_scheme(text), example(dtype=dtype) * 3  # a third of it clips
    scale = steps(scheme, dtype=dtype)
    whole = fake_quantize(x, scale, IRREPS, scheme)
    assert whole.dtype == dtype
    for b, block in enumerate(activation_blocks(IRREPS)):
        columns = slice(block.base, block.base + block.mul * block.components)
        part = x[:, columns].unflatten(1, (block.components, block.mul))
        operand, step = quantize_block(part, block.l, scale[b], scheme)
        is_float = scheme.vector == "exact" and block.l > 0
        assert operand.dtype == (dtype if is_float else torch.int32)
        assert float(operand.abs().max()) <= scheme.operand_max(block.l) * (1 + 1e-6)
        assert torch.equal((operand * step).flatten(1), whole[:, columns])
        operand_again, step_again = quantize_block(part, block.l, float(scale[b]), scheme)
        assert isinstance(step_again, float)
        assert step_again == pytest.approx(float(step))
        assert operand_again.dtype == operand.dtype


@pytest.mark.parametrize("text", ["s8 c8", "s3 c2", "s16 c16"])
def test_points_of_the_lattice_are_fixed(text: str) -> None:
    scheme = activation_scheme(text)
    once = fake_quantize(example(), steps(scheme), IRREPS, scheme)
    assert torch.equal(fake_quantize(once, steps(scheme), IRREPS, scheme), once)


@settings(max_examples=150, deadline=None)
@given(VECTORS, st.integers(4, 16))
def test_direction_codes_round_trip(v: list[float], bits: int) -> None:
    grid = IntegerGrid((len(v) - 1) // 2, bits)
    x = torch.tensor(v, dtype=torch.float64)[:, None]
    assume(float(x.norm()) > 1e-3)
    n = torch.round(x / x.norm() * grid.levels)
    length = float(n.norm())
    assume(abs(length - grid.levels) * float(n.abs().max()) / length < 0.5 - 1e-9)
    assert torch.equal(grid.encode(grid.decode(n), torch.ones(1, 1, dtype=torch.float64)), n)


@settings(max_examples=150, deadline=None)
@given(VECTORS, st.integers(4, 16))
def test_no_direction_lies_further_than_the_covering_angle(v: list[float], bits: int) -> None:
    grid = IntegerGrid((len(v) - 1) // 2, bits)
    x = torch.tensor(v, dtype=torch.float64)[:, None]
    m = x.norm(dim=-2, keepdim=True)
    assume(float(m) > 1e-3)
    code = grid.encode(x, m)
    assert float(code.abs().max()) <= grid.levels
    chord = float((grid.decode(code) - x / m).norm())
    assert chord <= 2 * math.sin(grid.delta / 2) + 1e-12


@settings(max_examples=300, deadline=None)
@given(VECTORS, ANGLES, st.sampled_from(["s8 m8d8", "s16 m16d16", "s8 m4d4", "s8 m12d10", "s8 m8d6"]))
def test_rotation_and_rounding_commute_within_the_bound(
    v: list[float], angles: tuple[float, float, float], text: str
) -> None:
    scheme, degree = activation_scheme(text), (len(v) - 1) // 2
    x = torch.tensor(v, dtype=torch.float64)
    scale = 2.0 / scheme.qmax(degree)
    fraction = float(x.norm()) / scale % 1.0
    assume(abs(fraction - 0.5) > 1e-6)  # else |Rv| and |v| may round apart, in the last bit of a float
    rotation = Irrep(degree, -1).D_from_angles(*torch.tensor(angles, dtype=torch.float64))

    def quantized(u: Tensor) -> Tensor:
        return fake_quantize(u[None], torch.tensor([scale]).double(), f"1x{degree}o", scheme)[0]

    error = float((quantized(rotation @ x) - rotation @ quantized(x)).norm())
    q = min(scheme.qmax(degree), round(float(x.norm()) / scale))
    grid = IntegerGrid(degree, scheme.direction_bits)
    assert error <= 2 * scale * q * grid.sin_delta(q, scheme.fraction_bits) + 1e-9


@settings(max_examples=100, deadline=None)
@given(VECTORS, ANGLES)
def test_exact_directions_commute_with_rotation(v: list[float], angles: tuple[float, float, float]) -> None:
    scheme, degree = activation_scheme("s8 m8exact"), (len(v) - 1) // 2
    x = torch.tensor(v, dtype=torch.float64)
    scale = torch.tensor([2.0 / 255], dtype=torch.float64)
    assume(abs(float(x.norm() / scale) % 1.0 - 0.5) > 1e-6)
    rotation = Irrep(degree, -1).D_from_angles(*torch.tensor(angles, dtype=torch.float64))
    turned = fake_quantize((rotation @ x)[None], scale, f"1x{degree}o", scheme)[0]
    assert torch.allclose(
        turned, rotation @ fake_quantize(x[None], scale, f"1x{degree}o", scheme)[0], atol=1e-9
    )


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 m8exact", "s16 m16d16"])
def test_gradient_of_vectors_is_radial_and_tangential(text: str) -> None:
    scheme, x = activation_scheme(text), example(1) * 1.5
    g, scale = example(2), steps(scheme)
    got = fake_quantize_backward(g, x, scale, IRREPS, scheme)
    clipped = 0
    for b, block in enumerate(activation_blocks(IRREPS)):
        if block.l == 0:
            continue
        columns = slice(block.base, block.base + block.mul * block.components)
        vs, gs, outs = (
            t[:, columns].unflatten(1, (block.components, block.mul)).transpose(1, 2).flatten(0, 1)
            for t in (x, g, got)
        )
        for v, gv, out in zip(vs, gs, outs, strict=True):
            m = v.norm()
            u = v / m
            q = min(scheme.qmax(block.l), round(float(m / scale[b])))
            inside = float(m / scale[b] <= scheme.qmax(block.l))
            clipped += inside == 0.0
            projector = torch.eye(len(v), dtype=torch.float64) - torch.outer(u, u)
            want = u * (gv @ u) * inside + scale[b] * q / m * (projector @ gv)
            torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
            # nothing leaks: a tangential gradient gives a tangential one
            assert float(out @ u) == pytest.approx(float(gv @ u) * inside, abs=1e-12)
    assert clipped > 10


@pytest.mark.parametrize("text", ["s8 c8", "s8 m8d8"])
def test_gradient_of_scalars_passes_inside_the_range_only(text: str) -> None:
    scheme = activation_scheme(text)
    x = torch.tensor([[0.0, 1.27, -1.27, 1.28, -9.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    scale = torch.tensor([0.01], dtype=torch.float64)
    got = fake_quantize_backward(g, x, scale, "5x0e", scheme)
    assert torch.equal(got, torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0]], dtype=torch.float64))


def test_gradient_of_components_ignores_geometry() -> None:
    scheme = activation_scheme("s8 c8")
    x = torch.tensor([[0.5, 2.0, -0.5]])
    got = fake_quantize_backward(torch.ones(1, 3), x, torch.tensor([0.01]), "1x1o", scheme)
    assert torch.equal(got, torch.tensor([[1.0, 0.0, 1.0]]))


@pytest.mark.parametrize("text", TEXTS)
def test_zero_stays_zero_and_passes_its_gradient(text: str) -> None:
    scheme = activation_scheme(text)
    x, g = torch.zeros(3, 32), torch.randn(3, 32)
    assert torch.equal(fake_quantize(x, torch.ones(5), IRREPS, scheme), x)
    assert torch.equal(fake_quantize_backward(g, x, torch.ones(5), IRREPS, scheme), g)


@pytest.mark.parametrize("text", TEXTS)
def test_vanishing_magnitudes_give_finite_zeros(text: str) -> None:
    scheme = activation_scheme(text)
    x = torch.full((1, 32), 1e-30)  # |v|^2 underflows
    assert torch.equal(fake_quantize(x, torch.ones(5), IRREPS, scheme), torch.zeros(1, 32))
    grad = fake_quantize_backward(torch.ones(1, 32), x, torch.ones(5), IRREPS, scheme)
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("text", TEXTS)
def test_nan_is_never_hidden(text: str) -> None:
    scheme, x = activation_scheme(text), example()[:1]
    for b, block in enumerate(activation_blocks(IRREPS)):
        bad = x.clone()
        bad[0, block.base] = torch.nan
        assert bool(torch.isnan(fake_quantize(bad, steps(scheme), IRREPS, scheme)[0, block.base])), b


def test_neighbouring_equal_irreps_share_one_scale() -> None:
    scheme = activation_scheme("s8 m8d8")
    x = example()[:, 6:15]
    scale = torch.tensor([0.01], dtype=torch.float64)
    assert torch.equal(fake_quantize(x, scale, "1x1o+2x1o", scheme), fake_quantize(x, scale, "3x1o", scheme))


def test_tensors_that_do_not_fit_are_refused() -> None:
    scheme = activation_scheme("s8 m8d8")
    with pytest.raises(IrrepsError, match="N, 32"):
        fake_quantize(torch.zeros(2, 33), torch.ones(5), IRREPS, scheme)
    with pytest.raises(IrrepsError, match="N, 32"):
        fake_quantize_backward(torch.zeros(32), torch.zeros(2, 32), torch.ones(5), IRREPS, scheme)
    with pytest.raises(IrrepsError, match="5 scales"):
        fake_quantize(torch.zeros(2, 32), torch.ones(4), IRREPS, scheme)


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches(n: int) -> None:
    scheme = activation_scheme("s8 m8d8")
    x = torch.ones(n, 32)
    assert fake_quantize(x, torch.ones(5), IRREPS, scheme).shape == (n, 32)
    assert fake_quantize_backward(x, x, torch.ones(5), IRREPS, scheme).shape == (n, 32)


def test_both_trace_with_a_dynamic_number_of_rows() -> None:
    scheme = activation_scheme("s8 m8d8")

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            forward = fake_quantize(x, scale, IRREPS, scheme)
            return forward, fake_quantize_backward(forward, x, scale, IRREPS, scheme)

    args = (example(), steps(scheme))
    rows = {"x": {0: torch.export.Dim("n")}, "scale": None}
    traced = torch.export.export(Module(), args, dynamic_shapes=rows, strict=False).module()
    for got, want in zip(traced(example(5, 7), args[1]), Module()(example(5, 7), args[1]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8", "s8 m8exact"])
def test_ties_round_to_even(text: str) -> None:
    scheme = activation_scheme(text)
    x = torch.tensor([[0.5, 1.5, 2.5, 2.5, 0.0, 0.0]])
    got = fake_quantize(x, torch.ones(2), "3x0e+1x1o", scheme)
    assert got.tolist() == [[0.0, 2.0, 2.0, 2.0, 0.0, 0.0]]
