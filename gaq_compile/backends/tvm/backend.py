"""Which gaq operators have generated kernels, and what each computes in."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ...config import activation_scheme
from ...ir.specs import learned_directions
from ...operators.registration import ops
from ...passes.fuse_rows import FusedRows
from ..base import Attribute, Lowered, Refused, register_backend
from .build import host_target, tvm_version
from .conv import conv_backward, conv_forward
from .linear import arithmetic, lower_linear
from .linear_nodes import LEARNED, LINEARS, is_fixed, lower_linear_node
from .pointwise import (
    lower_gate,
    lower_gate_backward,
    lower_harmonics,
    lower_harmonics_backward,
    lower_mddq,
    lower_mddq_backward,
    lower_product,
    lower_product_backward,
)
from .rows_kernel import lower_rows
from .rows_plan import UnsupportedRowsError
from .sum_rows_kernel import lower_sum_rows

Rule = Callable[[Node, Attribute, str], "Lowered | Refused"]


class TVMBackend:
    """Generated CPU kernels.

    Args:
        target: a TVM target in JSON; by default this machine's CPU.

    Raises:
        MissingPackageError: if TVM is not installed.
    """

    name = "tvm"
    groups_linears = True

    def __init__(self, target: str | None = None) -> None:
        tvm_version()
        self.target = target or host_target()

    def lower(self, node: Node, attribute: Attribute) -> Lowered | Refused:
        """The generated kernel for ``node``, or why there is none."""
        rule = _RULES.get(node.target)
        if rule is None:
            return Refused(f"no generated kernel for {node.target}")
        return rule(node, attribute, self.target)

    def lower_rows(self, fused: FusedRows) -> Lowered | Refused:
        """One generated kernel for the group, or why there is none."""
        try:
            run, linears = lower_rows(fused, self.target)
        except UnsupportedRowsError as reason:
            return Refused(str(reason))
        within = tuple(arithmetic(k.plan.problem, self.target) for k in linears)
        return Lowered(run, "f32", (), within)


def _linear(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    kernel = lower_linear_node(node, attribute, target, lower_linear)
    if isinstance(kernel, Refused):
        return kernel
    return Lowered(kernel, arithmetic(kernel.plan.problem, target), (node.args[0],))


def _conv(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    return Lowered(conv_forward(str(node.args[-2]), target), "f32", node.args[:-2])


def _conv_backward(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    return Lowered(conv_backward(str(node.args[-2]), target), "f32", node.args[:-2])


def _gate(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    return Lowered(lower_gate(str(node.args[-2]), target), "f32", node.args[:-2])


def _gate_backward(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    return Lowered(lower_gate_backward(str(node.args[-2]), target), "f32", node.args[:-2])


def _sum_rows(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    return Lowered(lower_sum_rows(int(node.args[3]), target), "f32", node.args[:3])  # type: ignore[call-overload]


def _product(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    return Lowered(lower_product(str(node.args[-2]), target), "f32", node.args[:-2])


def _product_backward(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    return Lowered(lower_product_backward(str(node.args[-2]), target), "f32", node.args[:-2])


def _harmonics(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    vec, irreps, normalize, normalization, _ = node.args
    run = lower_harmonics(str(irreps), bool(normalize), str(normalization), target)
    return Lowered(run, "f32", (vec,))


def _harmonics_backward(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    grad, vec, irreps, normalize, normalization, _ = node.args
    run = lower_harmonics_backward(str(irreps), bool(normalize), str(normalization), target)
    return Lowered(run, "f32", (grad, vec))


def _mddq(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    x, scale, irreps, scheme, _ = node.args
    if not is_fixed(scale):
        return Refused("activation steps are computed at run time, kernels need them fixed")
    if learned_directions(str(scheme), str(irreps)):
        return Refused(LEARNED)
    if activation_scheme(str(scheme)).common:
        return Refused("activations on a common grid have a kernel only together with integer weights")
    return Lowered(lower_mddq(str(irreps), str(scheme), attribute(scale), target), "f32", (x,))


def _mddq_backward(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    grad, x, scale, irreps, scheme, _ = node.args
    if not is_fixed(scale):
        return Refused("activation steps are computed at run time, kernels need them fixed")
    run = lower_mddq_backward(str(irreps), str(scheme), attribute(scale), target)
    return Lowered(run, "f32", (grad, x))


_RULES: dict[object, Rule] = {
    **dict.fromkeys(LINEARS, _linear),
    ops.sum_rows.default: _sum_rows,
    ops.conv.default: _conv,
    ops.conv_backward.default: _conv_backward,
    ops.gate.default: _gate,
    ops.gate_backward.default: _gate_backward,
    ops.tensor_product.default: _product,
    ops.tensor_product_backward.default: _product_backward,
    ops.spherical_harmonics.default: _harmonics,
    ops.spherical_harmonics_backward.default: _harmonics_backward,
    ops.mddq.default: _mddq,
    ops.mddq_backward.default: _mddq_backward,
}

register_backend("tvm", TVMBackend)
