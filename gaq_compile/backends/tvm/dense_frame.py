"""Around a linear's text: where its rows are, and the buffers that a task of rows has to itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .dense_plan import ColumnTiles, DensePlan, Operand
from .emit import vector

_BUFFERS = {"float32": "qf", "int16": "q16", "int8": "q8", "uint8": "q8"}

Place = Callable[[str, str, int], str]  # row of the task, first column, how many -> their text


@dataclass(frozen=True)
class Frame:
    """What a linear's text stands in.

    Attributes:
        x, y: the places of input and output elements.
        last: the last row of the task that may be read.
        prefix: begins the names of constants, where there are several linears.
        task_rows: the most rows of a task.
        asks: whether y's cache lines are asked for before they are written.
        decoded: whether weights that meet floats are floats, times their scales, before the first task
            (:mod:`.dense_weights`); elsewhere sums or operands are scaled, so that last bits may differ.
    """

    x: Place
    y: Place
    last: str
    prefix: str
    task_rows: int
    asks: bool = False
    decoded: bool = False


def tile_buffers(plan: DensePlan, task_rows: int, decoded: bool = False) -> dict[str, tuple[int, str]]:
    """The tile buffers: elements and dtype by name; a register tile may read rows beyond the task's.

    They mean nothing after a task, so that linears which follow each other can share them. Where weights are
    ``decoded``, no operand is scaled, and only those in half precision are copied.
    """
    rows = task_rows + max(plan.schedule.rows)
    none = decoded and plan.scaled and not plan.problem.half_in
    kept = [dtype for dtype in _BUFFERS if plan.row_size(dtype) and not none]
    rows_of = {_BUFFERS[dtype]: (plan.row_size(dtype), dtype) for dtype in kept}
    rows_of |= {"nan": (plan.watched, "float32"), "gs": (plan.dynamic, "float32")}
    return {name: (rows * size, dtype) for name, (size, dtype) in rows_of.items() if size}


def declared(buffers: Mapping[str, tuple[int, str]]) -> list[str]:
    """The declarations of tile buffers."""
    return [
        f'{name} = T.alloc_buffer(({size},), "{dtype}", scope="global")'
        for name, (size, dtype) in buffers.items()
    ]


def in_x(plan: DensePlan, frame: Frame, o: Operand) -> bool:
    """Whether an operand is read from x, not from a tile buffer.

    Half precision never is: every column tile would convert its numbers again, one at a time.
    """
    return o.rule == "direct" or (o.rule == "scaled" and frame.decoded and not plan.problem.half_in)


def tile(plan: DensePlan, frame: Frame, o: Operand, row: str, column: str, lanes: int) -> str:
    """Consecutive elements of an operand in the tile buffer."""
    dtype = plan.unit.storage(o.kind)
    place = f"{row} * {plan.row_size(dtype)} + {o.offset} + {column}"
    return vector(_BUFFERS[dtype], place, lanes)


def first_column(tiles: ColumnTiles, v: int, lanes: int) -> str:
    """The first column of vector v of column tile j, counted from the tiles' start."""
    return f"j * {tiles.vectors * lanes} + {v * lanes}"


def group_steps(plan: DensePlan) -> int:
    """Steps of K in a stored group of weights."""
    return 2 if plan.problem.weight == "s4" else 1
