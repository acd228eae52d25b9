"""What every direction codebook keeps: its covering angle, its bits, its codes, the commutation bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from e3nn.o3 import Irrep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.errors import ConfigError, IrrepsError
from gaq_compile.numerics.codebooks import Codebook, IntegerGrid, norm, operand_sin_delta
from gaq_compile.numerics.lattices import CubeGrid, PyramidGrid
from gaq_compile.numerics.magnitudes import LinearMagnitudes, LogMagnitudes, Magnitudes, quantize_vectors
from gaq_compile.numerics.sphere import FibonacciLattice, IcosahedralGrid, LearnedDirections, OctahedralGrid

pytestmark = pytest.mark.usefixtures("one_thread")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(v: Tensor) -> Tensor:
    return v / norm(v)


def learned(degree: int, code_bits: int) -> LearnedDirections:
    return LearnedDirections.fit(random(degree, 4000, 2 * degree + 1, 1), code_bits, iterations=5)


def makers() -> dict[str, tuple[Callable[[], Codebook], float]]:
    """By name: how to make a codebook, and which share of its covering angle a search finds at least."""
    kinds: list[tuple[str, Callable[..., Codebook], list[tuple[int, ...]], float]] = [
        ("integer", IntegerGrid, [(1, 4), (1, 8), (1, 12), (2, 4), (2, 8), (3, 4), (3, 8)], 0.7),
        ("cube", CubeGrid.within, [(1, 8), (1, 24), (2, 16), (2, 40), (3, 17), (3, 40)], 0.75),
        ("pyramid", PyramidGrid.within, [(1, 8), (1, 24), (2, 8), (2, 40), (3, 8), (3, 16), (3, 40)], 0.65),
        ("octahedral", OctahedralGrid, [(2,)], 0.7),
        ("octahedral", OctahedralGrid, [(4,), (8,), (12,)], 0.95),
        ("fibonacci", FibonacciLattice, [(4,), (256,), (4096,)], 0.99),
        ("icosahedral", IcosahedralGrid, [(1,)], 0.85),
        ("icosahedral", IcosahedralGrid, [(5,), (20,)], 0.95),
        ("learned", learned, [(1, 4), (1, 8), (2, 4), (2, 7), (3, 4), (3, 7)], 0.95),
    ]
    return {
        "-".join(map(str, (name, *setting))): (partial(make, *setting), share)
        for name, make, sizes, share in kinds
        for setting in sizes
    }


MAKERS = makers()
every_codebook = pytest.mark.parametrize("name", MAKERS)


@cache
def make(name: str) -> Codebook:
    return MAKERS[name][0]()


def codes_of(book: Codebook, v: Tensor) -> Tensor:
    return book.encode(v, norm(v))


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Between unit vectors; the arcsine keeps the digits that the cosine of a small angle loses."""
    return 2 * torch.asin(torch.clamp(norm(a - b) / 2, max=1.0))


def miss(book: Codebook, v: Tensor) -> Tensor:
    """How far each direction lies from its code."""
    return angle(book.decode(codes_of(book, v)), unit(v))


def on_boundaries(book: Codebook, seed: int, n: int) -> Tensor:
    """Unit vectors (1, d, n) between two codes, to the last bit: bisected."""
    near = unit(random(seed, 1, book.components, n))
    far = unit(near + 2 * math.sin(min(book.delta, 1.0)) * random(seed + 1, 1, book.components, n))
    code = codes_of(book, near)
    for _ in range(52):
        middle = unit(near + far)
        same = (codes_of(book, middle) == code).all(-2, keepdim=True)
        near, far = torch.where(same, middle, near), torch.where(same, far, middle)
    return torch.where(torch.arange(n) % 2 == 0, near, far)


def special(book: Codebook) -> Tensor:
    """Axes, diagonals and the like: all directions with components -1, 0, 1."""
    signs = [s for s in itertools.product((-1.0, 0.0, 1.0), repeat=book.components) if any(s)]
    return torch.tensor(signs, dtype=torch.float64).T[None]


def hard_vectors(book: Codebook, seed: int, n: int) -> Tensor:
    """Directions (1, d, >= 4n): random, on cell boundaries, on and beside code points, special."""
    somewhere = random(seed, 1, book.components, n)
    points = book.decode(codes_of(book, somewhere))
    beside = unit(points + 1e-14 * random(seed + 1, 1, book.components, n))
    few = special(book)[..., torch.randperm(3**book.components - 1)[:n]]
    return unit(torch.cat([somewhere, on_boundaries(book, seed + 2, n), points, beside, few], -1))


def not_at_a_step(m: Tensor, magnitudes: Magnitudes) -> Tensor:
    """Where |Rv| and |v| cannot round apart, in the last bits of a float."""
    return magnitudes.encode(m * (1 - 1e-9)) == magnitudes.encode(m * (1 + 1e-9))


def cases(book: Codebook, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """4n vectors (1, d, N) or more, and a rotation (N, d, d) for each."""
    u = hard_vectors(book, seed, n)
    generator = torch.Generator().manual_seed(seed)
    # norms from far below the smallest step to far beyond the largest code
    v = u * 10 ** (-4 + 8 * torch.rand(u.shape[-1], generator=generator, dtype=torch.float64))
    v[..., ::97], v[..., 1::97] = u[..., ::97] * 1e-140, u[..., 1::97] * 1e140
    angles = 2 * math.pi * torch.rand(3, u.shape[-1], generator=generator, dtype=torch.float64)
    angles[:, ::11] = (angles[:, ::11] / (math.pi / 2)).round() * (math.pi / 2)  # axes stay axes
    angles[:, 5::11] *= 1e-7
    return v, Irrep(book.l, -1).D_from_angles(*angles)


def commutation(book: Codebook, magnitudes: Magnitudes, v: Tensor, rotations: Tensor) -> Tensor:
    """``|Q(Rv) - R Q(v)| / Q_m(|v|)`` where that is not 0/0."""

    def turned(x: Tensor) -> Tensor:
        return torch.einsum("nij,ajn->ain", rotations, x)

    m = norm(v)
    left, right = quantize_vectors(turned(v), book, magnitudes), turned(quantize_vectors(v, book, magnitudes))
    size = magnitudes.decode(magnitudes.encode(m))
    sure = not_at_a_step(m, magnitudes)
    assert bool((left[(sure & (size == 0)).expand_as(left)] == 0).all())
    keep = sure & (size > 0)
    return norm(left - right)[keep] / size[keep]


def test_figures_of_a_grid() -> None:
    grid = IntegerGrid(1, 8)
    assert (grid.levels, grid.components, grid.code_bits) == (127, 3, 24)
    assert math.degrees(grid.delta) == pytest.approx(0.391, abs=1e-3)
    assert grid.sin_delta(255, 7) == pytest.approx(math.sin(grid.delta), rel=1e-2)
    assert grid.sin_delta(0, 7) == math.sin(grid.delta)
    assert IntegerGrid(3, 12).delta < IntegerGrid(3, 8).delta < IntegerGrid(4, 8).delta


@pytest.mark.parametrize(("degree", "bits"), [(0, 8), (1, 1), (1, 17), (2, 2)])
def test_grids_that_would_lose_a_direction_are_refused(degree: int, bits: int) -> None:
    with pytest.raises(ConfigError):
        IntegerGrid(degree, bits)


@every_codebook
def test_rotation_and_rounding_commute_within_the_bound(name: str) -> None:
    book, drawn, largest = make(name), 0, 0.0
    sine = math.sin(min(book.delta, math.pi / 2))

    @settings(max_examples=4, deadline=None, database=None)
    @given(st.integers(0, 2**31))
    def check(seed: int) -> None:
        nonlocal drawn, largest
        v, rotations = cases(book, seed, 800)
        drawn += v.shape[-1]
        for magnitudes in (LinearMagnitudes(8, 0.01), LogMagnitudes(6, 3.0, 1e-3)):
            error = commutation(book, magnitudes, v, rotations)
            assert len(error) > 0.5 * v.shape[-1]
            assert float(error.max()) <= 2 * sine + 1e-9
            largest = max(largest, float(error.max()))

    check()
    assert drawn >= 10_000
    assert largest > sine  # half of the bound is reached: it means something


@every_codebook
def test_no_direction_lies_further_than_the_covering_angle_and_some_nearly_do(name: str) -> None:
    book = make(name)
    share = MAKERS[name][1]
    about = special(book).repeat(1, 1, 10_000 // 3**book.components + 1)  # a Fibonacci lattice's gaps
    about = unit(unit(about) + book.delta * random(1, *about.shape))
    u = torch.cat([unit(random(0, 1, book.components, 10_000)), about], -1)
    worst = 0.0
    for step in range(20):
        far = miss(book, u)
        worst = max(worst, float(far.max()))
        best = u[..., far.flatten().topk(100).indices].repeat(1, 1, 20)
        moves = book.delta * 0.85**step * random(step, *best.shape)
        u = torch.cat([best[..., :100], unit(best + moves)], -1)  # climb
    assert share * book.delta < worst <= book.delta * (1 + 1e-9) + 1e-12


@every_codebook
def test_a_code_point_is_its_own_code(name: str) -> None:
    book = make(name)
    codes = codes_of(book, hard_vectors(book, 3, 1_000))
    if isinstance(book, IntegerGrid):  # many of its points lie close to one ray
        length = norm(codes)
        safe = (length - book.levels).abs() * codes.abs().amax(-2, keepdim=True) / length < 0.5 - 1e-9
        codes = codes[..., safe.flatten()]
    points = book.decode(codes)
    assert codes.numel() > 500
    assert torch.equal(codes_of(book, points), codes)
    assert torch.allclose(norm(points), torch.ones(1, dtype=torch.float64), atol=1e-14)


@every_codebook
def test_there_are_no_more_directions_than_the_bits_can_tell_apart(name: str) -> None:
    book = make(name)
    codes = codes_of(book, hard_vectors(book, 3, 1_000)).long()
    if codes.shape[-2] == 1:
        assert int(codes.min()) >= 0 and int(codes.max()) < 2**book.code_bits
    else:
        assert codes.shape[-2] * math.ceil(math.log2(2 * int(codes.abs().max()) + 1)) <= book.code_bits


@every_codebook
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_direction_decodes_to_nan(name: str, dtype: torch.dtype) -> None:
    book = make(name)
    v = random(0, 4, book.components, 6).to(dtype)
    v[:, :, 0] = 0.0
    v[:, 0, 1] = torch.nan
    v[:, -1, 2] = torch.inf
    magnitude = norm(v)
    magnitude[:2, ..., 1:3] = 1.0  # whatever the norm says
    magnitude[..., 3], magnitude[..., 4] = torch.nan, torch.inf
    got = book.decode(book.encode(v, magnitude))
    assert bool(torch.isnan(got[..., :5]).any(-2).all())
    assert bool(torch.isfinite(got[..., 5]).all())


@every_codebook
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_vectors_have_the_same_direction_or_none(name: str, dtype: torch.dtype) -> None:
    book = make(name)
    v = random(1, 2, book.components, 50).to(dtype)
    want = codes_of(book, v)
    edge = torch.finfo(dtype)
    for power in (math.log2(edge.tiny) / 2 + 16, -20, 20, math.log2(edge.max) / 2 - 8):
        assert torch.equal(codes_of(book, v * 2.0 ** round(power)), want)
    for factor in (edge.tiny, edge.tiny * 1e-5, edge.max / 8):  # |v| vanishes or overflows
        got, u = book.decode(codes_of(book, v * factor)), unit(v.double())
        known = torch.isfinite(got)
        assert float((got - u)[known].abs().max() if bool(known.any()) else 0.0) <= 2 * math.sin(
            book.delta / 2
        )


@every_codebook
def test_layouts_and_sizes(name: str) -> None:
    book = make(name)
    v = random(5, 2, 3, book.components, 4)
    codes = codes_of(book, v)
    assert codes.shape in {(2, 3, 1, 4), v.shape}
    assert book.decode(codes).shape == v.shape
    for i, j, c in itertools.product(range(2), range(3), range(4)):
        alone = v[i, j, :, c][:, None]
        assert torch.equal(codes_of(book, alone)[:, 0], codes[i, j, :, c])
    for none in (v[:0], v[..., :0]):
        assert book.decode(codes_of(book, none)).shape == none.shape


@pytest.mark.parametrize("name", [name for name in MAKERS if not isinstance(make(name), IntegerGrid)])
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    book = make(name)
    v = random(0, 2, book.components, 4)
    for bad, magnitude in ((v[:, 1:], norm(v)), (v, v.norm(dim=1)), (v[0, :, 0], norm(v)[0, :, 0])):
        with pytest.raises(IrrepsError, match="norms"):
            book.encode(bad, magnitude)


def test_operand_rounding_widens_the_bound_of_every_codebook() -> None:
    for name in MAKERS:
        book = make(name)
        wide = operand_sin_delta(book, 100, 7)
        assert math.sin(min(book.delta, math.pi / 2)) < wide < operand_sin_delta(book, 10, 7)
        if isinstance(book, IntegerGrid):
            assert book.sin_delta(100, 7) == wide
