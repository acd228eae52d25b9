"""What is the same for an edge and its reverse, computed once for both: one row per *bond*.

Before: ``r = norm(edge_vec); w = linear(r); y = conv(x, sh, w, edges)``                  # E rows
After:  ``v = edge_vec[first]; r = norm(v); w = linear(r); y = conv(x, sh, w, edges)``    # E / 2 rows

Edges come in pairs (:mod:`..capture.graphs`): edge ``e + E / 2`` is the reverse of edge ``e``. Under
reversal edge vectors and differences ``x[senders] - x[receivers]`` change sign: they are *odd*; lengths,
radial functions and networks of them do not: they are *even*. An even value is computed for the first
half and gathered where both directions are needed; a convolution reads it as it is.

A gradient with respect to an even value is never needed edge by edge: of the two numbers of a pair only
the sum ``g[e] + g[e + E / 2]`` matters, since what it is multiplied with later is even, or changes sign
and is then added to one end and subtracted from the other. So gradients are added up where they come
in (those of a convolution's weights in its own kernel), pass the networks backwards once per bond, and go
to the first of the two edges, the other gets zero.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..capture.graphs import EDGE_VECTORS
from .graph_tools import CONVOLUTIONS, LINEARS, VIEWS, aten, attribute, gaq, is_call
from .indices import GATHERS, gather_index
from .row_shapes import RowShape

EVEN, ODD = 1, -1
_VECTORS = "edge_vec"
_RECEIVERS, _SENDERS = EDGE_VECTORS[_VECTORS]
# fmt: off
_LINEAR = VIEWS | {
    aten.add.Tensor, aten.mm.default, aten.mul.Scalar, aten.neg.default, aten.sub.Tensor,
    aten.sum.dim_IntList,
}  # in every operand with a row per edge
_EACH = {
    aten.abs.default, aten.clamp.default, aten.clamp_min.default, aten.cos.default, aten.eq.Scalar,
    aten.erf.default, aten.exp.default, aten.ge.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.log.default,
    aten.logical_and.default, aten.lt.Scalar, aten.lt.Tensor, aten.masked_fill.Scalar,
    aten.pow.Tensor_Scalar, aten.reciprocal.default, aten.rsub.Scalar, aten.silu.default,
    aten.silu_backward.default, aten.sin.default, aten.softplus.default, aten.sqrt.default,
    aten.where.self, gaq.gate.default, gaq.gate_backward.default, gaq.mddq.default,
    gaq.mddq_backward.default, gaq.round_half.default,
}  # of even operands even
_SLOPES = (aten.silu_backward.default, gaq.gate_backward.default, gaq.mddq_backward.default)
_FILLS = (aten.ones.default, aten.zeros.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
# fmt: on
_BONDS = (
    ("bond", "edge", torch.int64),
    ("mask", "edge", torch.float32),
    ("first", "bond", torch.int64),
    ("second", "bond", torch.int64),
    (_RECEIVERS, "bond", torch.int64),
    (_SENDERS, "bond", torch.int64),
)  # what gaq.bonds returns
Parity = int | tuple[str, Node]
"""EVEN, ODD, or which end of the edge a row of which tensor belongs to."""


def pair_edges(gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
    """Compute even values and their gradients once per bond, in place; nothing where no linear would gain.

    Args:
        gm: a graph of energy and forces, of the caller's own, whose sizes are asked of its inputs.
        shapes: of its nodes (:func:`.row_shapes.row_shapes`); new nodes are added.
    """
    _Pairs(gm, shapes).rewrite()
    gm.graph.eliminate_dead_code()


class _Pairs:
    def __init__(self, gm: GraphModule, shapes: dict[Node, RowShape]) -> None:
        self.gm, self.shapes = gm, shapes
        self.inputs = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
        self.parity = self._parities()
        self.summed = self._summed()
        self.halves: dict[Node, Node] = {}
        self.index: dict[str, Node] = {}
        self.last: dict[Node, Node] = {}  # what has been put behind each node last

    # --- what is even -------------------------------------------------------------------------------

    def _parities(self) -> dict[Node, Parity]:
        found: dict[Node, Parity] = {}
        for node in self.gm.graph.nodes:
            if self._has_edges(node):
                parity = self._parity(node, found)
                if parity is not None:
                    found[node] = parity
        return found

    def _has_edges(self, node: object) -> bool:
        return isinstance(node, Node) and node in self.shapes and self.shapes[node].rows == "edge"

    def _edges_of(self, node: Node) -> list[Node]:
        return [a for a in node.all_input_nodes if self._has_edges(a)]

    def _parity(self, node: Node, known: Mapping[Node, Parity]) -> Parity | None:
        if node.op == "placeholder":
            return ODD if node.target == _VECTORS else None
        if node.target in _FILLS:
            return EVEN
        end = self._end(node)
        if end is not None:
            return end
        signs = [known.get(a) for a in self._edges_of(node)]
        if not signs or None in signs or not self._row_by_row(node):
            return None
        if any(isinstance(s, tuple) for s in signs):
            return self._of_ends(node, signs)
        if all(s == EVEN for s in signs):
            return EVEN if node.target in {*_LINEAR, *_EACH, *LINEARS, *_PRODUCTS} else None
        return self._with_signs(node, known)

    def _end(self, node: Node) -> Parity | None:
        """Which end's row of which tensor a gather takes."""
        if node.target not in GATHERS or node.target is aten.gather.default:
            return None
        index, table = gather_index(node), node.args[0]
        ends = {self.inputs.get(name): name for name in (_RECEIVERS, _SENDERS)}
        if index is None or index not in ends or not isinstance(table, Node):
            return None
        return EVEN if table.target == "batch" else (ends[index], table)

    @staticmethod
    def _of_ends(node: Node, signs: list[Any]) -> Parity | None:
        """``x[senders]`` and ``x[receivers]`` change places: their difference is odd, their product even."""
        if len(signs) != 2 or not all(isinstance(s, tuple) for s in signs) or node.kwargs:
            return None
        (one, left), (other, right) = signs
        if one == other or left is not right:
            return None
        parities: dict[object, int] = {aten.sub.Tensor: ODD, aten.add.Tensor: EVEN, aten.mul.Tensor: EVEN}
        return parities.get(node.target)

    @staticmethod
    def _with_signs(node: Node, known: Mapping[Node, Parity]) -> Parity | None:
        """Of operands some of which are odd."""
        signs = [known.get(a, EVEN) if isinstance(a, Node) else EVEN for a in node.args[:2]]
        if node.target in _PRODUCTS and not node.kwargs:
            return signs[0] * signs[1]  # type: ignore[operator,return-value]
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            return ODD if signs == [ODD, ODD] else None
        if node.target is aten.abs.default:
            return EVEN
        if node.target is aten.pow.Tensor_Scalar and float(node.args[1]).is_integer():  # type: ignore[arg-type]
            return ODD if int(node.args[1]) % 2 else EVEN  # type: ignore[arg-type]
        if node.target in VIEWS | {aten.neg.default, aten.sum.dim_IntList, aten.mul.Scalar}:
            return ODD
        if node.target is aten.masked_fill.Scalar and node.args[2] == 0 and signs == [ODD, EVEN]:
            return ODD
        return None

    def _row_by_row(self, node: Node) -> bool:
        """Whether a row of the result follows from the same row of the operands: both have one per edge."""
        if node.target is aten.slice.Tensor:
            return _axis((*node.args, 0)[1], self.shapes[node]) != 0
        if node.target is aten.sum.dim_IntList:
            axes = node.args[1]
            source = self.shapes[node.args[0]]  # type: ignore[index]
            return bool(axes) and all(_axis(a, source) != 0 for a in axes)  # type: ignore[union-attr]
        if node.target is aten.mm.default:
            return not self._has_edges(node.args[1])
        return True

    # --- what is only needed summed over the pair -----------------------------------------------------

    def _summed(self) -> dict[Node, int]:
        """EVEN for ``g`` if only ``g[e] + g[e + h]`` matters, ODD if only ``g[e] - g[e + h]`` does."""
        found: dict[Node, int] = {}
        for node in reversed(list(self.gm.graph.nodes)):
            if not self._has_edges(node) or not node.users:
                continue
            opposite = self._difference(node)
            classes = {self._through(node, user, found) for user in node.users if user not in opposite}
            if opposite:
                classes.add(ODD)
            if len(classes) == 1 and None not in classes:
                found[node] = classes.pop()  # type: ignore[assignment]
        return found

    def _difference(self, node: Node) -> list[Node]:
        """The users that add a value to one end of each edge and subtract it from the other, in one total."""
        added = {u.args[1]: u for u in node.users if self._is_end_sum(u, node)}
        for negative in node.users:
            if not is_call(negative, aten.neg.default) or len(negative.users) != 1:
                continue
            (taken,) = negative.users
            for end, other in ((_RECEIVERS, _SENDERS), (_SENDERS, _RECEIVERS)):
                mine = added.get(self.inputs.get(end))
                theirs = self._is_end_sum(taken, negative) and taken.args[1] is self.inputs.get(other)
                if mine is not None and theirs and _total(mine) is _total(taken):
                    return [mine, negative]
        return []

    def _is_end_sum(self, node: Node, source: Node) -> bool:
        return is_call(node, gaq.sum_rows.default) and node.args[0] is source

    def _through(self, node: Node, user: Node, found: Mapping[Node, int]) -> int | None:
        """What a user that is linear in a value says of it."""
        if is_call(user, gaq.sum_rows.default):
            return EVEN if user.args[0] is node and self.parity.get(user.args[1]) == EVEN else None  # type: ignore[arg-type]
        sign = self._coefficient(node, user)
        return found[user] * sign if user in found and sign is not None else None

    def _coefficient(self, node: Node, user: Node) -> int | None:
        """The parity of what a value is multiplied with, where the user is linear in it; else None."""
        others = [a for a in self._edges_of(user) if a is not node]
        target, args = user.target, user.args
        if not self._has_edges(user) or not self._row_by_row(user) or user.kwargs.keys() - {"dtype"}:
            return None
        if target in _SUMS and len(self._edges_of(user)) < len(set(args)):
            return None  # of a pair's two constants the sum would need both
        if target in _LINEAR or target is gaq.round_half.default:  # of a gradient: the sum is rounded
            return EVEN
        if target in LINEARS:
            bias, scheme = (args[2], "f32") if target is LINEARS[0] else (args[4], args[6])
            return EVEN if args[0] is node and bias is None and scheme in ("f32", "g16") else None
        if target in _PRODUCTS:
            first = args[0] is node and args[1] is not node
            if not first and target is not aten.mul.Tensor:
                return None
            signs = {self.parity.get(a) for a in others} if others else {EVEN}
            sign = signs.pop()
            return sign if isinstance(sign, int) and args[0] is not args[1] else None
        even = all(self.parity.get(a) == EVEN for a in others)
        if target in _SLOPES:
            return EVEN if args[0] is node and node not in args[1:] and even else None
        if target is aten.masked_fill.Scalar:
            return EVEN if args[0] is node and args[2] == 0 and even else None
        if target is aten.where.self:
            branches = list(args[1:])
            zero = [b for b in branches if b is not node and self._is_zero(b)]
            return EVEN if args[0] is not node and len(zero) == 1 and even else None
        return None

    def _is_zero(self, node: object) -> bool:
        if is_call(node, aten.zeros.default):
            return True
        held = isinstance(node, Node) and node.op == "get_attr"
        return held and not bool(attribute(self.gm, node).any())  # type: ignore[arg-type]

    def _lifts(self, node: Node) -> bool:
        """Whether a gradient is computed from others, and from even values, linearly."""
        if self.summed.get(node) != EVEN or self.parity.get(node) == EVEN:
            return False
        operands = [a for a in self._edges_of(node) if self.parity.get(a) != EVEN]
        if node.target in _SUMS and len(operands) < len(self._edges_of(node)):
            return False
        return bool(operands) and all(self._coefficient(a, node) == EVEN for a in operands)

    # --- rewriting ----------------------------------------------------------------------------------

    def rewrite(self) -> None:
        """Find what is downstream of a linear, and let whoever else reads it read bonds."""
        if _VECTORS not in self.inputs:
            return
        nodes = list(self.gm.graph.nodes)
        lifts = {n for n in nodes if self._has_edges(n) and self._lifts(n)}
        even = self._downstream({n for n in nodes if self.parity.get(n) == EVEN})
        lifted = self._downstream(lifts)
        readers = {n: [u for u in n.users if u in self.shapes and u not in even] for n in nodes if n in even}
        takers = {n: [u for u in n.users if u not in lifted] for n in nodes if n in lifted}
        together = self._sum_in_convolutions(readers, lifted)
        for node in (*readers, *takers):
            self.half(node)
        for node, users in readers.items():
            self._read(node, users, together)
        for node, users in takers.items():
            self._spread(node, users)
        for gradient in (n for n, half in self.halves.items() if n is half):
            self.shapes[gradient] = replace(self.shapes[gradient], rows="bond")

    def _sum_in_convolutions(self, readers: Mapping[Node, list[Node]], lifted: set[Node]) -> set[Node]:
        """The gradients of convolutions that add up those of a bond's weights by themselves.

        They do it where they are given a bond's weights, so nobody may ask for an edge's: what they return is
        its own half.
        """
        found: set[Node] = set()
        for node, users in readers.items():
            for user in users:
                if user.target is not gaq.conv_backward.default or user.args[3] is not node:
                    continue
                gradients = [g for g in user.users if g.args[1] == 2]
                if all(self.summed.get(g) == EVEN and lifted.issuperset(g.users) for g in gradients):
                    found.add(user)
                    self.halves.update({g: g for g in gradients})
        return found

    def _downstream(self, nodes: set[Node]) -> set[Node]:
        """Those that are linears, what is rounded before one, or computed from these by others."""
        begins = {*LINEARS, gaq.round_half.default}
        found: set[Node] = set()
        for node in self.gm.graph.nodes:
            if node in nodes and (node.target in begins or not found.isdisjoint(node.all_input_nodes)):
                found.add(node)
        return found

    def _read(self, node: Node, users: list[Node], together: set[Node]) -> None:
        """Let users read an even value's bond; convolutions do that by themselves.

        Of their gradients, those ``together`` do: others are asked for every edge's.
        """
        for user in (u for u in users if u.target is gaq.conv.default or u in together):
            if user.args[CONVOLUTIONS[user.target]] is node:
                user.update_arg(CONVOLUTIONS[user.target], self.half(node))
        others = [u for u in users if node in u.all_input_nodes]
        if others:
            whole = self._gather(self.half(node), "bond", node)
            for user in others:
                user.replace_input_with(node, whole)

    def _spread(self, node: Node, users: list[Node]) -> None:
        """Give a gradient of the bond to the first of its edges."""
        if not users:
            return
        whole, mask = self._gather(self.half(node), "bond", node), self._bonds("mask")
        for axis in range(len(self.shapes[node].row)):
            row = (*self.shapes[mask].row, 1)
            mask = self._call(
                node, aten.unsqueeze.default, (mask, axis + 1), RowShape("edge", row, torch.float32)
            )
        shared = self._call(node, aten.mul.Tensor, (whole, mask), self.shapes[node])
        for user in users:
            user.replace_input_with(node, shared)

    def half(self, node: Node) -> Node:
        """A value with one row per bond: of the first edge, or the sum of both for a gradient."""
        if node not in self.halves:
            self.halves[node] = self._half(node)
        return self.halves[node]

    def _half(self, node: Node) -> Node:
        parity, shape = self.parity.get(node), replace(self.shapes[node], rows="bond")
        if node.op == "placeholder":
            return self._gather(node, "first", self._bonds("size"))
        if isinstance(parity, tuple):
            return self._call(node, aten.index.Tensor, (node.args[0], [self._bonds(parity[0])]), shape)
        if parity is None and not self._lifts(node):
            both = tuple(self._gather(node, which, node) for which in ("first", "second"))
            return self._call(node, aten.add.Tensor, both, shape)
        halves = {a: self.half(a) for a in self._edges_of(node)}
        halves |= {a: self._bonds("size") for a in node.all_input_nodes if self._counts_edges(a)}
        args, kwargs = (map_arg(given, lambda a: halves.get(a, a)) for given in (node.args, node.kwargs))
        return self._call(node, node.target, args, shape, kwargs)

    def _counts_edges(self, node: Node) -> bool:
        return (
            is_call(node, aten.sym_size.int)
            and node.args == (node.args[0], 0)
            and self._has_edges(node.args[0])
        )

    def _gather(self, table: Node, which: str, near: Node) -> Node:
        """Rows of a table of bonds ("bond"), or the first or second edge of each bond."""
        shape = replace(self.shapes[table], rows="edge" if which == "bond" else "bond")
        return self._call(near, aten.index.Tensor, (table, [self._bonds(which)]), shape)

    def _bonds(self, which: str) -> Node:
        """A part of what :func:`gaq.bonds` returns, or the number of bonds."""
        if not self.index:
            last = list(self.inputs.values())[-1]
            ends = (self.inputs[_RECEIVERS], self.inputs[_SENDERS])
            bonds = self._call(last, gaq.bonds.default, ends, RowShape("edge", (), torch.int64))
            for k, (name, rows, dtype) in enumerate(_BONDS):
                self.index[name] = self._call(last, operator.getitem, (bonds, k), RowShape(rows, (), dtype))
            self.index["size"] = self._call(last, aten.sym_size.int, (self.index["first"], 0), None)
        return self.index[which]

    def _call(self, near: Node, target: Any, args: Any, shape: RowShape | None, kwargs: Any = None) -> Node:
        """A new node behind all that has been put behind another."""
        with self.gm.graph.inserting_after(self.last.get(near, near)):
            node = self.gm.graph.call_function(target, args, kwargs)
        self.last[near] = node
        if shape is not None:
            self.shapes[node] = shape
        return node


def _axis(axis: object, shape: RowShape) -> int:
    return int(axis) % (len(shape.row) + 1)  # type: ignore[call-overload,no-any-return]


def _total(term: Node) -> Node:
    """The sum that a term ends up in, once."""
    node = term
    while len(node.users) == 1:
        (user,) = node.users
        once = is_call(user, aten.add.Tensor) and not user.kwargs and user.args.count(node) == 1
        if not once:
            break
        node = user
    return node
