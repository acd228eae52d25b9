"""Remove what export leaves behind: assertions, no-op views, stacked-then-selected indices, copies."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .graph_tools import aten, calls, copied, finished, is_call


def simplify(graph_module: GraphModule, *, differentiated: bool = False) -> GraphModule:
    """Peephole clean-up followed by common subexpression elimination.

    Before: ``edges = stack([receivers, senders]); s = select(edges, 0, 1); x[s] ... x[s]``
    After:  ``x[senders] ...`` with equal expressions computed once.

    Args:
        graph_module: any graph.
        differentiated: whether forces have been derived; only then does ``detach`` mean nothing.
    """
    gm = copied(graph_module)
    for node in calls(gm, aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    for target in (aten.detach.default, aten.alias.default) if differentiated else ():
        for node in calls(gm, target):
            node.replace_all_uses_with(node.args[0])
    for node in calls(gm, aten.select.int):
        stack, axis, index = node.args
        if is_call(stack, aten.stack.default) and axis == 0 and _stack_axis(stack) == 0:
            node.replace_all_uses_with(stack.args[0][index])
    # a slice that takes all, too: its gradient would be a tensor of zeros, written over
    for target in (aten.view.default, aten.slice.Tensor):
        for node in calls(gm, target):
            if _same_shape(node, node.args[0]):
                node.replace_all_uses_with(node.args[0])
    gm.graph.eliminate_dead_code()
    _merge_equal(gm)
    return finished(gm)


def _stack_axis(stack: Node) -> object:
    return stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)


def _same_shape(node: Node, source: object) -> bool:
    """Whether a view changes nothing, by the shapes that tracing recorded: for a slice, that it takes all."""
    if not isinstance(source, Node) or "val" not in node.meta or "val" not in source.meta:
        return False
    a, b = node.meta["val"], source.meta["val"]
    return len(a.shape) == len(b.shape) and all(
        str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)
    )


def _merge_equal(gm: GraphModule) -> None:
    """Common subexpression elimination over pure operator calls and attributes."""
    seen: dict[object, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "get_attr") or _impure(node):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)


def _impure(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return random or bool(schema is not None and schema.is_mutable)


def _frozen(value: object) -> object:
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(_frozen(v) for v in value))
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, float | int | bool):
        return (type(value), repr(value))  # 1, 1.0 and True, 0.0 and -0.0 compare equal and differ
    return value
