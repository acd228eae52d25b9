"""What a linear node of a graph computes, and with which tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import Node

from ...ir.specs import learned_directions
from ...numerics.packing import unpack_int4
from ...passes.fuse_rows import has_fixed_weights
from ...passes.graph_tools import LINEARS, gaq
from ..base import Attribute, Refused
from .dense_plan import LinearProblem

LEARNED = "learned directions are a baseline, and have no generated kernel"
COMPUTED = "weights are computed at run time, kernels need them fixed"


Kernel = TypeVar("Kernel")

__all__ = ["COMPUTED", "LEARNED", "LINEARS", "is_fixed", "linear_problem", "lower_linear_node"]


def lower_linear_node(
    node: Node, attribute: Attribute, place: Any, lower: Callable[..., Kernel]
) -> Kernel | Refused:
    """The kernel of a linear, float or integer, or why there is none.

    Args:
        node: a call of one of :data:`LINEARS`.
        attribute: reads the tensor behind a ``get_attr`` node.
        place: what the kernel is for, as ``lower`` takes it.
        lower: :func:`.linear.lower_linear`, or another processor's.
    """
    if not has_fixed_weights(node):
        return Refused(COMPUTED)
    problem = linear_problem(node)
    if learned_directions(problem.activation, problem.linear.irreps_in):
        return Refused(LEARNED)
    if problem.weight == "f32":
        weight, bias = attribute(node.args[1]), node.args[2]  # type: ignore[arg-type]
        return lower(problem, weight, None, None, _optional(bias, attribute), place)
    steps, codes, scale, bias = node.args[1:5]
    stored = attribute(codes)  # type: ignore[arg-type]
    plain = unpack_int4(stored, problem.linear.weight_numel) if problem.weight == "s4" else stored
    floats = attribute(scale).float(), _optional(steps, attribute), _optional(bias, attribute)  # type: ignore[arg-type]
    return lower(problem, plain, *floats, place)


def is_fixed(node: object) -> bool:
    """Whether an argument is the same at every call."""
    return node is None or (isinstance(node, Node) and node.op == "get_attr")


def linear_problem(node: Node) -> LinearProblem:
    """What a linear node computes."""
    if node.target is gaq.irreps_linear.default:
        _, _, bias, spec, transpose, _ = node.args
        return LinearProblem(str(spec), "f32", "f32", bool(transpose), bias is not None)
    _, _, _, _, bias, spec, scheme, bits, transpose, _ = node.args
    return LinearProblem(str(spec), str(scheme), f"s{bits}", bool(transpose), bias is not None)


def _optional(node: object, attribute: Attribute) -> Tensor | None:
    return attribute(node) if isinstance(node, Node) else None
