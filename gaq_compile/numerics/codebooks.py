"""Codebooks on the unit sphere of a degree l: directions as small integers.

The normalised integer grid works for every l, needs no table and costs one rounding per component:
``n_c = round(B * u_c)``, ``Q_d(u) = n / |n|`` with ``B = 2^(bits-1) - 1``.

Others store a direction in fewer bits: ``lattices.py`` (integer points of a cube and of an
octahedron's kin, any l) and ``sphere.py`` (points of S^2, and learned ones).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, IrrepsError

AXIS = -2  # components of a (..., 2l+1, mul) block
NONE = -1  # the integer code of "no direction": of a zero vector, of NaN, of infinities


class Codebook(Protocol):
    """Unit vectors of R^(2l+1) that stand for all directions, and how to find one.

    With ``Q_d(u) = decode(encode(u))``, ``Q(v) = Q_m(|v|) Q_d(v/|v|)`` and a rotation R (which keeps
    |v|), the directions of Q(Rv) and R Q(v) lie within 2 delta of each other, so

        |Q(Rv) - R Q(v)| <= 2 Q_m(|v|) sin(min(delta, pi/2)).

    What has no direction decodes to NaN: vectors of magnitude 0, NaN or infinity and vectors that
    hold NaN or infinities. It is never an error, and never some other direction.
    """

    @property
    def l(self) -> int:  # noqa: E743 - the degree's name everywhere
        """The degree."""

    @property
    def components(self) -> int:
        """2l + 1."""

    @property
    def code_bits(self) -> int:
        """Bits of one stored direction; there are at most ``2^code_bits`` of them."""

    @property
    def delta(self) -> float:
        """Covering angle in radians, an upper bound: no direction lies further from its code."""

    def encode(self, v: Tensor, magnitude: Tensor) -> Tensor:
        """Codes of the directions of ``v`` (..., 2l+1, mul) with norms ``magnitude`` (..., 1, mul).

        Either integer vectors (..., 2l+1, mul) or one integer per direction, (..., 1, mul) int64.
        """

    def decode(self, codes: Tensor, /) -> Tensor:
        """Unit vectors (..., 2l+1, mul) of what :meth:`encode` gave."""


def operand_sin_delta(codebook: Codebook, q: float, fraction_bits: int) -> float:
    """sin(delta) with the fixed-point rounding of the operand ``X = round(q 2^f u)`` in it.

    Rounding X moves the vector by at most sqrt(2l+1)/2 units of ``scale * 2^-f``, so
    ``|Q(Rv) - R Q(v)| <= 2 * scale * q * operand_sin_delta(codebook, q, f)``. For a q of a few units
    and no fraction bits this exceeds 1 (and the bound still holds, as a distance).
    """
    fixed_point = math.sqrt(codebook.components) / (2 * q * 2**fraction_bits) if q else 0.0
    return math.sin(min(codebook.delta, math.pi / 2)) + fixed_point


@dataclass(frozen=True)
class IntegerGrid:
    """The normalised integer grid in R^(2l+1).

    Because ``|n - B u| <= sqrt(2l+1)/2``, the angle between u and Q_d(u) is at most
    ``delta = arcsin(sqrt(2l+1) / (2B))``. As |v| is invariant under rotations,
    ``|Q(Rv) - R Q(v)| <= 2 Q_m(m) sin(delta)``.

    A point n of the grid is its own code, ``encode(decode(n)) == n``, where
    ``abs(|n| - B) * max|n_c| / |n| < 1/2``; elsewhere a component may move by one, since many n
    lie close to one ray. The covering angle holds for every direction.

    Args:
        l: the degree, >= 1.
        bits: bits per component; ``2^(bits-1) - 1`` must exceed ``sqrt(2l+1)/2``, so that no
            direction rounds to zero.

    Raises:
        ConfigError: for fewer bits, more than 16, or l < 1.
    """

    l: int
    bits: int

    def __post_init__(self) -> None:
        if not (self.l >= 1 and 2 <= self.bits <= 16 and self.levels > math.sqrt(self.components) / 2):
            raise ConfigError(
                f"no integer grid of {self.bits} bits per component for l = {self.l}",
                fix="use 4 to 16 bits and l >= 1",
            )

    @property
    def components(self) -> int:
        """2l + 1."""
        return 2 * self.l + 1

    @property
    def levels(self) -> int:
        """B, the largest integer of a component."""
        return 2 ** (self.bits - 1) - 1

    @property
    def code_bits(self) -> int:
        """Bits of one stored direction."""
        return self.bits * self.components

    @property
    def delta(self) -> float:
        """Covering angle in radians: no direction lies further from its code than this."""
        return math.asin(math.sqrt(self.components) / (2 * self.levels))

    def sin_delta(self, q: float, fraction_bits: int) -> float:
        """:func:`operand_sin_delta` of this grid, whose operand is ``X = round(q 2^f n/|n|)``."""
        return operand_sin_delta(self, q, fraction_bits)

    def encode(self, v: Tensor, magnitude: Tensor) -> Tensor:
        """Directions of ``v`` (..., 2l+1, mul) with norms ``magnitude`` (..., 1, mul) as integers.

        Returns ``n = round(v * (B / |v|))``, held in v's dtype; NaN where the magnitude is 0.
        """
        return torch.round(v * (self.levels / magnitude))

    def decode(self, n: Tensor) -> Tensor:
        """Unit vectors ``n / |n|`` of integer directions (..., 2l+1, mul)."""
        return n / norm(n)


def norm(v: Tensor) -> Tensor:
    """|v| over the components of a block: (..., 2l+1, mul) -> (..., 1, mul)."""
    return torch.sqrt((v * v).sum(AXIS, keepdim=True))


def has_direction(codebook: Codebook, v: Tensor, magnitude: Tensor) -> Tensor:
    """Which vectors have a direction: (..., 2l+1, mul) and (..., 1, mul) -> bool, (..., 1, mul).

    Raises:
        IrrepsError: if ``v`` has another number of components, or ``magnitude`` another shape.
    """
    size = codebook.components
    if v.ndim < 2 or v.shape[AXIS] != size or magnitude.shape != (*v.shape[:-2], 1, v.shape[-1]):
        raise IrrepsError(
            f"a codebook of degree {codebook.l} needs vectors (..., {size}, mul) with norms (..., 1, mul), "
            f"got {tuple(v.shape)} and {tuple(magnitude.shape)}"
        )
    finite = torch.isfinite(v).all(AXIS, keepdim=True)
    return finite & torch.isfinite(magnitude) & (magnitude > 0)
