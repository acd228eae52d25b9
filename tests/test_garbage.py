"""The collector is as it was before, whatever happens in between."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from gaq_compile.garbage import rarely_collected, set_aside


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = (gc.get_threshold(), gc.get_freeze_count())
    yield
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_thresholds_rise_and_come_back():
    before = gc.get_threshold()
    with pytest.raises(KeyError), rarely_collected():
        assert gc.get_threshold() > before and gc.get_freeze_count() > 0
        raise KeyError
    assert gc.get_threshold() == before


def test_blocks_that_overlap():
    """The one that ends last was begun within the other."""
    begun, first_has_ended = threading.Event(), threading.Event()

    def second() -> None:
        with rarely_collected():
            begun.set()
            first_has_ended.wait()

    with rarely_collected():
        other = threading.Thread(target=second)
        other.start()
        begun.wait()
        raised = gc.get_threshold()
    assert gc.get_threshold() == raised and gc.get_freeze_count() > 0
    first_has_ended.set()
    other.join()


def test_what_was_set_aside_is_collected_afterwards():
    circle = Circle()
    alive = weakref.ref(circle)
    with rarely_collected():
        set_aside()
        del circle
        gc.collect()
        assert alive() is not None
    gc.collect()
    assert alive() is None


def test_what_others_have_set_aside_stays_so():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with rarely_collected():
            kept = [Circle() for _ in range(100)]
            set_aside()
            assert gc.get_freeze_count() <= count
        assert len(kept) == 100 and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_collector_that_is_off_stays_off():
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with rarely_collected():
            assert gc.get_threshold()[0] == 0
        assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
