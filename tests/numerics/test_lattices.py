"""Integer points of cubes and pyramids: their numbers, their codes, the nearest of a face."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.errors import ConfigError
from gaq_compile.numerics.codebooks import norm
from gaq_compile.numerics.lattices import CubeGrid, PackedIntegers, PyramidGrid, pyramid_size
from gaq_compile.numerics.sphere import OctahedralGrid

pytestmark = pytest.mark.usefixtures("one_thread")

FACES = [
    *(CubeGrid(l, b) for l, b in ((1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (3, 1))),
    *(PyramidGrid(l, k) for l, k in ((1, 1), (1, 4), (1, 9), (2, 2), (2, 5), (3, 2), (3, 4))),
]
# finds the nearest direction, not the nearest point of a face: test_sphere.py
SMALL = [*FACES, *(OctahedralGrid(b) for b in (2, 3, 4, 6))]


@cache
def every_point(grid: PackedIntegers) -> Tensor:
    """All integer vectors on the polytope, by brute force: (n, d)."""
    box = itertools.product(range(-grid.largest, grid.largest + 1), repeat=grid.components)
    if isinstance(grid, CubeGrid):
        found = [n for n in box if max(map(abs, n)) == grid.levels]
    else:
        found = [n for n in box if sum(map(abs, n)) == grid.largest]
    return torch.tensor(found)


@pytest.mark.parametrize("grid", SMALL, ids=str)
def test_every_point_has_one_code_that_reads_back(grid: PackedIntegers) -> None:
    n = every_point(grid)
    codes = grid.encode(n.double().T[None], norm(n.double().T[None]))
    assert len(n) == grid.size <= 2**grid.code_bits
    assert torch.equal(grid.integers(codes)[0].T, n)
    assert len(torch.unique(codes)) == grid.size
    u = grid.decode(codes)
    assert torch.equal(grid.encode(u, norm(u)), codes)
    assert len(torch.unique(u[0].T.round(decimals=9) + 0.0, dim=0)) == grid.size  # different directions


@pytest.mark.parametrize("grid", SMALL, ids=str)
def test_every_integer_is_a_point_or_no_code(grid: PackedIntegers) -> None:
    codes = torch.arange(-3, 2**grid.code_bits + 3)[None, None]
    n, u = grid.integers(codes), grid.decode(codes)
    points = {tuple(p) for p in every_point(grid).tolist()}
    read = [tuple(p) for p in n[0].T.tolist()]
    assert {p for p in read if any(p)} == points
    assert torch.equal(torch.isnan(u).all(-2), (n == 0).all(-2))
    assert not any(any(p) for p in (*read[:3], *read[-3:]))
    if isinstance(grid, PyramidGrid):
        assert len([p for p in read if any(p)]) == len(points)  # no point has two codes


@pytest.mark.parametrize("kind", [CubeGrid, PyramidGrid])
@pytest.mark.parametrize(
    ("degree", "code_bits"), [(1, 24), (1, 30), (2, 40), (2, 60), (3, 56), (3, 60), (4, 60)]
)
def test_long_codes_read_back(kind: type[CubeGrid] | type[PyramidGrid], degree: int, code_bits: int) -> None:
    grid = kind.within(degree, code_bits)
    v = torch.randn(50, 2 * degree + 1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v[0, :, :] = 0.0
    v[0, 0, :] = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)  # the first and the last codes
    n = grid.nearest(v, norm(v))
    codes = grid.encode(v, norm(v))
    assert torch.equal(grid.integers(codes).double(), n + 0.0)
    assert int(codes.min()) >= 0 and int(codes.max()) < 2**grid.code_bits
    assert grid.code_bits <= code_bits
    for dtype in (torch.float64, torch.float32):
        u = grid.decode(codes, dtype)
        assert u.dtype == dtype
        assert torch.equal(grid.encode(u, norm(u)), codes)


@pytest.mark.parametrize("kind", [CubeGrid, PyramidGrid])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_within_finds_the_finest(kind: type[CubeGrid] | type[PyramidGrid], degree: int) -> None:
    for code_bits in range(10, 45):
        if kind is CubeGrid and 2 * (2 * degree + 1) * 9**degree > 2**code_bits:
            with pytest.raises(ConfigError):
                kind.within(degree, code_bits)
            continue
        grid = kind.within(degree, code_bits)
        assert grid.code_bits <= code_bits
        if grid.largest < 2**15 - 1:
            assert kind(degree, grid.largest + 1).code_bits > code_bits


def test_numbers_of_a_pyramid() -> None:
    assert [pyramid_size(3, k) for k in (0, 1, 2, 7)] == [1, 6, 18, 4 * 49 + 2]
    assert pyramid_size(0, 0) == 1 and pyramid_size(0, 3) == 0 and pyramid_size(1, 5) == 2
    assert PyramidGrid(1, 127).size == OctahedralGrid(8).size
    assert PyramidGrid(1, 127).delta == pytest.approx(OctahedralGrid(8).delta, rel=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(FACES))
def test_the_nearest_point_of_the_face_is_found(seed: int, grid: PackedIntegers) -> None:
    v = torch.randn(
        1, grid.components, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    length = v.abs().amax(-2) if isinstance(grid, CubeGrid) else v.abs().sum(-2)
    a = (v * (grid.largest / length[:, None]))[0].T
    points = every_point(grid).double()
    n = grid.nearest(v, norm(v))[0].T
    gap = torch.cdist(a, points, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert torch.allclose((a - n).norm(dim=1), gap, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [CubeGrid, PyramidGrid])
@pytest.mark.parametrize(("degree", "n"), [(0, 5), (-1, 5), (1, 0), (1, -3), (1, 2**15), (6, 2**14)])
def test_grids_that_cannot_be(kind: type[CubeGrid] | type[PyramidGrid], degree: int, n: int) -> None:
    with pytest.raises(ConfigError):
        kind(degree, n)


@pytest.mark.parametrize("kind", [CubeGrid, PyramidGrid])
@pytest.mark.parametrize(("degree", "code_bits"), [(0, 24), (1, 0), (1, 61), (3, 3)])
def test_bits_that_cannot_be(kind: type[CubeGrid] | type[PyramidGrid], degree: int, code_bits: int) -> None:
    with pytest.raises(ConfigError):
        kind.within(degree, code_bits)


def test_a_pyramid_too_coarse_for_its_bound_is_refused() -> None:
    assert PyramidGrid(3, 2).delta < math.pi / 2
    with pytest.raises(ConfigError, match="total 1"):
        PyramidGrid(3, 1)


def test_vectors_whose_components_sum_to_infinity_have_no_direction() -> None:
    v, magnitude = torch.full((1, 5, 1), 2e38), torch.ones(1, 1, 1)  # whoever made that norm knew more
    grid = PyramidGrid.within(2, 40)
    assert bool(torch.isnan(grid.nearest(v, magnitude)).all())
    assert int(grid.encode(v, magnitude)) == -1
    u = CubeGrid.within(2, 40).decode(CubeGrid.within(2, 40).encode(v, magnitude))
    assert torch.allclose(u, torch.full_like(u, 1 / math.sqrt(5)))


@pytest.mark.parametrize("grid", [CubeGrid(1, 5), PyramidGrid(1, 5)], ids=str)
def test_vectors_too_small_to_invert_have_no_direction(grid: PackedIntegers) -> None:
    v, magnitude = torch.tensor([[[1e-40], [0.0], [-2e-40]]]), torch.ones(1, 1, 1)
    assert bool(torch.isnan(grid.nearest(v, magnitude)).all())
    assert int(grid.encode(v, magnitude)) == -1
