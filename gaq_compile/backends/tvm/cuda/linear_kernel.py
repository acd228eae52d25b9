"""The text of a linear kernel on a GPU: integers in shared memory, products with dp4a.

A block has the rows that fit into its shared memory, at most 16, and one **job**: an output block of the
linear, or one component of it where components do not meet while they are quantized::

    prologue: the job's operands of all rows become integers (or scaled floats) in shared memory,
        four channels to a word; of s16 the high and the low bytes are words of their own
    for each tile of 32 output channels, component and 8 rows (one warp each):
        for each product: sums = dp4a over the words, exact
            value (+)= sums * scale, times the row's step of a gradient, plus the bias
        y = value

An s16 X is ``256 * high + low + 128`` with signed bytes, so ``sum X w`` is two sums of bytes and 128 times
the column sum of the codes, which starts the low one. A 4-bit code stands in the upper half of a byte,
16 times as large, and the exact sum is shifted back. The packed weights are the CPU kernels'
(:mod:`..dense_plan`), in tiles as wide as a warp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ....config import activation_scheme
from ....errors import LoweringError
from ....ir.layout import Block
from ....numerics.gradients import LARGEST, SMALLEST
from ..dense_kernel import arguments, sizes
from ..dense_plan import DensePlan, Operand, Product, groups, padded
from ..dense_prologue import RULES
from ..emit import literal, loop
from .emit import SYNC, WARP, across_warp, branch, chosen, dp4a, grid_text, local, shared

THREADS = 128
_WARPS = THREADS // WARP
_MOST_ROWS = 16
_TILE_ROWS = 8  # rows of one warp's tile of sums
_SHARED_BYTES = 40960  # of 48 KiB that every GPU gives to a block
_FLOAT_MAX = (2.0 - 2.0**-23) * 2.0**127
_UPPER = -0x0F0F0F10  # 0xF0F0F0F0: the upper half of every byte
_STATIC = ("component", "mddq", "exact")


@dataclass(frozen=True)
class Job:
    """What a block along y computes: some components of one output block.

    Attributes:
        block: in y.
        first: the first component.
        components: how many.
        products: that reach the block, in order; none for a block of zeros or biases.
    """

    block: Block
    first: int
    components: int
    products: tuple[Product, ...]

    @property
    def operands(self) -> tuple[int, ...]:
        """The operands of the products, each once."""
        return tuple(dict.fromkeys(p.operand for p in self.products))


@lru_cache(maxsize=1024)
def jobs(plan: DensePlan) -> tuple[Job, ...]:
    """The jobs of a plan: components apart unless an operand's are quantized together."""
    found: list[Job] = []
    for block in dict.fromkeys([*(p.block for p in plan.products), *plan.unreached]):
        products = tuple(p for p in plan.products if p.block == block)
        together = any(plan.operands[p.operand].rule in _STATIC for p in products)
        if together or not products:
            found.append(Job(block, 0, block.components, products))
        else:
            found += [Job(block, c, 1, products) for c in range(block.components)]
    return tuple(found)


@lru_cache(maxsize=1024)
def rows_per_block(plan: DensePlan) -> int:
    """As many rows as fit into shared memory.

    Raises:
        LoweringError: if not even one row fits.
    """
    rows = _MOST_ROWS
    while rows and max(_layout(plan, job, rows).bytes for job in jobs(plan)) > _SHARED_BYTES:
        rows //= 2
    if not rows:
        raise LoweringError(
            "a row of this linear does not fit into a block's shared memory",
            where=plan.problem.spec,
            fix="split the layer, or run it with backend='reference'",
        )
    return rows


@dataclass(frozen=True)
class _Layout:
    """Where a job's operands lie in shared memory.

    Attributes:
        places: per operand: its first element among the floats, or among the integer words.
        floats, words: how many elements of each.
        rows: per block.
    """

    places: dict[int, int]
    floats: int
    words: int
    rows: int

    @property
    def bytes(self) -> int:
        return 4 * (self.floats + self.words)


def _layout(plan: DensePlan, job: Job, rows: int) -> _Layout:
    places: dict[int, int] = {}
    used = {"f32": 0, "words": 0}
    for k in job.operands:
        o = plan.operands[k]
        kind = "f32" if o.kind == "f32" else "words"
        places[k] = used[kind]
        used[kind] += _plane(o, job, rows) * (2 if o.kind == "s16" else 1)
    return _Layout(places, used["f32"], used["words"], rows)


def _width(o: Operand) -> int:
    """Elements (floats, or words of four channels) of one row and component."""
    return padded(o.block.mul, 4) if o.kind == "f32" else padded(o.block.mul, 16) // 4


def _plane(o: Operand, job: Job, rows: int) -> int:
    return rows * job.components * _width(o)


def linear_text(plan: DensePlan) -> str:
    """The TVMScript module of a plan.

    ``main(x, y, [weight], [words], [scale], [sums], [steps], [fine], [bias])``: x (N, dim_in) and
    y (N, dim_out) float32, and the packed constants; ``words`` are the bytes of the weights, four
    in an int32.
    """
    rows = rows_per_block(plan)
    every = jobs(plan)
    layouts = [_layout(plan, job, rows) for job in every]
    most = max((len(job.operands) * job.components * rows for job in every), default=1)
    body = [
        shared("xf", max(1, *(found.floats for found in layouts))),
        shared("xi", max(1, *(found.words for found in layouts)), "int32"),
        shared("nan", max(1, most), "int32"),
        shared("gs", max(1, most)),
        f"lane: T.let = tx % {WARP}",
        f"warp: T.let = tx // {WARP}",
        *chosen("by", [_job(plan, job, found) for job, found in zip(every, layouts, strict=True)]),
    ]
    return grid_text(
        _buffers(plan), body, blocks=f"(m + {rows - 1}) // {rows}", threads=THREADS, parts=len(every)
    )


def _buffers(plan: DensePlan) -> list[tuple[str, str, str]]:
    found = [("x", f"m, {plan.dim_in}", "float32"), ("y", f"m, {plan.dim_out}", "float32")]
    for name, dtype in arguments(plan).items():
        if name in ("x", "y"):
            continue
        size = sizes(plan)[name]
        if name != "weight" or any(o.kind == "f32" for o in plan.operands):
            found.append((name, str(size), dtype))
        if name == "weight" and any(o.kind != "f32" for o in plan.operands):
            found.append(("words", str(size // 4), "int32"))
    return found


def _job(plan: DensePlan, job: Job, layout: _Layout) -> list[str]:
    lines: list[str] = []
    watched = [k for k in job.operands if plan.operands[k].rule in _STATIC]
    if watched:
        size = len(job.operands) * layout.rows
        lines += loop(
            f"z in T.serial({-(-size // THREADS)})",
            branch(f"z * {THREADS} + tx < {size}", [f"nan[z * {THREADS} + tx] = 0"]),
        )
        lines.append(SYNC)
    for k in job.operands:
        o = plan.operands[k]
        if o.rule in _STATIC:
            lines += _static(plan, job, layout, k)
        elif o.rule == "dynamic":
            lines += _dynamic(plan, job, layout, k)
        else:
            lines += _floats(plan, job, layout, k)
    if job.operands:
        lines.append(SYNC)
    return lines + _tiles(plan, job, layout)


# Prologue --------------------------------------------------------------------------------------


def _static(plan: DensePlan, job: Job, layout: _Layout, k: int) -> list[str]:
    """Four channels a thread: quantized with static steps, stored as words (or as floats)."""
    o = plan.operands[k]
    scheme = activation_scheme(plan.problem.activation)
    comps = range(o.block.components)
    quads = _width(o) // 4 if o.kind == "f32" else _width(o)
    lines = ["seen = 0", *(f"high{c} = 0" for c in comps if o.kind != "f32")]
    lines += [f"low{c} = 0" for c in comps if o.kind == "s16"]
    for i in range(4):
        lines.append(f"u{i}: T.let = T.min(quad * 4 + {i}, {o.block.mul - 1})")
        for c in comps:
            lines.append(f"v{c} = x[row, {o.block.base + c * o.block.stride} + u{i}]")
            lines.append(f'seen = T.bitwise_or(seen, T.Cast("int32", T.isnan(v{c})))')
        lines.append(f"s = steps[{o.index} + u{i}]")
        if scheme.common:
            lines.append(f"ratio = fine[{o.index} + u{i}]")
        lines += [f"{name} = {value}" for name, value in RULES[o.rule](scheme, o, 1)]
        for c in comps:
            lines += _kept(plan, o, c, i, layout.places[k] + c * layout.rows * _width(o))
    if o.kind != "f32":
        for c in comps:
            place = f"{layout.places[k] + c * layout.rows * _width(o)} + r * {_width(o)} + quad"
            lines.append(f"xi[{place}] = high{c}")
            if o.kind == "s16":
                lines.append(f"xi[{_plane(o, job, layout.rows)} + {place}] = low{c}")
    flag = job.operands.index(k) * layout.rows
    lines += branch("seen != 0", [f"nan[{flag} + r] = 1"])
    return _shares(
        layout.rows * quads,
        [f"r: T.let = item // {quads}", f"quad: T.let = item % {quads}", *_row(layout), *lines],
    )


def _kept(plan: DensePlan, o: Operand, c: int, i: int, start: int) -> list[str]:
    """Channel i of four, from its operand ``X{c}``: its byte in the words, or a float."""
    if o.kind == "f32":
        value = f"X{c}"
        if plan.problem.weight == "f32":  # otherwise the weights hold the steps
            scheme = plan.problem.scheme
            fraction = scheme.fraction_bits(o.block.l) if scheme is not None else 0
            value = f"X{c} * (s * {literal(2.0**-fraction)})"
        value = f"T.Select(quad * 4 + {i} < {o.block.mul}, {value}, {literal(0.0)})"
        return [f"xf[{start} + r * {_width(o)} + quad * 4 + {i}] = {value}"]
    lines = [f'w{c} = T.Cast("int32", X{c})']
    return lines + _bytes(o.kind, f"w{c}", f"high{c}", f"low{c}", i)


def _bytes(kind: str, value: str, high: str, low: str, i: int) -> list[str]:
    """Put an integer's byte, or both of its bytes, at place i of the words."""

    def put(word: str, byte: str) -> str:
        return f"{word} = T.bitwise_or({word}, T.shift_left(T.bitwise_and({byte}, 255), {8 * i}))"

    if kind == "s8":
        return [put(high, value)]
    return [put(high, f"T.shift_right({value}, 8)"), put(low, f"T.bitwise_xor({value}, 128)")]


def _dynamic(plan: DensePlan, job: Job, layout: _Layout, k: int) -> list[str]:
    """A gradient's component in 16-bit integers, a row to a warp (numerics.gradients).

    The maximum is taken of the bits of ``|t|``, which order floats and put infinities and NaNs on
    top; the step of such a row is NaN.
    """
    o = plan.operands[k]
    mul, width = o.block.mul, _width(o)
    start = o.block.base + job.first * o.block.stride
    step = job.operands.index(k) * layout.rows

    def value(channel: str) -> str:
        return f"x[row, {start} + {channel}] * scale[{o.index} + {channel}]"

    largest = [
        f"u: T.let = T.min(i * {WARP} + lane, {mul - 1})",
        f"t = {value('u')}",
        'top = T.max(top, T.bitwise_and(T.reinterpret("int32", t), 0x7FFFFFFF))',
    ]
    pack = ["high = 0", "low = 0"]
    for i in range(4):
        pack += [
            f"u{i}: T.let = T.min((i * {WARP} + lane) * 4 + {i}, {mul - 1})",
            f"t{i} = {value(f'u{i}')}",
            f'q{i} = T.Cast("int32", T.nearbyint(t{i} * inverse))',
            *_bytes("s16", f"q{i}", "high", "low", i),
        ]
    place = f"{layout.places[k]} + r * {width} + i * {WARP} + lane"
    pack += [f"xi[{place}] = high", f"xi[{_plane(o, job, layout.rows)} + {place}] = low"]
    zero, small = literal(0.0), literal(SMALLEST)
    nan = literal(float("nan"))
    lines = [
        f"r: T.let = turn * {_WARPS} + warp",
        *_row(layout),
        "top = 0",
        *loop(f"i in T.serial({-(-mul // WARP)})", largest),
        *across_warp("top", "int32", "T.max({a}, {b})"),
        'most = T.reinterpret("float32", top)',
        f"finite = T.Select(most <= {literal(_FLOAT_MAX)}, most * {literal(1.0 / LARGEST)}, {nan})",
        f"inverse = T.Select(most < {small}, {zero}, {literal(float(LARGEST))} / most)",
        *branch("lane == 0", [f"gs[{step} + r] = T.Select(most < {small}, {zero}, finite)"]),
        *loop(f"i in T.serial({-(-width // WARP)})", branch(f"i * {WARP} + lane < {width}", pack)),
    ]
    return loop(f"turn in T.serial({-(-layout.rows // _WARPS)})", _below(layout.rows, lines))


def _below(rows: int, lines: list[str]) -> list[str]:
    """Leave out what warps beyond the last row would do."""
    return lines if rows % _WARPS == 0 else branch(f"turn * {_WARPS} + warp < {rows}", lines)


def _floats(plan: DensePlan, job: Job, layout: _Layout, k: int) -> list[str]:
    """A component of x as it is, or times the weights' scales; zeros beyond the last channel."""
    o = plan.operands[k]
    width = _width(o)
    value = f"x[row, {o.block.base + job.first * o.block.stride} + u]"
    if o.rule == "scaled":
        value += f" * scale[{o.index} + u]"
    lines = [
        f"r: T.let = item // {width}",
        f"k: T.let = item % {width}",
        *_row(layout),
        f"u: T.let = T.min(k, {o.block.mul - 1})",
        f"v = {value}",
        f"xf[{layout.places[k]} + item] = T.Select(k < {o.block.mul}, v, {literal(0.0)})",
    ]
    return _shares(layout.rows * width, lines)


def _row(layout: _Layout) -> list[str]:
    """The row of x; beyond the last one this is computed again, and not stored."""
    return [f"row: T.let = T.min(bx * {layout.rows} + r, m - 1)"]


def _shares(items: int, lines: list[str]) -> list[str]:
    """Every item once, spread over the block's threads."""
    inner = lines if items % THREADS == 0 else branch(f"turn * {THREADS} + tx < {items}", lines)
    return loop(f"turn in T.serial({-(-items // THREADS)})", _named(inner, items))


def _named(lines: list[str], items: int) -> list[str]:
    return [f"item: T.let = turn * {THREADS} + tx", *lines]


# Tiles of sums -----------------------------------------------------------------------------------


def _tiles(plan: DensePlan, job: Job, layout: _Layout) -> list[str]:
    """All of the job's tiles, a warp each."""
    height = min(_TILE_ROWS, layout.rows)
    stripes, columns = layout.rows // height, -(-job.block.mul // WARP)
    count = stripes * columns * job.components
    lines = [
        f"item: T.let = turn * {_WARPS} + warp",
        f"s: T.let = item % {stripes}",
        f"c: T.let = item // {stripes} % {job.components}",
        f"j: T.let = item // {stripes * job.components}",
        local("value", height),
    ]
    for p in job.products:
        lines += _product(plan, job, layout, p, height)
    if not job.products:
        lines += loop(f"r in T.unroll({height})", [f"value[r] = {_unreached(plan, job)}"])
    column = f"{job.block.base + job.first * job.block.stride} + c * {job.block.stride} + j * {WARP} + lane"
    store = branch(
        f"bx * {layout.rows} + s * {height} + r < m",
        [f"y[bx * {layout.rows} + s * {height} + r, {column}] = value[r]"],
    )
    stores = loop(f"r in T.unroll({height})", store)
    lines += branch(f"j * {WARP} + lane < {job.block.mul}", stores) if job.block.mul % WARP else stores
    inner = lines if count % _WARPS == 0 else [lines[0], *branch(f"item < {count}", lines[1:])]
    return loop(f"turn in T.serial({-(-count // _WARPS)})", inner)


def _unreached(plan: DensePlan, job: Job) -> str:
    bias = plan.bias_offset(job.block)
    return f"bias[{bias} + j * {WARP} + lane]" if bias >= 0 else literal(0.0)


def _product(plan: DensePlan, job: Job, layout: _Layout, p: Product, height: int) -> list[str]:
    """One product's tile: ``value (+)= scaled sums``."""
    o = plan.operands[p.operand]
    k = plan.products.index(p)
    sums = _float_sums if o.kind == "f32" else _integer_sums
    lines, total = sums(plan, layout, job, p, height)
    column = f"j * {WARP} + lane"
    if p.scale >= 0:
        total += f" * scale[{p.scale} + {column}]"
    spot = f"{job.operands.index(p.operand) * layout.rows} + s * {height} + r"
    if o.step >= 0:
        total += f" * gs[{spot}]"
    if o.rule in _STATIC:
        total += f" + T.Select(nan[{spot}] != 0, {literal(float('nan'))}, {literal(0.0)})"
    if p.bias >= 0:
        total += f" + bias[{p.bias} + {column}]"
    first = job.products[0] is p
    result = f"value[r] = {total}" if first else f"value[r] = value[r] + {total}"
    return [line.replace("@", str(k)) for line in (*lines, *loop(f"r in T.unroll({height})", [result]))]


def _integer_sums(
    plan: DensePlan, layout: _Layout, job: Job, p: Product, height: int
) -> tuple[list[str], str]:
    """Exact sums of products of bytes; ``@`` stands for the product's number."""
    o, packed = plan.operands[p.operand], plan.problem.weight == "s4"
    wide = o.kind == "s16"
    stored, per_word = groups(plan, o.kind, p.depth), 2 if packed else 1
    column = f"j * {WARP} + lane"
    start = f"sums[{p.sums} + {column}]" if p.sums >= 0 else "0"
    lines = [local("low@", height, "int32"), *loop(f"r in T.unroll({height})", [f"low@[r] = {start}"])]
    if wide:
        lines += [local("high@", height, "int32"), *loop(f"r in T.unroll({height})", ["high@[r] = 0"])]
    plane = _plane(o, job, layout.rows)
    row = f"((c * {layout.rows}) + s * {height} + r) * {_width(o)}"
    place = f"{layout.places[p.operand] + p.first // 4} + {row}"
    needed = -(-p.depth // 4)  # words of the operand

    def some(first: str, halves: int, tag: str) -> list[str]:
        """So many words of the operand from stored word ``first`` on, one or two to a stored word."""
        inside: list[str] = []
        for i in range(-(-halves // per_word)):
            at = f"{p.weight // 4} + (j * {stored} + {first} + {i}) * {WARP} + lane"
            inside.append(f"{tag}@_{i} = words[{at}]")
        codes = []
        for half in range(halves):
            name = f"{tag}@_{half // per_word}"
            if packed:
                shifted = f"T.shift_left({name}, 4)" if half % 2 == 0 else name
                inside.append(f"{tag}@_{half}c = T.bitwise_and({shifted}, {_UPPER})")
                name = f"{tag}@_{half}c"
            codes.append(name)
        sums = []
        for half, code in enumerate(codes):
            x = f"{place} + {first} * {per_word} + {half}"
            if wide:
                sums.append(f"high@[r] = {dp4a(f'xi[{x}]', code, 'high@[r]')}")
                sums.append(f"low@[r] = {dp4a(f'xi[{plane} + {x}]', code, 'low@[r]')}")
            else:
                sums.append(f"low@[r] = {dp4a(f'xi[{x}]', code, 'low@[r]')}")
        return inside + loop(f"r in T.unroll({height})", sums)

    whole, rest = divmod(needed, 4)
    if whole:
        lines += loop(f"k in T.serial({whole})", some(f"k * {4 // per_word}", 4, "w"))
    if rest:
        lines += some(str(whole * 4 // per_word), rest, "rest")
    total = "T.shift_left(high@[r], 8) + low@[r]" if wide else "low@[r]"
    total = f"T.shift_right({total}, 4)" if packed else total
    return lines, f'T.Cast("float32", {total})'


def _float_sums(plan: DensePlan, layout: _Layout, job: Job, p: Product, height: int) -> tuple[list[str], str]:
    """Sums of floats, with weights of any type; ``@`` stands for the product's number."""
    o, packed = plan.operands[p.operand], plan.problem.weight == "s4"
    stored, per_byte = groups(plan, o.kind, p.depth), 2 if packed else 1
    row = f"((c * {layout.rows}) + s * {height} + r) * {_width(o)}"
    place = f"{layout.places[p.operand] + p.first} + {row}"
    lines = [local("sum@", height), *loop(f"r in T.unroll({height})", [f"sum@[r] = {literal(0.0)}"])]

    def some(first: str, channels: int, tag: str) -> list[str]:
        inside: list[str] = []
        for i in range(0, channels, per_byte):
            at = f"{p.weight} + (j * {stored} + {first} // {per_byte} + {i // per_byte}) * {WARP} + lane"
            inside.append(f"{tag}@_{i} = weight[{at}]")
            for half in range(min(per_byte, channels - i)):
                inside.append(f"{tag}@_{i + half}f = {_as_float(plan, f'{tag}@_{i}', half)}")
        sums = [f"sum@[r] = sum@[r] + xf[{place} + {first} + {i}] * {tag}@_{i}f" for i in range(channels)]
        return inside + loop(f"r in T.unroll({height})", sums)

    whole, rest = divmod(p.depth, 4)
    if whole:
        lines += loop(f"k in T.serial({whole})", some("k * 4", 4, "w"))
    if rest:
        lines += some(str(whole * 4), rest, "rest")
    return lines, "sum@[r]"


def _as_float(plan: DensePlan, name: str, half: int) -> str:
    """A stored weight as a float; 4-bit codes are the halves of a byte, in two's complement."""
    if plan.problem.weight == "f32":
        return name
    if plan.problem.weight != "s4":
        return f'T.Cast("float32", {name})'
    word = f'T.shift_left(T.Cast("int32", {name}), {28 if half == 0 else 24})'
    return f'T.Cast("float32", T.shift_right({word}, 28))'
