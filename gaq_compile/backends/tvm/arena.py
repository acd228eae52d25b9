"""Memory for results that only kernels read: planned once for given sizes, used again at every call."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

LINE = 64  # bytes of a cache line: where tensors start
LARGE = 1 << 28  # bytes from which on an arena that has become four times too large is given back


class Arena:
    """Bytes that several users share, one of whom runs at a time.

    Attributes:
        start: the address of the first byte, at a cache line; it changes when the arena grows.
        memory: the bytes; what they are means nothing between two runs.
        busy: held by the user that runs.
    """

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self._needs: dict[object, int] = {}
        self._take(0)

    def reserve(self, user: object, size: int) -> None:
        """Make room for a user's ``size`` bytes; where there is no memory, what was reserved stays so.

        Raises:
            RuntimeError: torch's, if there is no memory.
        """
        needs = {**self._needs, user: size}
        wanted, held = max(needs.values()), self.memory.numel() - LINE
        if wanted > held or held > max(LARGE, 4 * wanted):
            try:
                self._take(wanted)
            except RuntimeError:
                self._take(held)
                raise
        self._needs = needs

    def _take(self, size: int) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)  # let go before asking for more
        self.memory = torch.empty(size + LINE, dtype=torch.uint8)
        self.start = -(-self.memory.data_ptr() // LINE) * LINE


def places(lives: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Where values go in an arena, so that none that live at the same time overlap.

    The largest first, each at the lowest place that is free while it lives.

    Args:
        lives: of each value its bytes, and the first and last time that it is needed.

    Returns:
        The offset of each value, a multiple of a cache line, and the bytes of the arena.
    """
    offsets, total = [0] * len(lives), 0
    placed: list[tuple[int, int, int, int]] = []  # start, end, first, last; by start
    for k in sorted(range(len(lives)), key=lambda k: -lives[k][0]):
        size, first, last = lives[k]
        start, size = 0, -(-size // LINE) * LINE
        for low, high, begun, ended in placed:
            if begun <= last and first <= ended:
                if low >= start + size:
                    break
                start = max(start, high)
        offsets[k], total = start, max(total, start + size)
        placed.append((start, start + size, first, last))
        placed.sort()
    return offsets, total
