"""The straight-through gradient of quantized scalars, written out so that it joins groups of rows.

Before: ``g = gaq.mddq_backward(grad, x, s, '128x0e', 's8 m8d8')``
After:  ``g = where(abs(x) < b, grad, grad * 0)``, b the least number for which ``b / s`` is more than 127

As an operator of its own it is a kernel between two linears, which reads and writes rows that these had at
hand. A comparison takes a tenth of the time of a division, and says the same of every number.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import activation_scheme
from ..ir.layout import blocks, simplified
from .graph_tools import add_buffer, aten, attribute, calls, gaq
from .row_shapes import RowShape

_ROUNDINGS = 8  # floats that two roundings may lie apart, and more


def straight_through(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Write out the gradients of scalars' rounding, in place; those of vectors need their norms and stay.

    Args:
        gm: a graph of the caller's own.
        shapes: of its nodes (:func:`.row_shapes.row_shapes`); new nodes are added.
    """
    for node in calls(gm, gaq.mddq_backward.default):
        grad, x, scale, irreps, scheme, _ = cast(Any, node.args)
        vectors = any(block.l for block in blocks(simplified(str(irreps))))
        if vectors or node not in shapes or scale.op != "get_attr":
            continue

        def call(target: Any, *args: Any, dtype: torch.dtype = torch.float32, near: Node = node) -> Node:
            with gm.graph.inserting_before(near):
                made = gm.graph.call_function(target, args)
            shapes[made] = RowShape(shapes[near].rows, shapes[near].row, dtype)
            return made

        bound = _bound(attribute(gm, scale).detach().float(), activation_scheme(str(scheme)).qmax(0))
        with gm.graph.inserting_before(node):
            beyond = gm.graph.get_attr(add_buffer(gm, f"{scale.target}_bound", bound))
        shapes[beyond] = RowShape(None, tuple(bound.shape), bound.dtype)
        inside = call(aten.lt.Tensor, call(aten.abs.default, x), beyond, dtype=torch.bool)
        kept = call(aten.where.self, inside, grad, call(aten.mul.Scalar, grad, 0.0))
        node.replace_all_uses_with(kept)
        gm.graph.erase_node(node)


def _bound(scale: Tensor, qmax: int) -> Tensor:
    """The least x with ``x / scale > qmax`` in float32: ``scale * qmax`` rounds, and so does the quotient."""
    bound = scale * qmax
    for _ in range(_ROUNDINGS):
        inside = bound / scale <= qmax
        bound = torch.where(inside, torch.nextafter(bound, torch.full_like(bound, torch.inf)), bound)
    return bound
