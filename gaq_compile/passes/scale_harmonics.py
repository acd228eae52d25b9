"""What all paths of a convolution have in common of an edge's weights scales its harmonics instead.

Before: of E edges, P paths, H heads with C / H channels each::

    w = mul(view(filters, [E, P, H, C / H]), alpha)                        # alpha (E, 1, H, 1): attention
    out = gaq.conv(x, sh, view(w, [E, P * C]), edges, 'Cx0e+... * 1x0e+1x1o -> ...')

After::

    sh_h = cat([sh * alpha_1, ..., sh * alpha_H])                          # a copy for each head
    out = gaq.conv(x, sh_h, filters, edges, '(C / H)x0e+(C / H)x0e+... * 1x0e+1x1o+1x0e+1x1o+... -> ...')

A product is linear in both. Harmonics have a few numbers for each edge, weights hundreds; and where filters
follow from distances alone, they are now the same for an edge and its reverse (:mod:`.pair_edges`).
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from ..ir.specs import TensorProductSpec, tensor_product_spec
from .graph_tools import aten, calls, copied, finished, gaq, is_call

_WEIGHT, _SPEC = 2, 4  # arguments of a convolution


def scale_harmonics(graph_module: GraphModule) -> GraphModule:
    """Rewrite every convolution whose weights are filters times attention; see the module's text."""
    gm = copied(graph_module)
    for conv in calls(gm, gaq.conv.default):
        spec = tensor_product_spec(str(conv.args[_SPEC]))
        found = _filters_and_attention(conv, spec)
        if found is None:
            continue
        filters, alpha, heads = found
        with gm.graph.inserting_before(conv):
            by_head = gm.graph.call_function(aten.view.default, (alpha, [-1, heads]))
            parts = gm.graph.call_function(aten.split_with_sizes.default, (by_head, [1] * heads, 1))
            scaled = [_scaled(gm, conv.args[1], parts, h) for h in range(heads)]
            harmonics = gm.graph.call_function(aten.cat.default, (scaled, 1))
        conv.update_arg(1, harmonics)
        conv.update_arg(_WEIGHT, filters)
        conv.update_arg(_SPEC, str(by_heads(spec, heads)))
    return finished(gm)


def _scaled(gm: GraphModule, sh: Any, parts: Node, head: int) -> Node:
    alpha = gm.graph.call_function(operator.getitem, (parts, head))
    return gm.graph.call_function(aten.mul.Tensor, (sh, alpha))


def by_heads(spec: TensorProductSpec, heads: int) -> TensorProductSpec:
    """A product each of whose blocks has ``heads`` equal parts, with harmonics of their own.

    Args:
        spec: of blocks whose channels can be divided so.
        heads: how many parts. Weights keep their order.
    """
    count = len(spec.irreps_sh.split("+"))
    instructions = tuple(
        (i * heads + h, j + h * count, k * heads + h, c)
        for i, j, k, c in spec.instructions
        for h in range(heads)
    )
    return replace(
        spec,
        irreps_x=_divided(spec.irreps_x, heads),
        irreps_sh="+".join([spec.irreps_sh] * heads),
        irreps_out=_divided(spec.irreps_out, heads),
        instructions=instructions,
    )


def _divided(irreps: str, heads: int) -> str:
    entries = (entry.split("x") for entry in irreps.split("+"))
    return "+".join(f"{int(mul) // heads}x{ir}" for mul, ir in entries for _ in range(heads))


def _filters_and_attention(conv: Node, spec: TensorProductSpec) -> tuple[Node, Node, int] | None:
    """Weights (E, paths * channels), what multiplies all paths' (E, 1, heads, 1), and how many heads."""
    weight: Any = conv.args[_WEIGHT]
    product: Any = weight.args[0] if is_call(weight, aten.view.default) else None
    if not is_call(product, aten.mul.Tensor) or product.kwargs or not _divides(spec):
        return None
    paths, channels = len(spec.paths), spec.paths[0].block_x.mul
    for split, alpha in (product.args, product.args[::-1]):
        sizes = _row(split)
        if sizes is None or len(sizes) != 3 or not is_call(split, aten.view.default):
            continue
        heads = sizes[1]
        fits = sizes == [paths, heads, channels // heads] and heads * (channels // heads) == channels
        if fits and heads > 1 and _row(alpha) == [1, heads, 1] and _row(split.args[0]) == [paths * channels]:
            return split.args[0], alpha, heads
    return None


def _divides(spec: TensorProductSpec) -> bool:
    """Whether all blocks have equally many channels, and harmonics of two heads stay two sets in a row.

    Equal irreps that are neighbours are one block, whose components do not lie one head after another.
    """
    channels = {mul for irreps in (spec.irreps_x, spec.irreps_out) for mul in _channels(irreps)}
    harmonics = spec.irreps_sh.split("+")
    return len(channels) == 1 and bool(spec.paths) and harmonics[0] != harmonics[-1]


def _channels(irreps: str) -> list[int]:
    return [int(entry.split("x")[0]) for entry in irreps.split("+")]


def _row(node: object) -> list[int] | None:
    """The sizes of a row of a tensor, where they are fixed."""
    sizes = getattr(node.meta.get("val"), "shape", ()) if isinstance(node, Node) else ()
    fixed = all(str(size).isdecimal() for size in sizes[1:])
    return [int(size) for size in sizes[1:]] if sizes and fixed else None
