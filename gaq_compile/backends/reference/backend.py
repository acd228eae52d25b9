"""The backend of last resort: the operator's own meaning in torch."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ...operators.registration import ops
from ...passes.graph_tools import is_gaq
from ...passes.row_groups import FusedRows
from ..base import Attribute, Lowered, Refused, register_backend

_INTEGER_WEIGHTS = ops.int_irreps_linear.default


class ReferenceBackend:
    """Runs every operator as :mod:`gaq_compile.operators.reference` defines it."""

    name = "reference"

    groups_linears = True
    groups_sums = True
    stores_halves = True

    def __init__(self, target: str | None = None) -> None:
        self.target = target or "torch"

    def lower(self, node: Node, attribute: Attribute) -> Lowered | Refused:
        """Always yes: the operator itself, with weights and settings left as arguments."""
        operator: Any = node.target
        return Lowered(operator, _arithmetic(node), node.args)

    def lower_rows(self, fused: FusedRows) -> Lowered | Refused:
        """Always yes: torch's operators one by one."""
        return Lowered(fused, "f32", (), tuple(_arithmetic(n) for n in fused.graph.nodes if is_gaq(n)))


def _arithmetic(node: Node) -> str:
    return "f32 (integers simulated)" if node.target is _INTEGER_WEIGHTS else "f32"


register_backend("reference", ReferenceBackend)
