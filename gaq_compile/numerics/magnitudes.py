"""Magnitudes m >= 0 as integers q, in equal steps or in equal ratios.

Codes are held in m's dtype, so that NaN stays NaN; an infinite magnitude saturates. All roundings are
half to even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from .codebooks import Codebook, norm


class Magnitudes(Protocol):
    """A quantizer of numbers m >= 0: ``m^ = decode(encode(m))``, with integers q in 0..qmax."""

    @property
    def qmax(self) -> int:
        """The largest code."""

    def encode(self, m: Tensor) -> Tensor:
        """q in m's dtype, for m of any shape; 0 for m < 0 as for 0; NaN stays NaN."""

    def decode(self, q: Tensor) -> Tensor:
        """m^ in q's dtype."""

    def error_bound(self, m: Tensor) -> Tensor:
        """The largest ``|m^ - m|`` at m, up to float rounding."""


def linear_codes(m: Tensor, step: Tensor | float, qmax: int) -> Tensor:
    """``q = clamp(round(m/s), 0, qmax)`` in m's dtype; NaN stays NaN."""
    return torch.clamp(torch.round(m / step), 0, qmax)


@dataclass(frozen=True)
class LinearMagnitudes:
    """Equal steps: ``q = clamp(round(m/s), 0, qmax)``, ``m^ = s q``, ``qmax = 2^bits - 1``.

    Args:
        bits: of a code, 1 to 16.
        step: s, > 0.

    Raises:
        ConfigError: for other values.
    """

    bits: int
    step: float

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= 16 and 0.0 < self.step < math.inf):
            raise ConfigError(f"no magnitudes of {self.bits} bits with step {self.step}", fix=_FIX)

    @classmethod
    def up_to(cls, largest: float, bits: int) -> LinearMagnitudes:
        """The finest steps that reach ``largest``.

        Raises:
            ConfigError: unless ``largest`` > 0 and bits is 1 to 16.
        """
        return cls(bits, largest / (2 ** max(bits, 1) - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def encode(self, m: Tensor) -> Tensor:
        """q in m's dtype, for m of any shape; 0 for m < 0 as for 0; NaN stays NaN."""
        return linear_codes(m, self.step, self.qmax)

    def decode(self, q: Tensor) -> Tensor:
        """m^ in q's dtype."""
        return q * self.step

    def error_bound(self, m: Tensor) -> Tensor:
        """The largest ``|m^ - m|`` at m: s/2, and ``m - s qmax`` for clipped m."""
        return torch.clamp(m - self.step * self.qmax, min=self.step / 2)


@dataclass(frozen=True)
class LogMagnitudes:
    """Equal ratios: ``m^ = largest * r^(qmax - q)`` for q >= 1, and q = 0 for what is too small.

    ``q = clamp(round(qmax - log(m/largest) / log(r)), 0, qmax)`` with ``qmax = 2^bits - 1`` and
    ``r = (smallest/largest)^(1/(qmax-1)) < 1``, so that q = 1 means ``smallest``. From
    ``smallest * sqrt(r)`` to ``largest / sqrt(r)`` the relative error is at most
    ``relative_error = 1/sqrt(r) - 1``; below, m^ = 0; above, m^ = largest.

    Args:
        bits: of a code, 2 to 16.
        largest: the magnitude of q = qmax.
        smallest: the magnitude of q = 1, > 0 and at most ``largest/2``: with closer ratios, float32
            could not tell 2^16 levels apart.

    Raises:
        ConfigError: for other values.
    """

    bits: int
    largest: float
    smallest: float

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 16 and 0.0 < self.smallest <= self.largest / 2 < math.inf):
            raise ConfigError(
                f"no magnitudes of {self.bits} bits in equal ratios from {self.smallest} to {self.largest}",
                fix=_FIX,
            )

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def log_ratio(self) -> float:
        """log(r) < 0."""
        return (math.log(self.smallest) - math.log(self.largest)) / (self.qmax - 1)

    @property
    def relative_error(self) -> float:
        """The largest ``|m^ - m| / m`` within the range: ``1/sqrt(r) - 1``."""
        return math.expm1(-self.log_ratio / 2)

    def encode(self, m: Tensor) -> Tensor:
        """q in m's dtype, for m of any shape; 0 for m < 0 as for 0; NaN stays NaN."""
        steps = (torch.log(torch.clamp(m, min=0.0)) - math.log(self.largest)) / self.log_ratio
        return torch.clamp(torch.round(self.qmax - steps), 0, self.qmax)

    def decode(self, q: Tensor) -> Tensor:
        """m^ in q's dtype."""
        m = self.largest * torch.exp(self.log_ratio * (self.qmax - q))
        return torch.where(q == 0, 0.0, m)

    def error_bound(self, m: Tensor) -> Tensor:
        """The largest ``|m^ - m|`` at m: relative within the range, m below it, the excess above."""
        half = math.exp(self.log_ratio / 2)
        inside = torch.where(m < self.smallest * half, m, m * self.relative_error)
        return torch.where(m > self.largest / half, m - self.largest, inside)


def quantize_vectors(v: Tensor, directions: Codebook, magnitudes: Magnitudes) -> Tensor:
    """``Q(v) = Q_m(|v|) Q_d(v/|v|)`` of vectors (..., 2l+1, mul), in v's dtype.

    0 where the magnitude's code is 0; NaN where v holds NaN or infinities, or |v| overflows.
    """
    m = norm(v)
    q = magnitudes.encode(m)
    u = directions.decode(directions.encode(v, m)).to(v.dtype)
    return torch.where(q == 0, 0.0, magnitudes.decode(q) * u)


_FIX = "use 1 (in equal ratios: 2) to 16 bits, a positive finite range, and smallest <= largest/2"
