"""What a linear node of a graph computes, and with which tensors."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from ...ir.specs import learned_directions, linear_spec
from ...numerics.packing import unpack_int4
from ...passes.fuse_rows import LINEARS
from ..base import Attribute, Refused
from .dense_plan import DenseSchedule, LinearProblem
from .linear import LinearKernel, lower_linear

LEARNED = "learned directions are a baseline, and have no generated kernel"
COMPUTED = "weights are computed at run time, kernels need them fixed"


__all__ = ["COMPUTED", "LEARNED", "LINEARS", "is_fixed", "lower_linear_node"]


def lower_linear_node(
    node: Node, attribute: Attribute, target: str, schedule: DenseSchedule | None = None
) -> LinearKernel | Refused:
    """The kernel of a linear, float or integer, or why there is none.

    Args:
        node: a call of one of :data:`LINEARS`.
        attribute: reads the tensor behind a ``get_attr`` node.
        target: a TVM target in JSON.
        schedule: as for :func:`.linear.lower_linear`.
    """
    if node.target is LINEARS[0]:
        return _float(node, attribute, target, schedule)
    return _integer(node, attribute, target, schedule)


def is_fixed(node: object) -> bool:
    """Whether an argument is the same at every call."""
    return node is None or (isinstance(node, Node) and node.op == "get_attr")


def _float(
    node: Node, attribute: Attribute, target: str, schedule: DenseSchedule | None
) -> LinearKernel | Refused:
    _, weight, bias, spec, transpose, _ = node.args
    if not (is_fixed(weight) and is_fixed(bias)):
        return Refused(COMPUTED)
    problem = LinearProblem(str(spec), "f32", "f32", bool(transpose), bias is not None)
    given = attribute(weight), None, None, _optional(bias, attribute)  # type: ignore[arg-type]
    return lower_linear(problem, *given, target, schedule)


def _integer(
    node: Node, attribute: Attribute, target: str, schedule: DenseSchedule | None
) -> LinearKernel | Refused:
    _, steps, codes, scale, bias, spec, scheme, bits, transpose, _ = node.args
    if not all(is_fixed(part) for part in (steps, codes, scale, bias)):
        return Refused(COMPUTED)
    if learned_directions(str(scheme), linear_spec(str(spec)).irreps_in):
        return Refused(LEARNED)
    problem = LinearProblem(str(spec), str(scheme), f"s{bits}", bool(transpose), bias is not None)
    stored = attribute(codes)  # type: ignore[arg-type]
    plain = unpack_int4(stored, linear_spec(str(spec)).weight_numel) if bits == 4 else stored
    floats = attribute(scale).float(), _optional(steps, attribute), _optional(bias, attribute)  # type: ignore[arg-type]
    return lower_linear(problem, plain, *floats, target, schedule)


def _optional(node: object, attribute: Attribute) -> Tensor | None:
    return attribute(node) if isinstance(node, Node) else None
