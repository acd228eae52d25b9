"""What an exported graph takes for granted about its inputs, checked before they enter it.

``torch.export`` specialises where a model's code asks for it: a Python loop over the atoms fixes
their number, a branch on a size keeps one side. It knows each such assumption (its guards), but a
graph without them computes on and is wrong. :class:`Limits` keeps them, through files too.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CaptureError, StructureError

_SIZE = re.compile(r"L\['(\w+)'\](?:\[(\d+)\])?\.size\(\)\[(\d+)\]")
_ARITHMETIC: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Limits:
    """Dtypes, shapes (None: any size) and conditions on sizes, one entry per input.

    A condition is a comparison of integers and sizes, e.g. ``"x.shape[0] == 2 * w.shape[0]"``.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    conditions: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Limits:
        """Raises ValueError for a condition that is no comparison of sizes."""
        conditions = tuple(data["conditions"])
        for text in conditions:
            _parsed(text)
        shapes = tuple(tuple(shape) for shape in data["shapes"])
        return Limits(tuple(data["dtypes"]), shapes, conditions)

    def check(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Refuse tensors that the graph was not made for.

        Args:
            tensors: the graph's inputs by name.
            names: their order, as in ``GraphFormat.inputs``.

        Raises:
            StructureError: for another type or shape, or where a condition does not hold.
        """
        for name, dtype, shape in zip(names, self.dtypes, self.shapes, strict=True):
            value = tensors[name]
            if not isinstance(value, Tensor) or str(value.dtype).removeprefix("torch.") != dtype:
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise StructureError(f"{name} is {found}, not torch.{dtype}", fix=f"pass it as {dtype}")
            fits = len(value.shape) == len(shape) and all(
                want is None or have == want for have, want in zip(value.shape, shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise StructureError(
                    f"{name} has shape {tuple(value.shape)}, the captured graph takes ({wanted})",
                    fix="the model's code fixes some sizes at the example's: give such an example",
                )
        sizes = {name: tuple(tensors[name].shape) for name in names}
        for condition in self.conditions:
            if not _holds(condition, sizes):
                raise StructureError(
                    f"the captured graph holds only where {condition}",
                    where=", ".join(f"{name} {shape}" for name, shape in sizes.items()),
                    fix="sizes must fit each other; if they do, capture the model with an example like this",
                )


def limits_of(
    placeholders: Sequence[Node],
    guards: Sequence[str],
    names: Sequence[str],
    parameters: Sequence[str],
    bounds: bool = True,
) -> Limits:
    """The limits of an exported graph.

    Args:
        placeholders: its inputs, with the values that export recorded.
        guards: what export assumed, in its own words.
        names: how the inputs are called here, in order.
        parameters: how the exported module's forward calls them.
        bounds: keep inequalities too. A recipe's graph does without: they only keep export's
            sizes 0 and 1 apart, which the recipe's operators treat alike.

    Raises:
        CaptureError: for an assumption about anything but sizes.
    """
    values = [node.meta["val"] for node in placeholders]
    conditions = []
    for guard in guards:
        text = _SIZE.sub(lambda m: _renamed(m, names, parameters), guard)
        try:
            equality = isinstance(_comparison(_parsed(text)), ast.Eq)
        except ValueError as error:
            raise CaptureError(
                f"export would hold only where {guard}",
                fix="remove what depends on it from the model's forward, or add a capture recipe",
            ) from error
        if bounds or equality:
            conditions.append(text)
    return Limits(
        tuple(str(v.dtype).removeprefix("torch.") for v in values),
        tuple(tuple(fixed_size(size) for size in v.shape) for v in values),
        tuple(conditions),
    )


def fixed_size(size: int | str | torch.SymInt) -> int | None:
    """The number that a traced size (or its symbol's name) stands for, or None if it is free."""
    if isinstance(size, str):
        return None
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _renamed(match: re.Match[str], names: Sequence[str], parameters: Sequence[str]) -> str:
    name, index, axis = match.groups()
    place = int(index) if index is not None else list(parameters).index(name)
    return f"{names[place]}.shape[{axis}]"


def _holds(condition: str, sizes: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        return bool(_value(_parsed(condition), sizes))
    except (KeyError, IndexError, ZeroDivisionError):  # sizes that the condition cannot even be asked of
        return False


@lru_cache(maxsize=1024)
def _parsed(text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is no condition") from error
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or (isinstance(node, ast.Constant) and type(node.value) is not int):
            raise ValueError(f"{text!r} is no comparison of sizes")
        if isinstance(node, ast.Subscript) and not _is_size(node):
            raise ValueError(f"{text!r} asks for something else than sizes")
    _comparison(tree)
    return tree


def _is_size(node: ast.Subscript) -> bool:
    """``name.shape[axis]``."""
    owner = node.value
    named = isinstance(owner, ast.Attribute) and owner.attr == "shape" and isinstance(owner.value, ast.Name)
    return named and isinstance(node.slice, ast.Constant)


_ALLOWED = (
    ast.Compare, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.And, ast.Or, ast.Constant, ast.Name, ast.Load,
    ast.Attribute, ast.Subscript, *_ARITHMETIC,
)  # fmt: skip


def _comparison(tree: ast.expr) -> ast.AST | None:
    """The operator of a plain comparison; None for a combination of several."""
    if isinstance(tree, ast.Compare) and len(tree.ops) == 1:
        return tree.ops[0]
    if isinstance(tree, ast.BoolOp | ast.UnaryOp | ast.Compare):
        return None
    raise ValueError("not a comparison")


def _value(tree: ast.expr, sizes: Mapping[str, tuple[int, ...]]) -> Any:
    """Evaluate a parsed condition; nothing but integers and comparisons can be in it."""
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Subscript):
        return sizes[tree.value.value.id][tree.slice.value]  # type: ignore[attr-defined]
    if isinstance(tree, ast.BinOp):
        return _ARITHMETIC[type(tree.op)](_value(tree.left, sizes), _value(tree.right, sizes))
    if isinstance(tree, ast.UnaryOp):
        return _ARITHMETIC[type(tree.op)](_value(tree.operand, sizes))
    if isinstance(tree, ast.BoolOp):
        combine = all if isinstance(tree.op, ast.And) else any
        return combine(_value(part, sizes) for part in tree.values)
    if isinstance(tree, ast.Compare):
        terms = [_value(part, sizes) for part in (tree.left, *tree.comparators)]
        return all(_ARITHMETIC[type(op)](a, b) for op, a, b in zip(tree.ops, terms, terms[1:], strict=False))
    raise ValueError(f"not a condition: {ast.dump(tree)}")
