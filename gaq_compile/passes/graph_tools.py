"""Small questions that passes ask of a graph, and the copy that keeps passes pure."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
gaq = torch.ops.gaq


def copied(graph_module: GraphModule) -> GraphModule:
    """A GraphModule with its own graph (metadata kept) that shares the weights."""
    graph = Graph()
    values: dict[Node, Node] = {}
    output = graph.graph_copy(graph_module.graph, values)
    if output is not None:
        graph.output(output)
    for old, new in values.items():
        new.meta = copy.copy(old.meta)
    return GraphModule(graph_module, graph)


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


def attribute(graph_module: GraphModule, node: Node) -> Tensor:
    """The tensor of a ``get_attr`` node."""
    value: object = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is not a tensor")
    return value


def add_buffer(graph_module: GraphModule, name: str, value: Tensor) -> str:
    """Register ``value`` under a free name made from ``name``; returns the attribute's name."""
    clean = "".join(c if c.isalnum() else "_" for c in name)
    if clean and clean[0].isdigit():
        clean = "_" + clean
    free, count = clean, 1
    while hasattr(graph_module, free):
        free, count = f"{clean}_{count}", count + 1
    graph_module.register_buffer(free, value)
    return free
