"""The constants of a convolution kernel that tuning may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .schedule import integers_from


@dataclass(frozen=True)
class ConvSchedule:
    """The constants of a convolution kernel that tuning may change.

    Attributes:
        chunk: edges of one node that are handled together, a multiple of 16.
        sums: vector registers of sums that the forward kernel holds at a time; 0 for the usual number.
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
    return integers_from(ConvSchedule, fields, _is_sound)


def _is_sound(schedule: ConvSchedule) -> bool:
    chunks = schedule.chunk % 16 == 0 and 16 <= schedule.chunk <= 256
    return chunks and 0 <= schedule.sums <= 64 and schedule.prefetch in (0, 1, 2)
