"""The text of a linear kernel: one loop over tasks of rows, each a prologue and register tiles.

    where rows are many: integer weights that meet floats become floats, once for all of them
    for each task of rows (in parallel):
        prologue: the task's rows of x become integers (or scaled floats) in a tile buffer; a
            gradient's integers get a step per row
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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...config import ActivationScheme, activation_scheme
from ...numerics.gradients import LARGEST, SMALLEST
from .build import module_text
from .dense_plan import WEIGHED, ColumnTiles, DensePlan, Operand, Product, groups
from .emit import ask_to_write, literal, loop, many, splat, vector

_BUFFERS = {"float32": "qf", "int16": "q16", "int8": "q8", "uint8": "q8"}
_FLOAT_MAX = (2.0 - 2.0**-23) * 2.0**127
_WEIGHTS = {"f32": "float32", "s16": "int16", "s8": "int8", "s4": "uint8"}


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
            (:func:`_decoding`); elsewhere sums or operands are scaled, so that last bits may differ.
    """

    x: Place
    y: Place
    last: str
    prefix: str
    task_rows: int
    asks: bool = False
    decoded: bool = False


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
        part = _decoded_part(plan, frame, body)
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
    body = _prologue(plan, frame)
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


def tile_buffers(plan: DensePlan, task_rows: int, decoded: bool = False) -> dict[str, tuple[int, str]]:
    """The tile buffers: elements and dtype by name; a register tile may read rows beyond the task's.

    They mean nothing after a task, so that linears which follow each other can share them. Where weights are
    ``decoded``, no operand is scaled.
    """
    rows = task_rows + max(plan.schedule.rows)
    kept = [dtype for dtype in _BUFFERS if plan.row_size(dtype) and not (decoded and plan.scaled)]
    rows_of = {_BUFFERS[dtype]: (plan.row_size(dtype), dtype) for dtype in kept}
    rows_of |= {"nan": (plan.watched, "float32"), "gs": (plan.dynamic, "float32")}
    return {name: (rows * size, dtype) for name, (size, dtype) in rows_of.items() if size}


def declared(buffers: Mapping[str, tuple[int, str]]) -> list[str]:
    """The declarations of tile buffers."""
    return [
        f'{name} = T.alloc_buffer(({size},), "{dtype}", scope="global")'
        for name, (size, dtype) in buffers.items()
    ]


# Weights ---------------------------------------------------------------------------------------


def _decoded_part(plan: DensePlan, frame: Frame, task: Sequence[str]) -> list[str]:
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
    size = _halves(plan) * plan.sizes["weight"]
    buffer = f'{frame.prefix}wf = T.alloc_buffer(({size},), "float32", scope="global")'
    return [buffer, *lines] if lines else []


def _decode_tiles(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles) -> list[str]:
    """One product's column tiles of one width, a stored group at a time, in the order of the packed ones."""
    lanes, halves, operand = plan.unit.lanes, _halves(plan), plan.operands[p.operand]
    stored = groups(plan, operand.kind, p.depth)
    row = tiles.vectors * lanes
    base = p.weight + tiles.start * lanes * stored
    lines = []
    for v in range(tiles.vectors):
        raw = vector(f"{frame.prefix}weight", f"{base} + (j * {stored} + g) * {row} + {v * lanes}", lanes)
        codes = [raw]
        if halves == 2:
            lines.append(f"b{v}: T.let = {raw}")
            codes = [_nibble(f"b{v}", half, lanes) for half in range(halves)]
        for half, code in enumerate(codes):
            k = f"(g * {halves} + {half})"
            place = f"{halves * base} + (j * {halves * stored} + {k}) * {row} + {v * lanes}"
            value = _decode(plan, operand, code)
            if operand.rule == "scaled":
                value += f" * {splat(f'{frame.prefix}scale[{operand.index + p.first} + {k}]', lanes)}"
            column = f"{p.scale + tiles.start * lanes} + {_column(tiles, v, lanes)}"
            value += f" * {vector(f'{frame.prefix}scale', column, lanes)}"
            lines.append(f"{vector(f'{frame.prefix}wf', place, lanes)} = {value}")
    return loop(f"j in T.serial({tiles.count})", loop(f"g in T.serial({stored})", lines))


def _in_x(frame: Frame, o: Operand) -> bool:
    """Whether an operand is read from x, not from a tile buffer."""
    return o.rule == "direct" or (o.rule == "scaled" and frame.decoded)


def _halves(plan: DensePlan) -> int:
    """Steps of K in a stored group of weights."""
    return 2 if plan.problem.weight == "s4" else 1


# Prologue --------------------------------------------------------------------------------------


def _prologue(plan: DensePlan, frame: Frame) -> list[str]:
    body: list[str] = []
    for operand in plan.operands:
        if operand.rule == "dynamic":
            body += _gradient(plan, frame, operand)
        elif not _in_x(frame, operand):
            body += _convert(plan, frame, operand)
    return loop("r in T.serial(rows)", body) if body else []


def _convert(plan: DensePlan, frame: Frame, o: Operand) -> list[str]:
    """One row's block of x into the tile buffer, a vector of channels at a time.

    The last vector is moved back to end with the block: it overlaps, and repeats the same values.
    """
    mul = o.block.mul
    lanes = min(plan.unit.lanes, 1 << (mul.bit_length() - 1))
    comps, p = range(o.block.components), frame.prefix
    lines = [f"u: T.let = T.min(i * {lanes}, {mul - lanes})"]
    for c in comps:
        lines.append(f"v{c}: T.let = {frame.x('r', f'{o.block.base + c * o.block.stride} + u', lanes)}")
    if o.rule == "scaled":
        lines.append(f"s: T.let = {vector(f'{p}scale', f'{o.index} + u', lanes)}")
        values = [f"v{c} * s" for c in comps]
    else:
        lines.append(f"s: T.let = {vector(f'{p}steps', f'{o.index} + u', lanes)}")
        scheme = activation_scheme(plan.problem.activation)
        if scheme.common:
            lines.append(f"ratio: T.let = {vector(f'{p}fine', f'{o.index} + u', lanes)}")
        lines += [f"{name}: T.let = {value}" for name, value in RULES[o.rule](scheme, o, lanes)]
        values = [_stored(plan, o, c, lanes) for c in comps]
    for c, value in zip(comps, values, strict=True):
        lines.append(f"{_tile(plan, frame, o, 'r', f'{c * o.width} + u', lanes)} = {value}")
    if o.slot < 0:
        return loop(f"i in T.serial({-(-mul // lanes)})", lines)
    zero = splat(literal(0.0), lanes)
    bad = [f"T.Select(T.isnan(v{c}), v{c}, {zero})" for c in comps]
    name = f"seen{o.slot}"
    watch = vector(name, "0", lanes)
    lines.append(f"{watch} = {' + '.join([watch, *bad])}")
    return [
        f'{name} = T.alloc_buffer(({lanes},), "float32", scope="global")',
        f"{watch} = {zero}",
        *loop(f"i in T.serial({-(-mul // lanes)})", lines),
        *_halved(name, lanes, "{} + {}"),
        f"nan[r * {plan.watched} + {o.slot}] = {name}[0]",
    ]


def _gradient(plan: DensePlan, frame: Frame, o: Operand) -> list[str]:
    """One row's block of a gradient into 16-bit integers, a step per component (numerics.gradients).

    The maximum is taken of the bits of ``|t|``, which order floats and put infinities and NaNs on
    top; the step of such a row is NaN. Adding 1.5 * 2^23 rounds half to even and leaves the integer
    in the low bits of the sum.
    """
    mul, comps = o.block.mul, range(o.block.components)
    lanes = min(plan.unit.lanes, 1 << (mul.bit_length() - 1))
    ints = many("int32", lanes)
    weight = vector(f"{frame.prefix}scale", f"{o.index} + u", lanes)
    load = [f"u: T.let = T.min(i * {lanes}, {mul - lanes})", f"w: T.let = {weight}"]
    for c in comps:
        place = frame.x("r", f"{o.block.base + c * o.block.stride} + u", lanes)
        load.append(f"t{c}: T.let = {place} * w")
    header = f"i in T.serial({-(-mul // lanes)})"
    lines, largest, stores = [], [], []
    for c in comps:
        name = f"top{o.step + c}"
        lines += [
            f'{name} = T.alloc_buffer(({lanes},), "int32", scope="global")',
            f"{vector(name, '0', lanes)} = {splat('0', lanes)}",
        ]
        bits = f'T.reinterpret(t{c}, dtype="{ints}") & {splat("0x7FFFFFFF", lanes)}'
        largest.append(f"{vector(name, '0', lanes)} = T.max({vector(name, '0', lanes)}, {bits})")
    lines += loop(header, load + largest)
    for c in comps:
        lines += _step(plan, frame, o, c, lanes)
    rounding = splat(literal(1.5 * 2.0**23), lanes)
    for c in comps:
        bits = f'T.reinterpret(t{c} * {splat(f"inv{o.step + c}", lanes)} + {rounding}, dtype="{ints}")'
        place = _tile(plan, frame, o, "r", f"{c * o.width} + u", lanes)
        stores.append(f'{place} = T.Cast("{many("int16", lanes)}", {bits})')
    return lines + loop(header, load + stores)


def _halved(name: str, lanes: int, join: str) -> list[str]:
    """Statements that join all lanes of a vector in its first: in halves, a fixed order."""
    lines, half = [], lanes // 2
    while half:
        low, high = vector(name, "0", half), vector(name, str(half), half)
        lines.append(f"{low} = {join.format(low, high)}")
        half //= 2
    return lines


def _step(plan: DensePlan, frame: Frame, o: Operand, c: int, lanes: int) -> list[str]:
    """A component's step, kept for the row's products, and what its values are multiplied by."""
    k = o.step + c
    zero, small = literal(0.0), literal(SMALLEST)
    finite = f"T.Select(m{k} <= {literal(_FLOAT_MAX)}, m{k} * {literal(1.0 / LARGEST)}, T.float32('nan'))"
    return [
        *_halved(f"top{k}", lanes, "T.max({}, {})"),
        f'm{k}: T.let = T.reinterpret(top{k}[0], dtype="float32")',
        f"gs[r * {plan.dynamic} + {k}] = T.Select(m{k} < {small}, {zero}, {finite})",
        f"inv{k}: T.let = T.Select(m{k} < {small}, {zero}, {literal(float(LARGEST))} / m{k})",
    ]


def _stored(plan: DensePlan, o: Operand, c: int, lanes: int) -> str:
    """The value of component c in the tile buffer, from its operand ``X{c}`` (a whole float)."""
    dtype = plan.unit.storage(o.kind)
    if dtype == "float32":
        if plan.problem.weight != "f32":  # the weights hold the steps
            return f"X{c}"
        scheme = plan.problem.scheme
        fraction = scheme.fraction_bits(o.block.l) if scheme is not None else 0
        return f"X{c} * (s * {splat(literal(2.0**-fraction), lanes)})"
    integer = f'T.Cast("{many("int32", lanes)}", X{c})'
    if plan.unit.offset(o.kind):
        integer += f" + {splat(str(plan.unit.offset(o.kind)), lanes)}"
    return f'T.Cast("{many(dtype, lanes)}", {integer})'


Named = list[tuple[str, str]]  # names, and what they stand for


def _component(scheme: ActivationScheme, o: Operand, lanes: int) -> Named:
    top = scheme.qmax(o.block.l)
    high, low = splat(literal(float(top)), lanes), splat(literal(float(-top)), lanes)
    codes = [f"T.max(T.min(T.nearbyint(v{c} / s), {high}), {low})" for c in range(o.block.components)]
    if scheme.common:
        codes = [f"T.nearbyint({code} * ratio)" for code in codes]
    return [(f"X{c}", code) for c, code in enumerate(codes)]


def _magnitude(scheme: ActivationScheme, o: Operand, lanes: int) -> Named:
    squares = " + ".join(f"v{c} * v{c}" for c in range(o.block.components))
    top = splat(literal(float(scheme.qmax(o.block.l))), lanes)
    return [("m1", f"T.sqrt({squares})"), ("q", f"T.min(T.nearbyint(m1 / s), {top})")]


def _exact(scheme: ActivationScheme, o: Operand, lanes: int) -> Named:
    zero = splat(literal(0.0), lanes)
    factor = f"T.Select(q == {zero}, {zero}, {'q * ratio' if scheme.common else 'q'} / m1)"
    values = [(f"X{c}", f"v{c} * f") for c in range(o.block.components)]
    return [*_magnitude(scheme, o, lanes), ("f", factor), *values]


def _mddq(scheme: ActivationScheme, o: Operand, lanes: int) -> Named:
    comps = range(o.block.components)
    zero = splat(literal(0.0), lanes)
    levels = splat(literal(float(scheme.direction_levels)), lanes)
    fine = "ratio" if scheme.common else splat(literal(2.0 ** scheme.fraction_bits(o.block.l)), lanes)
    return [
        *_magnitude(scheme, o, lanes),
        ("g", f"T.Select(q == {zero}, {zero}, {levels} / m1)"),
        *((f"d{c}", f"T.nearbyint(v{c} * g)") for c in comps),
        ("h", f"T.sqrt({' + '.join(f'd{c} * d{c}' for c in comps)})"),
        ("f", f"T.Select(q == {zero}, {zero}, q * {fine} / h)"),
        *((f"X{c}", f"T.nearbyint(d{c} * f)") for c in comps),
    ]


RULES = {"component": _component, "mddq": _mddq, "exact": _exact}
"""An operand's values ``X0``, ``X1``, ... from its components ``v0``, ``v1``, ... and steps ``s``."""


# Register tiles --------------------------------------------------------------------------------


def _sweep(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles) -> list[str]:
    """All register tiles of one product and one width of column tile."""
    height = plan.schedule.rows[tiles.vectors - 1]
    body = _register_tile(plan, frame, p, tiles, height)
    tile = loop(f"s in T.serial((rows + {height - 1}) // {height})", body)
    columns, comps = f"j in T.serial({tiles.count})", f"c in T.serial({p.block.components})"
    if plan.schedule.components_first:
        return loop(comps, loop(columns, tile))
    return loop(columns, loop(comps, tile))


def _register_tile(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles, height: int) -> list[str]:
    o, lanes, vectors = plan.operands[p.operand], plan.unit.lanes, tiles.vectors
    dtype = "float32" if o.kind == "f32" else "int32"
    cells = [(r, v) for r in range(height) for v in range(vectors)]
    lines = [f'a{r}_{v} = T.alloc_buffer(({lanes},), "{dtype}", scope="global")' for r, v in cells]
    for r, v in cells:
        lines.append(f"{_acc(r, v, lanes)} = {_start(frame, p, tiles, v, lanes, dtype)}")
    if _in_x(frame, o):
        lines += [f"i{r}: T.let = T.min(s * {height} + {r}, {frame.last})" for r in range(height)]
    steps = -(-p.depth // plan.unit.step(o.kind))
    packed = _halves(plan) == 2 and not (frame.decoded and plan.decodes(p))
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
    starts = (f"{tiles.start * lanes} + {_column(tiles, v, lanes)}" for v in range(tiles.vectors))
    columns = [f"{p.block.base} + c * {p.block.stride} + {start}" for start in starts]
    rows = (f"(s * {height} + {height + r})" for r in range(height))
    return [ask_to_write(frame.y(row, column, 1)) for row in rows for column in columns]


def _start(frame: Frame, p: Product, tiles: ColumnTiles, v: int, lanes: int, dtype: str) -> str:
    if p.sums >= 0:
        place = f"{p.sums + tiles.start * lanes} + {_column(tiles, v, lanes)}"
        return vector(f"{frame.prefix}sums", place, lanes)
    return splat("0" if dtype == "int32" else literal(0.0), lanes)


def _group(plan: DensePlan, frame: Frame, p: Product, tiles: ColumnTiles, k: str, *, odd: bool) -> list[str]:
    """Accumulate one stored group of input channels (two steps where a byte holds two codes)."""
    o, unit, vectors = plan.operands[p.operand], plan.unit, tiles.vectors
    step, lanes = unit.step(o.kind), unit.lanes
    row = vectors * lanes * step
    decoded = frame.decoded and plan.decodes(p)
    each = _halves(plan) if decoded else 1
    stored = groups(plan, o.kind, p.depth)
    base = each * (p.weight + tiles.start * lanes * step * stored)
    place = f"{base} + (j * {each * stored} + {k}) * {row}"
    weight = f"{frame.prefix}{'wf' if decoded else 'weight'}"
    packed = _halves(plan) == 2 and not decoded
    lines = []
    if packed:
        stacked = (f"{place} + {v * lanes * step}" for v in range(vectors))
        lines = [f"b{v}: T.let = {vector(weight, at, lanes * step)}" for v, at in enumerate(stacked)]
    for half in range(2 if packed and not odd else 1):
        step_index = f"({k} * 2 + {half})" if packed else k
        for v in range(vectors):
            raw = _nibble(f"b{v}", half, lanes * step) if packed else None
            raw = raw or vector(weight, f"{place} + {v * lanes * step}", lanes * step)
            lines.append(f"w{half}_{v}: T.let = {raw if decoded else _decode(plan, o, raw)}")
        for r in range(plan.schedule.rows[vectors - 1]):
            height = plan.schedule.rows[vectors - 1]
            lines.append(f"e{half}_{r}: T.let = {_operand(plan, frame, p, r, step_index, height)}")
            for v in range(vectors):
                acc = _acc(r, v, lanes)
                lines.append(f"{acc} = {unit.accumulate(o.kind, acc, f'e{half}_{r}', f'w{half}_{v}')}")
    return lines


def _nibble(name: str, half: int, n: int) -> str:
    """int8 codes from the low or the high halves of bytes, which hold code + 8."""
    byte = (
        f"T.shift_right({name}, T.broadcast(T.uint8(4), {n}))"
        if half
        else (f"({name} & T.broadcast(T.uint8(15), {n}))")
    )
    return f'(T.reinterpret({byte}, dtype="int8x{n}") - T.broadcast(T.int8(8), {n}))'


def _decode(plan: DensePlan, o: Operand, raw: str) -> str:
    """Stored weights as the multiplication wants them, in registers."""
    lanes, step = plan.unit.lanes, plan.unit.step(o.kind)
    if plan.problem.weight == "f32":
        return raw
    if o.kind == "f32":
        return f'T.Cast("float32x{lanes}", {raw})'
    if step == 1:
        return f'T.Cast("int32x{lanes}", {raw})'
    return raw if step == 4 else f'T.Cast("int16x{2 * lanes}", {raw})'


def _operand(plan: DensePlan, frame: Frame, p: Product, r: int, k: str, height: int) -> str:
    """The operand of row r and step k, in every lane."""
    o, lanes, step = plan.operands[p.operand], plan.unit.lanes, plan.unit.step(plan.operands[p.operand].kind)
    if _in_x(frame, o):
        column = f"{o.block.base + p.first} + c * {o.block.stride} + {k}"
        return splat(frame.x(f"i{r}", column, 1), lanes)
    here = _tile(plan, frame, o, f"(s * {height} + {r})", f"{p.first} + c * {o.width} + {k} * {step}", step)
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
        column = f"{tiles.start * lanes} + {_column(tiles, v, lanes)}"
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


# Places ----------------------------------------------------------------------------------------


def _tile(plan: DensePlan, frame: Frame, o: Operand, row: str, column: str, lanes: int) -> str:
    """Consecutive elements of an operand in the tile buffer."""
    dtype = plan.unit.storage(o.kind)
    place = f"{row} * {plan.row_size(dtype)} + {o.offset} + {column}"
    return vector(_BUFFERS[dtype], place, lanes)


def _column(tiles: ColumnTiles, v: int, lanes: int) -> str:
    """The first column of vector v of column tile j, counted from the tiles' start."""
    return f"j * {tiles.vectors * lanes} + {v * lanes}"


def _acc(r: int, v: int, lanes: int) -> str:
    return vector(f"a{r}_{v}", "0", lanes)
