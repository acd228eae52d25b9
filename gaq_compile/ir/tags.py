"""Irreps tags: ``node.meta["irreps"]``, set once and never silently changed."""

from __future__ import annotations

from torch.fx import Node

from ..errors import IrrepsError
from .layout import simplified


def irreps_of(node: object) -> str | None:
    """The irreps of a node's tensor, or None where it has none."""
    return node.meta.get("irreps") if isinstance(node, Node) else None


def tag(node: Node, irreps: str, by: str) -> None:
    """Record the irreps of a node's last axis.

    Args:
        node: the node whose tensor is meant.
        irreps: its irreps; stored simplified.
        by: the pass that sets the tag, named in the error.

    Raises:
        IrrepsError: if the node already carries different irreps.
    """
    value = simplified(irreps)
    old = node.meta.get("irreps")
    if old is not None and old != value:
        raise IrrepsError(
            f"pass {by!r} would change the irreps of {node.name} from {old} to {value}",
            where=node.format_node() or node.name,
            fix="a pass may only add tags; make it create a new node",
        )
    node.meta["irreps"] = value
