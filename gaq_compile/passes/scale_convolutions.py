"""What all of a convolution's result is divided by goes into its coefficients.

Before::

    out = div(gaq.conv(x, sh, weight, edges, '... | 0.0.0 1.1.2*0.5'), denominator)     # denominator = 4

After::

    out = gaq.conv(x, sh, weight, edges, '... | 0.0.0*0.25 1.1.2*0.125')

Models divide by an average number of neighbours, or its root. As an operator of its own that reads and writes
every atom's widest features, and once more for their gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx import GraphModule, Node

from ..ir.specs import tensor_product_spec
from .graph_tools import aten, attribute, calls, copied, finished, gaq

_SPEC = 4  # the argument of a convolution


def scale_convolutions(graph_module: GraphModule) -> GraphModule:
    """Multiply the coefficients of convolutions whose result is only used times, or over, a fixed number."""
    gm = copied(graph_module)
    for conv in calls(gm, gaq.conv.default):
        while (scaling := _scaling(gm, conv)) is not None:
            scaled, factor = scaling
            spec = tensor_product_spec(str(conv.args[_SPEC]))
            instructions = tuple((i, j, k, c * factor) for i, j, k, c in spec.instructions)
            conv.update_arg(_SPEC, str(replace(spec, instructions=instructions)))
            scaled.replace_all_uses_with(conv)
            gm.graph.erase_node(scaled)
    return finished(gm)


def _scaling(gm: GraphModule, conv: Node) -> tuple[Node, float] | None:
    """The only user of a convolution's result and the number that it multiplies it with, if it does that."""
    if len(conv.users) != 1:
        return None
    (user,) = conv.users
    if (
        user.kwargs
        or user.target not in (aten.div.Tensor, aten.mul.Tensor)
        or user.all_input_nodes.count(conv) != 1
    ):
        return None
    first, second = user.args
    if first is not conv and user.target is aten.div.Tensor:
        return None
    number = _number(gm, second if first is conv else first)
    if number is None or not math.isfinite(number) or number == 0.0:
        return None
    return user, 1.0 / number if user.target is aten.div.Tensor else number


def _number(gm: GraphModule, value: object) -> float | None:
    """A number, or a constant tensor that holds one and makes no result larger."""
    if isinstance(value, Node):
        tensor = attribute(gm, value) if value.op == "get_attr" else None
        return float(tensor) if tensor is not None and tensor.numel() == 1 and tensor.ndim <= 2 else None
    return float(value) if isinstance(value, int | float) else None
