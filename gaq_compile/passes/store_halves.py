"""Radial weights that are rounded to half precision are stored as such, and so is their gradient.

Before::

    w = gaq.round_half(gaq.int_irreps_linear(r, ..., '64x0e -> 960x0e', ...), 0)
    y = gaq.conv(x, sh, w, edges, spec)
    ...
    g = gaq.round_half(gaq.conv_backward(dy, x, sh, w, edges, spec)[2], 10)
    dr = gaq.int_irreps_linear(g, ..., '64x0e -> 960x0e', ...)                       # transposed

After: the same without ``round_half``, ``'64x0e -> 960x0e ; f16'`` and ``spec + ' ; f16'``

They have hundreds of numbers for each bond, and what a convolution waits for is their way through the caches.
A bond's gradient is the sum of its two edges', of which the first is rounded already.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ..ir.specs import GRADIENT_EXPONENT, in_half, linear_spec
from .graph_tools import CONVOLUTIONS, calls, gaq, is_call
from .row_shapes import RowShape

_DEEPEST = 512  # channels of an input block: a kernel adds the parts of longer sums up in its result
_SPEC = 5  # the argument of an integer linear


def store_halves(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Merge ``round_half`` into what makes and what reads radial weights, in place.

    Nothing happens where somebody else reads them: then the rounding stays an operator.

    Args:
        gm: a graph of energy and forces, of the caller's own.
        shapes: of its nodes (:func:`.row_shapes.row_shapes`), which are changed with them.
    """
    for rounded in calls(gm, gaq.round_half.default):
        gradients = _gradients(rounded)
        if (
            rounded.args[1] != 0
            or gradients is None
            or not _is_product(rounded.args[0], rounded, transposed=False)
        ):
            continue
        product = rounded.args[0]
        for user in tuple(rounded.users):
            user.update_arg(CONVOLUTIONS[user.target] + 2, in_half(str(user.args[-2])))
        linears = {product, *(reader for g in gradients for reader in g.users)}
        for linear in linears:
            linear.update_arg(_SPEC, in_half(str(linear.args[_SPEC])))  # type: ignore[union-attr]
        for node in (product, *(g.args[0] for g in gradients)):
            shapes[node] = replace(shapes[node], dtype=torch.float16)  # type: ignore[index]
        for node in (rounded, *gradients):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            gm.graph.erase_node(node)


def _gradients(rounded: Node) -> list[Node] | None:
    """The roundings of the gradients of radial weights; None where these are not convolutions' alone."""
    found: list[Node] = []
    for user in rounded.users:
        place = CONVOLUTIONS.get(user.target)  # type: ignore[call-overload]
        if place is None or user.all_input_nodes.count(rounded) != 1 or user.args[place] is not rounded:
            return None
        parts = user.users if user.target is gaq.conv_backward.default else ()
        for part in (p for p in parts if p.target is operator.getitem and p.args[1] == 2):
            if not all(
                is_call(g, gaq.round_half.default) and g.args[1] == GRADIENT_EXPONENT for g in part.users
            ):
                return None
            found += part.users
    products = all(_is_product(reader, g, transposed=True) for g in found for reader in g.users)
    return found if products else None


def _is_product(node: object, rounded: Node, transposed: bool) -> bool:
    """Whether a node is the linear that a rounded tensor comes from, or its adjoint that reads it.

    Every block of its results has one path, so that it is written once.
    """
    if not is_call(node, gaq.int_irreps_linear.default) or node.args[-2] is not transposed:  # type: ignore[union-attr]
        return False
    if transposed:
        return node.args[0] is rounded and node.all_input_nodes.count(rounded) == 1  # type: ignore[union-attr]
    paths = linear_spec(str(node.args[_SPEC])).paths  # type: ignore[union-attr]
    once = len({path.block_out for path in paths}) == len(paths)
    alone = list(node.users) == [rounded]  # type: ignore[union-attr]
    return alone and once and all(path.block_in.mul <= _DEEPEST for path in paths)
