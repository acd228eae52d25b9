"""Keep tensors component-major: move conversions outward until they meet and vanish.

Before: ``a = relayout(linear(x), I, 'mul_ir'); b = relayout(a + c', I, 'ir_mul')``
After:  ``b = linear(x) + c``
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch.fx import GraphModule, Node

from ..ir.layout import dim as irreps_dim
from ..ir.layout import permutation, simplified
from .graph_tools import SCATTERS, ZEROS, aten, calls, copied, finished, gaq, is_call, rows_index

# Operators that treat every element of a row alike, so that reordering a row commutes with them;
# the value is the positions of the arguments that carry rows.
_ROWWISE: dict[object, tuple[int, ...]] = {
    aten.index.Tensor: (0,),
    aten.neg.default: (0,),
    aten.silu.default: (0,),
    aten.tanh.default: (0,),
    aten.sigmoid.default: (0,),
    aten.add.Tensor: (0, 1),
    aten.sub.Tensor: (0, 1),
    aten.div.Tensor: (0,),
    aten.mul.Tensor: (0,),
    aten.scatter_reduce.two: (3,),
    aten.scatter_add.default: (3,),
    aten.index_add.default: (3,),
}


def cancel_relayouts(graph_module: GraphModule) -> GraphModule:
    """Remove every layout conversion that a later one undoes; see the module's text."""
    gm = copied(graph_module)
    for node in calls(gm, gaq.relayout.default):
        if _is_same(str(node.args[1])):
            node.replace_all_uses_with(node.args[0])
    gm.graph.eliminate_dead_code()
    while _cancel_pairs(gm) or _push_down(gm):
        gm.graph.eliminate_dead_code()
    return finished(gm)


def _is_same(irreps: str) -> bool:
    """Whether both layouts are the same."""
    order = permutation(irreps, "ir_mul")
    return order == tuple(range(len(order)))


def _cancel_pairs(gm: GraphModule) -> bool:
    changed = False
    for node in calls(gm, gaq.relayout.default):
        source = node.args[0]
        if (
            is_call(source, gaq.relayout.default)
            and source.args[1] == node.args[1]
            and source.args[2] != node.args[2]
        ):
            node.replace_all_uses_with(source.args[0])
            changed = True
    return changed


def _push_down(gm: GraphModule) -> bool:
    """Move one conversion to e3nn's layout below the row-wise operator that consumes it."""
    for node in calls(gm, gaq.relayout.default):
        if node.args[2] != "mul_ir":
            continue
        for user in list(node.users):
            if _can_pass(user, node):
                _pass_through(gm, user, str(node.args[1]))
                return True
            if is_call(user, aten.cat.default) and _joins_columns(user) and _stay_apart(_parts_irreps(user)):
                _pass_cat(gm, user)
                return True
            if is_call(user, aten.split_with_sizes.default) and _pass_split(gm, user, node):
                return True
    return False


def _joins_columns(cat: Node) -> bool:
    """Whether a cat of matrices puts them side by side, and knows how wide they are."""
    known = all(_columns(part) is not None for part in cat.args[0])  # type: ignore[union-attr]
    return known and len(cat.args) > 1 and cat.args[1] in (1, -1)


def _columns(node: Node) -> int | None:
    """How many columns a matrix has, if that is fixed."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return int(shape[1]) if len(shape) == 2 and str(shape[1]).isdecimal() else None


def _pass_cat(gm: GraphModule, cat: Node) -> None:
    """Convert after joining: parts in no layout have one number to a channel, which lies alike in both."""
    parts: list[Node] = list(cat.args[0])  # type: ignore[arg-type]
    irreps = simplified("+".join(_parts_irreps(cat)))
    cat.update_arg(0, [p.args[0] if _is_converted(p) else p for p in parts])
    _convert_after(gm, cat, irreps)


def _is_converted(part: Node) -> bool:
    return is_call(part, gaq.relayout.default) and part.args[2] == "mul_ir"


def _parts_irreps(cat: Node) -> list[str]:
    parts: list[Node] = list(cat.args[0])  # type: ignore[arg-type]
    return [str(p.args[1]) if _is_converted(p) else f"{_columns(p)}x0e" for p in parts]


def _stay_apart(irreps: Sequence[str]) -> bool:
    """Whether no block of vectors meets its like in the next part.

    The layout knows such two as one block, in which a component of all channels comes before the next
    component; joined, all components of the first part would. Scalars have one component.
    """
    parts = [[entry.split("x")[1] for entry in simplified(part).split("+")] for part in irreps]
    return all(a[-1] != b[0] or a[-1].startswith("0") for a, b in pairwise(parts))


def _pass_split(gm: GraphModule, split: Node, node: Node) -> bool:
    """Convert each part after splitting, if every part is whole blocks."""
    whole, sizes, *axis = split.args
    parts = _whole_blocks(str(node.args[1]), sizes)  # type: ignore[arg-type]
    if whole is not node or axis not in ([1], [-1]) or parts is None:
        return False
    split.update_arg(0, node.args[0])
    for part in list(split.users):
        _convert_after(gm, part, parts[part.args[1]])  # type: ignore[index]
    return True


def _whole_blocks(irreps: str, sizes: Sequence[int]) -> list[str] | None:
    """The irreps of parts with so many columns, or None if a block is cut."""
    entries = [(irreps_dim(e), e) for e in simplified(irreps).split("+")]
    found: list[str] = []
    for size in sizes:
        part: list[str] = []
        while size > 0 and entries:
            width, entry = entries.pop(0)
            size -= width
            part.append(entry)
        if size != 0:
            return None
        found.append("+".join(part))
    return found


def _can_pass(user: Node, node: Node) -> bool:
    if user.op != "call_function" or user.target not in _ROWWISE:
        return False
    rows = _ROWWISE[user.target]
    if user.target in (aten.div.Tensor, aten.mul.Tensor):
        return bool(user.args[0] is node and _is_scalar(user.args[1]))
    if user.target is aten.index.Tensor:
        return bool(user.args[0] is node and len(user.args[1]) == 1)
    if user.target in SCATTERS:
        whole_rows = user.args[1] == 0 and user.args[3] is node and is_call(user.args[0], *ZEROS)
        return bool(whole_rows and rows_index(user) is not None)
    return all(
        is_call(user.args[i], gaq.relayout.default) and user.args[i].args[1:] == node.args[1:] for i in rows
    )


def _is_scalar(value: object) -> bool:
    if isinstance(value, int | float):
        return True
    found = value.meta.get("val") if isinstance(value, Node) else None
    shape = getattr(found, "shape", None)
    return shape is not None and all(size == 1 for size in shape)


def _pass_through(gm: GraphModule, user: Node, irreps: str) -> None:
    for i in _ROWWISE[user.target]:
        user.update_arg(i, user.args[i].args[0])  # type: ignore[union-attr]
    _convert_after(gm, user, irreps)


def _convert_after(gm: GraphModule, node: Node, irreps: str) -> None:
    """Let all users read a node in e3nn's layout again, where it differs."""
    if _is_same(irreps):
        return
    with gm.graph.inserting_after(node):
        after = gm.graph.call_function(gaq.relayout.default, (node, irreps, "mul_ir"))
    after.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(after, delete_user_cb=lambda u: u is not after)
