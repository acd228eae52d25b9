"""Elementwise operators of torch as expressions on vectors, for :mod:`.rows_kernel`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.fx import Node

from ...passes.graph_tools import aten, gaq
from .row_kernel import Emitter
from .rows_plan import Step, UnsupportedRowsError, cat_places
from .rows_values import View, places


def emit_operator(e: Emitter, node: Node, operands: Sequence[str]) -> str:
    """One elementwise operator on vectors; its numbers are the node's own.

    Raises:
        UnsupportedRowsError: for an operator without a kernel.
    """
    given = iter(operands)
    values = [next(given) if isinstance(a, Node) else a for a in node.args]
    rule = OPERATORS.get(node.target)
    if rule is None:
        raise UnsupportedRowsError(f"no row kernel for {node.target}")
    try:
        return e.let(rule(e, *values))
    except TypeError:
        raise UnsupportedRowsError(f"no row kernel for {node.target} with {len(values)} arguments") from None


def components(step: Step, element: Callable[[View, Sequence[int]], str], e: Emitter) -> list[str]:
    """The elements of a value that has few, as names.

    Args:
        step: what makes the value.
        element: of a view, at a place of it.
        e: collects the statements.

    Raises:
        UnsupportedRowsError: for an operator without a kernel.
    """
    views = step.operands
    if step.op == "cat":
        return [element(view, place) for view in views for place in cat_places(step, view)]
    if step.op in ("copy", "add"):
        return [element(views[0], place) for place in places(step.shape)]
    if step.op == "sum":
        return [
            e.let(" + ".join(element(views[0], place) for place in _summed(step, kept)))
            for kept in places(step.shape)
        ]
    if step.op == "product":
        left, right = views
        rows, columns = (range(n) for n in right.shape)
        return [
            e.let(" + ".join(f"{element(left, (j,))} * {element(right, (j, c))}" for j in rows))
            for c in columns
        ]
    return [emit_operator(e, step.node, [element(v, place) for v in views]) for place in places(step.shape)]


def _summed(step: Step, kept: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The places of a sum's operand that one element of it adds up."""
    sizes = zip(step.operands[0].shape, step.shape, kept, strict=True)
    return itertools.product(*(range(n) if m == 1 else [place] for n, m, place in sizes))


def _text(e: Emitter, value: Any) -> str:
    return value if isinstance(value, str) else e.number(float(value))


def _infix(sign: str) -> Callable[..., str]:
    return lambda e, a, b: f"({_text(e, a)}) {sign} ({_text(e, b)})"


def _compared(sign: str) -> Callable[..., str]:
    return lambda e, a, b: f"T.Select({_text(e, a)} {sign} {_text(e, b)}, {e.number(1.0)}, {e.number(0.0)})"


def _chosen(e: Emitter, mask: str, yes: Any, no: Any) -> str:
    return f"T.Select({mask} != {e.number(0.0)}, {_text(e, yes)}, {_text(e, no)})"


def _power(e: Emitter, x: str, exponent: float) -> str:
    if exponent == 0.5:
        return f"T.sqrt({x})"
    if float(exponent) != int(exponent) or abs(exponent) > _MOST_WHOLE:
        found = e.exp(e.keep(f"{e.number(float(exponent))} * {e.log(x)}"))
        zero = e.number(0.0 if exponent > 0 else math.inf)
        return f"T.Select({x} == {e.number(0.0)}, {zero}, {found})"
    if exponent == 0:
        return e.number(1.0)
    square, result, left = x, "", abs(int(exponent))
    while left:
        if left & 1:
            result = e.keep(f"{result} * {square}") if result else square
        left >>= 1
        square = e.keep(f"{square} * {square}") if left else square
    return result if exponent > 0 else f"{e.number(1.0)} / {result}"


def _silu_backward(e: Emitter, grad: str, x: str) -> str:
    s = e.keep(e.sigmoid(x))
    return f"{grad} * {s} * ({e.number(1.0)} + {x} * ({e.number(1.0)} - {s}))"


def _clamped(e: Emitter, x: str, low: Any = None, high: Any = None) -> str:
    bounded = x if low is None else e.let(e.at_least(_text(e, low), x))
    return bounded if high is None else e.at_most(_text(e, high), bounded)


def _sign(e: Emitter, x: str) -> str:
    zero = e.number(0.0)
    return f"T.Select({x} > {zero}, {e.number(1.0)}, T.Select({x} < {zero}, {e.number(-1.0)}, {zero}))"


def _half(e: Emitter, x: str, exponent: int, label: str) -> str:
    rounded = e.half(e.keep(f"{x} * {e.number(2.0**exponent)}") if exponent else x)
    return f"{rounded} * {e.number(2.0**-exponent)}" if exponent else rounded


_MOST_WHOLE = 1 << 20  # exponents up to which squares are multiplied
OPERATORS: dict[object, Callable[..., str]] = {
    aten.abs.default: lambda e, x: f"T.fabs({x})",
    aten.add.Tensor: _infix("+"),
    aten.clamp.default: _clamped,
    aten.clamp_min.default: _clamped,
    aten.cos.default: lambda e, x: e.sine(x, 1),
    aten.div.Tensor: _infix("/"),
    aten.eq.Scalar: _compared("=="),
    aten.erf.default: lambda e, x: e.erf(x),
    aten.exp.default: lambda e, x: e.exp(x),
    aten.ge.Scalar: _compared(">="),
    aten.gt.Scalar: _compared(">"),
    aten.le.Scalar: _compared("<="),
    aten.log.default: lambda e, x: e.log(x),
    aten.logical_and.default: lambda e, a, b: f"{a} * {b}",
    aten.lt.Scalar: _compared("<"),
    aten.lt.Tensor: _compared("<"),
    aten.masked_fill.Scalar: lambda e, x, mask, value: _chosen(e, mask, value, x),
    aten.mul.Scalar: _infix("*"),
    aten.mul.Tensor: _infix("*"),
    aten.neg.default: lambda e, x: f"{e.number(0.0)} - {x}",
    aten.pow.Tensor_Scalar: _power,
    aten.reciprocal.default: lambda e, x: f"{e.number(1.0)} / {x}",
    aten.rsub.Scalar: lambda e, a, b: f"{_text(e, b)} - {a}",
    aten.sgn.default: _sign,
    aten.silu.default: lambda e, x: e.silu(x),
    aten.silu_backward.default: _silu_backward,
    aten.sin.default: lambda e, x: e.sine(x),
    aten.softplus.default: lambda e, x: e.softplus(x),
    aten.sqrt.default: lambda e, x: f"T.sqrt({x})",
    aten.sub.Tensor: _infix("-"),
    aten.where.self: _chosen,
    gaq.round_half.default: _half,
}
