"""Quantizing activations and its straight-through gradient on CPUs, vectorised over channels.

The orders of operations are those of :mod:`gaq_compile.numerics.activations`, so that results agree
up to values within float32 rounding of a tie. Steps are an argument of the kernel, not constants in
it: all layers of one shape share one kernel, and a division by a constant would become a product.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from ...config import ActivationScheme, activation_scheme
from ...errors import IrrepsError, LoweringError
from ...ir.layout import Block, blocks, channels, dim, simplified
from .emit import block_lanes, kernel_text, vector
from .launch import Input, Launch, Output
from .row_kernel import UNTUNED, Emitter, RowSchedule, at, row_loop, tiled
from .row_launch import row_launch


def lower_mddq(irreps: str, scheme: str, scale: Tensor, target: str) -> Launch:
    """The compiled ``numerics.activations.fake_quantize``, x (N, dim) -> xhat (N, dim).

    Args:
        irreps: of x, float32, contiguous, component-major.
        scheme: an activation scheme such as ``"s8 m8d8"``.
        scale: (n_channels,) steps.
        target: a TVM target in JSON.

    Raises:
        ConfigError: for an unknown scheme.
        IrrepsError: if scale does not fit the irreps.
        LoweringError: for a common grid, or if TVM rejects the kernel.
    """
    if activation_scheme(scheme).common:
        raise LoweringError(
            "activations on a common grid have a kernel only together with integer weights", where=scheme
        )
    steps, width = channel_steps(scale, irreps), (dim(irreps),)
    parts = (Input(0, width), steps, Output(0, width))
    problem = {"irreps": irreps, "scheme": scheme}
    return row_launch("mddq", problem, parts, partial(mddq_source, irreps, scheme), target)


def lower_mddq_backward(irreps: str, scheme: str, scale: Tensor, target: str) -> Launch:
    """The compiled ``fake_quantize_backward``, (grad, x) -> grad_x, all (N, dim); see :func:`lower_mddq`.

    Gradients of a common grid are those of the same scheme without it.
    """
    steps, width = channel_steps(scale, irreps), (dim(irreps),)
    parts = (Input(0, width), Input(1, width), steps, Output(1, width))
    problem = {"irreps": irreps, "scheme": scheme}
    return row_launch("mddq_backward", problem, parts, partial(mddq_backward_source, irreps, scheme), target)


@lru_cache(maxsize=256)
def mddq_source(irreps: str, scheme: str, schedule: RowSchedule = UNTUNED) -> str:
    """TVMScript of ``main(x, scale, xhat)``; arguments and errors as :func:`lower_mddq`."""
    chosen = activation_scheme(scheme)
    body: list[str] = []
    for block in mddq_blocks(irreps):
        e = Emitter(block_lanes(block.mul, schedule.lanes))
        body += tiled(block.mul, e.lanes, mddq_lines(e, block, chosen))
    return _text(irreps, ("x",), "xhat", body, schedule)


@lru_cache(maxsize=256)
def mddq_backward_source(irreps: str, scheme: str, schedule: RowSchedule = UNTUNED) -> str:
    """TVMScript of ``main(grad, x, scale, gx)``; arguments and errors as :func:`lower_mddq`."""
    chosen = activation_scheme(scheme)
    body: list[str] = []
    for block in mddq_blocks(irreps):
        e = Emitter(block_lanes(block.mul, schedule.lanes))
        body += tiled(block.mul, e.lanes, mddq_backward_lines(e, block, chosen))
    return _text(irreps, ("grad", "x"), "gx", body, schedule)


def mddq_lines(e: Emitter, block: Block, scheme: ActivationScheme) -> list[str]:
    """Statements on tile ``t`` of row ``i`` that write a block of ``xhat``."""
    return _stored(e, block, _quantize(e, block, scheme), "xhat")


def mddq_backward_lines(e: Emitter, block: Block, scheme: ActivationScheme) -> list[str]:
    """Statements on tile ``t`` of row ``i`` that write a block of ``gx``."""
    return _stored(e, block, _gradient(e, block, scheme), "gx")


def _text(irreps: str, inputs: tuple[str, ...], output: str, body: list[str], schedule: RowSchedule) -> str:
    rows = row_loop(body, (1 + len(inputs)) * dim(irreps), schedule=schedule)
    return kernel_text(buffers(irreps, inputs, output), rows)


def buffers(irreps: str, inputs: tuple[str, ...], output: str) -> list[tuple[str, str, str]]:
    """The kernel's parameters: inputs, ``scale`` and the output."""
    width, count = dim(irreps), channels(irreps)
    found = [(name, f"n, {width}", "float32") for name in inputs]
    return [*found, ("scale", str(count), "float32"), (output, f"n, {width}", "float32")]


def mddq_blocks(irreps: str) -> tuple[Block, ...]:
    """The blocks that are quantized each by itself."""
    return blocks(simplified(irreps))


def channel_steps(scale: Tensor, irreps: str) -> Tensor:
    """The steps as a kernel reads them.

    Raises:
        IrrepsError: if there is not one for every channel.
    """
    count = channels(irreps)
    if tuple(scale.shape) != (count,):
        raise IrrepsError(f"expected {count} scales, one per channel, got {tuple(scale.shape)}", where=irreps)
    return scale.detach().to(torch.float32).contiguous()


def _element(buffer: str, block: Block, component: int, lanes: int) -> str:
    return vector(buffer, at(block.base + component * block.stride, lanes), lanes, "i")


def _load(e: Emitter, buffer: str, block: Block) -> list[str]:
    return [e.let(_element(buffer, block, c, e.lanes)) for c in range(block.components)]


def _stored(e: Emitter, block: Block, results: list[str], output: str) -> list[str]:
    e.lines += [f"{_element(output, block, c, e.lanes)} = {value}" for c, value in enumerate(results)]
    return e.lines


def _by_component(block: Block, scheme: ActivationScheme) -> bool:
    return block.l == 0 or scheme.vector == "component"


def _step(e: Emitter, block: Block) -> str:
    """The steps of one tile's channels."""
    return e.let(vector("scale", at(block.channel, e.lanes), e.lanes))


def _norm(e: Emitter, values: list[str]) -> str:
    return e.let(f"T.sqrt({' + '.join(f'{v} * {v}' for v in values)})")


def _magnitude(e: Emitter, ratio: str, qmax: int) -> str:
    """clamp(round(ratio), 0, qmax) of a ratio >= 0; keeps NaN."""
    return e.let(e.at_most(e.number(qmax), f"T.nearbyint({ratio})"))


def _quantize(e: Emitter, block: Block, scheme: ActivationScheme) -> list[str]:
    """xhat of one tile, by component."""
    s = _step(e, block)
    qmax = scheme.qmax(block.l)
    x = _load(e, "x", block)
    if _by_component(block, scheme):
        low, high = e.number(-qmax), e.number(qmax)
        codes = [e.at_most(high, e.at_least(low, f"T.nearbyint({v} / {s})")) for v in x]
        return [e.let(f"{s} * {code}") for code in codes]
    m = _norm(e, x)
    q = _magnitude(e, e.let(f"{m} / {s}"), qmax)
    zero = e.number(0.0)
    step = s
    if scheme.vector == "exact":
        g = e.let(f"{q} / {m}")
        operand = [f"{v} * {g}" for v in x]
    else:
        step = e.let(f"{s} * {e.number(2.0 ** -scheme.fraction_bits(block.l))}")
        g = e.let(f"{e.number(scheme.direction_levels)} / {m}")
        n = [e.let(f"T.nearbyint({v} * {g})") for v in x]
        f = e.let(f"{q} * {e.number(2.0 ** scheme.fraction_bits(block.l))} / {_norm(e, n)}")
        operand = [f"T.nearbyint({c} * {f})" for c in n]
    return [e.let(f"T.Select({q} == {zero}, {zero}, {step} * ({value}))") for value in operand]


def _gradient(e: Emitter, block: Block, scheme: ActivationScheme) -> list[str]:
    """The straight-through gradient of one tile, by component."""
    s = _step(e, block)
    zero, qmax = e.number(0.0), e.number(scheme.qmax(block.l))
    g, x = _load(e, "grad", block), _load(e, "x", block)
    if _by_component(block, scheme):
        inside = [f"T.fabs({v} / {s}) <= {qmax}" for v in x]
        return [e.let(f"T.Select({c}, {d}, {d} * {zero})") for c, d in zip(inside, g, strict=True)]
    m = _norm(e, x)
    inverse = e.let(f"{e.number(1.0)} / {m}")
    u = [e.let(f"{v} * {inverse}") for v in x]
    along = e.let(" + ".join(f"{a} * {b}" for a, b in zip(g, u, strict=True)))
    ratio = e.let(f"{m} / {s}")
    bend = e.let(f"{s} * {_magnitude(e, ratio, scheme.qmax(block.l))} * {inverse}")
    # u (g.u) [m/s <= qmax] + bend (g - u (g.u)), with both terms in u taken together
    radial = e.let(f"{along} * (T.Select({ratio} <= {qmax}, {e.number(1.0)}, {zero}) - {bend})")
    return [
        e.let(f"T.Select({m} == {zero}, {a}, {b} * {radial} + {bend} * {a})")
        for a, b in zip(g, u, strict=True)
    ]
