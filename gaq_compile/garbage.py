"""Python's garbage collector, told to look less often while much is made that stays.

Imports, models and graphs are millions of objects, and nearly all of them stay. The collector goes through
them again and again, and through everything that was there before: a seventh of the time that a potential
takes to come from the cache (measured). References are counted as ever; only circles of objects wait longer.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LEAST = (100_000, 20, 1000)  # new objects for a look at them (Python: 700), looks for one at older objects
_LOCK = threading.Lock()
_inside = 0  # how many are within the block, which the first one begins and the last one ends
_before = gc.get_threshold()
_ours = False  # whether it was here that objects were set aside


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Let the collector look at new objects rarely, and at those from before not at all."""
    global _inside, _before, _ours
    with _LOCK:
        _inside += 1
        if _inside == 1:
            _before, _ours = gc.get_threshold(), gc.get_freeze_count() == 0
            if _before[0]:  # or it is off
                gc.set_threshold(*map(max, _before, _LEAST))
    set_aside()
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                gc.set_threshold(*_before)
                if _ours:
                    gc.unfreeze()


def set_aside() -> None:
    """Within :func:`rarely_collected`: what there is by now is not looked at either."""
    with _LOCK:
        if _inside and _ours:
            gc.freeze()
