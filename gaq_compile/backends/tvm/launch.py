"""A kernel's call as data: what it reads, what it makes, in which order.

Every CPU kernel is lowered to a :class:`Launch`. Called with tensors, it makes fresh results and runs
the kernel; a whole graph's launches can also be laid out beforehand and run without Python between them
(:mod:`.runner`), because each says everything about itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import LoweringError
from ...passes.straight_line import flat
from .build import kernel_argument

MAX_ELEMENTS = 2**31 - 2**16  # of a tensor: a kernel's indices are 32-bit


@dataclass(frozen=True)
class Input:
    """A tensor that the call is given, as the kernel sees it, without gaps.

    Attributes:
        place: which of the call's arguments (those of lists counted one by one).
        row: the sizes of all axes but the first.
        dtype: of its elements; a kernel sees booleans as int8.
        has_rows: False for a tensor without rows, whose axes are all in ``row``.
    """

    place: int
    row: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    has_rows: bool = True

    def seen(self, tensor: Tensor) -> Tensor:
        """The tensor, in the shape and type that the kernel takes."""
        tensor = tensor.view(torch.int8) if tensor.dtype is torch.bool else tensor
        shape = (*tensor.shape[:1], *self.row) if self.has_rows else self.row
        return tensor if tensor.shape == shape else tensor.view(shape)


@dataclass(frozen=True)
class Output:
    """A result, (rows, *row).

    Attributes:
        rows: place of the argument that has as many rows, or is their number.
        row: the sizes of all axes but the first, as the kernel sees them.
        dtype: of its elements.
        like: place of the argument whose other axes the result has too; None where ``row`` says it.
    """

    rows: int
    row: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    like: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row) * self.dtype.itemsize


Part = Input | Output | Tensor
"""Of what a kernel takes; a tensor is a constant."""


@dataclass(frozen=True)
class Choice:
    """Which function runs so many rows, and what it takes after everything else."""

    function: Callable[..., Any]
    more: tuple[Tensor | int, ...] = ()


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel, ready to be called.

    Attributes:
        parts: what the kernel takes, in its order.
        choose: the function for a number of rows.
        more: how many arguments come after ``parts``: as many as every choice has.
        counted: place of the argument whose rows are meant.
        several: whether the call's value is a tuple of all results, not the only one.
        empty: called instead where there are no rows; None where the kernel can do it.
        longer: called instead where a tensor has more elements than a kernel can count; None refuses it.
        tuning: kernel family and problem by which the tuning database knows it; empty where it does not.
    """

    parts: tuple[Part, ...]
    choose: Callable[[int], Choice]
    more: int = 0
    counted: int = 0
    several: bool = False
    empty: Callable[..., Any] | None = None
    longer: Callable[..., Any] | None = None
    tuning: tuple[str, str] | tuple[()] = ()

    @property
    def launch(self) -> Launch:
        """Itself: what a lowered graph calls has one."""
        return self

    @cached_property
    def results(self) -> tuple[Output, ...]:
        """What the call makes, in order."""
        return tuple(part for part in self.parts if isinstance(part, Output))

    def __call__(self, *arguments: Any) -> Any:
        """Run on tensors without gaps (and numbers, and lists of tensors).

        Returns:
            Fresh tensors.

        Raises:
            LoweringError: for tensors with more elements than kernels count, which nothing else takes.
        """
        given = flat(arguments)
        rows = given[self.counted].shape[0]
        if rows == 0 and self.empty is not None:
            return self.empty(*arguments)
        if self._elements(given) > MAX_ELEMENTS:
            return (self.longer or refuse)(*arguments)
        found: list[Tensor] = []
        values: list[Any] = []
        for part in self._held:
            if isinstance(part, Input):
                values.append(part.seen(given[part.place]))
            elif isinstance(part, Output):
                found.append(fresh(part, given))
                values.append(_seen(part, found[-1]))
            else:
                values.append(part)
        choice = self.choose(rows)
        choice.function(*values, *choice.more)
        return tuple(found) if self.several else found[0]

    def _elements(self, given: Sequence[Any]) -> int:
        """Of the largest tensor of a call."""
        known = [given[part.place].numel() for part in self.parts if isinstance(part, Input)]
        return max((*known, *(count(given[m.rows]) * math.prod(m.row) for m in self.results)))

    @cached_property
    def _held(self) -> tuple[Any, ...]:
        return tuple(kernel_argument(p) if isinstance(p, Tensor) else p for p in self.parts)


def most_rows(width: int) -> int:
    """The rows of so many elements that a kernel can count."""
    return MAX_ELEMENTS // max(1, width)


def refuse(*arguments: Any) -> Any:
    """Refuse a call.

    Raises:
        LoweringError: always.
    """
    most = max(t.numel() for t in flat(arguments) if isinstance(t, Tensor))
    raise LoweringError(
        f"a kernel counts up to {MAX_ELEMENTS:,} elements, and it was given {most:,}, or was to make more",
        fix="evaluate fewer structures together",
    )


def always(function: Callable[..., Any]) -> Callable[[int], Choice]:
    """The choice of what has one function only."""
    choice = Choice(function)
    return lambda rows: choice


def fresh(part: Output, given: Sequence[Any]) -> Tensor:
    """An empty result for a call's arguments."""
    row = part.row if part.like is None else given[part.like].shape[1:]
    return torch.empty((count(given[part.rows]), *row), dtype=part.dtype)


def count(argument: Tensor | int) -> int:
    """The rows of a tensor, of one without axes 1; a number is one itself."""
    if isinstance(argument, int):
        return argument
    return argument.shape[0] if argument.ndim else 1


def _seen(part: Output, result: Tensor) -> Tensor:
    result = result.view(torch.int8) if part.dtype is torch.bool else result
    return result if part.like is None else result.view(result.shape[0], *part.row)
