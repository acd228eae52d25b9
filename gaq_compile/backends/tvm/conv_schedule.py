"""The constants of a convolution kernel that tuning may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ConvSchedule:
    """The constants of a convolution kernel that tuning may change.

    Attributes:
        chunk: edges of one node that are handled together, a multiple of 16.
        sums: vector registers of sums that the forward kernel holds at a time; 0 for the target's.
        prefetch: the cache that the next chunk's weights are fetched into: 1 or 2; 0 for none.
    """

    chunk: int = 16
    sums: int = 0
    prefetch: int = 2


DEFAULT = ConvSchedule()


def conv_schedule_from(fields: Mapping[str, Any]) -> ConvSchedule:
    """A schedule from its fields in JSON.

    Raises:
        ValueError, TypeError, KeyError: if they make no schedule.
    """
    found = ConvSchedule(int(fields["chunk"]), int(fields["sums"]), int(fields["prefetch"]))
    if found.chunk % 16 or not 16 <= found.chunk <= 256 or not 0 <= found.sums <= 64:
        raise ValueError(f"constants out of range: {dict(fields)}")
    if found.prefetch not in (0, 1, 2):
        raise ValueError(f"no cache of level {found.prefetch}")
    return found
