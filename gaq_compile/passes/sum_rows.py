"""Additions by index as one operator, whose kernel adds in a fixed order.

Before: ``zeros = new_zeros(x, [n, 128]); y = index_put(zeros, [senders], x, accumulate=True)``
After:  ``y = gaq.sum_rows(x, senders, n, 128, 'sum over senders')``

torch adds in any order where it uses threads, so the last bits of two runs may differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from ..capture.graphs import GraphFormat
from .graph_tools import ZEROS, aten, calls, gaq, is_call
from .indices import is_sound
from .row_shapes import RowShape

_SCATTERS = (aten.index_add.default, aten.index_put.default, aten.scatter_add.default)


def sum_rows(gm: GraphModule, form: GraphFormat, shapes: dict[Node, RowShape]) -> None:
    """Replace, in place, sums over edges, pairs and atoms whose index is known to be in range.

    Args:
        gm: a graph of the caller's own.
        form: its inputs.
        shapes: of its nodes (:func:`.row_shapes.row_shapes`); new nodes are added.
    """
    for node in [n for target in _SCATTERS for n in calls(gm, target)]:
        values, index = _parts(node)
        if index is None or not is_sound(index, None, form) or not _fits(node, values, shapes):
            continue
        base = node.args[0]
        with gm.graph.inserting_before(node):
            rows = _rows(gm, base)
            width = math.prod(shapes[node].row)
            label = f"sum over {index.name}"
            total = gm.graph.call_function(gaq.sum_rows.default, (values, index, rows, width, label))
            shapes[total] = shapes[node]
            if not is_call(base, *ZEROS):
                total = gm.graph.call_function(aten.add.Tensor, (base, total))
                shapes[total] = shapes[node]
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)


def _parts(node: Node) -> tuple[Node, Node | None]:
    """What is added, and the one-dimensional index; None where the operator does something else."""
    args = (*node.args, False)
    if node.target is aten.index_put.default:
        indices, values = args[1], args[2]
        plain = args[3] is True and len(indices) == 1  # type: ignore[arg-type]
        return values, indices[0] if plain else None  # type: ignore[return-value,index]
    plain = args[1] == 0 and not node.kwargs
    return args[3], args[2] if plain else None  # type: ignore[return-value]


def _fits(node: Node, values: object, shapes: Mapping[Node, RowShape]) -> bool:
    """Whether whole rows of float32 are added."""
    if not isinstance(values, Node) or values not in shapes or node not in shapes:
        return False
    added, result = shapes[values], shapes[node]
    plain = added.rows is not None and result.rows is not None and added.row == result.row
    if node.target is aten.scatter_add.default and added.row:
        return False
    return plain and added.dtype is result.dtype is torch.float32 and added.static


def _rows(gm: GraphModule, base: object) -> object:
    """The number of rows of the result."""
    if is_call(base, aten.zeros.default):
        return base.args[0][0]  # type: ignore[union-attr,index]
    if is_call(base, aten.new_zeros.default):
        return base.args[1][0]  # type: ignore[union-attr,index]
    return gm.graph.call_function(aten.sym_size.int, (base, 0))
