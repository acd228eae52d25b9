"""Codebooks on the unit sphere of a degree l: directions as small integers.

The normalised integer grid works for every l, needs no table and costs one rounding per component:
``n_c = round(B * u_c)``, ``Q_d(u) = n / |n|`` with ``B = 2^(bits-1) - 1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

AXIS = -2  # components of a (..., 2l+1, mul) block


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
        """sin(delta) with the fixed-point rounding of the operand ``X = round(q 2^f n/|n|)`` in it.

        Rounding X moves the vector by at most sqrt(2l+1)/2 units of ``scale * 2^-f``, so
        ``|Q(Rv) - R Q(v)| <= 2 * scale * q * sin_delta(q, f)``. For a q of a few units and no
        fraction bits this exceeds 1 (and the bound still holds, as a distance).
        """
        fixed_point = math.sqrt(self.components) / (2 * q * 2**fraction_bits) if q else 0.0
        return math.sin(self.delta) + fixed_point

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
