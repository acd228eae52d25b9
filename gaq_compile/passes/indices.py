"""Gathers of whole rows, and which indices are known to be in range."""

from __future__ import annotations

import operator

from torch.fx import Node

from ..capture.graphs import EDGE_VECTORS, GraphFormat
from .graph_tools import aten, gaq, is_call

GATHERS = (aten.index.Tensor, aten.index_select.default, aten.embedding.default, aten.gather.default)
# Indices that calling a potential checks.
_SOUND = {"batch", *(end for ends in EDGE_VECTORS.values() for end in ends)}


def gather_index(node: Node) -> Node | None:
    """The one-dimensional index of a gather of whole rows, or None if it is none."""
    if node.target is aten.index.Tensor:
        indices = node.args[1]
        index = indices[0] if isinstance(indices, list | tuple) and len(indices) == 1 else None
    elif node.target is aten.embedding.default:
        index = node.args[1]
    else:  # index_select and gather along an axis
        index = node.args[2] if node.args[1] == 0 else None
    return index if isinstance(index, Node) else None


def is_sound(index: Node, rows: int | None, form: GraphFormat) -> bool:
    """Whether an index is known to be in range: kernels do not look.

    Ends of edges and the atoms' graphs are checked when a potential is called, elements against those
    that it was trained on.
    """
    if index.op == "placeholder" and index.target == "numbers":
        return rows is not None and bool(form.elements) and max(form.elements) < rows
    if is_call(index, aten.index.Tensor):
        inner, outer = index.args[0], gather_index(index)
        return outer is not None and inner.target == "batch" and is_sound(outer, None, form)  # type: ignore[union-attr]
    if is_call(index, operator.getitem) and is_call(index.args[0], gaq.bonds.default):
        return rows is None
    return rows is None and index.op == "placeholder" and index.target in _SOUND
