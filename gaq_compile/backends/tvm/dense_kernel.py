"""The text of a linear kernel: one loop over tasks of rows, each a prologue and register tiles.

    where rows are many: integer weights that meet floats become floats, once for each thread
        (:mod:`.dense_weights`)
    for each task of rows (in parallel):
        prologue: the task's rows of x become integers (or scaled floats) in a tile buffer
            (:mod:`.dense_prologue`)
        for each product, column tile, component, register tile of rows:
            accumulators = 0 (or minus the unsigned offset's share)
            ask for the cache lines that the next register tile writes
            for each group of input channels: accumulators += operand * decoded weights
            y (+)= accumulators * scale (+ bias)

Integers never leave the task. Rows beyond the last are computed on clamped rows and not stored.
Results of many rows do not fit the caches: each line has to be fetched before it is written, and a
processor that is asked early does so while it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

from .build import module_text
from .dense_frame import Frame, declared, first_column, group_steps, in_x, tile, tile_buffers
from .dense_plan import WEIGHED, ColumnTiles, DensePlan, Product, groups
from .dense_prologue import prologue
from .dense_weights import decode, decoded_part, nibble
from .emit import ask_to_write, literal, loop, many, splat, vector

_WEIGHTS = {"f32": "float32", "s16": "int16", "s8": "int8", "s4": "uint8"}


def dense_text(plan: DensePlan, parallel: bool, decoded: bool = False) -> str:
    """The TVMScript module of a plan, for few rows or in parallel, and there with decoded weights (Frame).

    ``main(x, y, weight, [scale], [sums], [steps], [fine], [bias], task)``: x (N, dim_in) and y (N, dim_out),
    float32 or float16, the packed constants, and ``task``, the rows per task (at most the schedule's), or
    with decoded weights the rows per thread.
    """
    names = arguments(plan)
    half = plan.problem.half_in

    def read(row: str, column: str, lanes: int) -> str:
        place = vector("x", column, lanes, row=f"n0 + {row}")
        return f'T.Cast("{many("float32", lanes)}", {place})' if half else place

    frame = Frame(
        x=read,
        y=lambda row, column, lanes: vector("y", column, lanes, row=f"n0 + {row}"),
        last="m - 1 - n0",
        prefix="",
        task_rows=plan.schedule.task_rows,
        asks=True,
        decoded=decoded,
    )
    body = [*declared(tile_buffers(plan, frame.task_rows, decoded)), *task_lines(plan, frame)]
    kind = "parallel" if parallel else "serial"
    if decoded:
        part = decoded_part(plan, frame, body)
    else:
        part = ["n0: T.let = t * task", "rows: T.let = T.min(task, m - n0)", *body]
    lines = loop(f"t in T.{kind}((m + task - 1) // task)", part)
    shapes = {"x": f"(m, {plan.dim_in})", "y": f"(m, {plan.dim_out})"}
    preamble = ["m = T.int32()"]
    for name, dtype in names.items():
        shape = shapes.get(name, f"({sizes(plan).get(name)},)")
        align = int(dtype[-2:]) // 8 if name in shapes else 64
        preamble.append(f'{name} = T.match_buffer({name}_h, {shape}, "{dtype}", align={align})')
    signature = ", ".join([*(f"{name}_h: T.handle" for name in names), "task: T.int32"])
    return module_text(signature, "".join(f"        {line}\n" for line in (*preamble, *lines)))


def task_lines(plan: DensePlan, frame: Frame) -> list[str]:
    """The product for a task of ``rows`` rows, which must be a name of the text around it."""
    body = prologue(plan, frame)
    for product in plan.products:
        for tiles in product.tiles:
            body += _sweep(plan, frame, product, tiles)
    return body + _fill(plan, frame)


def arguments(plan: DensePlan) -> dict[str, str]:
    """Names and dtypes of the kernel's tensors, in order."""
    found = sizes(plan)
    every = {
        "weight": _WEIGHTS[plan.problem.weight],
        "scale": "float32",
        "sums": "int32",
        "steps": "float32",
        "fine": "float32",
        "bias": "float32",
    }
    x, y = ("float16" if half else "float32" for half in (plan.problem.half_in, plan.problem.half_out))
    return {"x": x, "y": y} | {k: v for k, v in every.items() if found[k]}


def sizes(plan: DensePlan) -> dict[str, int]:
    """Elements of each packed constant."""
    quantized = [o.index + o.block.mul for o in plan.operands if o.rule not in ("direct", *WEIGHED)]
    steps, scheme = max(quantized, default=0), plan.problem.scheme
    return plan.sizes | {"steps": steps, "fine": steps if scheme is not None and scheme.common else 0}


# Register tiles --------------------------------------------------------------------------------


def _sweep(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles) -> list[str]:
    """All register tiles of one product and one width of column tile."""
    height = plan.schedule.rows[tiles.vectors - 1]
    body = _register_tile(plan, frame, p, tiles, height)
    strips = loop(f"s in T.serial((rows + {height - 1}) // {height})", body)
    columns, comps = f"j in T.serial({tiles.count})", f"c in T.serial({p.block.components})"
    if plan.schedule.components_first:
        return loop(comps, loop(columns, strips))
    return loop(columns, loop(comps, strips))


def _register_tile(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles, height: int) -> list[str]:
    o, lanes, vectors = plan.operands[p.operand], plan.unit.lanes, tiles.vectors
    dtype = "float32" if o.kind == "f32" else "int32"
    cells = [(r, v) for r in range(height) for v in range(vectors)]
    lines = [f'a{r}_{v} = T.alloc_buffer(({lanes},), "{dtype}", scope="global")' for r, v in cells]
    for r, v in cells:
        lines.append(f"{_acc(r, v, lanes)} = {_start(frame, p, tiles, v, lanes, dtype)}")
    if in_x(plan, frame, o):
        lines += [f"i{r}: T.let = T.min(s * {height} + {r}, {frame.last})" for r in range(height)]
    steps = -(-p.depth // plan.unit.step(o.kind))
    packed = group_steps(plan) == 2 and not (frame.decoded and plan.decodes(p))
    whole, halves = divmod(steps, 2) if packed else (steps, 0)
    if frame.asks:
        lines += _ask(plan, frame, p, tiles, height)
    if whole:
        lines += loop(f"k in T.serial({whole})", _group(plan, frame, p, tiles, "k", odd=False))
    if halves:  # an odd last group: only the low halves of its bytes
        lines += _group(plan, frame, p, tiles, str(whole), odd=True)
    for r in range(height):
        stores = _store(plan, frame, p, tiles, r)
        lines += [f"if s * {height} + {r} < rows:", *("    " + line for line in stores)]
    return lines


def _ask(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles, height: int) -> list[str]:
    """Ask for what the next register tile writes, of which nothing need exist."""
    lanes = plan.unit.lanes
    starts = (f"{tiles.start * lanes} + {first_column(tiles, v, lanes)}" for v in range(tiles.vectors))
    columns = [f"{p.block.base} + c * {p.block.stride} + {start}" for start in starts]
    rows = (f"(s * {height} + {height + r})" for r in range(height))
    return [ask_to_write(frame.y(row, column, 1)) for row in rows for column in columns]


def _start(frame: Frame, p: Product, tiles: ColumnTiles, v: int, lanes: int, dtype: str) -> str:
    if p.sums >= 0:
        place = f"{p.sums + tiles.start * lanes} + {first_column(tiles, v, lanes)}"
        return vector(f"{frame.prefix}sums", place, lanes)
    return splat("0" if dtype == "int32" else literal(0.0), lanes)


def _group(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles, k: str, *, odd: bool) -> list[str]:
    """Accumulate one stored group of input channels (two steps where a byte holds two codes)."""
    o, unit, vectors = plan.operands[p.operand], plan.unit, tiles.vectors
    step, lanes = unit.step(o.kind), unit.lanes
    row = vectors * lanes * step
    decoded = frame.decoded and plan.decodes(p)
    each = group_steps(plan) if decoded else 1
    stored = groups(plan, o.kind, p.depth)
    base = each * (p.weight + tiles.start * lanes * step * stored)
    place = f"{base} + (j * {each * stored} + {k}) * {row}"
    weight = f"{frame.prefix}{'wf' if decoded else 'weight'}"
    packed = group_steps(plan) == 2 and not decoded
    lines = []
    if packed:
        stacked = (f"{place} + {v * lanes * step}" for v in range(vectors))
        lines = [f"b{v}: T.let = {vector(weight, at, lanes * step)}" for v, at in enumerate(stacked)]
    for half in range(2 if packed and not odd else 1):
        step_index = f"({k} * 2 + {half})" if packed else k
        for v in range(vectors):
            raw = nibble(f"b{v}", half, lanes * step) if packed else None
            raw = raw or vector(weight, f"{place} + {v * lanes * step}", lanes * step)
            lines.append(f"w{half}_{v}: T.let = {raw if decoded else decode(plan, o, raw)}")
        for r in range(plan.schedule.rows[vectors - 1]):
            height = plan.schedule.rows[vectors - 1]
            lines.append(f"e{half}_{r}: T.let = {_operand(plan, frame, p, r, step_index, height)}")
            for v in range(vectors):
                acc = _acc(r, v, lanes)
                lines.append(f"{acc} = {unit.accumulate(o.kind, acc, f'e{half}_{r}', f'w{half}_{v}')}")
    return lines


def _operand(plan: DensePlan, frame: Frame, p: Product, r: int, k: str, height: int) -> str:
    """The operand of row r and step k, in every lane."""
    o, lanes, step = plan.operands[p.operand], plan.unit.lanes, plan.unit.step(plan.operands[p.operand].kind)
    if in_x(plan, frame, o):
        column = f"{o.block.base + p.first} + c * {o.block.stride} + {k}"
        return splat(frame.x(f"i{r}", column, 1), lanes)
    here = tile(plan, frame, o, f"(s * {height} + {r})", f"{p.first} + c * {o.width} + {k} * {step}", step)
    if o.kind == "f32":
        return splat(here, lanes)
    if step == 1:
        return splat(f'T.Cast("int32", {here})', lanes)
    dtype = f"int{32 // step}x{step * lanes}"
    return f'T.reinterpret({splat(f"""T.reinterpret({here}, dtype="int32")""", lanes)}, dtype="{dtype}")'


def _store(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles, r: int) -> list[str]:
    """Row r of a register tile to y: times scale, plus bias or what earlier products left."""
    o, lanes = plan.operands[p.operand], plan.unit.lanes
    height = plan.schedule.rows[tiles.vectors - 1]
    row, names = f"(s * {height} + {r})", frame.prefix
    lines = []
    for v in range(tiles.vectors):
        column = f"{tiles.start * lanes} + {first_column(tiles, v, lanes)}"
        value = _acc(r, v, lanes)
        if o.kind != "f32":
            value = f'T.Cast("float32x{lanes}", {value})'
        if p.scale >= 0 and not (frame.decoded and plan.decodes(p)):
            value += f" * {vector(f'{names}scale', f'{p.scale} + {column}', lanes)}"
        if o.step >= 0:
            value += f" * {splat(f'gs[{row} * {plan.dynamic} + {o.step} + c]', lanes)}"
        if o.slot >= 0:
            spot = f"nan[{row} * {plan.watched} + {o.slot}]"
            value += f" + {splat(spot, lanes)}"
        if p.bias >= 0:
            value += f" + {vector(f'{names}bias', f'{p.bias} + {column}', lanes)}"
        at = f"{p.block.base} + c * {p.block.stride} + {column}"
        tail = p.block.mul - (tiles.start + tiles.vectors * (tiles.count - 1) + v) * lanes
        dtype = "float16" if plan.problem.half_out else "float32"
        value = value if dtype == "float32" else f'T.Cast("{many(dtype, lanes)}", {value})'
        to = _Target(frame, dtype, add=not p.opens)
        lines += _write(to, value, row, at, lanes, tail, name=f"z{v}")
    return lines


@dataclass(frozen=True)
class _Target:
    """Where results go, of which type, and whether they are added to what is there."""

    frame: Frame
    dtype: str
    add: bool


def _write(to: _Target, value: str, row: str, at: str, lanes: int, tail: int, name: str) -> list[str]:
    """``y[row, at : at + lanes] (+)= value``; only ``tail`` of them in a block's last vector."""
    if tail >= lanes:
        place = to.frame.y(row, at, lanes)
        return [f"{place} = {place} + {value}" if to.add else f"{place} = {value}"]
    one = to.frame.y(row, f"{at} + i", 1)
    return [
        f'{name} = T.alloc_buffer(({lanes},), "{to.dtype}", scope="global")',
        f"{vector(name, '0', lanes)} = {value}",
        *loop(f"i in T.serial({tail})", [f"{one} = {one} + {name}[i]" if to.add else f"{one} = {name}[i]"]),
    ]


def _fill(plan: DensePlan, frame: Frame) -> list[str]:
    """Output blocks that no product reaches: their bias, or zeros."""
    lines: list[str] = []
    for b in plan.unreached:
        bias = plan.bias_offset(b)
        value = f"{frame.prefix}bias[{bias} + i]" if bias >= 0 else literal(0.0)
        value = f'T.Cast("float16", {value})' if plan.problem.half_out else value
        place = frame.y("r", f"{b.base} + c * {b.stride} + i", 1)
        inner = loop(f"i in T.serial({b.mul})", [f"{place} = {value}"])
        lines += loop("r in T.serial(rows)", loop(f"c in T.serial({b.components})", inner))
    return lines


def _acc(r: int, v: int, lanes: int) -> str:
    return vector(f"a{r}_{v}", "0", lanes)
