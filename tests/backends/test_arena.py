"""Memory planning: values that live at the same time never overlap, and an arena holds all its users."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.backends.tvm import arena as arenas
from gaq_compile.backends.tvm.arena import LINE, Arena, places

Life = tuple[int, int, int]
LIVES = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 12), st.integers(0, 6)).map(
        lambda t: (t[0], t[1], t[1] + t[2])
    ),
    max_size=30,
)


def _lines(size: int) -> int:
    """Bytes of the cache lines that a value takes."""
    return -(-size // LINE) * LINE


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(LIVES)
def test_values_that_live_together_do_not_overlap(lives: list[Life]) -> None:
    offsets, total = places(lives)
    assert len(offsets) == len(lives) and all(at >= 0 and at % LINE == 0 for at in offsets)
    placed = [(at, at + life[0], *life) for at, life in zip(offsets, lives, strict=True)]
    for k, (low, high, size, first, last) in enumerate(placed):
        for other_low, other_high, other_size, begun, ended in placed[:k]:
            if size and other_size and begun <= last and first <= ended:
                assert high <= other_low or other_high <= low
    assert total == max((at + _lines(life[0]) for at, life in zip(offsets, lives, strict=True)), default=0)
    assert total <= sum(_lines(size) for size, _, _ in lives)
    busiest = (sum(_lines(s) for s, first, last in lives if first <= t <= last) for t in range(20))
    assert total >= max(busiest)


def test_nothing_takes_nothing() -> None:
    assert places([]) == ([], 0)
    assert places([(0, 0, 3), (0, 1, 2)]) == ([0, 0], 0)


def test_a_chain_of_equal_values_needs_two_places() -> None:
    offsets, total = places([(1000, k, k + 1) for k in range(10)])
    assert total == 2048 and sorted(set(offsets)) == [0, 1024]
    assert all(a != b for a, b in itertools.pairwise(offsets))


def test_a_gap_below_is_found() -> None:
    """The small one goes where the second large one was, not above the third."""
    offsets, total = places([(640, 0, 9), (320, 0, 3), (256, 0, 9), (128, 5, 6)])
    assert offsets == [0, 640, 960, 640] and total == 1216


def test_an_arena_holds_the_most_that_anyone_needs() -> None:
    arena = Arena()
    arena.reserve("a", 1000)
    large = arena.memory
    assert large.numel() == 1000 + LINE and arena.start % LINE == 0
    assert large.data_ptr() <= arena.start <= large.data_ptr() + large.numel() - 1000
    arena.reserve("b", 10)
    arena.reserve("b", 900)
    assert arena.memory is large
    arena.reserve("b", 5000)
    grown = arena.memory
    assert grown is not large and grown.numel() == 5000 + LINE
    assert arena.start % LINE == 0 and grown.data_ptr() <= arena.start < grown.data_ptr() + LINE
    arena.reserve("b", 10)
    assert arena.memory is grown  # too little to be worth giving back


def test_a_large_arena_that_has_become_four_times_too_large_is_given_back(monkeypatch) -> None:
    monkeypatch.setattr(arenas, "LARGE", 4096)
    arena = Arena()
    arena.reserve("a", 1000)
    arena.reserve("b", 8000)
    arena.reserve("b", 2000)
    assert arena.memory.numel() == 8000 + LINE  # four times, not more
    arena.reserve("b", 1999)
    assert arena.memory.numel() == 1999 + LINE
    arena.reserve("b", 5000)
    arena.reserve("b", 0)
    assert arena.memory.numel() == 1000 + LINE  # "a" still needs it
    arena.reserve("b", 4000)
    arena.reserve("b", 0)
    assert arena.memory.numel() == 4000 + LINE  # not large


def test_an_arena_that_cannot_grow_stays_what_it_was() -> None:
    arena = Arena()
    arena.reserve("a", 1000)
    with pytest.raises(RuntimeError, match="allocate memory"):
        arena.reserve("b", 1 << 60)
    assert arena.memory.numel() == 1000 + LINE and arena.start % LINE == 0
    assert 0 <= arena.start - arena.memory.data_ptr() < LINE
    arena.reserve("c", 2000)
    assert arena.memory.numel() == 2000 + LINE
