"""The text of a linear kernel: one loop over tasks of rows, each a prologue and register tiles.

    for each task of rows (in parallel):
        prologue: the task's rows of x become integers (or scaled floats) in a tile buffer; a
            gradient's integers get a step per row
        for each product, column tile, component, register tile of rows:
            accumulators = 0 (or minus the unsigned offset's share)
            for each group of input channels: accumulators += operand * decoded weights
            y (+)= accumulators * scale (+ bias)

Integers never leave the task. Rows beyond the last are computed on clamped rows and not stored.
"""

from __future__ import annotations

from ...config import ActivationScheme, activation_scheme
from ...numerics.gradients import LARGEST, SMALLEST
from .build import module_text
from .dense_plan import WEIGHED, ColumnTiles, DensePlan, Operand, Product, groups
from .emit import literal, loop, splat, vector

_BUFFERS = {"float32": "qf", "int16": "q16", "int8": "q8", "uint8": "q8"}
_FLOAT_MAX = (2.0 - 2.0**-23) * 2.0**127
_WEIGHTS = {"f32": "float32", "s16": "int16", "s8": "int8", "s4": "uint8"}


def dense_text(plan: DensePlan, parallel: bool) -> str:
    """The TVMScript module of a plan.

    ``main(x, y, weight, [scale], [sums], [steps], [fine], [bias], task)``: x (N, dim_in) and y (N, dim_out)
    float32, the packed constants, and ``task``, the rows per task (at most the schedule's).
    """
    names = arguments(plan)
    body = ["n0 = t * task", "rows = T.min(task, m - n0)", *_buffers(plan), *_prologue(plan)]
    for product in plan.products:
        for tiles in product.tiles:
            body += _sweep(plan, product, tiles)
    body += _fill(plan)
    kind = "parallel" if parallel else "serial"
    lines = loop(f"t in T.{kind}((m + task - 1) // task)", body)
    shapes = {"x": f"(m, {plan.dim_in})", "y": f"(m, {plan.dim_out})"}
    preamble = ["m = T.int32()"]
    for name, dtype in names.items():
        shape = shapes.get(name, f"({sizes(plan).get(name)},)")
        align = 4 if name in shapes else 64
        preamble.append(f'{name} = T.match_buffer({name}_h, {shape}, "{dtype}", align={align})')
    signature = ", ".join([*(f"{name}_h: T.handle" for name in names), "task: T.int32"])
    return module_text(signature, "".join(f"        {line}\n" for line in (*preamble, *lines)))


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
    return {"x": "float32", "y": "float32"} | {k: v for k, v in every.items() if found[k]}


def sizes(plan: DensePlan) -> dict[str, int]:
    """Elements of each packed constant."""
    quantized = [o.index + o.block.mul for o in plan.operands if o.rule not in ("direct", *WEIGHED)]
    steps, scheme = max(quantized, default=0), plan.problem.scheme
    return plan.sizes | {"steps": steps, "fine": steps if scheme is not None and scheme.common else 0}


def _buffers(plan: DensePlan) -> list[str]:
    """The tile buffers; a register tile may read rows beyond the task's."""
    rows = plan.schedule.task_rows + max(plan.schedule.rows)
    lines = []
    for dtype in ("float32", "int16", "int8", "uint8"):
        size = plan.row_size(dtype)
        if size:
            lines.append(f'{_BUFFERS[dtype]} = T.alloc_buffer(({rows * size},), "{dtype}", scope="global")')
    if plan.watched:
        lines.append(f'nan = T.alloc_buffer(({rows * plan.watched},), "float32", scope="global")')
    if plan.dynamic:
        lines.append(f'gs = T.alloc_buffer(({rows * plan.dynamic},), "float32", scope="global")')
    return lines


# Prologue --------------------------------------------------------------------------------------


def _prologue(plan: DensePlan) -> list[str]:
    body: list[str] = []
    for operand in plan.operands:
        if operand.rule == "dynamic":
            body += _gradient(plan, operand)
        elif operand.rule != "direct":
            body += _convert(plan, operand)
    return loop("r in T.serial(rows)", body) if body else []


def _convert(plan: DensePlan, o: Operand) -> list[str]:
    """One row's block of x into the tile buffer, a vector of channels at a time.

    The last vector is moved back to end with the block: it overlaps, and repeats the same values.
    """
    mul = o.block.mul
    lanes = min(plan.unit.lanes, 1 << (mul.bit_length() - 1))
    comps = range(o.block.components)
    lines = [f"u = T.min(i * {lanes}, {mul - lanes})"]
    for c in comps:
        lines.append(f"v{c} = {vector('x', f'{o.block.base + c * o.block.stride} + u', lanes, row='n0 + r')}")
    if o.rule == "scaled":
        lines.append(f"s = {vector('scale', f'{o.index} + u', lanes)}")
        values = [f"v{c} * s" for c in comps]
    else:
        lines.append(f"s = {vector('steps', f'{o.index} + u', lanes)}")
        scheme = activation_scheme(plan.problem.activation)
        if scheme.common:
            lines.append(f"ratio = {vector('fine', f'{o.index} + u', lanes)}")
        lines += RULES[o.rule](scheme, o, lanes)
        values = [_stored(plan, o, c, lanes) for c in comps]
    for c, value in zip(comps, values, strict=True):
        lines.append(f"{_tile(plan, o, 'r', f'{c * o.width} + u', lanes)} = {value}")
    if o.slot < 0:
        return loop(f"i in T.serial({-(-mul // lanes)})", lines)
    zero = splat(literal(0.0), lanes)
    bad = [f"T.Select(T.isnan(v{c}), v{c}, {zero})" for c in comps]
    name = f"seen{o.slot}"
    watch = vector(name, "0", lanes)
    lines.append(f"{watch} = {' + '.join([watch, *bad])}")
    total = " + ".join(f"{name}[{k}]" for k in range(lanes))
    return [
        f'{name} = T.alloc_buffer(({lanes},), "float32", scope="local")',
        f"{watch} = {zero}",
        *loop(f"i in T.serial({-(-mul // lanes)})", lines),
        f"nan[r * {plan.watched} + {o.slot}] = {total}",
    ]


def _gradient(plan: DensePlan, o: Operand) -> list[str]:
    """One row's block of a gradient into 16-bit integers, a step per component (numerics.gradients).

    The maximum is taken of the bits of ``|t|``, which order floats and put infinities and NaNs on
    top; the step of such a row is NaN. Adding 1.5 * 2^23 rounds half to even and leaves the integer
    in the low bits of the sum.
    """
    mul, comps = o.block.mul, range(o.block.components)
    lanes = min(plan.unit.lanes, 1 << (mul.bit_length() - 1))
    ints = _many("int32", lanes)
    load = [f"u = T.min(i * {lanes}, {mul - lanes})", f"w = {vector('scale', f'{o.index} + u', lanes)}"]
    for c in comps:
        place = vector("x", f"{o.block.base + c * o.block.stride} + u", lanes, row="n0 + r")
        load.append(f"t{c} = {place} * w")
    header = f"i in T.serial({-(-mul // lanes)})"
    lines, largest, stores = [], [], []
    for c in comps:
        name = f"top{o.step + c}"
        lines += [
            f'{name} = T.alloc_buffer(({lanes},), "int32", scope="local")',
            f"{vector(name, '0', lanes)} = {splat('0', lanes)}",
        ]
        bits = f'T.reinterpret(t{c}, dtype="{ints}") & {splat("0x7FFFFFFF", lanes)}'
        largest.append(f"{vector(name, '0', lanes)} = T.max({vector(name, '0', lanes)}, {bits})")
    lines += loop(header, load + largest)
    for c in comps:
        lines += _step(plan, o, c, lanes)
    rounding = splat(literal(1.5 * 2.0**23), lanes)
    for c in comps:
        bits = f'T.reinterpret(t{c} * {splat(f"inv{o.step + c}", lanes)} + {rounding}, dtype="{ints}")'
        place = _tile(plan, o, "r", f"{c * o.width} + u", lanes)
        stores.append(f'{place} = T.Cast("{_many("int16", lanes)}", {bits})')
    return lines + loop(header, load + stores)


def _step(plan: DensePlan, o: Operand, c: int, lanes: int) -> list[str]:
    """A component's step, kept for the row's products, and what its values are multiplied by."""
    k = o.step + c
    lines, half = [], lanes // 2
    while half:
        low, high = vector(f"top{k}", "0", half), vector(f"top{k}", str(half), half)
        lines.append(f"{low} = T.max({low}, {high})")
        half //= 2
    zero, small = literal(0.0), literal(SMALLEST)
    finite = f"T.Select(m{k} <= {literal(_FLOAT_MAX)}, m{k} * {literal(1.0 / LARGEST)}, T.float32('nan'))"
    return [
        *lines,
        f'm{k} = T.reinterpret(top{k}[0], dtype="float32")',
        f"gs[r * {plan.dynamic} + {k}] = T.Select(m{k} < {small}, {zero}, {finite})",
        f"inv{k} = T.Select(m{k} < {small}, {zero}, {literal(float(LARGEST))} / m{k})",
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
    integer = f'T.Cast("{_many("int32", lanes)}", X{c})'
    if plan.unit.offset(o.kind):
        integer += f" + {splat(str(plan.unit.offset(o.kind)), lanes)}"
    return f'T.Cast("{_many(dtype, lanes)}", {integer})'


def _component(scheme: ActivationScheme, o: Operand, lanes: int) -> list[str]:
    top = scheme.qmax(o.block.l)
    high, low = splat(literal(float(top)), lanes), splat(literal(float(-top)), lanes)
    codes = [f"T.max(T.min(T.nearbyint(v{c} / s), {high}), {low})" for c in range(o.block.components)]
    if scheme.common:
        codes = [f"T.nearbyint({code} * ratio)" for code in codes]
    return [f"X{c} = {code}" for c, code in enumerate(codes)]


def _magnitude(scheme: ActivationScheme, o: Operand, lanes: int) -> list[str]:
    squares = " + ".join(f"v{c} * v{c}" for c in range(o.block.components))
    top = splat(literal(float(scheme.qmax(o.block.l))), lanes)
    return [
        f"m1 = T.sqrt({squares})",
        f"q = T.min(T.nearbyint(m1 / s), {top})",
    ]


def _exact(scheme: ActivationScheme, o: Operand, lanes: int) -> list[str]:
    zero = splat(literal(0.0), lanes)
    factor = f"f = T.Select(q == {zero}, {zero}, {'q * ratio' if scheme.common else 'q'} / m1)"
    return [*_magnitude(scheme, o, lanes), factor, *(f"X{c} = v{c} * f" for c in range(o.block.components))]


def _mddq(scheme: ActivationScheme, o: Operand, lanes: int) -> list[str]:
    comps = range(o.block.components)
    zero = splat(literal(0.0), lanes)
    levels = splat(literal(float(scheme.direction_levels)), lanes)
    fine = "ratio" if scheme.common else splat(literal(2.0 ** scheme.fraction_bits(o.block.l)), lanes)
    return [
        *_magnitude(scheme, o, lanes),
        f"g = T.Select(q == {zero}, {zero}, {levels} / m1)",
        *(f"d{c} = T.nearbyint(v{c} * g)" for c in comps),
        f"h = T.sqrt({' + '.join(f'd{c} * d{c}' for c in comps)})",
        f"f = T.Select(q == {zero}, {zero}, q * {fine} / h)",
        *(f"X{c} = T.nearbyint(d{c} * f)" for c in comps),
    ]


RULES = {"component": _component, "mddq": _mddq, "exact": _exact}


# Register tiles --------------------------------------------------------------------------------


def _sweep(plan: DensePlan, p: Product, tiles: ColumnTiles) -> list[str]:
    """All register tiles of one product and one width of column tile."""
    height = plan.schedule.rows[tiles.vectors - 1]
    tile = loop(f"s in T.serial((rows + {height - 1}) // {height})", _register_tile(plan, p, tiles, height))
    columns, comps = f"j in T.serial({tiles.count})", f"c in T.serial({p.block.components})"
    if plan.schedule.components_first:
        return loop(comps, loop(columns, tile))
    return loop(columns, loop(comps, tile))


def _register_tile(plan: DensePlan, p: Product, tiles: ColumnTiles, height: int) -> list[str]:
    o, lanes, vectors = plan.operands[p.operand], plan.unit.lanes, tiles.vectors
    dtype = "float32" if o.kind == "f32" else "int32"
    cells = [(r, v) for r in range(height) for v in range(vectors)]
    lines = [f'a{r}_{v} = T.alloc_buffer(({lanes},), "{dtype}", scope="local")' for r, v in cells]
    for r, v in cells:
        lines.append(f"{_acc(r, v, lanes)} = {_start(p, tiles, v, lanes, dtype)}")
    if o.rule == "direct":
        lines += [f"i{r} = T.min(n0 + s * {height} + {r}, m - 1)" for r in range(height)]
    step = plan.unit.step(o.kind)
    steps = -(-p.depth // step)
    whole, halves = divmod(steps, 2) if plan.problem.weight == "s4" else (steps, 0)
    if whole:
        lines += loop(f"k in T.serial({whole})", _group(plan, p, tiles, "k", odd=False))
    if halves:  # an odd last group: only the low halves of its bytes
        lines += _group(plan, p, tiles, str(whole), odd=True)
    for r in range(height):
        lines += [f"if s * {height} + {r} < rows:", *("    " + line for line in _store(plan, p, tiles, r))]
    return lines


def _start(p: Product, tiles: ColumnTiles, v: int, lanes: int, dtype: str) -> str:
    if p.sums >= 0:
        return vector("sums", f"{p.sums + tiles.start * lanes} + {_column(tiles, v, lanes)}", lanes)
    return splat("0" if dtype == "int32" else literal(0.0), lanes)


def _group(plan: DensePlan, p: Product, tiles: ColumnTiles, k: str, *, odd: bool) -> list[str]:
    """Accumulate one stored group of input channels (two steps where a byte holds two codes)."""
    o, unit, vectors = plan.operands[p.operand], plan.unit, tiles.vectors
    step, lanes = unit.step(o.kind), unit.lanes
    row = vectors * lanes * step
    stored = groups(plan, o.kind, p.depth)
    base = p.weight + tiles.start * lanes * step * stored
    place = f"{base} + (j * {stored} + {k}) * {row}"
    packed = plan.problem.weight == "s4"
    lines = []
    if packed:
        stacked = (f"{place} + {v * lanes * step}" for v in range(vectors))
        lines = [f"b{v} = {vector('weight', at, lanes * step)}" for v, at in enumerate(stacked)]
    for half in range(2 if packed and not odd else 1):
        step_index = f"({k} * 2 + {half})" if packed else k
        for v in range(vectors):
            raw = _nibble(f"b{v}", half, lanes * step) if packed else None
            raw = raw or vector("weight", f"{place} + {v * lanes * step}", lanes * step)
            lines.append(f"w{half}_{v} = {_decode(plan, o, raw)}")
        for r in range(plan.schedule.rows[vectors - 1]):
            lines.append(f"e{half}_{r} = {_operand(plan, p, r, step_index, plan.schedule.rows[vectors - 1])}")
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


def _operand(plan: DensePlan, p: Product, r: int, k: str, height: int) -> str:
    """The operand of row r and step k, in every lane."""
    o, lanes, step = plan.operands[p.operand], plan.unit.lanes, plan.unit.step(plan.operands[p.operand].kind)
    if o.rule == "direct":
        return splat(f"x[i{r}, {o.block.base + p.first} + c * {o.block.stride} + {k}]", lanes)
    here = _tile(plan, o, f"(s * {height} + {r})", f"{p.first} + c * {o.width} + {k} * {step}", step)
    if o.kind == "f32":
        return splat(here, lanes)
    if step == 1:
        return splat(f'T.Cast("int32", {here})', lanes)
    dtype = f"int{32 // step}x{step * lanes}"
    return f'T.reinterpret({splat(f"""T.reinterpret({here}, dtype="int32")""", lanes)}, dtype="{dtype}")'


def _store(plan: DensePlan, p: Product, tiles: ColumnTiles, r: int) -> list[str]:
    """Row r of a register tile to y: times scale, plus bias or what earlier products left."""
    o, lanes = plan.operands[p.operand], plan.unit.lanes
    height = plan.schedule.rows[tiles.vectors - 1]
    row = f"n0 + s * {height} + {r}"
    lines = []
    for v in range(tiles.vectors):
        column = f"{tiles.start * lanes} + {_column(tiles, v, lanes)}"
        value = _acc(r, v, lanes)
        if o.kind != "f32":
            value = f'T.Cast("float32x{lanes}", {value})'
        if p.scale >= 0:
            value += f" * {vector('scale', f'{p.scale} + {column}', lanes)}"
        if o.step >= 0:
            value += f" * {splat(f'gs[(s * {height} + {r}) * {plan.dynamic} + {o.step} + c]', lanes)}"
        if o.slot >= 0:
            spot = f"nan[(s * {height} + {r}) * {plan.watched} + {o.slot}]"
            value += f" + {splat(spot, lanes)}"
        if p.bias >= 0:
            value += f" + {vector('bias', f'{p.bias} + {column}', lanes)}"
        at = f"{p.block.base} + c * {p.block.stride} + {column}"
        tail = p.block.mul - (tiles.start + tiles.vectors * (tiles.count - 1) + v) * lanes
        lines += _write(value, row, at, lanes, tail, add=not p.opens, name=f"z{v}")
    return lines


def _write(value: str, row: str, at: str, lanes: int, tail: int, *, add: bool, name: str) -> list[str]:
    """``y[row, at : at + lanes] (+)= value``; only ``tail`` of them in a block's last vector."""
    if tail >= lanes:
        place = vector("y", at, lanes, row=row)
        return [f"{place} = {place} + {value}" if add else f"{place} = {value}"]
    one = f"y[{row}, {at} + i]"
    return [
        f'{name} = T.alloc_buffer(({lanes},), "float32", scope="local")',
        f"{vector(name, '0', lanes)} = {value}",
        *loop(f"i in T.serial({tail})", [f"{one} = {one} + {name}[i]" if add else f"{one} = {name}[i]"]),
    ]


def _fill(plan: DensePlan) -> list[str]:
    """Output blocks that no product reaches: their bias, or zeros."""
    lines: list[str] = []
    for b in plan.unreached:
        bias = plan.bias_offset(b)
        value = f"bias[{bias} + i]" if bias >= 0 else literal(0.0)
        inner = loop(f"i in T.serial({b.mul})", [f"y[n0 + r, {b.base} + c * {b.stride} + i] = {value}"])
        lines += loop("r in T.serial(rows)", loop(f"c in T.serial({b.components})", inner))
    return lines


# Places ----------------------------------------------------------------------------------------


def _tile(plan: DensePlan, o: Operand, row: str, column: str, lanes: int) -> str:
    """Consecutive elements of an operand in the tile buffer."""
    dtype = plan.unit.storage(o.kind)
    return vector(_BUFFERS[dtype], f"{row} * {plan.row_size(dtype)} + {o.offset} + {column}", lanes)


def _column(tiles: ColumnTiles, v: int, lanes: int) -> str:
    """The first column of vector v of column tile j, counted from the tiles' start."""
    return f"j * {tiles.vectors * lanes} + {v * lanes}"


def _acc(r: int, v: int, lanes: int) -> str:
    return vector(f"a{r}_{v}", "0", lanes)


def _many(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"
