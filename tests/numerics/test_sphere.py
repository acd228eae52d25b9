"""Directions on S^2 and learned ones: the nearest is found exactly; limits and figures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.errors import ConfigError, GaqError
from gaq_compile.numerics.codebooks import Codebook, IntegerGrid, norm
from gaq_compile.numerics.lattices import CubeGrid, PyramidGrid
from gaq_compile.numerics.sphere import (
    FibonacciLattice,
    IcosahedralGrid,
    LearnedDirections,
    OctahedralGrid,
    PointTable,
    _k_means_step,
    covering_angle,
    make_codebook,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(v: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v, dim=-1)


def all_points(book: OctahedralGrid | PointTable) -> Tensor:
    """Every direction once, (n, d)."""
    if isinstance(book, PointTable):
        return book.points
    k = book.largest
    half = [(x, y, k - abs(x) - abs(y)) for x in range(-k, k + 1) for y in range(-k, k + 1)]
    half = [n for n in half if n[2] >= 0]
    both = half + [(x, y, -z) for x, y, z in half if z > 0]
    return unit(torch.tensor(both, dtype=torch.float64))


def hard_directions(points: Tensor, seed: int, n: int) -> Tensor:
    """Random ones, near poles and mirror planes, and near middles of two and of three neighbours."""
    d = points.shape[1]
    near = random(seed + 1, n, d) * 10.0 ** -torch.arange(n).remainder(9)[:, None]
    axes = (
        torch.eye(d, dtype=torch.float64)[torch.arange(n) % d] * (1.0 - 2.0 * (torch.arange(n) % 2))[:, None]
    )
    thin = random(seed + 2, n, d)
    thin[torch.arange(n), torch.arange(n) % d] *= 1e-9
    some = points[torch.randint(len(points), (n,), generator=torch.Generator().manual_seed(seed))]
    order = (some @ points.T).topk(min(4, len(points)), dim=1).indices
    two, three = some + points[order[:, 1]], some + points[order[:, 1]] + points[order[:, 2]]
    noise = 1e-10 * random(seed + 3, n, d)
    found = torch.cat([random(seed, n, d), axes + near, thin, axes, two, two + noise, three, three + noise])
    return unit(found[found.norm(dim=1) > 1e-3])


def excess(book: Codebook, points: Tensor, u: Tensor) -> float:
    """How much further than the nearest point the found one is, at most."""
    v = u.T[None]
    found = (book.decode(book.encode(v, norm(v)))[0].T - u).norm(dim=1)
    nearest = torch.cdist(u, points, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return float((found - nearest).abs().max())


EXACT = [
    *(OctahedralGrid(b) for b in (2, 3, 4, 5, 6)),
    *(FibonacciLattice(n) for n in (4, 5, 30, 257, 2000)),
    *(IcosahedralGrid(f) for f in (1, 2, 3, 7, 14)),
]


@pytest.mark.parametrize("book", EXACT, ids=str)
def test_the_nearest_direction_is_found(book: OctahedralGrid | PointTable) -> None:
    points = all_points(book)

    @settings(max_examples=8, deadline=None, database=None)
    @given(st.integers(0, 2**31))
    def check(seed: int) -> None:
        assert excess(book, points, hard_directions(points, seed, 60)) < 1e-13

    check()


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_nearest_learned_direction_is_found(degree: int) -> None:
    book = LearnedDirections.fit(random(0, 500, 2 * degree + 1, 2), 6)
    assert (book.l, book.size, book.code_bits) == (degree, 64, 6)
    for seed in range(5):
        assert excess(book, book.points, hard_directions(book.points, seed, 60)) < 1e-13


@pytest.mark.parametrize("bits", [8, 9])
def test_a_fine_octahedral_grid_finds_what_a_search_tree_finds(bits: int) -> None:
    book = OctahedralGrid(bits)
    points = all_points(book)
    table = LearnedDirections(points)
    v = torch.cat([random(0, 20_000, 3), hard_directions(points[::7], 0, 500)]).T[None]
    a, b = (x.decode(x.encode(v, norm(v))) for x in (book, table))
    u = v / norm(v)
    assert float((norm(a - u) - norm(b - u)).abs().max()) < 1e-14
    assert float((a == b).all(-2).double().mean()) > 0.8  # the rest are ties


@pytest.mark.parametrize("book", EXACT, ids=str)
def test_all_directions_are_their_own_codes(book: OctahedralGrid | PointTable) -> None:
    v = all_points(book).T[None]
    codes = book.encode(v, norm(v))
    assert len(torch.unique(codes)) == book.size == v.shape[-1] <= 2**book.code_bits
    u = book.decode(codes)
    assert torch.allclose(u, v, rtol=0, atol=1e-15)
    assert torch.equal(book.encode(u, norm(u)), codes)
    assert torch.equal(book.encode(u.float(), norm(u.float())), codes)


@pytest.mark.parametrize("book", EXACT[2:], ids=str)
def test_the_claimed_covering_angle_is_the_computed_one(book: OctahedralGrid | PointTable) -> None:
    computed = covering_angle(all_points(book))
    assert computed <= book.delta * (1 + 1e-12) + 1e-9  # computed adds 1e-9
    assert computed > (0.85 if book.size < 100 else 0.95) * book.delta


def test_covering_angle_of_an_octahedron_and_of_points_that_leave_a_gap() -> None:
    axes = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    assert covering_angle(axes) == pytest.approx(math.acos(1 / math.sqrt(3)), abs=1e-8)
    octant = torch.cat([axes[:3], axes[:3].sum(0, keepdim=True) / math.sqrt(3)])
    assert covering_angle(octant) == pytest.approx(math.acos(-1 / math.sqrt(3)), abs=1e-8)
    assert covering_angle(axes[[0, 1, 3, 4]]) == math.pi  # all in a plane
    assert covering_angle(axes[:2]) == math.pi
    assert covering_angle(random(0, 100, 11)) == math.pi  # too many facets: the trivial bound
    rest = torch.cat([torch.eye(7), -torch.eye(7)]).double()
    assert covering_angle(rest) == pytest.approx(math.acos(1 / math.sqrt(7)), abs=1e-8)


def test_fibonacci_covers_large_sizes_as_it_covers_small_ones() -> None:
    counts = (2**14, 2**16, 2**17)
    found = [FibonacciLattice(n).delta * math.sqrt(n) for n in counts]
    assert found == sorted(found, reverse=True)
    assert found[0] < FibonacciLattice(2**17 + 1).delta * math.sqrt(2**17 + 1) == pytest.approx(2.73)


def test_figures() -> None:
    assert [OctahedralGrid(b).size for b in (2, 4, 8)] == [6, 198, 64518]
    assert [IcosahedralGrid(f).size for f in (1, 5, 80)] == [12, 252, 64002]
    for name, size in (("octahedral", 4002), ("fibonacci", 4096), ("icosahedral", 4002)):
        book = make_codebook(name, 1, 12)
        assert book.code_bits <= 12 and len(torch.unique(all_points(book), dim=0)) <= max(size, 4096)
        assert make_codebook(name, 1, 16).delta < book.delta < make_codebook(name, 1, 8).delta
    assert make_codebook("integer", 2, 40) == IntegerGrid(2, 8)
    assert make_codebook("cube", 2, 40) == CubeGrid.within(2, 40)
    assert make_codebook("pyramid", 3, 16) == PyramidGrid(3, 8)


@pytest.mark.parametrize(
    ("name", "degree", "code_bits"),
    [
        ("hexagonal", 1, 8),
        ("octahedral", 2, 8),
        ("octahedral", 1, 3),
        ("octahedral", 1, 34),
        ("fibonacci", 1, 1),
        ("fibonacci", 1, 25),
        ("fibonacci", 3, 8),
        ("icosahedral", 1, 3),
        ("icosahedral", 1, 25),
        ("icosahedral", 1, -1),
        ("integer", 2, 9),
        ("cube", 1, 2),
        ("pyramid", 0, 8),
    ],
)
def test_codebooks_that_cannot_be(name: str, degree: int, code_bits: int) -> None:
    with pytest.raises(ConfigError):
        make_codebook(name, degree, code_bits)


def test_the_square_folds_where_the_halves_meet() -> None:
    grid = OctahedralGrid(3)  # K = 3, codes (i + 3) * 8 + j + 3
    for x, y, z in itertools.product((-1, 0, 1), repeat=3):
        if abs(x) + abs(y) + abs(z) == 1:
            code = grid.encode(torch.tensor([[[x], [y], [z]]]).double(), torch.ones(1, 1, 1).double())
            want = (6, 6) if z < 0 else (3 * x + 3, 3 * y + 3)  # the lower pole is all four corners
            assert divmod(int(code), 8) == want
    corners = torch.tensor([0 * 8 + 0, 0 * 8 + 6, 6 * 8 + 0, 6 * 8 + 6])[None, None]
    assert torch.equal(grid.integers(corners)[0].T, torch.tensor([[0, 0, -3]] * 4))


@pytest.mark.parametrize("bits", [3, 4, 6, 8, 10])
def test_the_triangles_of_an_octahedral_grid_are_acute(bits: int) -> None:
    k = OctahedralGrid(bits).largest
    x, y = torch.meshgrid(torch.arange(k), torch.arange(k), indexing="ij")
    for turn in (0, 1):  # triangles that point up and down
        inside = x + y < k - turn
        # the corners of the rhombus at (x, y), which both triangles share two of
        first = (x[inside] + turn, y[inside] + turn)
        corners = (first, (x[inside] + 1, y[inside]), (x[inside], y[inside] + 1))
        a, b, c = (unit(torch.stack([i, j, k - i - j], 1).double()) for i, j in corners)
        for p, q, r in ((a, b, c), (b, c, a), (c, a, b)):
            assert float(((q - p) * (r - p)).sum(1).min()) > 0


# ---- learned


def test_learning_finds_clusters() -> None:
    centres = unit(random(1, 8, 5))
    samples = centres[torch.arange(800) % 8] + 0.01 * random(2, 800, 5)
    book = LearnedDirections.fit((samples * torch.rand(800, 1).add(0.1)).T[None], 3)
    gap = torch.cdist(centres, book.points)
    found = int((gap.amin(1) < 0.05).sum())
    assert book.size == 8 and found >= 5  # a local minimum may share a cluster
    assert book.delta > math.pi / 3  # eight directions cannot cover more


def test_learning_improves_on_where_it_starts_and_is_reproducible() -> None:
    v = random(0, 300, 3, 4)

    def error(book: LearnedDirections) -> float:
        return float((book.decode(book.encode(v, norm(v))) - v / norm(v)).square().sum(-2).mean())

    start, end = LearnedDirections.fit(v, 5, iterations=0), LearnedDirections.fit(v, 5)
    assert error(end) < 0.8 * error(start)
    assert torch.equal(end.points, LearnedDirections.fit(v, 5).points)
    assert not torch.equal(end.points, LearnedDirections.fit(v, 5, seed=1).points)


def test_a_direction_that_attracts_none_becomes_the_sample_furthest_from_all() -> None:
    samples = unit(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 1.0, 0.0]]).double())
    points = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]).double()
    moved = _k_means_step(points, samples)
    assert torch.allclose(moved, torch.stack([unit(samples.sum(0)), samples[2]]))


def test_samples_that_repeat_weigh_more() -> None:
    v = torch.tensor([[1.0, 0.0, 0.0]] * 99 + [[0.0, 1.0, 0.0]], dtype=torch.float64)
    point = LearnedDirections.fit(v[:, :, None], 0).points[0]
    assert torch.allclose(point, unit(torch.tensor([99.0, 1.0, 0.0]).double()))


def test_learning_from_little() -> None:
    v = torch.zeros(10, 3, 2)
    v[0, :, 0] = torch.tensor([0.0, -0.0, 2.0])
    v[1, :, 1] = torch.tensor([-0.0, 0.0, 1e-30])  # the same direction
    book = LearnedDirections.fit(v, 8)
    assert book.points.tolist() == [[0.0, 0.0, 1.0]]
    assert book.code_bits == 0 and book.delta == math.pi
    v[2, :, 0] = -v[0, :, 0]  # two that cancel
    assert LearnedDirections.fit(v, 0).size == 1
    assert LearnedDirections.fit(v, 8).size == 2


def test_samples_and_tables_that_cannot_be() -> None:
    v = torch.zeros(4, 3, 2)
    with pytest.raises(ConfigError, match="0 nonzero"):
        LearnedDirections.fit(v, 4)
    with pytest.raises(ConfigError, match="17 bits"):
        LearnedDirections.fit(v + 1, 17)
    for bad in (v[:, :2], v[0, :, 0], v[:, :1]):
        with pytest.raises(ConfigError, match="2l"):
            LearnedDirections.fit(bad + 1, 4)
    v[0, 0, 0] = torch.nan
    with pytest.raises(GaqError, match="NaN"):
        LearnedDirections.fit(v, 4)
    axes = torch.eye(3, dtype=torch.float64)
    for bad in (axes[:, :2], axes[0], axes.float(), 2 * axes, axes[[0, 1, 1]], axes[:0], axes * torch.nan):
        with pytest.raises(ConfigError):
            LearnedDirections(bad)
