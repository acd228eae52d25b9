"""Schedules whose constants are all whole numbers, as the tuning database keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Schedule = TypeVar("Schedule")


def integers_from(
    kind: Callable[..., Schedule], fields: Mapping[str, Any], is_sound: Callable[[Schedule], bool]
) -> Schedule:
    """A schedule from its fields in JSON.

    Args:
        kind: the schedule's dataclass.
        fields: by name; others are not looked at.
        is_sound: whether kernels can be made with it.

    Raises:
        ValueError, TypeError, KeyError: if they make no schedule.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    found = kind(**{name: int(fields[name]) for name in names})
    if not is_sound(found):
        raise ValueError(f"constants out of range: {dict(fields)}")
    return found
