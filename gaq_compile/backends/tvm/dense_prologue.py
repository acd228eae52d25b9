"""A linear's prologue: a task's rows of x become integers, or scaled floats, in tile buffers.

A gradient's integers get a step per row. What an activation scheme does to a block is in :data:`RULES`.
"""

from __future__ import annotations

from ...config import ActivationScheme, activation_scheme
from ...numerics.gradients import LARGEST, SMALLEST
from .dense_frame import Frame, in_x, tile
from .dense_plan import DensePlan, Operand
from .emit import literal, loop, many, splat, vector

_FLOAT_MAX = (2.0 - 2.0**-23) * 2.0**127


def prologue(plan: DensePlan, frame: Frame) -> list[str]:
    body: list[str] = []
    for operand in plan.operands:
        if operand.rule == "dynamic":
            body += _gradient(plan, frame, operand)
        elif not in_x(plan, frame, operand):
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
    if o.rule == "scaled" and frame.decoded:  # their weights are scaled
        values = [f"v{c}" for c in comps]
    elif o.rule == "scaled":
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
        lines.append(f"{tile(plan, frame, o, 'r', f'{c * o.width} + u', lanes)} = {value}")
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
        place = tile(plan, frame, o, "r", f"{c * o.width} + u", lanes)
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
