"""Which gaq operators have generated kernels, and what each computes in."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import Node

from ...config import activation_scheme
from ...ir.layout import lmax
from ...ir.specs import linear_spec
from ...numerics.packing import unpack_int4
from ...operators.registration import ops
from ...passes.fuse_rows import FusedRows
from ..base import Attribute, Lowered, Refused, register_backend
from .build import host_target, tvm_version
from .conv import conv_backward, conv_forward
from .dense_plan import GRADIENT
from .linear import LinearProblem, arithmetic, lower_linear
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

LEARNED = "learned directions are a baseline, and have no generated kernel"

Rule = Callable[[Node, Attribute, str], "Lowered | Refused"]


class TVMBackend:
    """Generated CPU kernels.

    Args:
        target: a TVM target in JSON; by default this machine's CPU.

    Raises:
        MissingPackageError: if TVM is not installed.
    """

    name = "tvm"

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
            return Lowered(lower_rows(fused, self.target), "f32", ())
        except UnsupportedRowsError as reason:
            return Refused(str(reason))


def _constant(node: object) -> bool:
    return node is None or (isinstance(node, Node) and node.op == "get_attr")


def _float_linear(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    x, weight, bias, spec, transpose, _ = node.args
    if not (_constant(weight) and _constant(bias)):
        return Refused("weights are computed at run time, kernels need them fixed")
    problem = LinearProblem(str(spec), "f32", "f32", bool(transpose), bias is not None)
    run = lower_linear(problem, attribute(weight), None, None, _optional(bias, attribute), target)
    return Lowered(run, arithmetic(problem, target), (x,))


def _integer_linear(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    x, steps, codes, scale, bias, spec, scheme, bits, transpose, _ = node.args
    if not all(_constant(part) for part in (steps, codes, scale, bias)):
        return Refused("weights are computed at run time, kernels need them fixed")
    if _looks_up(str(scheme), linear_spec(str(spec)).irreps_in):
        return Refused(LEARNED)
    problem = LinearProblem(str(spec), str(scheme), f"s{bits}", bool(transpose), bias is not None)
    stored = attribute(codes)
    plain = unpack_int4(stored, linear_spec(str(spec)).weight_numel) if bits == 4 else stored
    run = lower_linear(
        problem,
        plain,
        attribute(scale).float(),
        _optional(steps, attribute),
        _optional(bias, attribute),
        target,
    )
    return Lowered(run, arithmetic(problem, target), (x,))


def _looks_up(scheme: str, irreps: str) -> bool:
    """Whether a scheme takes directions of these irreps from a table."""
    known = scheme not in ("f32", GRADIENT) and activation_scheme(scheme).vector == "svq"
    return known and lmax(irreps) > 0


def _optional(node: object, attribute: Attribute) -> Tensor | None:
    return attribute(node) if isinstance(node, Node) else None


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
    if not _constant(scale):
        return Refused("activation steps are computed at run time, kernels need them fixed")
    if _looks_up(str(scheme), str(irreps)):
        return Refused(LEARNED)
    if activation_scheme(str(scheme)).common:
        return Refused("activations on a common grid have a kernel only together with integer weights")
    return Lowered(lower_mddq(str(irreps), str(scheme), attribute(scale), target), "f32", (x,))


def _mddq_backward(node: Node, attribute: Attribute, target: str) -> Lowered | Refused:
    grad, x, scale, irreps, scheme, _ = node.args
    if not _constant(scale):
        return Refused("activation steps are computed at run time, kernels need them fixed")
    run = lower_mddq_backward(str(irreps), str(scheme), attribute(scale), target)
    return Lowered(run, "f32", (grad, x))


_RULES: dict[object, Rule] = {
    ops.irreps_linear.default: _float_linear,
    ops.int_irreps_linear.default: _integer_linear,
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
