"""Directions as integer points on the faces of a polytope, for every degree l.

Points of the integer grid that lie on one polytope point in different directions, so that no code is
spent twice on one ray, as the normalised integer grid does. In d = 2l+1 dimensions:

* :class:`CubeGrid`: ``max |n_c| = B``. One rounding per component, like the integer grid; the code
  names a face and d-1 components.
* :class:`PyramidGrid`: ``sum |n_c| = K`` (T. R. Fischer, "A pyramid vector quantizer", IEEE Trans.
  Inf. Theory 32, 568, 1986). More even than the cube, and the best known here at equal bits; its code
  is the place of n in a list, which takes 2l+1 look-ups to read.

Both decode to n/|n| with integer n, so that a kernel needs no table of directions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .codebooks import AXIS, NONE, has_direction

LARGEST = 2**15 - 1  # of a component: integers of 16 bits
CODE_BITS = 60  # twice a number of codes still fits int64
_FIX = f"use l >= 1, {CODE_BITS} bits per direction at most, and within(l, code_bits) to find the finest"


class PackedIntegers(ABC):
    """A codebook of integer vectors n, one int64 a direction: ``Q_d(u) = n / |n|``.

    Subclasses say which n is nearest, and how n and its code turn into each other.
    """

    l: int

    @property
    def components(self) -> int:
        """2l + 1."""
        return 2 * self.l + 1

    @property
    @abstractmethod
    def size(self) -> int:
        """How many directions there are."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """The largest |n_c|."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of one stored direction."""

    @property
    @abstractmethod
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this."""

    def nearest(self, v: Tensor, magnitude: Tensor) -> Tensor:
        """The integer vectors n for ``v`` (..., 2l+1, mul) with norms ``magnitude`` (..., 1, mul).

        This is what a kernel multiplies; it never needs the code.

        Returns:
            n in v's dtype, (..., 2l+1, mul); NaN where there is no direction.

        Raises:
            IrrepsError: if a tensor has another shape.
        """
        known = has_direction(self, v, magnitude)
        n = self._nearest(torch.where(known, v, 1.0))
        # |v| may be so small that its inverse overflows
        return torch.where(known & torch.isfinite(n).all(AXIS, keepdim=True), n, torch.nan)

    def encode(self, v: Tensor, magnitude: Tensor) -> Tensor:
        """Codes (..., 1, mul) int64 of ``v`` (..., 2l+1, mul) with norms ``magnitude`` (..., 1, mul).

        Equal n give equal codes. -1 where there is no direction.

        Raises:
            IrrepsError: if a tensor has another shape.
        """
        n = self.nearest(v, magnitude)
        known = torch.isfinite(n)
        # any valid n will do for the others: the first component's axis
        axis = (torch.arange(self.components, device=v.device) == 0)[:, None] * self.largest
        code = self._pack(torch.where(known, n, axis).long()).unsqueeze(AXIS)
        return torch.where(known.all(AXIS, keepdim=True), code, NONE)

    def integers(self, codes: Tensor) -> Tensor:
        """The n of codes (..., 1, mul): (..., 2l+1, mul) int64; zeros for what is no code."""
        known = self._is_code(codes)
        return torch.where(known, self._unpack(torch.where(known, codes, 0).squeeze(AXIS)), 0)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Unit vectors ``n / |n|`` (..., 2l+1, mul) of codes (..., 1, mul); NaN for what is no code."""
        n = self.integers(codes).double()
        return (n / torch.sqrt((n * n).sum(AXIS, keepdim=True))).to(dtype)

    @abstractmethod
    def _nearest(self, v: Tensor) -> Tensor:
        """n of finite nonzero vectors, in v's dtype; not finite where |v| is too small for that."""

    @abstractmethod
    def _is_code(self, codes: Tensor) -> Tensor:
        """Which integers :meth:`_unpack` can read."""

    @abstractmethod
    def _pack(self, n: Tensor) -> Tensor:
        """Codes (..., mul) of integer vectors (..., 2l+1, mul)."""

    @abstractmethod
    def _unpack(self, codes: Tensor) -> Tensor:
        """Integer vectors (..., 2l+1, mul) of codes (..., mul)."""


@dataclass(frozen=True)
class CubeGrid(PackedIntegers):
    """Integer points on the surface of a cube: ``n_c = round(v_c (B / max|v|))``, so ``max|n_c| = B``.

    ``u`` scaled onto the cube lies within ``sqrt(2l)/2`` of n, in a plane at distance B, and a
    segment subtends the widest angle where its middle is nearest; so
    ``delta = 2 arctan(sqrt(2l) / (4B))`` (proven). n is the nearest point of the face, not always the
    nearest direction.

    Args:
        l: the degree, >= 1.
        levels: B, the largest component.

    Raises:
        ConfigError: for B < 1 or > 32767, l < 1, or codes of more than 60 bits.
    """

    l: int
    levels: int

    def __post_init__(self) -> None:
        if not (self.l >= 1 and 1 <= self.levels <= LARGEST and self.code_bits <= CODE_BITS):
            raise ConfigError(f"no cube grid of {self.levels} levels for l = {self.l}", fix=_FIX)

    @classmethod
    def within(cls, l: int, code_bits: int) -> CubeGrid:
        """The finest cube grid of at most so many bits per direction.

        Raises:
            ConfigError: if there is none, or code_bits > 60.
        """
        return cls(l, _finest(lambda levels: _cube_codes(2 * l + 1, levels), l, code_bits))

    @property
    def size(self) -> int:
        """How many directions there are: ``(2B+1)^d - (2B-1)^d``."""
        return (2 * self.levels + 1) ** self.components - (2 * self.levels - 1) ** self.components

    @property
    def largest(self) -> int:
        """The largest |n_c|."""
        return self.levels

    @property
    def code_bits(self) -> int:
        """Bits of one stored direction: 2d faces of ``(2B+1)^(d-1)`` points, edges in both of theirs."""
        return (_cube_codes(self.components, self.levels) - 1).bit_length()

    @property
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this."""
        return 2 * math.atan(math.sqrt(2 * self.l) / (4 * self.levels))

    def _nearest(self, v: Tensor) -> Tensor:
        return torch.round(v * (self.levels / v.abs().amax(AXIS, keepdim=True)))

    def _is_code(self, codes: Tensor) -> Tensor:
        return (codes >= 0) & (codes < _cube_codes(self.components, self.levels))

    def _pack(self, n: Tensor) -> Tensor:
        axis = (n.abs() == self.levels).long().argmax(AXIS, keepdim=True)  # the first of several
        code = 2 * axis + (n.gather(AXIS, axis) < 0)
        rest = torch.arange(2 * self.l, device=n.device)[:, None].expand(*n.shape[:-2], -1, n.shape[-1])
        for digit in n.gather(AXIS, rest + (rest >= axis)).unbind(AXIS):
            code = code * (2 * self.levels + 1) + (digit + self.levels).unsqueeze(AXIS)
        return code.squeeze(AXIS)

    def _unpack(self, codes: Tensor) -> Tensor:
        base, digits = 2 * self.levels + 1, []
        for _ in range(2 * self.l):
            digits.append(codes % base - self.levels)
            codes = codes // base
        axis, sign = codes // 2, 1 - 2 * (codes % 2)
        rest = torch.stack([*digits[::-1], self.levels * sign], AXIS)  # the axis' own component is last
        place = torch.arange(self.components, device=codes.device)[:, None]
        axis = axis.unsqueeze(AXIS)
        source = torch.where(place == axis, 2 * self.l, place - (place > axis).long())
        return rest.gather(AXIS, source)


@dataclass(frozen=True)
class PyramidGrid(PackedIntegers):
    """Integer points with ``sum |n_c| = K``: for l = 1 those of an octahedron.

    ``a = |u| (K / sum |u_c|)`` lies on a face, where the points form the lattice A_(d-1) (d = 2l+1): the
    nearest rounds all a_c down and the ones with the largest remainders up, as many as the sum needs
    (J. H. Conway, N. J. A. Sloane, "Sphere Packings, Lattices and Groups", ch. 20). The lattice covers
    its space with radius ``R = sqrt(l (l+1) / d)``, the face's distance is ``K / sqrt(d)``, and a
    segment subtends the widest angle where its middle is nearest; so
    ``delta = 2 arctan(R sqrt(d) / (2K)) = 2 arctan(sqrt(l (l+1)) / (2K))`` (proven). n is the nearest
    point of the face, not always the nearest direction.

    Args:
        l: the degree, >= 1.
        total: K.

    Raises:
        ConfigError: for l < 1, a K so small that delta >= pi/2, K > 32767 or codes of more than 60 bits.
    """

    l: int
    total: int

    def __post_init__(self) -> None:
        fits = self.l >= 1 and 1 <= self.total <= LARGEST
        if not (fits and self.delta < math.pi / 2 and self.code_bits <= CODE_BITS):
            raise ConfigError(f"no pyramid grid of total {self.total} for l = {self.l}", fix=_FIX)

    @classmethod
    def within(cls, l: int, code_bits: int) -> PyramidGrid:
        """The finest pyramid grid of at most so many bits per direction.

        Raises:
            ConfigError: if there is none, or code_bits > 60.
        """
        return cls(l, _finest(lambda total: pyramid_size(2 * l + 1, total), l, code_bits))

    @property
    def size(self) -> int:
        """How many directions there are."""
        return pyramid_size(self.components, self.total)

    @property
    def largest(self) -> int:
        """The largest |n_c|."""
        return self.total

    @property
    def code_bits(self) -> int:
        """Bits of one stored direction."""
        return (self.size - 1).bit_length()

    @property
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this."""
        return 2 * math.atan(math.sqrt(self.l * (self.l + 1)) / (2 * self.total))

    def _nearest(self, v: Tensor) -> Tensor:
        a = v.abs()
        a = a * (self.total / a.sum(AXIS, keepdim=True))
        n = torch.floor(a)
        missing = self.total - n.sum(AXIS, keepdim=True)
        order = torch.argsort(a - n, dim=AXIS, descending=True, stable=True)
        n = n + (torch.argsort(order, dim=AXIS) < missing)
        # a sum that overflows gives another total
        n = torch.where(n.sum(AXIS, keepdim=True) == self.total, n, torch.nan)
        return torch.where(v < 0, -n, n)

    def _is_code(self, codes: Tensor) -> Tensor:
        return (codes >= 0) & (codes < self.size)

    def _pack(self, n: Tensor) -> Tensor:
        """Codes count: the points with n_1 = 0 come first, then n_1 = 1, -1, 2, -2 and so on."""
        code = torch.zeros_like(n.select(AXIS, 0))
        left = torch.full_like(code, self.total)
        counts, sums = _tables(self.components, self.total, n.device)
        for c, x in enumerate(n.unbind(AXIS)):
            count, sum_to = counts[self.l * 2 - c], sums[self.l * 2 - c]
            after = left - x.abs()
            between = 2 * (sum_to[(left - 1).clamp(min=0)] - sum_to[after])
            smaller = count[left] + between + torch.where(x < 0, count[after], 0)
            code = code + torch.where(x == 0, 0, smaller)
            left = after
        return code

    def _unpack(self, codes: Tensor) -> Tensor:
        left = torch.full_like(codes, self.total)
        counts, sums = _tables(self.components, self.total, codes.device)
        found = []
        for c in reversed(range(self.components)):
            count, sum_to = counts[c], sums[c]
            rest = codes - count[left]  # >= 0 where this component is not 0
            before = sum_to[(left - 1).clamp(min=0)]
            after = torch.searchsorted(sum_to, before - rest // 2)
            after = torch.where(rest < 0, left, after)
            rest = rest - 2 * (before - sum_to[after])
            negative = rest >= count[after]
            codes = torch.where(codes < count[left], codes, rest - torch.where(negative, count[after], 0))
            found.append(torch.where(negative, after - left, left - after))
            left = after
        return torch.stack(found, AXIS)


def pyramid_size(dimension: int, total: int) -> int:
    """The number of integer points with ``sum |n_c| = total`` in so many dimensions."""
    if total == 0:
        return 1
    signed = (2**i * math.comb(dimension, i) * math.comb(total - 1, i - 1) for i in range(1, dimension + 1))
    return sum(signed)


def _tables(dimension: int, total: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """``counts[d][k]``, the points of total k in d < dimension dimensions, and their sums up to k."""
    counts, sums = ([torch.from_numpy(row).to(device) for row in t] for t in _arrays(dimension, total))
    return counts, sums


@lru_cache(maxsize=32)
def _arrays(dimension: int, total: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same as arrays: a tensor that is made while a graph is traced must not be kept."""
    counts = [(np.arange(total + 1) == 0).astype(np.int64)]
    sums = [counts[0].cumsum()]
    for _ in range(1, dimension):
        # a component of 0 leaves k to the others; one of +-j leaves them k - j
        counts.append(sums[-1] + np.concatenate([[0], sums[-1][:-1]]))
        sums.append(counts[-1].cumsum())
    return counts, sums


def _cube_codes(dimension: int, levels: int) -> int:
    return 2 * dimension * (2 * levels + 1) ** (dimension - 1)


def _finest(codes: Callable[[int], int], l: int, code_bits: int) -> int:
    """The largest n <= LARGEST with ``codes(n) <= 2^code_bits``; 0 if there is none."""
    if l < 1 or not 1 <= code_bits <= CODE_BITS:
        raise ConfigError(f"no codebook of {code_bits} bits per direction for l = {l}", fix=_FIX)
    below, above = 0, LARGEST + 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if codes(middle) <= 2**code_bits else (below, middle)
    return below
