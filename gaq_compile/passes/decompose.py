"""Composite torch operators as the primitive ones that row kernels know.

Before: ``native_layer_norm(x, [C], w, b, eps)``
After:  ``d = x - sum(x) / C; d * rsqrt(sum(d * d) / C + eps) * w + b``, and its gradient alike
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from .graph_tools import aten, calls, copied, finished

Call = Callable[..., Node]


def decompose(graph_module: GraphModule) -> GraphModule:
    """Layer norms over the last axis, their gradients, and Euclidean norms, written out."""
    gm = copied(graph_module)
    means: dict[Node, tuple[Node, Node]] = {}  # of each layer norm: its mean and 1 / standard deviation
    for node in calls(gm, aten.native_layer_norm.default):
        if len(node.args[1]) == 1 and None not in node.args[2:4]:  # type: ignore[arg-type]
            _replace(gm, node, _layer_norm(_caller(gm, node), node.args, means))
    for node in calls(gm, aten.native_layer_norm_backward.default):
        mask = node.args[7]
        if len(node.args[2]) == 1 and list(mask) == [True, False, False]:  # type: ignore[arg-type]
            _replace(gm, node, _layer_norm_backward(_caller(gm, node), node.args))
    for node in calls(gm, aten.linalg_vector_norm.default):
        if len(node.args) > 2 and node.args[1] == 2 and not node.kwargs:
            x, _, *rest = node.args
            call = _caller(gm, node)
            node.replace_all_uses_with(
                call(aten.sqrt.default, call(aten.sum.dim_IntList, _square(call, x), *rest))
            )
            gm.graph.erase_node(node)
    return finished(gm)


def _caller(gm: GraphModule, before: Node) -> Call:
    def call(target: Any, *args: Any) -> Node:
        with gm.graph.inserting_before(before):
            return gm.graph.call_function(target, args)

    return call


def _square(call: Call, x: Any) -> Node:
    return call(aten.mul.Tensor, x, x)


def _mean(call: Call, x: Node, width: int) -> Node:
    return call(aten.div.Tensor, call(aten.sum.dim_IntList, x, [-1], True), float(width))


def _layer_norm(call: Call, args: Any, means: dict[Node, tuple[Node, Node]]) -> dict[int, Node]:
    x, (width,), weight, bias, eps = args
    mean = _mean(call, x, width)
    centred = call(aten.sub.Tensor, x, mean)
    spread = call(aten.sqrt.default, call(aten.add.Tensor, _mean(call, _square(call, centred), width), eps))
    inverse = call(aten.reciprocal.default, spread)
    scaled = call(aten.mul.Tensor, call(aten.mul.Tensor, centred, inverse), weight)
    return {0: call(aten.add.Tensor, scaled, bias), 1: mean, 2: inverse}


def _layer_norm_backward(call: Call, args: Any) -> dict[int, Node]:
    """``dE/dx = (h - mean(h) - z mean(h z)) / s`` with z = (x - mean) / s and h = grad * weight."""
    grad, x, (width,), mean, inverse, weight, *_ = args
    z = call(aten.mul.Tensor, call(aten.sub.Tensor, x, mean), inverse)
    h = call(aten.mul.Tensor, grad, weight)
    along = call(aten.mul.Tensor, z, _mean(call, call(aten.mul.Tensor, h, z), width))
    rest = call(aten.sub.Tensor, call(aten.sub.Tensor, h, _mean(call, h, width)), along)
    return {0: call(aten.mul.Tensor, rest, inverse)}


def _replace(gm: GraphModule, node: Node, parts: dict[int, Node]) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] in parts:
            user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
            gm.graph.erase_node(user)
    if not node.users:
        gm.graph.erase_node(node)
