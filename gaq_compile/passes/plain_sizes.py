"""Numbers of rows asked of the graph's inputs, and tensors of ones and zeros made of nothing else.

Before: ``n = sym_size(sum_rows, 0); a = ones_like(x); b = expand(ones_like(energy), [n])``
After:  ``n = sym_size(numbers, 0); a = ones([n, 64]); b = ones([n])``

What is written so waits for no kernel, and is the same as long as the structure's atoms and edges are.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..capture.graphs import GraphFormat
from .graph_tools import aten, calls, is_call
from .row_shapes import RowShape

_FILLS = {
    aten.new_ones.default: aten.ones.default,
    aten.new_zeros.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default,
    aten.zeros_like.default: aten.zeros.default,
}
_SPREADS = (
    aten._to_copy.default,
    aten.expand.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.view.default,
)


def plain_sizes(gm: GraphModule, form: GraphFormat, shapes: dict[Node, RowShape]) -> None:
    """Rewrite sizes and fills, in place.

    Args:
        gm: a graph of the caller's own.
        form: its inputs.
        shapes: of its nodes (:func:`.row_shapes.row_shapes`); new nodes are added.
    """
    sizes = _Sizes(gm, form, shapes)
    for node in calls(gm, aten.sym_size.int):
        source, axis = node.args
        shape = shapes.get(source)  # type: ignore[call-overload]
        if axis == 0 and shape is not None and shape.rows is not None and sizes.has(shape.rows):
            node.replace_all_uses_with(sizes.of(shape.rows))
    for node in list(gm.graph.nodes):
        target = _FILLS.get(node.target)
        if target is None and node.target in _SPREADS and is_call(node.args[0], *_FILLS.values()):
            target = node.args[0].target
        if target is not None and _is_known(shapes.get(node), sizes):
            _replace(gm, node, target, sizes, shapes)
    gm.graph.eliminate_dead_code()


class _Sizes:
    """The node of each number of rows, asked of an input."""

    def __init__(self, gm: GraphModule, form: GraphFormat, shapes: dict[Node, RowShape]) -> None:
        self.gm, self.found = gm, dict[str, Node]()
        self.inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        # Vectors come last: how many there are is known from the ends of edges.
        ordered = sorted(self.inputs, key=lambda n: str(n.target) in form.vectors)
        self.source: dict[str, Node] = {}
        for node in ordered:
            rows = shapes[node].rows if node in shapes else None
            if rows is not None:
                self.source.setdefault(rows, node)

    def has(self, rows: str) -> bool:
        """Whether an input says how many there are."""
        return rows in self.source or (rows == "graph" and any(n.target == "ptr" for n in self.inputs))

    def of(self, rows: str) -> Node:
        if rows not in self.found:
            with self.gm.graph.inserting_after(self.inputs[-1]):
                self.found[rows] = self._asked(rows)
        return self.found[rows]

    def _asked(self, rows: str) -> Node:
        if rows in self.source:
            return self._size(self.source[rows])
        pointers = next(n for n in self.inputs if n.target == "ptr")  # one more than there are graphs
        ends = self._size(pointers)
        with self.gm.graph.inserting_after(ends):
            return self.gm.graph.call_function(operator.sub, (ends, 1))

    def _size(self, node: Node) -> Node:
        return self.gm.graph.call_function(aten.sym_size.int, (node, 0))


def _is_known(shape: RowShape | None, sizes: _Sizes) -> bool:
    return shape is not None and shape.static and (shape.rows is None or sizes.has(shape.rows))


def _replace(gm: GraphModule, node: Node, target: Any, sizes: _Sizes, shapes: dict[Node, RowShape]) -> None:
    shape = shapes[node]
    rows = [] if shape.rows is None else [sizes.of(shape.rows)]
    kwargs = {"dtype": shape.dtype, "device": torch.device("cpu")}
    with gm.graph.inserting_before(node):
        fill = gm.graph.call_function(target, ([*rows, *shape.row],), kwargs)
    shapes[fill] = shape
    node.replace_all_uses_with(fill)
    gm.graph.erase_node(node)
