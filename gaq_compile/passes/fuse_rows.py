"""Small torch operators that work row by row, gathered into groups that one kernel each can run.

Before: ``a = mul(x, y); b = exp(a); c = index(z, [senders]); d = mul(b, c)``
After:  ``d = self.edge_3(x, y, z, senders)``, a graph of the four

All operators of a group have one row per atom (or edge, pair, graph), and the row of a result depends
on the same row of the arguments only, or on a gathered one. Every operator has a level: operators of a
group see each other's results at the same level, anything else at the next. Groups of one kind and
level are then free of circles.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ..capture.graphs import GraphFormat
from ..ir.specs import learned_directions, linear_spec
from .decompose import decompose
from .fold_constants import fold_constants
from .graph_tools import LINEARS, VIEWS, add_buffer, aten, attribute, gaq, is_call
from .indices import GATHERS, gather_index, is_sound
from .pair_edges import pair_edges
from .plain_sizes import plain_sizes
from .row_groups import RowGroup, call_groups
from .row_shapes import NARROW, RowShape, row_shapes
from .scalar_products import scalar_products
from .sort_sums import sort_sums
from .store_halves import store_halves
from .straight_through import straight_through
from .sum_rows import sum_rows

# fmt: off
_EACH = {
    aten.abs.default, aten.add.Tensor, aten.clamp.default, aten.clamp_min.default, aten.cos.default,
    aten.div.Tensor, aten.eq.Scalar, aten.erf.default, aten.exp.default, aten.ge.Scalar, aten.gt.Scalar,
    aten.le.Scalar, aten.log.default, aten.logical_and.default, aten.lt.Scalar, aten.lt.Tensor,
    aten.masked_fill.Scalar, aten.mul.Scalar, aten.mul.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.reciprocal.default, aten.rsub.Scalar, aten.sgn.default, aten.silu.default,
    aten.silu_backward.default, aten.sin.default, aten.softplus.default, aten.sqrt.default,
    aten.sub.Tensor, aten.where.self, gaq.round_half.default,
}
# fmt: on
_CREATIONS = {aten.ones.default: 1.0, aten.zeros.default: 0.0}
_COMPARISONS = {
    aten.eq.Scalar, aten.ge.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.lt.Scalar, aten.lt.Tensor,
}  # fmt: skip
_ARGUMENTS = {aten.softplus.default: 1, aten.rsub.Scalar: 2}  # further ones change what is computed
_REDUCTIONS = {aten.sum.dim_IntList, aten.mm.default}
_MOST = 4096  # elements of a row
_WIDEST = 512  # of a linear's row: tiles of wider ones leave the nearest cache anyway
_FLOATS = (torch.float32, torch.bool)


def fuse_rows(
    graph_module: GraphModule, form: GraphFormat, linears: bool = True, sums: bool = True, halves: bool = True
) -> GraphModule:
    """Group what torch would run operator by operator.

    Args:
        graph_module: the integer graph of energy and forces.
        form: its inputs; a graph of a model's own tensors is returned as it is.
        linears: whether linears join groups: their kernels then begin and end in the group's tile.
        sums: whether sums over the ends of edges do (:mod:`.sort_sums`).
        halves: whether what is rounded to half precision is stored so (:mod:`.store_halves`).
    """
    if form.positions is not None:
        return graph_module
    gm = fold_constants(decompose(graph_module))
    shapes = row_shapes(gm, form)
    _drop_idle_views(gm, shapes)
    sum_rows(gm, form, shapes)
    plain_sizes(gm, form, shapes)
    pair_edges(gm, shapes)
    if halves:
        store_halves(gm, shapes)
    straight_through(gm, shapes)
    if sums:
        scalar_products(gm, shapes)
        sort_sums(gm, shapes)
    _inline_creations(gm, shapes)
    _float_integers(gm, shapes)
    return call_groups(gm, _groups(gm, shapes, form, linears), shapes)


def _drop_idle_views(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Views that change nothing; a copy may be there for its strides."""
    for node in list(gm.graph.nodes):
        if node.target in VIEWS - {aten.clone.default} and node in shapes:
            source = node.args[0]
            if shapes[node] == shapes.get(source):
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def _groups(
    gm: GraphModule, shapes: dict[Node, RowShape], form: GraphFormat, linears: bool
) -> list[RowGroup]:
    found: dict[tuple[str, int, Node | None], RowGroup] = {}
    levels: dict[Node, int] = {}
    inside: dict[Node, str] = {}  # operators of groups -> what they have rows of
    for node in gm.graph.nodes:
        rows = _row_operator(node, shapes, form) if linears or node.target not in LINEARS else None
        level = 0
        for argument in node.all_input_nodes:
            near = rows is not None and inside.get(argument) == rows and argument is not _gathered(node)
            level = max(level, levels[argument] + (0 if near else 1))
        levels[node] = level
        owner = _order_of_sum(node)
        if rows is not None:
            if owner is None:  # what is added up is known when all edges have been seen
                inside[node] = rows
            found.setdefault((rows, level, owner), RowGroup(rows, level, owner)).nodes.append(node)
    return list(found.values())


def _order_of_sum(node: Node) -> Node | None:
    """The order in which a sum's group goes through the edges."""
    return node.args[2] if is_call(node, gaq.sum_sorted.default) else None  # type: ignore[return-value]


def _row_operator(node: Node, shapes: dict[Node, RowShape], form: GraphFormat) -> str | None:
    """What the node has rows of, if it can be part of a group."""
    shape = shapes.get(node)
    if node.op != "call_function" or shape is None or shape.rows is None or not shape.static:
        return None
    if is_call(node, gaq.sum_sorted.default):
        return shapes[node.args[0]].rows  # type: ignore[index]
    if shape.dtype not in _FLOATS or math.prod(shape.row) > _MOST:
        return None
    if node.target in GATHERS:
        return shape.rows if _gathers_rows(node, shape, shapes, form) else None
    if node.target is operator.getitem:
        split = node.args[0]
        known = is_call(split, aten.split_with_sizes.default)
        return _row_operator(split, shapes, form) if known else None  # type: ignore[arg-type]
    if node.target in LINEARS:
        return shape.rows if _has_kernel(node) and _fits_tile(node, shape, shapes) else None
    known = node.target in _EACH | VIEWS | _REDUCTIONS | {aten.cat.default, aten.split_with_sizes.default}
    return shape.rows if known and _by_rows(node, shape, shapes) else None


def _has_kernel(linear: Node) -> bool:
    """Whether a kernel can take it: weights are constants, and directions are not learned."""
    if linear.target is gaq.int_irreps_linear.default:
        spec, scheme = str(linear.args[5]), str(linear.args[6])
        if learned_directions(scheme, linear_spec(spec).irreps_in):
            return False
    return has_fixed_weights(linear)


def has_fixed_weights(linear: Node) -> bool:
    """Whether all that a linear takes besides its input is the same at every call."""
    return all(a.op == "get_attr" for a in linear.all_input_nodes if a is not linear.args[0])


def _fits_tile(linear: Node, shape: RowShape, shapes: Mapping[Node, RowShape]) -> bool:
    """Whether tiles of what goes in and what comes out are small enough to stay near."""
    given = shapes.get(linear.args[0])  # type: ignore[call-overload]
    if given is None or {given.dtype, shape.dtype} != {torch.float32}:
        return False
    return len(given.row) == len(shape.row) == 1 and max(*given.row, *shape.row) <= _WIDEST


def _by_rows(node: Node, shape: RowShape, shapes: dict[Node, RowShape]) -> bool:
    """Whether every row of the result follows from the same row of the arguments."""
    dims = len(shape.row) + 1
    for argument in node.all_input_nodes:
        other = shapes.get(argument)
        if other is None and node.target in VIEWS:
            continue  # a size
        if other is None or other.dtype not in _FLOATS or not other.static:
            return False
        if other.rows is None and not _broadcasts(other.row, dims) and node.target is not aten.mm.default:
            return False
        if other.rows is not None and other.rows != shape.rows:
            return False
        if other.rows is not None and node.target in _EACH and len(other.row) + 1 != dims:
            return False
    if (node.kwargs and node.target is not aten.clone.default) or not _keeps_flags(node, shape, shapes):
        return False
    if node.target in (aten.softplus.default, aten.rsub.Scalar) and len(node.args) > _ARGUMENTS[node.target]:
        return False
    if node.target in VIEWS:
        return _keeps_rows(node, shape, shapes)
    if node.target is aten.mm.default:
        left, right = (shapes[a] for a in node.args)  # type: ignore[index]
        return left.rows is not None and right.rows is None and min(right.row) < NARROW
    if node.target is aten.sum.dim_IntList:
        axes = reduced_axes(node, shapes)
        return bool(axes) and 0 not in axes
    if node.target is aten.split_with_sizes.default:
        return _axis((*node.args, 0)[2], dims) != 0
    if node.target is aten.cat.default:
        return _axis((*node.args, 0)[1], dims) != 0
    return True


def _keeps_flags(node: Node, shape: RowShape, shapes: dict[Node, RowShape]) -> bool:
    """Truth values are held as 0 and 1: their sums, and the truth of numbers, are not."""
    flags = [shapes[a].dtype is torch.bool for a in node.all_input_nodes if a in shapes]
    if node.target is aten.logical_and.default:
        return all(flags)
    return shape.dtype is not torch.bool or node.target not in _EACH or node.target in _COMPARISONS


def _broadcasts(sizes: tuple[int, ...], dims: int) -> bool:
    """Whether a tensor without rows meets every row alike."""
    return len(sizes) < dims or (len(sizes) == dims and sizes[0] == 1)


def _axis(axis: object, dims: int) -> int:
    return int(axis) % dims  # type: ignore[call-overload, no-any-return]


def reduced_axes(node: Node, shapes: Mapping[Node, RowShape]) -> list[int]:
    """The axes that a sum goes over, the rows' being 0."""
    dims = len(shapes[node.args[0]].row) + 1  # type: ignore[index]
    axes = node.args[1] if len(node.args) > 1 else None
    return [_axis(a, dims) for a in axes] if isinstance(axes, list | tuple) else []


def _keeps_rows(node: Node, shape: RowShape, shapes: dict[Node, RowShape]) -> bool:
    """Whether a view leaves the rows what and where they are."""
    source = shapes[node.args[0]]  # type: ignore[index]
    if node.target is aten.expand.default:
        return source.rows is None or len(source.row) == len(shape.row)
    if source.rows is None:
        return False
    if node.target in (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.clone.default,
    ):
        return math.prod(source.row) == math.prod(shape.row)
    if node.target is aten.unsqueeze.default:
        return _axis(node.args[1], len(shape.row) + 1) != 0
    strided = node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1
    return not strided and _axis((*node.args, 0)[1], len(source.row) + 1) != 0


def _gathered(node: Node) -> Node | None:
    """What a gather takes rows of."""
    source = node.args[0] if node.target in GATHERS else None
    return source if isinstance(source, Node) else None


def _gathers_rows(node: Node, shape: RowShape, shapes: dict[Node, RowShape], form: GraphFormat) -> bool:
    source, index = _gathered(node), gather_index(node)
    if source is None or index is None or source not in shapes or index not in shapes:
        return False
    table, at = shapes[source], shapes[index]
    if table.dtype is not torch.float32 or (at.rows, at.row) != (shape.rows, ()) or not table.static:
        return False
    if node.target is aten.gather.default and len(table.row) != (0 if table.rows else 1):
        return False
    return is_sound(index, None if table.rows else table.row[0], form)


def _inline_creations(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Tensors of ones and zeros that meet others of the same shape become numbers."""
    for node in list(gm.graph.nodes):
        if node.target not in _CREATIONS or not _is_float(node, shapes):
            continue
        users = [u for u in node.users if u.target in _EACH and _other_has_shape(u, node, shapes)]
        if users:
            name = add_buffer(gm, node.name, torch.tensor(_CREATIONS[node.target]))
            with gm.graph.inserting_before(node):
                number = gm.graph.get_attr(name)
            shapes[number] = RowShape(None, (), torch.float32)
            for user in users:
                user.replace_input_with(node, number)
    gm.graph.eliminate_dead_code()


def _float_integers(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Integers that operators on floats take become floats beforehand, as torch has it."""
    for node in [n for n in gm.graph.nodes if n in shapes and shapes[n].dtype in (torch.int64, torch.int32)]:
        users = [u for u in node.users if u.target in _EACH and _is_float(u, shapes)]
        if not users:
            continue
        with gm.graph.inserting_after(node):
            if node.op == "get_attr":
                number = gm.graph.get_attr(add_buffer(gm, node.name, attribute(gm, node).float()))
            elif shapes[node].rows is not None and node.op != "placeholder":
                number = gm.graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
            else:
                continue
        shapes[number] = replace(shapes[node], dtype=torch.float32)
        for user in users:
            user.replace_input_with(node, number)
    gm.graph.eliminate_dead_code()


def _is_float(node: Node, shapes: Mapping[Node, RowShape]) -> bool:
    return node in shapes and shapes[node].dtype is torch.float32


def _other_has_shape(user: Node, creation: Node, shapes: dict[Node, RowShape]) -> bool:
    others = [a for a in user.all_input_nodes if a is not creation and a.target not in _CREATIONS]
    return any(
        a in shapes and (shapes[a].rows, shapes[a].row) == (shapes[user].rows, shapes[user].row)
        for a in others
    )
