"""Find the irreps of every tensor: from the gaq operators outward through row-wise operators."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch.fx import GraphModule, Node

from ..ir.specs import gate_spec, linear_spec, tensor_product_spec
from ..ir.tags import irreps_of, tag
from .graph_tools import SCATTERS, aten, copied, gaq

_NAME = "tag_irreps"


def tag_irreps(graph_module: GraphModule) -> GraphModule:
    """Set ``node.meta["irreps"]`` wherever operators determine it; a second run changes nothing.

    Args:
        graph_module: any graph; it is copied.

    Raises:
        IrrepsError: if a node already carries other irreps.
    """
    gm = copied(graph_module)
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        for target, irreps in _known(node):
            if isinstance(target, Node):
                tag(target, irreps, _NAME)
    for node in gm.graph.nodes:
        source = _same_as(node)
        if source is not None:
            tag(node, source, _NAME)
    return gm


def _known(node: Node) -> list[tuple[object, str]]:
    """(node, irreps) pairs that one gaq operator fixes for its inputs and outputs."""
    rule = _RULES.get(node.target)
    return rule(node) if rule else []


def _linear(node: Node) -> list[tuple[object, str]]:
    position = 3 if node.target is gaq.irreps_linear.default else 5
    spec = linear_spec(str(node.args[position]))
    transpose = node.args[4] if position == 3 else node.args[8]
    source, sink = (spec.irreps_out, spec.irreps_in) if transpose else (spec.irreps_in, spec.irreps_out)
    return [(node.args[0], source), (node, sink)]


def _product(node: Node) -> list[tuple[object, str]]:
    spec = tensor_product_spec(str(node.args[-2]))
    return [(node.args[0], spec.irreps_x), (node.args[1], spec.irreps_sh), (node, spec.irreps_out)]


def _product_backward(node: Node) -> list[tuple[object, str]]:
    spec = tensor_product_spec(str(node.args[-2]))
    pairs: list[tuple[object, str]] = [
        (node.args[0], spec.irreps_out),
        (node.args[1], spec.irreps_x),
        (node.args[2], spec.irreps_sh),
    ]
    for user in node.users:
        if user.target is operator.getitem and user.args[1] in (0, 1):
            pairs.append((user, spec.irreps_x if user.args[1] == 0 else spec.irreps_sh))
    return pairs


def _gate(node: Node) -> list[tuple[object, str]]:
    spec = gate_spec(str(node.args[-2]))
    if node.target is gaq.gate.default:
        return [(node.args[0], spec.irreps_in), (node, spec.irreps_out)]
    return [(node.args[0], spec.irreps_out), (node.args[1], spec.irreps_in), (node, spec.irreps_in)]


def _mddq(node: Node) -> list[tuple[object, str]]:
    return [(node.args[0], str(node.args[2])), (node, str(node.args[2]))]


def _mddq_backward(node: Node) -> list[tuple[object, str]]:
    irreps = str(node.args[3])
    return [(node.args[0], irreps), (node.args[1], irreps), (node, irreps)]


def _harmonics(node: Node) -> list[tuple[object, str]]:
    return [(node.args[0], "1x1o"), (node, str(node.args[1]))]


def _harmonics_backward(node: Node) -> list[tuple[object, str]]:
    return [(node.args[0], str(node.args[2])), (node.args[1], "1x1o"), (node, "1x1o")]


_RULES: dict[object, Callable[[Node], list[tuple[object, str]]]] = {
    gaq.irreps_linear.default: _linear,
    gaq.int_irreps_linear.default: _linear,
    gaq.tensor_product.default: _product,
    gaq.conv.default: _product,
    gaq.tensor_product_backward.default: _product_backward,
    gaq.conv_backward.default: _product_backward,
    gaq.gate.default: _gate,
    gaq.gate_backward.default: _gate,
    gaq.mddq.default: _mddq,
    gaq.mddq_backward.default: _mddq_backward,
    gaq.spherical_harmonics.default: _harmonics,
    gaq.spherical_harmonics_backward.default: _harmonics_backward,
}

_CARRIES = {
    aten.neg.default, aten.clone.default, aten.alias.default, aten.detach.default, gaq.round_half.default,
}  # fmt: skip
_SCALES = {aten.mul.Tensor, aten.div.Tensor}
_JOINS = {aten.add.Tensor, aten.sub.Tensor}


def _same_as(node: Node) -> str | None:
    """The irreps that a plain operator passes on from its inputs, or None."""
    if node.op != "call_function" or irreps_of(node) is not None:
        return None
    if node.target in _CARRIES or _gathers_rows(node):
        return irreps_of(node.args[0])
    if node.target in _SCALES and _is_one_number(node.args[1]):
        return irreps_of(node.args[0])
    if node.target in _JOINS:
        first, second = irreps_of(node.args[0]), irreps_of(node.args[1])
        return first if first == second else None
    if node.target in SCATTERS:
        return irreps_of(node.args[3])
    return None


def _gathers_rows(node: Node) -> bool:
    """``x[index]``: whole rows; an index along another axis picks components apart."""
    if node.target is not aten.index.Tensor:
        return False
    indices = node.args[1]
    return isinstance(indices, list | tuple) and len(indices) == 1 and indices[0] is not None


def _is_one_number(value: object) -> bool:
    if isinstance(value, int | float):
        return True
    found = value.meta.get("val") if isinstance(value, Node) else None
    shape = getattr(found, "shape", None)
    return shape is not None and all(size == 1 for size in shape)
