"""Small questions that passes ask of a graph, and the copy that keeps passes pure."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..ir.traced import TracedTensor
from ..ir.unwritten import module_of

aten = torch.ops.aten
gaq = torch.ops.gaq

ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
LINEARS = (gaq.irreps_linear.default, gaq.int_irreps_linear.default)
CONVOLUTIONS: dict[object, int] = {gaq.conv.default: 2, gaq.conv_backward.default: 3}  # where the weight is
# fmt: off
VIEWS = {
    aten._unsafe_view.default, aten.expand.default, aten.slice.Tensor, aten.squeeze.dim,
    aten.clone.default, aten.reshape.default, aten.unsqueeze.default, aten.view.default,
}
# fmt: on
SCATTERS = (aten.scatter_reduce.two, aten.scatter_add.default, aten.index_add.default)


def copied(graph_module: GraphModule) -> GraphModule:
    """A GraphModule with its own graph (metadata kept) that shares the weights."""
    graph = Graph()
    values: dict[Node, Node] = {}
    output = graph.graph_copy(graph_module.graph, values)
    if output is not None:
        graph.output(output)
    for old, new in values.items():
        new.meta = copy.copy(old.meta)
    return module_of(graph_module, graph)


def finished(graph_module: GraphModule) -> GraphModule:
    """Drop dead nodes, check the graph and regenerate its code."""
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def calls(graph_module: GraphModule, target: object) -> Iterator[Node]:
    """The nodes that call ``target``, in order, safe against changes while iterating."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is target:
            yield node


def is_call(node: object, *targets: object) -> bool:
    """Whether ``node`` calls one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_gaq(node: Node) -> bool:
    """Whether ``node`` calls an operator of this package."""
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "gaq"


def rows_index(scatter: Node) -> Node | None:
    """The one-dimensional index by which a scatter adds whole rows, or None if it does not.

    ``index_add(zeros, 0, index, rows)``, or ``scatter_*(zeros, 0, index, rows)`` whose index is a
    column ``unsqueeze(index, 1)`` expanded over the row.
    """
    index = scatter.args[2]
    if scatter.target is aten.index_add.default:
        return index if isinstance(index, Node) and scatter.kwargs.get("alpha", 1) == 1 else None
    if not is_call(index, aten.expand.default) or not is_call(index.args[0], aten.unsqueeze.default):
        return None
    index, axis = index.args[0].args
    flat = isinstance(index, Node) and axis in (1, -1) and _dimensions(index) == 1
    return index if isinstance(index, Node) and flat else None


def _dimensions(node: object) -> int | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dim() if isinstance(value, Tensor | TracedTensor) else None


def attribute(graph_module: nn.Module, node: Node) -> Tensor:
    """The tensor of a ``get_attr`` node."""
    value: object = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is not a tensor")
    return value


def add_buffer(module: nn.Module, name: str, value: Tensor) -> str:
    """Register ``value`` under a free name made from ``name``; returns the attribute's name."""
    clean = "".join(c if c.isalnum() else "_" for c in name)
    if clean and clean[0].isdigit():
        clean = "_" + clean
    free, count = clean, 1
    while hasattr(module, free):
        free, count = f"{clean}_{count}", count + 1
    module.register_buffer(free, value)
    return free


def is_pure(node: Node) -> bool:
    """Whether a node calls one of torch's own operators that only computes from its arguments."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "aten" or schema is None:
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not (schema.is_mutable or random or "assert" in schema.name)
