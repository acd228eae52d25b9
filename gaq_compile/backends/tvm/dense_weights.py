"""Stored weights of a linear as its products want them: in registers, or as floats for a thread's rows."""

from __future__ import annotations

from collections.abc import Sequence

from .dense_frame import Frame, first_column, group_steps
from .dense_plan import ColumnTiles, DensePlan, Operand, Product, groups
from .emit import loop, splat, vector


def decode(plan: DensePlan, o: Operand, raw: str) -> str:
    """Stored weights as the multiplication wants them, in registers."""
    lanes, step = plan.unit.lanes, plan.unit.step(o.kind)
    if plan.problem.weight == "f32":
        return raw
    if o.kind == "f32":
        return f'T.Cast("float32x{lanes}", {raw})'
    if step == 1:
        return f'T.Cast("int32x{lanes}", {raw})'
    return raw if step == 4 else f'T.Cast("int16x{2 * lanes}", {raw})'


def nibble(name: str, half: int, n: int) -> str:
    """int8 codes from the low or the high halves of bytes, which hold code + 8."""
    byte = (
        f"T.shift_right({name}, T.broadcast(T.uint8(4), {n}))"
        if half
        else (f"({name} & T.broadcast(T.uint8(15), {n}))")
    )
    return f'(T.reinterpret({byte}, dtype="int8x{n}") - T.broadcast(T.int8(8), {n}))'


def decoded_part(plan: DensePlan, frame: Frame, task: Sequence[str]) -> list[str]:
    """A thread's rows: weights are decoded for all of them, then come its tasks, which are as long as can be.

    Each thread has floats of its own: to get another's from its cache costs more than to decode them.
    """
    rows = plan.schedule.task_rows
    sizes = ["part: T.let = T.min(task, m - t * task)", f"tasks: T.let = (part + {rows - 1}) // {rows}"]
    sizes.append("each: T.let = (part + tasks - 1) // tasks")
    setup = ["n0: T.let = t * task + u * each", "rows: T.let = T.min(each, part - u * each)"]
    tasks = loop("u in T.serial((part + each - 1) // each)", [*setup, *task])
    return [*_decoding(plan, frame), *sizes, *tasks]


def _decoding(plan: DensePlan, frame: Frame) -> list[str]:
    """A buffer of the integer weights that meet floats, as scaled floats, and the loops that fill it.

    Integers that meet integers stay packed: their decoding costs little or nothing.
    """
    lines = []
    for p in plan.products:
        if plan.decodes(p):
            for tiles in p.tiles:
                lines += _decode_tiles(plan, frame, p, tiles)
    size = group_steps(plan) * plan.sizes["weight"]
    buffer = f'{frame.prefix}wf = T.alloc_buffer(({size},), "float32", scope="global")'
    return [buffer, *lines] if lines else []


def _decode_tiles(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles) -> list[str]:
    """One product's column tiles of one width, a stored group at a time, in the order of the packed ones."""
    lanes, halves, operand = plan.unit.lanes, group_steps(plan), plan.operands[p.operand]
    stored = groups(plan, operand.kind, p.depth)
    row = tiles.vectors * lanes
    base = p.weight + tiles.start * lanes * stored
    lines = []
    for v in range(tiles.vectors):
        raw = vector(f"{frame.prefix}weight", f"{base} + (j * {stored} + g) * {row} + {v * lanes}", lanes)
        codes = [raw]
        if halves == 2:
            lines.append(f"b{v}: T.let = {raw}")
            codes = [nibble(f"b{v}", half, lanes) for half in range(halves)]
        for half, code in enumerate(codes):
            k = f"(g * {halves} + {half})"
            place = f"{halves * base} + (j * {halves * stored} + {k}) * {row} + {v * lanes}"
            value = decode(plan, operand, code)
            if operand.rule == "scaled":
                value += f" * {splat(f'{frame.prefix}scale[{operand.index + p.first} + {k}]', lanes)}"
            column = f"{p.scale + tiles.start * lanes} + {first_column(tiles, v, lanes)}"
            value += f" * {vector(f'{frame.prefix}scale', column, lanes)}"
            lines.append(f"{vector(f'{frame.prefix}wf', place, lanes)} = {value}")
    return loop(f"j in T.serial({tiles.count})", loop(f"g in T.serial({stored})", lines))
