"""Narrow results that one group of rows hands to others, as columns of one tensor.

Before: ``a, b, c = self.edge_rows_1(x); y = self.edge_rows_7(a, b, c)``
After:  ``packed = self.edge_rows_1(x); y = self.edge_rows_7(packed)``

A gradient needs many numbers per edge from the forward pass, and every tensor that is passed to a
kernel costs some two microseconds, which is more than a small molecule's whole column.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from .graph_tools import aten, copied, finished
from .indices import GATHERS
from .row_groups import FusedRows, fused_rows
from .row_shapes import NARROW, RowShape


@dataclass(frozen=True)
class _Column:
    """One result's place in the packed tensor: ``start`` to ``start + size`` of every row."""

    start: int
    shape: RowShape

    @property
    def size(self) -> int:
        return math.prod(self.shape.row)


def pack_rows(graph_module: GraphModule) -> GraphModule:
    """Pack what is read by other groups only; graphs without groups are returned as they are."""
    gm = copied(graph_module)
    for node in list(gm.graph.nodes):
        fused = fused_rows(gm, node)
        if fused is not None:
            packed = [part for part in node.users if _packable(gm, fused, part)]
            # flags alone would be joined as flags
            floats = [p for p in packed if _shape(fused, p).dtype is torch.float32]
            if len(packed) > 1 and floats:
                _pack(gm, node, fused, packed)
    return finished(gm)


def _results(fused: FusedRows) -> list[Node]:
    return list(next(n for n in fused.graph.nodes if n.op == "output").args[0])  # type: ignore[arg-type]


def _shape(fused: FusedRows, part: Node) -> RowShape:
    return fused.shapes[_results(fused)[part.args[1]]]  # type: ignore[index]


def _packable(gm: GraphModule, fused: FusedRows, part: Node) -> bool:
    """Whether a result (a getitem) is narrow, and every reader a group that reads it row by row."""
    if math.prod(_shape(fused, part).row) >= NARROW:
        return False
    for user in part.users:
        other = fused_rows(gm, user)
        if other is None or other.rows != fused.rows:
            return False
        inputs = [n for n in other.graph.nodes if n.op == "placeholder"]
        readers = [r for n, a in zip(inputs, user.args, strict=True) if a is part for r in n.users]
        if any(r.target in GATHERS for r in readers):
            return False
    return True


def _pack(gm: GraphModule, node: Node, fused: FusedRows, packed: list[Node]) -> None:
    """The producer returns a tensor more, in place of those that are packed; readers take it apart."""
    columns: dict[Node, _Column] = {}
    width = 0
    for part in packed:
        columns[part] = _Column(width, _shape(fused, part))
        width += columns[part].size
    whole = RowShape(fused.rows, (width,), torch.float32)
    kept = [k for k in range(len(_results(fused))) if k not in {part.args[1] for part in packed}]
    setattr(gm, str(node.target), _packing(fused, kept, [int(p.args[1]) for p in packed], whole))  # type: ignore[call-overload]
    with gm.graph.inserting_after(node):
        tensor = gm.graph.call_function(operator.getitem, (node, len(kept)))
    readers = dict.fromkeys(user for part in packed for user in part.users)
    for reader, other in ((r, fused_rows(gm, r)) for r in readers):
        if other is None:
            continue
        taken = [columns.get(a) if isinstance(a, Node) else None for a in reader.args]
        setattr(gm, str(reader.target), _unpacking(other, taken, whole))
        reader.args = (*(a for a, c in zip(reader.args, taken, strict=True) if c is None), tensor)
    for part in list(node.users):
        if part.args[1] in kept and part is not tensor:
            part.args = (node, kept.index(part.args[1]))  # type: ignore[arg-type]
    for part in packed:
        gm.graph.erase_node(part)


def _copy(fused: FusedRows) -> tuple[Graph, dict[Node, Node]]:
    graph, values = Graph(), dict[Node, Node]()
    for node in fused.graph.nodes:
        if node.op != "output":
            values[node] = graph.node_copy(node, lambda n: values[n])
    return graph, values


def _rebuilt(fused: FusedRows, graph: Graph, shapes: dict[Node, RowShape]) -> FusedRows:
    root = nn.Module()
    for name, value in fused.named_buffers():
        root.register_buffer(name, value)
    return FusedRows(root, graph, fused.rows, shapes)


def _packing(fused: FusedRows, kept: list[int], packed: list[int], whole: RowShape) -> FusedRows:
    graph, values = _copy(fused)
    shapes = {values[n]: s for n, s in fused.shapes.items() if n in values}
    results = [values[n] for n in _results(fused)]
    columns = []
    for k in packed:
        shape = shapes[results[k]]
        flat = graph.call_function(aten.view.default, (results[k], [-1, math.prod(shape.row)]))
        shapes[flat] = RowShape(shape.rows, (math.prod(shape.row),), shape.dtype)
        columns.append(flat)
    joined = graph.call_function(aten.cat.default, (columns, 1))
    shapes[joined] = whole
    graph.output((*(results[k] for k in kept), joined))
    return _rebuilt(fused, graph, shapes)


def _unpacking(fused: FusedRows, taken: list[_Column | None], whole: RowShape) -> FusedRows:
    """The same group with one argument in place of those that are columns now; it comes last."""
    graph, values = Graph(), dict[Node, Node]()
    inputs = [n for n in fused.graph.nodes if n.op == "placeholder"]
    shapes: dict[Node, RowShape] = {}
    for node, column in zip(inputs, taken, strict=True):
        if column is None:
            values[node] = graph.placeholder(str(node.target))
    names = {str(n.target) for n in inputs}
    count = sum(name.startswith("packed") for name in names)
    tensor = graph.placeholder(f"packed_{count}")
    shapes[tensor] = whole
    for node, column in zip(inputs, taken, strict=True):
        if column is not None:
            values[node] = _column(graph, tensor, column, shapes)
    for node in fused.graph.nodes:
        if node.op == "output":
            graph.output(tuple(values[n] for n in node.args[0]))
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n])
    shapes |= {values[n]: s for n, s in fused.shapes.items() if n in values and values[n] not in shapes}
    return _rebuilt(fused, graph, shapes)


def _column(graph: Graph, tensor: Node, column: _Column, shapes: dict[Node, RowShape]) -> Node:
    end = column.start + column.size
    part = graph.call_function(aten.slice.Tensor, (tensor, 1, column.start, end))
    shapes[part] = RowShape(column.shape.rows, (column.size,), torch.float32)
    if column.shape.dtype is torch.bool:
        part = graph.call_function(aten.gt.Scalar, (part, 0.5))
        shapes[part] = RowShape(column.shape.rows, (column.size,), torch.bool)
    if len(column.shape.row) != 1:
        part = _shaped(graph, part, column)
        shapes[part] = column.shape
    return part


def _shaped(graph: Graph, part: Node, column: _Column) -> Node:
    """As it was: (n,) or (n, a, b)."""
    if not column.shape.row:
        return graph.call_function(aten.squeeze.dim, (part, 1))
    return graph.call_function(aten.reshape.default, (part, [-1, *column.shape.row]))
