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
from gaq_compile.ir.layout import channels, dim, permutation
from gaq_compile.numerics.activations import (
    ActivationScheme,
    activation_blocks,
    activation_scheme,
    fake_quantize,
    fake_quantize_backward,
    learned_directions,
    quantize_block,
)
from gaq_compile.numerics.codebooks import IntegerGrid

IRREPS = "4x0e+2x0o+3x1o+2x2e+1x3o"
TEXTS = ["s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8exact", "s6 m4d5", "s8 m8k6"]
COMMON = [f"{text} common" for text in TEXTS]
VECTORS = st.sampled_from([3, 5, 7]).flatmap(
    lambda size: st.lists(st.floats(-1, 1), min_size=size, max_size=size)
)
RATIOS = (0.11, 1.0, 0.37)  # of the steps of a block to the largest
MDDQ = ["s8 m8d8", "s16 m16d16", "s8 m4d4", "s8 m12d10", "s8 m8d6"]
ANGLES = st.tuples(*[st.floats(0, 2 * math.pi)] * 3)


def example(seed: int = 0, n: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim(IRREPS), generator=generator, dtype=torch.float64).to(dtype)


def steps(scheme: ActivationScheme, reach: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A step for every channel: no two are alike, and those of a block differ by up to 7 times."""
    generator = torch.Generator().manual_seed(9)
    tops = [scheme.qmax(b.l) for b in activation_blocks(IRREPS) for _ in range(b.mul)]
    spread = 0.15 + 0.85 * torch.rand(len(tops), generator=generator, dtype=torch.float64)
    return (reach * spread / torch.tensor(tops)).to(dtype)


def of_channels(scale: Tensor) -> list[tuple[int, float, float]]:
    """Degree, step and largest step of the block, of every channel of IRREPS in order."""
    found, values = [], scale.tolist()
    for block in activation_blocks(IRREPS):
        own, values = values[: block.mul], values[block.mul :]
        found += [(block.l, s, max(own)) for s in own]
    return found


def by_definition(v: list[float], degree: int, s: float, top: float, scheme: ActivationScheme) -> list[float]:
    """xhat of one channel, in plain Python (whose ``round`` is half to even)."""
    qmax, f = scheme.qmax(degree), scheme.fraction_bits(degree)
    unit = (top if scheme.common else s) * 2.0**-f
    if degree == 0 or scheme.vector == "component":
        codes = [max(-qmax, min(qmax, round(c / s))) for c in v]
        return (
            [unit * round(code * (s / unit)) for code in codes] if scheme.common else [s * c for c in codes]
        )
    m = math.sqrt(sum(c * c for c in v))
    q = min(qmax, round(m / s))
    if q == 0:
        return [0.0 for _ in v]
    if scheme.vector == "exact":
        return [c * (s * q / m) for c in v]
    if scheme.vector == "svq":
        points = learned_directions(degree, scheme.direction_bits).points.tolist()
        nearest = max(points, key=lambda p: sum(a * b for a, b in zip(p, v, strict=True)))
        return [unit * round(q * c * (s / unit)) for c in nearest]
    n = [round(c / m * scheme.direction_levels) for c in v]
    length = math.sqrt(sum(c * c for c in n))
    return [unit * round(q * c / length * (s / unit)) for c in n]


@pytest.mark.parametrize("text", TEXTS + COMMON)
def test_fake_quantize_follows_the_definition_channel_by_channel(text: str) -> None:
    scheme, x = activation_scheme(text), example()
    scale = steps(scheme)
    got = fake_quantize(x, scale, IRREPS, scheme)[:, list(permutation(IRREPS, "mul_ir"))]
    rows = x[:, list(permutation(IRREPS, "mul_ir"))].tolist()
    want: list[list[float]] = []
    for row in rows:
        out: list[float] = []
        for degree, step, top in of_channels(scale):
            channel = row[len(out) : len(out) + 2 * degree + 1]
            out += by_definition(channel, degree, step, top, scheme)
        want.append(out)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("text", TEXTS)
def test_a_channel_with_held_steps_does_not_see_its_neighbours(text: str) -> None:
    scheme, x = activation_scheme(text), example()
    scale = steps(scheme)
    whole = fake_quantize(x, scale, IRREPS, scheme)
    for block in activation_blocks(IRREPS):
        for u in range(block.mul):
            columns = [block.base + c * block.mul + u for c in range(block.components)]
            alone = fake_quantize(x[:, columns], scale[block.channel + u][None], f"1x{block.ir}", scheme)
            assert torch.equal(alone, whole[:, columns])


@pytest.mark.parametrize("text", COMMON)
def test_channels_of_a_block_come_on_one_grid(text: str) -> None:
    scheme, x = activation_scheme(text), example()
    scale = steps(scheme)
    held = fake_quantize(x, scale, IRREPS, activation_scheme(text.removesuffix(" common")))
    got = fake_quantize(x, scale, IRREPS, scheme)
    for block in activation_blocks(IRREPS):
        span = slice(block.base, block.base + block.mul * block.components)
        own = scale[block.channel : block.channel + block.mul]
        if scheme.vector == "exact" and block.l:  # a float direction needs no grid
            torch.testing.assert_close(got[:, span], held[:, span], rtol=1e-14, atol=0)
            continue
        unit = own.max() * 2.0 ** -scheme.fraction_bits(block.l)
        whole = got[:, span] / unit
        assert float((whole - whole.round()).abs().max()) < 1e-9
        assert 0 < float(whole.abs().max()) <= scheme.operand_max(block.l) * (1 + 1e-12)
        # what the grid adds to the error of a channel's own step: half a unit of the grid, and for
        # vectors half of their own units, which the common ones replace
        fine = (
            own * 2.0 ** -scheme.fraction_bits(block.l)
            if scheme.vector in ("mddq", "svq") and block.l
            else 0 * own
        )
        error = (got - held)[:, span].abs().unflatten(1, (block.components, block.mul))
        assert bool((error <= 0.5 * (unit + fine) * (1 + 1e-9)).all())


@pytest.mark.parametrize("text", COMMON)
def test_a_common_grid_changes_nothing_where_the_steps_are_alike(text: str) -> None:
    scheme, x = activation_scheme(text), example(3)
    scale = torch.full((channels(IRREPS),), 0.0173, dtype=torch.float64)
    held = fake_quantize(x, scale, IRREPS, activation_scheme(text.removesuffix(" common")))
    torch.testing.assert_close(fake_quantize(x, scale, IRREPS, scheme), held, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", TEXTS + COMMON)
def test_operand_times_step_is_the_fake_quantized_block(text: str, dtype: torch.dtype) -> None:
    scheme, x = activation_scheme(text), example(dtype=dtype) * 3  # a third of it clips
    scale = steps(scheme, dtype=dtype)
    whole = fake_quantize(x, scale, IRREPS, scheme)
    assert whole.dtype == dtype
    for block in activation_blocks(IRREPS):
        columns = slice(block.base, block.base + block.mul * block.components)
        part = x[:, columns].unflatten(1, (block.components, block.mul))
        operand, step = quantize_block(part, block.l, scale[block.channel :][: block.mul], scheme)
        assert step.shape == (() if scheme.common else (block.mul,))
        is_float = scheme.vector == "exact" and block.l > 0
        assert operand.dtype == (dtype if is_float else torch.int32)
        assert float(operand.abs().max()) <= scheme.operand_max(block.l) * (1 + 1e-6)
        assert torch.equal((operand * step).flatten(1), whole[:, columns])
        operand_again, step_again = quantize_block(part, block.l, 0.0173, scheme)
        assert isinstance(step_again, float)
        alike = torch.full((block.mul,), 0.0173, dtype=dtype)
        operand, step = quantize_block(part, block.l, alike, scheme)
        assert operand_again.dtype == operand.dtype
        again = (operand_again * step_again).to(dtype)
        torch.testing.assert_close(again, operand * step, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["s8 c8", "s3 c2", "s16 c16", "s8 c8 common", "s3 c2 common"])
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
@given(VECTORS, ANGLES, st.sampled_from(MDDQ + [f"{text} common" for text in MDDQ]))
def test_rotation_and_rounding_commute_within_the_bound(
    v: list[float], angles: tuple[float, float, float], text: str
) -> None:
    scheme, degree = activation_scheme(text), (len(v) - 1) // 2
    x = torch.tensor(v, dtype=torch.float64)
    scales = [2.0 * ratio / scheme.qmax(degree) for ratio in RATIOS]
    for scale in scales:
        fraction = float(x.norm()) / scale % 1.0
        assume(abs(fraction - 0.5) > 1e-6)  # else |Rv| and |v| may round apart, in the last bit of a float
    rotation = Irrep(degree, -1).D_from_angles(*torch.tensor(angles, dtype=torch.float64))

    def quantized(u: Tensor) -> Tensor:
        block, steps = u[:, None].expand(-1, len(scales)), torch.tensor(scales, dtype=torch.float64)
        return fake_quantize(block.reshape(1, -1), steps, f"{len(scales)}x{degree}o", scheme).view_as(block)

    errors = (quantized(rotation @ x) - rotation @ quantized(x)).norm(dim=0)
    grid, f = IntegerGrid(degree, scheme.direction_bits), scheme.fraction_bits(degree)
    for scale, error in zip(scales, errors.tolist(), strict=True):
        q = min(scheme.qmax(degree), round(float(x.norm()) / scale))
        # of a common grid, whose units are the largest step's, a vector is q * r units long
        unit, length = (max(scales), q * scale / max(scales)) if scheme.common else (scale, q)
        assert error <= 2 * unit * length * grid.sin_delta(length, f) + 1e-9


@settings(max_examples=100, deadline=None)
@given(VECTORS, ANGLES, st.sampled_from(["s8 m8exact", "s8 m8exact common"]))
def test_exact_directions_commute_with_rotation(
    v: list[float], angles: tuple[float, float, float], text: str
) -> None:
    scheme, degree = activation_scheme(text), (len(v) - 1) // 2
    x = torch.tensor(v, dtype=torch.float64)
    scale = torch.tensor(RATIOS, dtype=torch.float64) * (2.0 / 255)
    assume(bool(((x.norm() / scale % 1.0 - 0.5).abs() > 1e-6).all()))
    rotation = Irrep(degree, -1).D_from_angles(*torch.tensor(angles, dtype=torch.float64))

    def quantized(u: Tensor) -> Tensor:
        block = u[:, None].expand(-1, len(scale))
        return fake_quantize(block.reshape(1, -1), scale, f"3x{degree}o", scheme).view_as(block)

    assert torch.allclose(quantized(rotation @ x), rotation @ quantized(x), atol=1e-9)


@pytest.mark.parametrize(
    "text", ["s8 m8d8", "s8 m8exact", "s16 m16d16", "s8 m8d8 common", "s8 m8exact common"]
)
def test_gradient_of_vectors_is_radial_and_tangential(text: str) -> None:
    scheme, x = activation_scheme(text), example(1) * 1.5
    g, scale = example(2), steps(scheme)
    got = fake_quantize_backward(g, x, scale, IRREPS, scheme)
    clipped = 0
    for block in activation_blocks(IRREPS):
        if block.l == 0:
            continue
        own = scale[block.channel : block.channel + block.mul].repeat(len(x))
        columns = slice(block.base, block.base + block.mul * block.components)
        vs, gs, outs = (
            t[:, columns].unflatten(1, (block.components, block.mul)).transpose(1, 2).flatten(0, 1)
            for t in (x, g, got)
        )
        for v, gv, out, s in zip(vs, gs, outs, own, strict=True):
            m = v.norm()
            u = v / m
            q = min(scheme.qmax(block.l), round(float(m / s)))
            inside = float(m / s <= scheme.qmax(block.l))
            clipped += inside == 0.0
            projector = torch.eye(len(v), dtype=torch.float64) - torch.outer(u, u)
            want = u * (gv @ u) * inside + s * q / m * (projector @ gv)
            torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
            # nothing leaks: a tangential gradient gives a tangential one
            assert float(out @ u) == pytest.approx(float(gv @ u) * inside, abs=1e-12)
    assert clipped > 10


@pytest.mark.parametrize("text", ["s8 c8", "s8 m8d8", "s8 c8 common"])
def test_gradient_of_scalars_passes_inside_the_range_only(text: str) -> None:
    scheme = activation_scheme(text)
    x = torch.tensor([[0.0, 1.27, -1.27, 1.28, -9.0, 1.28, 1.27, -0.64]], dtype=torch.float64)
    g = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    scale = torch.tensor([0.01] * 5 + [0.02, 0.005, 0.005], dtype=torch.float64)
    got = fake_quantize_backward(g, x, scale, "8x0e", scheme)
    assert torch.equal(got, g * torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]))


@pytest.mark.parametrize("text", ["s8 c8", "s8 c8 common"])
def test_gradient_of_components_ignores_geometry(text: str) -> None:
    x = torch.tensor([[0.5, 0.5, 2.0, 2.0, -0.5, -0.5]])  # two equal vectors, component by component
    scale = torch.tensor([0.01, 0.02])
    got = fake_quantize_backward(torch.ones(1, 6), x, scale, "2x1o", activation_scheme(text))
    assert torch.equal(got, torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]]))


@pytest.mark.parametrize("text", TEXTS + COMMON)
def test_zero_stays_zero_and_passes_its_gradient(text: str) -> None:
    scheme = activation_scheme(text)
    x, g, scale = torch.zeros(3, 32), torch.randn(3, 32), steps(scheme, dtype=torch.float32)
    assert torch.equal(fake_quantize(x, scale, IRREPS, scheme), x)
    assert torch.equal(fake_quantize_backward(g, x, scale, IRREPS, scheme), g)


@pytest.mark.parametrize("text", TEXTS + COMMON)
def test_vanishing_magnitudes_give_finite_zeros(text: str) -> None:
    scheme = activation_scheme(text)
    x = torch.full((1, 32), 1e-30)  # |v|^2 underflows
    scale = steps(scheme, dtype=torch.float32)
    assert torch.equal(fake_quantize(x, scale, IRREPS, scheme), torch.zeros(1, 32))
    grad = fake_quantize_backward(torch.ones(1, 32), x, scale, IRREPS, scheme)
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("text", TEXTS + COMMON)
def test_nan_is_never_hidden(text: str) -> None:
    scheme, x = activation_scheme(text), example()[:1]
    for b, block in enumerate(activation_blocks(IRREPS)):
        bad = x.clone()
        bad[0, block.base] = torch.nan
        assert bool(torch.isnan(fake_quantize(bad, steps(scheme), IRREPS, scheme)[0, block.base])), b


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 m8d8 common", "s8 c8 common"])
def test_neighbouring_equal_irreps_are_one_block(text: str) -> None:
    """And share a grid, where it is common: the largest step counts, wherever it stands."""
    scheme, x = activation_scheme(text), example()[:, 6:15]
    for order in ([0.01, 0.013, 0.05], [0.05, 0.013, 0.01]):
        scale = torch.tensor(order, dtype=torch.float64)
        merged = fake_quantize(x, scale, "3x1o", scheme)
        assert torch.equal(fake_quantize(x, scale, "1x1o+2x1o", scheme), merged)


def test_tensors_that_do_not_fit_are_refused() -> None:
    scheme = activation_scheme("s8 m8d8")
    scale = torch.ones(12)
    with pytest.raises(IrrepsError, match="N, 32"):
        fake_quantize(torch.zeros(2, 33), scale, IRREPS, scheme)
    with pytest.raises(IrrepsError, match="N, 32"):
        fake_quantize_backward(torch.zeros(32), torch.zeros(2, 32), scale, IRREPS, scheme)
    for wrong in (torch.ones(5), torch.ones(32), torch.ones(1), torch.ones(12, 1), torch.tensor(1.0)):
        with pytest.raises(IrrepsError, match="12 scales"):
            fake_quantize(torch.zeros(2, 32), wrong, IRREPS, scheme)


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches(n: int) -> None:
    scheme = activation_scheme("s8 m8d8")
    x = torch.ones(n, 32)
    assert fake_quantize(x, torch.ones(12), IRREPS, scheme).shape == (n, 32)
    assert fake_quantize_backward(x, x, torch.ones(12), IRREPS, scheme).shape == (n, 32)


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 m8d8 common"])
def test_both_trace_with_a_dynamic_number_of_rows(text: str) -> None:
    scheme = activation_scheme(text)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            forward = fake_quantize(x, scale, IRREPS, scheme)
            return forward, fake_quantize_backward(forward, x, scale, IRREPS, scheme)

    args = (example(), steps(scheme))
    rows = {"x": {0: torch.export.Dim("n")}, "scale": None}
    traced = torch.export.export(Module(), args, dynamic_shapes=rows, strict=False).module()
    for got, want in zip(traced(example(5, 7), args[1]), Module()(example(5, 7), args[1]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8", "s8 m8exact", "s8 m8d8 common", "s8 c8 common"])
def test_ties_round_to_even(text: str) -> None:
    scheme = activation_scheme(text)
    x = torch.tensor([[0.5, 1.5, 5.0, 2.5, 0.0, 0.0]])
    got = fake_quantize(x, torch.tensor([1.0, 1.0, 2.0, 1.0]), "3x0e+1x1o", scheme)
    assert got.tolist() == [[0.0, 2.0, 4.0, 2.0, 0.0, 0.0]]


def test_ties_of_the_common_grid_round_to_even() -> None:
    """Operands are X * r * 2^f: with r = 2^-9 and f = 8, odd X lie halfway between two."""
    x = torch.tensor([[1.0, 2.0, 3.0, 5.0, 0.0]])
    scale = torch.tensor([1.0, 1.0, 1.0, 1.0, 512.0])
    got = fake_quantize(x, scale, "5x0e", activation_scheme("s8 c8 common"))
    assert got.tolist() == [[0.0, 2.0, 4.0, 4.0, 0.0]]
