"""Directions on S^2 (l = 1), and directions learned from samples (every l).

* :class:`OctahedralGrid`: integer points of an octahedron, folded to a square; no table.
* :class:`FibonacciLattice`: points on a spiral of equal areas; a table.
* :class:`IcosahedralGrid`: the faces of an icosahedron in f^2 triangles each; a table.
* :class:`LearnedDirections`: spherical k-means on sample vectors; a table.

All encode to the nearest direction exactly (up to ties within rounding), poles and edges included.
:func:`make_codebook` makes any codebook by name.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError, cKDTree
from torch import Tensor

from ..errors import ConfigError, GaqError
from .codebooks import AXIS, NONE, Codebook, IntegerGrid, has_direction
from .lattices import CubeGrid, PackedIntegers, PyramidGrid

TABLE_BITS = 24  # 16.8 million directions take 0.4 GiB, and their search tree as much again
FIBONACCI = 2.73  # delta sqrt(N) for large N
FACETS = {3: 2, 5: 32, 7: 1300}  # of a convex hull in d dimensions, per point
MANY_FACETS = 1_000_000  # take some ten seconds


@dataclass(frozen=True)
class OctahedralGrid(PackedIntegers):
    """Integer points of an octahedron, ``|x| + |y| + |z| = K``, in a square of two integers.

    The upper half is projected along z: code ``(i, j) = (x, y)``; the lower half's four triangles fold
    outwards over the square's edges: ``i = (K - |y|) sign(x)``, ``j = (K - |x|) sign(y)``
    (Z. H. Cigolle et al., "A Survey of Efficient Representations for Independent Unit Vectors", JCGT 3,
    2014). A code is ``(i + K) 2^bits + j + K`` with ``K = 2^(bits-1) - 1``; there are ``4K^2 + 2``
    directions. Points of the square's edge have two codes, of which encode gives one.

    A point of the octahedron lies within sqrt(2/3) of a grid point of its face, whose distance from the
    centre is K/sqrt(3), so ``delta = 2 arctan(1 / (sqrt(2) K))`` (proven; see :class:`PyramidGrid`).
    It is reached, to first order in 1/K, in the middle of a face.

    Args:
        bits: per coordinate of the square, 2 to 16.

    Raises:
        ConfigError: for other bits.
    """

    bits: int
    l = 1

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ConfigError(
                f"no octahedral grid of {self.bits} bits per coordinate", fix="use 2 to 16 bits"
            )

    @classmethod
    def within(cls, code_bits: int) -> OctahedralGrid:
        """The finest octahedral grid of at most so many bits per direction.

        Raises:
            ConfigError: if there is none.
        """
        return cls(code_bits // 2)

    @property
    def largest(self) -> int:
        """K, the largest |n_c|."""
        return 2 ** (self.bits - 1) - 1

    @property
    def size(self) -> int:
        """How many directions there are: 4 K^2 + 2."""
        return 4 * self.largest**2 + 2

    @property
    def code_bits(self) -> int:
        """Bits of one stored direction."""
        return 2 * self.bits

    @property
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this."""
        return 2 * math.atan(1 / (math.sqrt(2) * self.largest))

    def _nearest(self, v: Tensor) -> Tensor:
        """The nearest direction, of the four points about ``a``, which is |v| scaled onto the octahedron.

        A mirror keeps the grid, so one nearest point has v's signs: no candidate lies over an edge of
        the octahedron. Seen from the centre the grid's triangles are all acute (checked for every one
        up to K = 2047; the smallest cosine falls as 1/(4 K^2)), hence each holds its own circumcentre,
        and the nearest is a corner of the triangle about a; the four points hold it and its neighbour.
        Since ``a x n = a x (n - a)``, the sine below loses no digits to cancellation.
        """
        a = v.double().abs()
        a = a / a.amax(AXIS, keepdim=True)
        a = a * (self.largest / a.sum(AXIS, keepdim=True))
        corner, best, least = torch.floor(a), torch.zeros_like(a), torch.full_like(a[..., :1, :], torch.inf)
        for dx, dy in itertools.product((0, 1), repeat=2):
            x, y = corner[..., 0, :] + dx, corner[..., 1, :] + dy
            n = torch.stack([x, y, self.largest - x - y], AXIS)
            sine = torch.linalg.cross(a, n - a, dim=AXIS).square().sum(AXIS, keepdim=True)
            sine = sine / n.square().sum(AXIS, keepdim=True)
            nearer = (sine < least) & (n >= 0).all(AXIS, keepdim=True)
            best, least = torch.where(nearer, n, best), torch.where(nearer, sine, least)
        return torch.where(v < 0, -best, best).to(v.dtype)

    def _is_code(self, codes: Tensor) -> Tensor:
        side = 2 * self.largest
        return (codes >= 0) & (codes >> self.bits <= side) & (codes & (2**self.bits - 1) <= side)

    def _pack(self, n: Tensor) -> Tensor:
        x, y, z = n.unbind(AXIS)
        below = z < 0
        i = torch.where(below, torch.where(x < 0, -1, 1) * (self.largest - y.abs()), x)
        j = torch.where(below, torch.where(y < 0, -1, 1) * (self.largest - x.abs()), y)
        return ((i + self.largest) << self.bits) | (j + self.largest)

    def _unpack(self, codes: Tensor) -> Tensor:
        i = (codes >> self.bits) - self.largest
        j = (codes & (2**self.bits - 1)) - self.largest
        z = self.largest - i.abs() - j.abs()
        below = z < 0
        x = torch.where(below, torch.where(i < 0, -1, 1) * (self.largest - j.abs()), i)
        y = torch.where(below, torch.where(j < 0, -1, 1) * (self.largest - i.abs()), j)
        return torch.stack([x, y, z], AXIS)


class PointTable(ABC):
    """A codebook given by its unit vectors; a direction's code is a place in the table.

    The nearest is found by a search tree on the CPU, in float64, whatever v is; so ``encode`` cannot be
    traced into a graph (a kernel may take the largest ``points @ v`` instead).
    """

    @property
    @abstractmethod
    def points(self) -> Tensor:
        """The unit vectors, (size, 2l+1) float64."""

    @property
    def components(self) -> int:
        """2l + 1."""
        return self.points.shape[1]

    @property
    def l(self) -> int:  # noqa: E743 - the degree's name everywhere
        """The degree."""
        return self.components // 2

    @property
    def size(self) -> int:
        """How many directions there are."""
        return len(self.points)

    @property
    def code_bits(self) -> int:
        """Bits of one stored direction."""
        return (self.size - 1).bit_length()

    @cached_property
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this."""
        return covering_angle(self.points)

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.points.numpy())

    def encode(self, v: Tensor, magnitude: Tensor) -> Tensor:
        """Places (..., 1, mul) int64 of the directions of ``v`` (..., 2l+1, mul).

        Only whether ``magnitude`` (..., 1, mul) is positive and finite matters. -1 where there is no
        direction.

        Raises:
            IrrepsError: if a tensor has another shape.
        """
        known = has_direction(self, v, magnitude)
        u = torch.where(known, v, 1.0).detach().double().movedim(AXIS, -1)
        u = u / u.abs().amax(-1, keepdim=True)  # squares of tiny vectors would vanish
        places = self._search(u.flatten(0, -2)).view(u.shape[:-1]).unsqueeze(AXIS)
        return torch.where(known, places.to(v.device), NONE)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Unit vectors (..., 2l+1, mul) of places (..., 1, mul); NaN for what is no place."""
        known = (codes >= 0) & (codes < self.size)
        found = self.points.to(codes.device, dtype)[torch.where(known, codes, 0).squeeze(AXIS)]
        return torch.where(known, found.movedim(-1, AXIS), torch.nan)

    def _search(self, u: Tensor) -> Tensor:
        """Places (n,) of the points nearest to nonzero vectors (n, 2l+1)."""
        return torch.from_numpy(self._tree.query(torch.nn.functional.normalize(u, dim=-1).cpu().numpy())[1])


@dataclass(frozen=True)
class FibonacciLattice(PointTable):
    """Points of equal areas along a spiral: ``z_i = 1 - (2i+1)/N``, turned by the golden angle each.

    ``phi_i = 2 pi i / golden ratio`` (A. Gonzalez, "Measurement of areas on a sphere using Fibonacci and
    latitude-longitude lattices", Math. Geosci. 42, 49, 2010).

    Args:
        count: N, 4 to 2^24.

    Raises:
        ConfigError: for another count.
    """

    count: int

    def __post_init__(self) -> None:
        if not 4 <= self.count <= 2**TABLE_BITS:
            raise ConfigError(
                f"no Fibonacci lattice of {self.count} points", fix=f"use 4 to 2^{TABLE_BITS} points"
            )

    @classmethod
    def within(cls, code_bits: int) -> FibonacciLattice:
        """The finest Fibonacci lattice of at most so many bits per direction.

        Raises:
            ConfigError: for fewer than 2 or more than 24 bits.
        """
        return cls(2**code_bits if 0 <= code_bits <= TABLE_BITS else 0)

    @cached_property
    def points(self) -> Tensor:
        """The unit vectors, (N, 3) float64."""
        i = torch.arange(self.count, dtype=torch.float64)
        z = 1 - (2 * i + 1) / self.count
        phi = 2 * math.pi * torch.remainder(i * ((math.sqrt(5) - 1) / 2), 1.0)
        r = torch.sqrt(1 - z * z)
        return torch.stack([r * torch.cos(phi), r * torch.sin(phi), z], 1)

    @cached_property
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this.

        Computed from all empty circles (:func:`covering_angle`) up to 2^17 points. Beyond, it is
        ``FIBONACCI / sqrt(N)``, measured but not proven: the widest gap is at the poles, where the
        lattice looks alike at every size; delta sqrt(N) falls from 2.734 (N = 20) to 2.7281 (N = 2^17).
        """
        if self.count <= 2**17:
            return covering_angle(self.points)
        return FIBONACCI / math.sqrt(self.count)


@dataclass(frozen=True)
class IcosahedralGrid(PointTable):
    """The faces of an icosahedron cut into f^2 equal triangles each, projected onto the sphere.

    There are ``10 f^2 + 2`` directions: corners, then edges, then faces. With edges of length 1, a
    point of a face lies within ``1 / (sqrt(3) f)`` of a grid point, and the face's distance from the
    centre is ``h = (3 sqrt(3) + sqrt(15)) / 12``; so ``delta = 2 arctan(1 / (2 sqrt(3) f h))`` (proven;
    see :class:`~gaq_compile.numerics.lattices.PyramidGrid`).

    Args:
        frequency: f, 1 to 1295.

    Raises:
        ConfigError: for another frequency.
    """

    frequency: int

    def __post_init__(self) -> None:
        if not (self.frequency >= 1 and 10 * self.frequency**2 + 2 <= 2**TABLE_BITS):
            raise ConfigError(f"no icosahedral grid of frequency {self.frequency}", fix="use 1 to 1295")

    @classmethod
    def within(cls, code_bits: int) -> IcosahedralGrid:
        """The finest icosahedral grid of at most so many bits per direction.

        Raises:
            ConfigError: for fewer than 4 or more than 24 bits.
        """
        return cls(math.isqrt((2**code_bits - 2) // 10) if 4 <= code_bits <= TABLE_BITS else 0)

    @cached_property
    def points(self) -> Tensor:
        """The unit vectors, (10 f^2 + 2, 3) float64."""
        corners = _icosahedron()
        near = torch.cdist(corners, corners) < 2.1  # edges are 2 long, the next distance is 3.2
        edges = [(a, b) for a, b in itertools.combinations(range(12), 2) if near[a, b]]
        faces = [(a, b, c) for a, b in edges for c in range(b + 1, 12) if near[a, c] and near[b, c]]
        f = self.frequency
        # the inside of every edge and face on its own: no point is made twice
        inner = torch.arange(1, f)
        along = torch.stack([inner, f - inner], 1)
        i, j = torch.meshgrid(inner, inner, indexing="ij")
        across = torch.stack([i, j, f - i - j], 2)[i + j < f]
        parts = [
            corners,
            torch.einsum("ka,eax->ekx", along.double(), corners[torch.tensor(edges)]).flatten(0, 1),
            torch.einsum("ka,eax->ekx", across.double(), corners[torch.tensor(faces)]).flatten(0, 1),
        ]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    @cached_property
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this."""
        height = (3 * math.sqrt(3) + math.sqrt(15)) / 12
        return 2 * math.atan(1 / (2 * math.sqrt(3) * self.frequency * height))


@dataclass(frozen=True, eq=False)
class LearnedDirections(PointTable):
    """SVQ-KMeans: directions learned from sample vectors, as a table of floats.

    The baseline that ignores symmetry: its directions lie where the samples' did, so directions that the
    samples lack may be far from every code, and delta close to pi.

    Args:
        table: the unit vectors, (size, 2l+1) float64 on the CPU, pairwise different.

    Raises:
        ConfigError: for another shape or type, vectors not of unit length, or two of them alike.
    """

    table: Tensor

    def __post_init__(self) -> None:
        p = self.table
        shaped = p.ndim == 2 and len(p) > 0 and p.shape[1] >= 3 and p.shape[1] % 2 == 1
        if not (shaped and p.dtype == torch.float64 and p.device.type == "cpu"):
            raise ConfigError(
                f"directions must be (size, 2l+1) float64 on the CPU, got {p.dtype} {tuple(p.shape)}"
            )
        if not bool(((p.norm(dim=1) - 1).abs() < 1e-9).all()):
            raise ConfigError("directions must have unit length", fix="normalise them")
        if not torch.equal(self._search(p), torch.arange(len(p))):
            raise ConfigError("two directions of a codebook are alike", fix="leave one of them out")

    @property
    def points(self) -> Tensor:
        """The unit vectors, (size, 2l+1) float64."""
        return self.table

    @classmethod
    def fit(cls, v: Tensor, code_bits: int, *, seed: int = 0, iterations: int = 50) -> LearnedDirections:
        """Spherical k-means (I. S. Dhillon, D. S. Modha, Mach. Learn. 42, 143, 2001).

        Starts at different samples drawn at random; then each direction becomes the mean of the samples
        nearest to it, until none moves. One that attracts none becomes the sample furthest from all.

        Args:
            v: sample vectors, (..., 2l+1, mul); zero vectors are left out.
            code_bits: ``2^code_bits`` directions, or as many as the samples have.
            seed: of the draw; the same samples and seed give the same directions.
            iterations: at most.

        Raises:
            ConfigError: if there is no nonzero sample, v has another shape, or code_bits is not 0 to 16.
            GaqError: if v holds NaN or infinities.
        """
        samples = _directions(v)
        if not (len(samples) and 0 <= code_bits <= 16):
            raise ConfigError(
                f"cannot learn directions of {code_bits} bits from {len(samples)} nonzero vectors",
                fix="use 0 to 16 bits, and samples that do not all vanish",
            )
        different = torch.unique(samples, dim=0)
        order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
        points = different[order[: 2**code_bits]]
        for _ in range(iterations):
            moved = _k_means_step(points, samples)
            if torch.equal(moved, points):
                break
            points = moved
        return cls(_distinct(points))


def covering_angle(points: Tensor) -> float:
    """The largest angle in radians between any direction and the nearest of ``points`` (n, d).

    The plane of every facet of the points' convex hull cuts a cap without points off the sphere, and the
    largest cap without points is one of them: the angle is the largest ``arccos`` of a facet's distance
    from the centre (computed; 1e-9 covers rounding). Facets grow steeply with d; where they cannot be
    had (points in a plane, more facets than ``MANY_FACETS``, d > 7), pi, which holds for any points.
    """
    n, d = points.shape
    if n * FACETS.get(d, math.inf) > MANY_FACETS:
        return math.pi
    try:
        least = float(ConvexHull(points.numpy()).equations[:, -1].max())
    except (QhullError, ValueError):
        return math.pi
    return min(math.pi, math.acos(max(-1.0, -least - 1e-13)) + 1e-9)


def make_codebook(name: str, l: int, code_bits: int) -> Codebook:
    """The finest codebook of a kind, of at most ``code_bits`` bits per direction.

    Args:
        name: "integer", "cube", "pyramid" (every l), "octahedral", "fibonacci" or "icosahedral" (l = 1).
        l: the degree.
        code_bits: bits of one stored direction.

    Raises:
        ConfigError: for another name, or where the kind has no such codebook.
    """
    if name == "integer":
        return IntegerGrid(l, min(16, code_bits // (2 * l + 1)))
    if name == "cube":
        return CubeGrid.within(l, code_bits)
    if name == "pyramid":
        return PyramidGrid.within(l, code_bits)
    kinds = {"octahedral": OctahedralGrid, "fibonacci": FibonacciLattice, "icosahedral": IcosahedralGrid}
    if name not in kinds:
        known = ", ".join(("integer", "cube", "pyramid", *kinds))
        raise ConfigError(f"unknown codebook {name!r}", fix=f"use one of {known}")
    if l != 1:
        raise ConfigError(f"the {name} codebook is for l = 1, not {l}", fix="use cube or pyramid")
    return kinds[name].within(code_bits)  # type: ignore[attr-defined]


def _icosahedron() -> Tensor:
    """Its 12 corners (12, 3), with edges of length 2: cyclic turns of (0, +-1, +-golden ratio)."""
    golden = (1 + math.sqrt(5)) / 2
    signs = itertools.product((1.0, -1.0), (golden, -golden))
    corners = [(0.0, a, b) for a, b in signs]
    return torch.tensor([c[k:] + c[:k] for k in range(3) for c in corners], dtype=torch.float64)


def _directions(v: Tensor) -> Tensor:
    """The directions of the nonzero among vectors (..., 2l+1, mul): (n, 2l+1) float64."""
    if v.ndim < 2 or v.shape[AXIS] < 3 or v.shape[AXIS] % 2 == 0:
        raise ConfigError(f"sample vectors must be (..., 2l+1, mul) with l >= 1, got {tuple(v.shape)}")
    rows = v.detach().cpu().double().movedim(AXIS, -1).flatten(0, -2)
    if not bool(torch.isfinite(rows).all()):
        raise GaqError("sample vectors hold NaN or infinities", fix="check the example graphs")
    rows = rows[(rows != 0).any(1)]
    rows = rows / rows.abs().amax(1, keepdim=True)  # squares of tiny vectors would vanish
    return torch.nn.functional.normalize(rows, dim=1) + 0.0  # -0.0 becomes 0.0


def _k_means_step(points: Tensor, samples: Tensor) -> Tensor:
    """The normalised mean of the samples (n, d) nearest to each of the points (size, d)."""
    chord, place = cKDTree(points.numpy()).query(samples.numpy())
    sums = torch.zeros_like(points).index_add_(0, torch.from_numpy(place), samples)
    length = sums.norm(dim=1)
    empty = length < 1e-9  # nothing is near, or what is cancels
    moved = torch.where(empty[:, None], points, sums / length[:, None])
    furthest = np.argsort(-chord, kind="stable")[: int(empty.sum())]
    moved[empty] = samples[torch.from_numpy(furthest)]
    return moved


def _distinct(points: Tensor) -> Tensor:
    """The points without those that a search takes for another."""
    place = torch.from_numpy(cKDTree(points.numpy()).query(points.numpy())[1])
    return points[torch.unique(place)]
