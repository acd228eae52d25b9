"""Tensor products with one number on one side, as operators that work row by row and so join groups.

Before: ``y = gaq.conv(ones, sh, w, edges, '1x0e * 1x1o+1x2e -> 1x1o+1x2e | ...', label)``
After:  ``y = gaq.sum_rows(sh * (w @ S), receivers, n, 8, label)``, and its gradients alike

A product of a vector with a scalar couples nothing: each component is multiplied by its block's weight. ``S``
(weights, components) says whose that is, and holds the constants. Kernels of convolutions are made for many
channels; with a single one they work number by number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from e3nn.o3 import wigner_3j
from torch import Tensor
from torch.fx import GraphModule, Node

from ..ir.layout import dim
from ..ir.specs import tensor_product_spec
from .graph_tools import add_buffer, aten, calls, gaq, is_call
from .row_shapes import RowShape

_X, _SH = 0, 1  # which operand is the vector
_DIGITS = 12  # of a constant: products of square roots that cancel


def scalar_products(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Rewrite, in place, products of which one side is ones (n, 1), and their gradients.

    Args:
        gm: a graph of the caller's own.
        shapes: of its nodes (:func:`.row_shapes.row_shapes`); new nodes are added.
    """
    rules: dict[Any, Callable[[_Product], None]] = {
        gaq.conv.default: _conv,
        gaq.conv_backward.default: _conv_backward,
        gaq.tensor_product.default: _product,
        gaq.tensor_product_backward.default: _product_backward,
    }
    for target, rule in rules.items():
        for node in calls(gm, target):
            found = _found(gm, node, shapes)
            if found is not None:
                rule(found)


@dataclass(frozen=True)
class _Product:
    """A call that is rewritten.

    Attributes:
        node: the call.
        vector: which operand of the product is the vector, 0 or 1; the other is ones.
        operands: x, sh and the weight.
        selector: S (weights, components).
    """

    gm: GraphModule
    shapes: dict[Node, RowShape]
    node: Node
    vector: int
    operands: tuple[Node, Node, Node]
    selector: Tensor

    @property
    def edges(self) -> Node:
        """The call of ``sort_edges`` that a convolution is given."""
        first: Any = self.node.args[-3][0]  # type: ignore[index]
        return first.args[0]  # type: ignore[no-any-return]

    def call(self, target: Any, args: tuple[Any, ...], like: Node, row: tuple[int, ...]) -> Node:
        """A new node in front of the call, with the rows of another."""
        with self.gm.graph.inserting_before(self.node):
            made = self.gm.graph.call_function(target, args)
        self.shapes[made] = replace(self.shapes[like], row=row, dtype=torch.float32)
        return made

    def scaled(self, vector: Node) -> Node:
        """A row's vector, each component times its weight."""
        weight, width = self.operands[2], self.selector.shape[1]
        spread = self.call(aten.mm.default, (weight, self._matrix(self.selector)), weight, (width,))
        return self.call(aten.mul.Tensor, (vector, spread), spread, (width,))

    def contracted(self, left: Node, right: Node) -> Node:
        """The weights' gradient: products of components, added up by weight."""
        weights, width = self.selector.shape
        both = self.call(aten.mul.Tensor, (left, right), self.operands[2], (width,))
        matrix = self._matrix(self.selector.t().contiguous())
        return self.call(aten.mm.default, (both, matrix), both, (weights,))

    def _matrix(self, value: Tensor) -> Node:
        name = add_buffer(self.gm, f"{self.node.name}_selector", value)
        with self.gm.graph.inserting_before(self.node):
            made = self.gm.graph.get_attr(name)
        self.shapes[made] = RowShape(None, tuple(value.shape), value.dtype)
        return made

    def replace(self, parts: dict[int, Node]) -> None:
        """Let users of a gradient's parts read these instead."""
        for user in list(self.node.users):
            user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
            self.gm.graph.erase_node(user)
        self.gm.graph.erase_node(self.node)


def _conv(p: _Product) -> None:
    x, sh, _ = p.operands
    _, receivers, atoms = p.edges.args
    values, width = p.scaled(sh), p.selector.shape[1]
    args = (values, receivers, atoms, width, f"sum over {receivers}")
    total = p.call(gaq.sum_rows.default, args, x, (width,))
    p.node.replace_all_uses_with(total)
    p.gm.graph.erase_node(p.node)


def _conv_backward(p: _Product) -> None:
    grad, sh, width = p.node.args[0], p.operands[1], p.selector.shape[1]
    at = p.call(aten.index.Tensor, (grad, [p.edges.args[1]]), sh, (width,))
    p.replace({1: p.scaled(at), 2: p.contracted(sh, at)})


def _product(p: _Product) -> None:
    p.node.replace_all_uses_with(p.scaled(p.operands[p.vector]))
    p.gm.graph.erase_node(p.node)


def _product_backward(p: _Product) -> None:
    grad: Any = p.node.args[0]
    p.replace({p.vector: p.scaled(grad), 2: p.contracted(p.operands[p.vector], grad)})


def _found(gm: GraphModule, node: Node, shapes: dict[Node, RowShape]) -> _Product | None:
    """A product that is rewritten, or None."""
    convolution = node.target in (gaq.conv.default, gaq.conv_backward.default)
    backward = node.target in (gaq.conv_backward.default, gaq.tensor_product_backward.default)
    operands: Any = node.args[1:4] if backward else node.args[:3]
    spec = str(node.args[-2])
    if not all(a in shapes and shapes[a].rows is not None for a in operands):
        return None
    for vector in (_SH,) if convolution else (_X, _SH):
        ones, selector = operands[1 - vector], _selector(spec, vector)
        if selector is None or not is_call(ones, aten.ones.default):
            continue
        if convolution and not _per_edge(node, operands, shapes):
            continue
        read = {u.args[1] for u in node.users} if backward else set()
        known = all(u.target is operator.getitem for u in node.users) and read <= {vector, 2}
        if not backward or known:
            return _Product(gm, shapes, node, vector, operands, selector)
    return None


def _per_edge(node: Node, operands: Any, shapes: dict[Node, RowShape]) -> bool:
    """Whether weights have a row per edge, not per bond, and edges are sorted from the graph's own."""
    parts = node.args[-3]
    first = parts[0] if isinstance(parts, list | tuple) and parts else None
    known = is_call(first, operator.getitem) and is_call(first.args[0], gaq.sort_edges.default)  # type: ignore[union-attr]
    return known and shapes[operands[1]].rows == shapes[operands[2]].rows == "edge"


def _selector(spec: str, vector: int) -> Tensor | None:
    """S of a product whose other side is one scalar, and whose result lies as the vector does; or None."""
    parsed = tensor_product_spec(spec)
    sides = (parsed.irreps_x, parsed.irreps_sh)
    if dim(sides[1 - vector]) != 1 or dim(parsed.irreps_out) != dim(sides[vector]):
        return None
    found = torch.zeros(parsed.weight_numel, dim(parsed.irreps_out), dtype=torch.float64)
    for path in parsed.paths:
        block = path.block_sh if vector == _SH else path.block_x
        out, size = path.block_out, 2 * path.block_out.l + 1
        alike = (block.base, block.stride, block.mul, block.l) == (out.base, out.stride, 1, out.l)
        if not alike or bool(found[:, out.base : out.base + size].any()):
            return None
        # a vector and a scalar: the same constant for each component
        constant = float(wigner_3j(path.block_x.l, path.block_sh.l, out.l, dtype=torch.float64).flatten()[0])
        found[path.offset, out.base : out.base + size] = round(path.coefficient * constant, _DIGITS)
    return found.float()
