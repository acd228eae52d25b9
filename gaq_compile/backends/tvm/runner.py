"""Kernels that follow each other, run without Python between them.

A small molecule's step is ruled by what happens between its kernels: results are made and every tensor
is described to every kernel, some thousand times a step. A *segment* has all that laid out once
(:mod:`.call_table`); a new number of atoms or edges changes sizes in place. Results that nothing else
reads lie in an *arena* (:mod:`.arena`), planned for sizes a little larger than the present ones, so
that neighbour lists may grow for a while before anything has to be placed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from ...capture.graphs import EDGE_VECTORS, GraphFormat
from ...errors import LoweringError
from ...passes.straight_line import Step, straight_line
from .arena import LARGE, Arena, places
from .call_table import CallTable, number
from .launch import MAX_ELEMENTS, Choice, Input, Launch, Output, count

_ATOMS = ("numbers", "batch", "ptr", "charge", "spin")  # inputs that stay the same in dynamics
_SPARE = 64  # places are planned for a sixty-fourth more rows than there are
_SHRUNK = 8  # ... and anew where a large arena could be so many times smaller


def native(graph_module: GraphModule, form: GraphFormat) -> Callable[..., Any]:
    """The function that a lowered graph computes, of its inputs in order; kernels run in segments.

    What depends on the atoms' elements alone, or on them and the neighbour list, is remembered from
    call to call.

    Args:
        graph_module: from :func:`~gaq_compile.passes.lower.lower`, with kernels of this backend for
            this machine's CPU. Later changes of it do not show.
        form: its inputs.
    """
    arena = Arena()

    def together(steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]) -> Segment:
        return Segment(steps, inputs, outputs, arena)

    lasting = () if form.positions else (_ATOMS, tuple(end for ends in EDGE_VECTORS.values() for end in ends))
    return straight_line(graph_module, together=together, lasting=lasting)


@dataclass(eq=False)
class _Value:
    """A tensor of a segment.

    Attributes:
        number: in the call table.
        size: which of the segment's sizes says how many rows it has.
        row: the other axes, of what the segment makes; in one where ``like`` says them.
        dtype: of its elements.
        first: the call that makes it.
        last: the last call that reads it.
        like: the value whose other axes it has.
    """

    number: int
    size: int
    row: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    first: int = -1
    last: int = -1
    like: _Value | None = None

    @property
    def width(self) -> int:
        return math.prod(self.row)


@dataclass(eq=False)
class _Call:
    """A launch of a segment.

    Attributes:
        launch: the kernel.
        counted: which of the segment's sizes decides its function.
        fixed: how many arguments it has before those that depend on the function.
        choice: the present function, kept alive; none before the first run.
    """

    launch: Launch
    counted: int
    fixed: int
    choice: Choice | None = None


class Segment:
    """Kernel calls in order, as one function.

    Args:
        steps: the calls; where what they run has ``times``, a list, each call adds its nanoseconds.
        inputs: names of the values that they are given, in the order of the function's arguments.
        outputs: names of the results that are read elsewhere, in the order of the function's results.
        arena: where the others go.
    """

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str], arena: Arena
    ) -> None:
        self.steps, self.inputs, self.outputs, self.arena = steps, inputs, outputs, arena
        self._table = CallTable()
        self._values = {name: _Value(self._table.value(), k) for k, name in enumerate(inputs)}
        self._numbers: list[int] = []  # sizes that the graph itself says
        # What inputs have to be: place, size, width, dtype; once for each way that kernels see them.
        self._taken: dict[tuple[int, int | None, int, torch.dtype], None] = {}
        self._turned: list[tuple[_Value, int | None, int]] = []  # what is read in other rows than it has
        self._calls = [self._call(k, step) for k, step in enumerate(steps)]
        self._times = [
            step.run.times for step in steps if hasattr(step.run, "times")
        ]  # all have them, or none
        self._table.finish()
        self._wanted = [self._values[name] for name in outputs]
        given = [value for value in self._values.values() if value.first < 0]
        self._inner = [v for v in self._values.values() if v not in self._wanted and v not in given]
        self._widths = {(size, width) for _, size, width, _ in self._taken}
        self._widths |= {(v.size, v.width) for v in self._values.values() if v.first >= 0}
        self._inner_numbers = np.array([v.number for v in self._inner], np.int64)
        self._read_places = list(dict.fromkeys(place for place, *_ in self._taken))
        self._outer_numbers = np.array([*self._read_places, *(v.number for v in self._wanted)], np.int64)
        self._sizes: list[int] = []
        self._room: list[int] = []  # the sizes that places are planned for
        self._offsets, self._bytes, self._start = np.zeros(0, np.uint64), 0, -1

    # --- laying out -----------------------------------------------------------------------------

    def _call(self, place: int, step: Step) -> _Call:
        launch: Launch = step.run.launch
        given: list[Any] = [self._values[a] if isinstance(a, str) else a for a in step.arguments]
        arguments, made = [], 0
        for part in launch.parts:
            if isinstance(part, Tensor):
                arguments.append(self._table.constant(part))
            elif isinstance(part, Input):
                arguments.append(self._read(given[part.place], part, place))
            else:
                name = step.results.get(made, f"{step.name}.{made}")
                arguments.append(self._make(name, part, given, place))
                made += 1
        self._table.call([*arguments, *[number(0)] * launch.more])  # which these are, the rows decide
        return _Call(launch, self._size(given[launch.counted]), len(arguments))

    def _read(self, value: _Value, part: Input, place: int) -> tuple[int, int]:
        value.last = place
        size, width = value.size if part.has_rows else None, math.prod(part.row)
        if value.first < 0:
            self._taken[value.number, size, width, part.dtype] = None
        elif (size, width) != (value.size, value.width):
            self._turned.append((value, size, width))
        return self._table.slot(value.number, part.row, part.dtype, size)

    def _make(self, name: str, part: Output, given: list[Any], place: int) -> tuple[int, int]:
        like = None if part.like is None else given[part.like]
        value = _Value(
            self._table.value(), self._size(given[part.rows]), part.row, part.dtype, place, place, like
        )
        self._values[name] = value
        return self._table.slot(value.number, part.row, part.dtype, value.size)

    def _size(self, argument: _Value | int) -> int:
        """Which size an argument has, or is."""
        if isinstance(argument, _Value):
            return argument.size
        self._numbers.append(argument)
        return len(self.inputs) + len(self._numbers) - 1

    def _more(self, choice: Choice) -> list[tuple[int, int]]:
        return [self._table.constant(m) if isinstance(m, Tensor) else number(m) for m in choice.more]

    # --- running --------------------------------------------------------------------------------

    def __call__(self, *given: Tensor | int) -> tuple[Tensor, ...]:
        """Run all calls; returns the outputs, fresh."""
        sizes = [*map(count, given), *self._numbers]
        with self.arena.busy:
            made = self._run(given, sizes)
        return self._one_by_one(given) if made is None else tuple(made)

    def _run(self, given: Sequence[Any], sizes: list[int]) -> list[Tensor] | None:
        """The outputs; None where the kernels cannot be run like this, or one of them has failed."""
        for place, size, width, dtype in self._taken:
            tensor, elements = given[place], width if size is None else sizes[size] * width
            if tensor.dtype is not dtype or tensor.numel() != elements or not tensor.is_contiguous():
                return None
        if sizes != self._sizes and not self._resize(sizes):
            return None
        if self._start != self.arena.start:
            self._start = self.arena.start
            self._table.set_addresses(self._inner_numbers, self._offsets + np.uint64(self._start))
        made = [self._fresh(value, given) for value in self._wanted]
        pointers = [given[place].data_ptr() for place in self._read_places]
        self._table.set_addresses(self._outer_numbers, pointers + [tensor.data_ptr() for tensor in made])
        done = self._table.run_timed(self._times) if self._times else self._table.run()
        return made if done else None

    def _fresh(self, value: _Value, given: Sequence[Any]) -> Tensor:
        row, source = value.row, value.like
        while source is not None:
            row = given[source.number].shape[1:] if source.first < 0 else source.row
            source = source.like
        return torch.empty((self._sizes[value.size], *row), dtype=value.dtype)

    def _one_by_one(self, given: Sequence[Any]) -> tuple[Tensor, ...]:
        """The same by each kernel's own function: for sizes that kernels do not take, and for errors."""
        known: dict[str, Any] = dict(zip(self.inputs, given, strict=True))
        for step in self.steps:
            value = step.run(*(known[a] if isinstance(a, str) else a for a in step.arguments))
            parts = value if step.run.launch.several else (value,)
            known.update({name: parts[k] for k, name in step.results.items()})
        return tuple(known[name] for name in self.outputs)

    # --- sizes ----------------------------------------------------------------------------------

    def _resize(self, sizes: list[int]) -> bool:
        """Take new sizes over; False where a kernel does not take them."""
        before, self._sizes = self._sizes, []  # none, should anything fail in between
        most = max(_elements(sizes, size, width) for size, width in self._widths)
        fits = all(_elements(sizes, k, n) == sizes[v.size] * v.width for v, k, n in self._turned)
        empty = any(call.launch.empty is not None and sizes[call.counted] == 0 for call in self._calls)
        if empty or not fits or most > MAX_ELEMENTS:
            return False
        for k, call in enumerate(self._calls):
            rows = sizes[call.counted]
            if not before or before[call.counted] != rows:
                self._choose(k, call, rows)
        self._table.set_sizes(sizes)
        wide = self._bytes > LARGE and _SHRUNK * self._apart(sizes) < self._apart(self._room)
        if not self._room or wide or any(n > m for n, m in zip(sizes, self._room, strict=True)):
            self._plan([n + n // _SPARE for n in sizes])
        self._sizes = sizes
        return True

    def _choose(self, k: int, call: _Call, rows: int) -> None:
        choice = call.launch.choose(rows)
        if len(choice.more) != call.launch.more:
            raise LoweringError("a kernel takes more arguments for some numbers of rows than for others")
        call.choice = choice
        self._table.set_function(k, choice.function)
        self._table.set_arguments(k, call.fixed, self._more(choice))

    def _apart(self, sizes: Sequence[int]) -> int:
        """Bytes of the arena's values, did each have a place of its own."""
        return sum(sizes[v.size] * v.width * v.dtype.itemsize for v in self._inner)

    def _plan(self, room: list[int]) -> None:
        lives = [(room[v.size] * v.width * v.dtype.itemsize, v.first, v.last) for v in self._inner]
        offsets, size = places(lives)
        self.arena.reserve(self, size)  # first: without memory the plan before stays
        self._room, self._offsets = room, np.array(offsets, np.uint64)
        self._bytes, self._start = size, -1


def _elements(sizes: Sequence[int], size: int | None, width: int) -> int:
    """Of a tensor with rows of so many elements; of one without rows, where there is no ``size``."""
    return width if size is None else sizes[size] * width
