"""Where the values of a fused group of row operators live, and how they are addressed.

A group is worked through in tiles of :data:`TILE` rows. A value of few elements per row is held
*across* rows: element k of all rows of the tile is one vector, so that an expression of single
numbers per edge runs on full registers. A value of many elements is held *along* the row, as in
memory. Views (slices, reshapes, broadcasts) are never computed: they are strides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...passes.row_shapes import NARROW

TILE = 16  # rows that are worked on together


@dataclass(frozen=True)
class Base:
    """A tensor that values are read from.

    Attributes:
        kind: "rows" (an argument with the group's rows), "gather" (rows of ``name`` picked by
            ``index``), "fixed" (the same for every row), "number", or "value" (computed here).
        name: of the kernel's buffer; of a number, its literal; of a value, its node's name.
        size: elements per row.
        index: the buffer that holds the row to take.
        number: of kind "number".
    """

    kind: str
    name: str
    size: int
    index: str = ""
    number: float = 0.0

    @property
    def across(self) -> bool:
        """Whether a computed value is held across the rows of a tile."""
        return self.size < NARROW


@dataclass(frozen=True)
class View:
    """Elements of a base, as a tensor of the given row shape with strides."""

    base: Base
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether this is all of the base, in its order."""
        return self.offset == 0 and self.size == self.base.size and self.contiguous

    @property
    def contiguous(self) -> bool:
        pairs = zip(self.shape, self.strides, contiguous_strides(self.shape), strict=True)
        return all(size == 1 or stride == plain for size, stride, plain in pairs)

    def flat(self, place: Sequence[int]) -> int:
        """The element of the base at a place of the view."""
        return self.offset + sum(i * s for i, s in zip(place, self.strides, strict=True))

    def broadcast(self, shape: tuple[int, ...]) -> View:
        """As a tensor of a larger shape, right-aligned, repeated along axes of one."""
        missing = len(shape) - len(self.shape)
        sizes, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        strides = tuple(0 if old == 1 else s for old, s in zip(sizes, strides, strict=True))
        return View(self.base, shape, strides, self.offset)

    def squeezed(self) -> View:
        """Without axes of one."""
        kept = [k for k, size in enumerate(self.shape) if size != 1]
        return View(
            self.base, tuple(self.shape[k] for k in kept), tuple(self.strides[k] for k in kept), self.offset
        )

    def sliced(self, axis: int, start: int, stop: int) -> View:
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return View(self.base, shape, self.strides, self.offset + start * self.strides[axis])

    def without(self, axis: int) -> View:
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        return View(self.base, shape, (*self.strides[:axis], *self.strides[axis + 1 :]), self.offset)

    def with_axis(self, axis: int) -> View:
        shape = (*self.shape[:axis], 1, *self.shape[axis:])
        return View(self.base, shape, (*self.strides[:axis], 0, *self.strides[axis:]), self.offset)

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """The same elements in another shape; None where strides do not allow it."""
        if not self.contiguous:
            a, b = self.squeezed(), tuple(size for size in shape if size != 1)
            if a.shape != b:
                return None
            strides = iter(a.strides)
            return View(self.base, shape, tuple(0 if n == 1 else next(strides) for n in shape), self.offset)
        return View(self.base, shape, contiguous_strides(shape), self.offset)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def whole(base: Base, shape: tuple[int, ...]) -> View:
    """All of a base."""
    return View(base, shape, contiguous_strides(shape))


def places(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """All places of a shape, in order."""
    return list(itertools.product(*(range(n) for n in shape)))
