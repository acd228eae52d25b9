"""Expressions of weights alone, computed once.

Before: ``scale = softplus(self.raw); y = x * scale``
After:  ``y = x * self.softplus``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .graph_tools import add_buffer, attribute, copied, finished, is_pure

_MOST_ELEMENTS = 1 << 16  # what is larger is better computed than kept


def fold_constants(graph_module: GraphModule) -> GraphModule:
    """Evaluate torch's operators where all arguments are weights or numbers.

    Integer weights of layers stay as they are: what decodes them is not one of torch's operators.
    """
    gm = copied(graph_module)
    known: dict[Node, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            known[node] = attribute(gm, node)
        elif is_pure(node) and all(argument in known for argument in node.all_input_nodes):
            value = _value(node, known)
            if isinstance(value, Tensor) and value.numel() <= _MOST_ELEMENTS:
                known[node] = value
    folded = [node for node in known if node.op != "get_attr"]
    for node in folded:
        if any(user not in known for user in node.users):
            name = add_buffer(gm, node.name, known[node].contiguous())
            with gm.graph.inserting_before(node):
                constant = gm.graph.get_attr(name)
            node.replace_all_uses_with(constant)
    return finished(gm)


def _value(node: Node, known: dict[Node, Tensor]) -> Any:
    args, kwargs = (map_arg(given, known.__getitem__) for given in (node.args, node.kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
