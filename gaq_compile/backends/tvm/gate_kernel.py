"""The gated nonlinearity and its gradient on CPUs, vectorised over channels.

    y = [act(scalars), gated * act(gates)]

Each tile of gate channels is evaluated once for all components of the blocks it scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from e3nn.o3 import Irreps

from ...errors import IrrepsError, LoweringError
from ...ir.layout import blocks, dim, simplified
from ...ir.specs import GateSpec, gate_spec
from ...operators.activations import split
from .emit import block_lanes, kernel_text, vector
from .launch import Input, Launch, Output
from .row_kernel import UNTUNED, Emitter, RowSchedule, at, row_loop, tiled
from .row_launch import row_launch

_LOG2 = 0.6931471805599453


@dataclass(frozen=True)
class _Range:
    """``count`` channels under one activation; of gates, with the block that they scale.

    ``start`` counts columns of the input, ``base`` (input) and ``out`` (output) begin component 0
    of the gated channels, components lying ``stride`` apart.
    """

    start: int
    count: int
    activation: str
    base: int = 0
    out: int = 0
    stride: int = 0
    components: int = 0


def lower_gate(spec: str, target: str) -> Launch:
    """The compiled gate, x (N, dim_in) -> y (N, dim_out), float32, contiguous, component-major.

    Args:
        spec: a :class:`~gaq_compile.ir.specs.GateSpec` string.
        target: a TVM target in JSON.

    Raises:
        IrrepsError: if gates do not fit the blocks they scale.
        LoweringError: for an activation without a kernel, or if TVM rejects the kernel.
    """
    parsed = gate_spec(spec)
    parts = (Input(0, (dim(parsed.irreps_in),)), Output(0, (dim(parsed.irreps_out),)))
    return row_launch("gate", {"spec": spec}, parts, partial(gate_source, spec), target)


def lower_gate_backward(spec: str, target: str) -> Launch:
    """The compiled gradient (grad (N, dim_out), x (N, dim_in)) -> grad_x; else as :func:`lower_gate`."""
    parsed = gate_spec(spec)
    width = (dim(parsed.irreps_in),)
    parts = (Input(0, (dim(parsed.irreps_out),)), Input(1, width), Output(1, width))
    return row_launch("gate_backward", {"spec": spec}, parts, partial(gate_backward_source, spec), target)


@lru_cache(maxsize=256)
def gate_source(spec: str, schedule: RowSchedule = UNTUNED) -> str:
    """TVMScript of ``main(x, y)``; arguments and errors as :func:`lower_gate`."""
    s = gate_spec(spec)
    body: list[str] = []
    for count, e in gate_ranges(spec, _emitter(schedule.lanes)):
        body += tiled(count, e.lanes, e.lines)
    width_in, width_out = dim(s.irreps_in), dim(s.irreps_out)
    return kernel_text(
        [("x", f"n, {width_in}", "float32"), ("y", f"n, {width_out}", "float32")],
        row_loop(body, width_in + width_out, schedule=schedule),
    )


@lru_cache(maxsize=256)
def gate_backward_source(spec: str, schedule: RowSchedule = UNTUNED) -> str:
    """TVMScript of ``main(grad, x, grad_x)``; arguments and errors as :func:`lower_gate`."""
    s = gate_spec(spec)
    body: list[str] = []
    for count, e in gate_backward_ranges(spec, _emitter(schedule.lanes)):
        body += tiled(count, e.lanes, e.lines)
    width_in, width_out = dim(s.irreps_in), dim(s.irreps_out)
    return kernel_text(
        [(name, f"n, {width}", "float32") for name, width in (("grad", width_out), ("x", width_in))]
        + [("gx", f"n, {width_in}", "float32")],
        row_loop(body, 2 * width_in + width_out, schedule=schedule),
    )


def gate_ranges(spec: str, emitter: Callable[[int], Emitter]) -> Iterator[tuple[int, Emitter]]:
    """Runs of channels under one activation: how many, and statements on tile ``t`` of row ``i``.

    Args:
        spec: a gate's.
        emitter: of a number of channels, whose lanes are those of a tile.
    """
    s = gate_spec(spec)
    for r in _scalar_ranges(s):
        e = emitter(r.count)
        lanes = e.lanes
        value, _ = _activate(e, r.activation, e.let(vector("x", at(r.start, lanes), lanes, "i")), False)
        e.lines.append(f"{vector('y', at(r.start, lanes), lanes, 'i')} = {value}")
        yield r.count, e
    for r in _gate_ranges(s):
        e = emitter(r.count)
        lanes = e.lanes
        value, _ = _activate(e, r.activation, e.let(vector("x", at(r.start, lanes), lanes, "i")), False)
        for c in range(r.components):
            source = vector("x", at(r.base + c * r.stride, lanes), lanes, "i")
            e.lines.append(f"{vector('y', at(r.out + c * r.stride, lanes), lanes, 'i')} = {source} * {value}")
        yield r.count, e


def gate_backward_ranges(spec: str, emitter: Callable[[int], Emitter]) -> Iterator[tuple[int, Emitter]]:
    """The same for the gradient; arguments as :func:`gate_ranges`."""
    s = gate_spec(spec)
    for r in _scalar_ranges(s):
        e = emitter(r.count)
        lanes = e.lanes
        _, slope = _activate(e, r.activation, e.let(vector("x", at(r.start, lanes), lanes, "i")), True)
        grad = vector("grad", at(r.start, lanes), lanes, "i")
        e.lines.append(f"{vector('gx', at(r.start, lanes), lanes, 'i')} = {grad} * {slope}")
        yield r.count, e
    for r in _gate_ranges(s):
        e = emitter(r.count)
        lanes = e.lanes
        value, slope = _activate(e, r.activation, e.let(vector("x", at(r.start, lanes), lanes, "i")), True)
        total = ""
        for c in range(r.components):
            place = at(r.base + c * r.stride, lanes)
            g = e.let(vector("grad", at(r.out + c * r.stride, lanes), lanes, "i"))
            product = f"{g} * {vector('x', place, lanes, 'i')}"
            total = e.let(f"{total} + {product}" if total else product)
            e.lines.append(f"{vector('gx', place, lanes, 'i')} = {g} * {value}")
        e.lines.append(f"{vector('gx', at(r.start, lanes), lanes, 'i')} = {total} * {slope}")
        yield r.count, e


def _emitter(most: int) -> Callable[[int], Emitter]:
    return lambda count: Emitter(block_lanes(count, most))


def _scalar_ranges(s: GateSpec) -> list[_Range]:
    return _spans(s.scalars, s.scalar_activations, 0, str(s))


def _gate_ranges(s: GateSpec) -> list[_Range]:
    """The gate channels, cut where the activation or the gated block changes."""
    start = dim(s.scalars)
    spans = _spans(s.gates, s.gate_activations, start, str(s))
    gated = blocks(simplified(s.gated)) if s.gated else ()
    if sum(b.mul for b in gated) != dim(s.gates):
        raise IrrepsError(
            f"{dim(s.gates)} gates for {sum(b.mul for b in gated)} gated channels", where=str(s)
        )
    found, channel, base = [], start, start + dim(s.gates)
    for b in gated:
        for span in spans:
            low, high = max(span.start, channel), min(span.start + span.count, channel + b.mul)
            if low < high:
                first = base + low - channel
                out = first - dim(s.gates)
                found.append(_Range(low, high - low, span.activation, first, out, b.mul, b.components))
        channel, base = channel + b.mul, base + b.mul * b.components
    return found


def _spans(irreps: str, acts: tuple[str, ...], start: int, where: str) -> list[_Range]:
    """Runs of scalar channels under one activation."""
    entries = list(Irreps(irreps))
    sizes = [mul for mul, _ in entries]
    if any(ir.l for _, ir in entries):
        raise IrrepsError("activations apply to scalars (l = 0) only", where=where)
    if len(set(acts)) <= 1:
        sizes, acts = [sum(sizes)], acts[:1] or ("identity",)
    if len(sizes) != len(acts):
        raise IrrepsError(f"{len(acts)} activations for {len(sizes)} blocks of scalars", where=where)
    spans = []
    for size, activation in zip(sizes, acts, strict=True):
        if size:
            spans.append(_Range(start, size, activation))
        start += size
    return spans


def _activate(e: Emitter, activation: str, x: str, gradient: bool) -> tuple[str, str]:
    """The activation's value and slope (empty unless ``gradient``) at ``x``."""
    name, factor = split(activation)
    one = e.number(1.0)
    slope = ""
    if name in ("silu", "sigmoid"):
        s = e.sigmoid(x)
        value = e.let(f"{x} * {s}") if name == "silu" else s
        if gradient:
            rest = e.let(f"{one} - {s}")
            slope = e.let(f"{s} * ({one} + {x} * {rest})" if name == "silu" else f"{s} * {rest}")
    elif name == "ssp":
        value = e.let(f"{e.softplus(x)} - {e.number(_LOG2)}")
        slope = e.sigmoid(x) if gradient else ""
    elif name == "tanh":
        value = e.tanh(x)
        slope = e.let(f"{one} - {value} * {value}") if gradient else ""
    elif name == "relu":
        value = e.let(e.at_least(e.number(0.0), x))
        slope = e.let(f"T.Select({x} > {e.number(0.0)}, {one}, {e.number(0.0)})") if gradient else ""
    elif name == "identity":
        value, slope = x, one
    else:
        raise LoweringError(f"no kernel for the activation {name!r}", where=activation)
    if factor != 1.0:
        value = e.let(f"{value} * {e.number(factor)}")
        slope = e.let(f"{slope} * {e.number(factor)}") if gradient else ""
    return value, slope
