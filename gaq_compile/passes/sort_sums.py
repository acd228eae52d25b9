"""Sums over the ends of edges as sums over each atom's edges, so that they join groups of edges.

Before: ``y = gaq.sum_rows(mul(v, a), receivers, n, 128, label)``
After:  ``y = gaq.sum_sorted(mul(v, a), receivers, order, ptr, n, label)``

Atom i has the edges ``order[ptr[i] : ptr[i + 1]]``. A group that goes through edges atom by atom adds a value
up where it computes it: nobody writes or reads a row per edge, each atom has one thread that owns it, and the
order of the sum is the order of the edges, as before.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from ..capture.graphs import EDGE_VECTORS
from .graph_tools import calls, gaq
from .row_shapes import RowShape


def sort_sums(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Rewrite sums over receivers and senders of edges and pairs, in place.

    Args:
        gm: a graph of the caller's own.
        shapes: of its nodes (:func:`.row_shapes.row_shapes`); new nodes are added.
    """
    inputs = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
    for receivers, senders in EDGE_VECTORS.values():
        if receivers in inputs:
            _sort_sums(gm, shapes, inputs[receivers], inputs[senders])


def _sort_sums(gm: GraphModule, shapes: dict[Node, RowShape], receivers: Node, senders: Node) -> None:
    sums = [n for n in calls(gm, gaq.sum_rows.default) if _is_of_atoms(n, (receivers, senders), shapes)]
    if not sums:
        return
    known = [n for n in calls(gm, gaq.sort_edges.default) if n.args[:2] == (senders, receivers)]
    first = next(n for n in gm.graph.nodes if n in (sums[0], *known))
    with gm.graph.inserting_before(first):  # the number of atoms is the third argument of both
        edges = gm.graph.call_function(gaq.sort_edges.default, (senders, receivers, first.args[2]))
        parts = {
            end: tuple(gm.graph.call_function(operator.getitem, (edges, k)) for k in places)
            for end, places in ((receivers, (3, 2)), (senders, (5, 4)))
        }
    for other in known:
        other.replace_all_uses_with(edges)
        gm.graph.erase_node(other)
    for order, starts in parts.values():
        shapes[order] = RowShape(shapes[receivers].rows, (), torch.int32)
        shapes[starts] = RowShape(None, (), torch.int32)
    for node in sums:
        values, index, count, _, label = node.args
        with gm.graph.inserting_before(node):
            total = gm.graph.call_function(
                gaq.sum_sorted.default,
                (values, index, *parts[index], count, label),  # type: ignore[index]
            )
        shapes[total] = shapes[node]
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)


def _is_of_atoms(node: Node, ends: tuple[Node, Node], shapes: dict[Node, RowShape]) -> bool:
    """Whether a sum over the ends of edges has a row for each atom, a number that is asked for."""
    return node.args[1] in ends and shapes[node].rows == "atom" and isinstance(node.args[2], Node)
