"""Groups of row operators as calls of one graph each, and what a group computes again instead of reading.

Before: ``v = index(x, [senders]); a = mul(v, w); ...`` in one group, ``b = mul(v, c)`` in another
After:  ``a, ... = self.edge_rows_3(x, senders, w); b = self.edge_rows_7(x, senders, c)``

A row of many numbers per edge, written by one kernel and read by the next, costs more than its arithmetic:
edges are many, atoms few, and the atoms' rows stay near. So what follows from atoms' or bonds' rows, and
from a few numbers per edge, by a few additions and products, is not handed on but computed again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from ..capture.graphs import EDGE_VECTORS
from ..ir.unwritten import module_of
from .graph_tools import LINEARS, VIEWS, add_buffer, aten, attribute, copied, finished, gaq, is_call
from .indices import GATHERS, gather_index
from .row_shapes import NARROW, RowShape

_CHEAP = {
    aten.add.Tensor, aten.mm.default, aten.mul.Scalar, aten.mul.Tensor, aten.neg.default, aten.sub.Tensor,
}  # fmt: skip
_MOST_AGAIN = 8  # gathers and operators that are computed again for one value
_RECEIVERS, _SENDERS = EDGE_VECTORS["edge_vec"]
_FIRST, _SECOND = "first", "second"  # the two edges of a bond
_PARTS = {0: "bond", 2: _FIRST, 3: _SECOND, 4: _RECEIVERS, 5: _SENDERS}  # of what gaq.bonds returns


@dataclass(eq=False)
class RowGroup:
    """Operators that one kernel runs.

    Attributes:
        rows: what there is a row of: "atom", "edge", "pair" or "graph".
        level: its place in the order.
        owner: of sums over edges, the order in which it goes through them.
        nodes: in the graph's order.
    """

    rows: str
    level: int
    owner: Node | None = None
    nodes: list[Node] = field(default_factory=list)


class FusedRows(nn.Module):
    """A group's operators as a graph of their own, which torch can run and a backend can compile.

    No ``GraphModule``: that writes and compiles its Python whenever it, or a graph around it, changes, which
    was half of loading a file, for code that nobody runs where there are kernels.

    Args:
        root: holds the graph's constants as buffers.
        graph: the operators.
        rows: what there is a row of.
        shapes: of every node.
    """

    def __init__(self, root: nn.Module, graph: Graph, rows: str, shapes: dict[Node, RowShape]) -> None:
        super().__init__()
        for name, value in root.named_buffers():
            self.register_buffer(name, value)
        self.graph, self.rows, self.shapes = graph, rows, shapes
        self._interpreter: Interpreter | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedRows:
        """Constants of its own; nobody changes the graph."""
        root = nn.Module()
        for name, value in self.named_buffers():
            root.register_buffer(name, value.clone())
        return FusedRows(root, self.graph, self.rows, self.shapes)

    def forward(self, *arguments: Any) -> Any:
        """The results, in torch."""
        if self._interpreter is None:  # it reads through the whole graph to begin with
            self._interpreter = Interpreter(self, graph=self.graph)
        return self._interpreter.run(*arguments)

    @property
    def operators(self) -> int:
        """How many of torch's operators it stands for."""
        return sum(node.op == "call_function" for node in self.graph.nodes)


def fused_rows(graph_module: GraphModule, node: Node) -> FusedRows | None:
    """The group that a node calls, if it calls one."""
    module = getattr(graph_module, str(node.target), None) if node.op == "call_module" else None
    return module if isinstance(module, FusedRows) else None


def call_groups(gm: GraphModule, groups: Sequence[RowGroup], shapes: dict[Node, RowShape]) -> GraphModule:
    """The graph with a call for each group, in an order that suits all.

    Args:
        gm: the graph that the groups' operators are in.
        groups: without circles between them. Those that compute nothing are left out.
        shapes: of its nodes.
    """
    again = _Again(gm, groups, shapes)
    groups = [group for group in groups if _worth_it(group)]
    unit_of: dict[Node, Node | RowGroup] = {node: node for node in gm.graph.nodes}
    for group in groups:
        unit_of.update(dict.fromkeys(group.nodes, group))
    order = _order(gm, unit_of, again)
    inner = _inner_graphs(gm, order, shapes, again)
    graph, values, root = Graph(), dict[Node, Node](), copied(gm)
    for unit in order:
        if isinstance(unit, Node):
            values[unit] = graph.node_copy(unit, lambda n: values[n])
            values[unit].meta = dict(unit.meta)
        elif unit in inner:
            _call_group(root, graph, unit, inner[unit], values)
    return finished(module_of(root, graph))


def _worth_it(group: RowGroup) -> bool:
    """Whether anything is computed; one linear by itself has a kernel of its own."""
    work = [n for n in group.nodes if n.target not in VIEWS and n.target is not operator.getitem]
    return len(work) > 1 or (bool(work) and work[0].target not in LINEARS)


def _order(gm: GraphModule, unit_of: Mapping[Node, Node | RowGroup], again: _Again) -> list[Node | RowGroup]:
    place = {node: k for k, node in enumerate(gm.graph.nodes)}
    order, first = networkx.DiGraph(), dict[Node | RowGroup, int]()
    for node in gm.graph.nodes:
        unit = unit_of[node]
        order.add_node(unit)
        first.setdefault(unit, place[node])
        order.add_edges_from((unit_of[a], unit) for a in node.all_input_nodes if unit_of[a] is not unit)
        if again.edge_of_bond(node):
            order.add_edges_from((part, unit) for part in again.ends.values())
    return list(networkx.lexicographical_topological_sort(order, key=lambda u: first[u]))


def _inner_graphs(
    gm: GraphModule, order: Sequence[Node | RowGroup], shapes: dict[Node, RowShape], again: _Again
) -> dict[RowGroup, _Inner]:
    """Every group's graph, from the last to the first: what nobody reads any more is not computed."""
    read: set[Node] = set()
    found: dict[RowGroup, _Inner] = {}
    for unit in reversed(order):
        if isinstance(unit, Node):
            read.update(unit.all_input_nodes)
            continue
        results = [n for n in unit.nodes if n in read and n.target is not aten.split_with_sizes.default]
        if results:
            found[unit] = _Inner(gm, unit, results, shapes, again)
            read.update(found[unit].inputs)
    return found


class _Again:
    """Which values are computed again by every group that needs them.

    Some of many numbers per edge, and views that no group computes: between kernels they would be torch's.
    """

    def __init__(self, gm: GraphModule, groups: Sequence[RowGroup], shapes: dict[Node, RowShape]) -> None:
        self.shapes = shapes
        self.members = {node for group in groups for node in group.nodes}
        idle = (node for group in groups if not _worth_it(group) for node in group.nodes)
        self.views = {node for node in idle if node.target in VIEWS}
        self.ends = _ends_of_bonds(gm, shapes)
        self._work: dict[Node, int | None] = {}

    def __call__(self, node: Node) -> bool:
        """Whether a value is computed again."""
        return self._steps(node) is not None

    def wide(self, node: Node) -> bool:
        """Whether it has many numbers per edge."""
        shape = self.shapes.get(node)
        return shape is not None and shape.rows == "edge" and math.prod(shape.row) >= NARROW

    def edge_of_bond(self, node: Node) -> str | None:
        """Which edge of each bond a gather takes a value of that can be computed again for bonds."""
        index = gather_index(node) if node.target in GATHERS else None
        which = _part(index) if index is not None else None
        if which not in (_FIRST, _SECOND):
            return None
        source: Any = node.args[0]
        return which if self(source) and self._of_ends(source) else None

    def _steps(self, node: Node) -> int | None:
        if node not in self._work:
            self._work[node] = self._counted(node)
        return self._work[node]

    def _counted(self, node: Node) -> int | None:
        """Operators that make a value from what is there; None if it is better kept."""
        if node in self.views:
            return 0
        if node not in self.members or not self.wide(node) or self.shapes[node].dtype is not torch.float32:
            return None
        if node.target in GATHERS:
            return None if self.has_edges(node.args[0]) else 1
        if node.target not in _CHEAP | VIEWS:
            return None
        parts = [self._steps(a) if a in self.members else 0 for a in node.all_input_nodes if self.wide(a)]
        if None in parts:
            return None
        total = sum(parts) + (node.target in _CHEAP)  # type: ignore[arg-type]
        return total if total <= _MOST_AGAIN else None

    def has_edges(self, node: object) -> bool:
        """Whether a value has a row for each edge."""
        return isinstance(node, Node) and node in self.shapes and self.shapes[node].rows == "edge"

    def _of_ends(self, node: Node) -> bool:
        """Whether all rows that it gathers are of its edge's ends, or of its bond."""
        if node.target in GATHERS:
            index = gather_index(node)
            return index is not None and (_is_end(index) or _part(index) == "bond")
        if node.target in VIEWS and not self.has_edges(node.args[0]):
            return False  # of a constant, spread over as many rows as there are edges
        return all(self._of_ends(a) for a in node.all_input_nodes if self(a))


def _ends_of_bonds(gm: GraphModule, shapes: dict[Node, RowShape]) -> dict[str, Node]:
    """Receivers and senders of the bonds' first edges, where there are bonds."""
    bonds = next((n for n in gm.graph.nodes if is_call(n, gaq.bonds.default)), None)
    if bonds is None:
        return {}
    found = {}
    for k, name in _PARTS.items():
        if name in (_RECEIVERS, _SENDERS):
            with gm.graph.inserting_after(bonds):
                found[name] = gm.graph.call_function(operator.getitem, (bonds, k))
            shapes[found[name]] = RowShape("bond", (), torch.int64)
    return found


def _part(node: Node) -> str | None:
    known = is_call(node, operator.getitem) and is_call(node.args[0], gaq.bonds.default)
    return _PARTS.get(node.args[1]) if known else None  # type: ignore[arg-type]


def _is_end(node: Node) -> bool:
    return node.op == "placeholder" and node.target in (_RECEIVERS, _SENDERS)


class _Inner:
    """A group's own graph.

    Attributes:
        graph: its operators, those of other groups that it computes again included.
        inputs: what is read from outside, in the order of the graph's placeholders.
        results: the nodes of the whole graph that it returns.
    """

    def __init__(
        self,
        gm: GraphModule,
        group: RowGroup,
        results: list[Node],
        shapes: dict[Node, RowShape],
        again: _Again,
    ) -> None:
        self.gm, self.group, self.results, self.again = gm, group, results, again
        self.graph, self.buffers = Graph(), nn.Module()
        self.inputs: list[Node] = []
        self.outer, self.shapes = shapes, dict[Node, RowShape]()
        self._values: dict[tuple[Node, str | None], Node] = {}
        self._inputs: dict[Node, Node] = {}
        for node in self._live():
            self._computed(node)
        self.graph.output(tuple(self._values[n, None] for n in results))

    @property
    def fused(self) -> FusedRows:
        """The graph as a module."""
        return FusedRows(self.buffers, self.graph, self.group.rows, self.shapes)

    def _live(self) -> list[Node]:
        needed = set(self.results)
        for node in reversed(self.group.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        return [n for n in self.group.nodes if n in needed]

    def _computed(self, node: Node) -> None:
        which = self.again.edge_of_bond(node)
        if which is not None:
            self._values[node, None] = self._value(node.args[0], which)  # type: ignore[arg-type]
        else:
            self._copied(node)

    def _copied(self, node: Node) -> Node:
        table = node.args[0] if node.target in GATHERS else None  # kernels gather from what is there
        copy = self.graph.node_copy(node, lambda a: self._given(a) if a is table else self._value(a, None))
        return self._keep(node, None, copy)

    def _keep(self, node: Node, edge: str | None, made: Node) -> Node:
        self._values[node, edge] = made
        if node in self.outer:
            shape = self.outer[node]
            self.shapes[made] = replace(shape, rows="bond") if edge and shape.rows == "edge" else shape
        return made

    def _value(self, node: Node, edge: str | None) -> Node:
        """A value for this group: with ``edge``, of that edge of every bond."""
        if edge and not self.again.has_edges(node):
            edge = None  # a table
        if (node, edge) in self._values:
            return self._values[node, edge]
        if self.again(node):
            return self._repeated(node, edge)
        return self._gathered(node, edge) if edge else self._keep(node, None, self._given(node))

    def _given(self, node: Node) -> Node:
        """What is there: a constant, or an input."""
        if node not in self._inputs:
            if node.op == "get_attr":
                made = self.graph.get_attr(add_buffer(self.buffers, node.name, attribute(self.gm, node)))
            else:
                made = self.graph.placeholder(node.name)
                self.inputs.append(node)
            if node in self.outer:
                self.shapes[made] = self.outer[node]
            self._inputs[node] = made
        return self._inputs[node]

    def _repeated(self, node: Node, edge: str | None) -> Node:
        if edge is None:
            return self._copied(node)
        if node.target in GATHERS:
            return self._gathered_at_bond(node, edge)
        sized = node.target in VIEWS  # sizes are the edges', and the only ones that are no numbers

        def argument(a: Node) -> Any:
            return -1 if sized and a not in self.outer else self._value(a, edge)

        args = map_arg(node.args, argument)
        return self._keep(node, edge, self.graph.call_function(node.target, args, dict(node.kwargs)))

    def _gathered_at_bond(self, node: Node, edge: str) -> Node:
        index: Any = gather_index(node)
        table: Any = node.args[0]
        if _part(index) == "bond":
            self._values[node, edge] = self._value(table, None)
            return self._values[node, edge]
        end = str(index.target)
        if edge == _SECOND:  # the reverse of the first
            end = _SENDERS if end == _RECEIVERS else _RECEIVERS
        return self._indexed(node, edge, table, self.again.ends[end])

    def _gathered(self, node: Node, edge: str) -> Node:
        """A value that is there, of one edge of every bond."""
        ends = next(iter(self.again.ends.values()))
        parts = {_part(n): n for n in ends.args[0].users}  # type: ignore[union-attr]
        return self._indexed(node, edge, node, parts[edge])

    def _indexed(self, node: Node, edge: str, table: Node, index: Node) -> Node:
        rows = (self._given(table), [self._value(index, None)])
        return self._keep(node, edge, self.graph.call_function(aten.index.Tensor, rows))


def _call_group(
    root: nn.Module, graph: Graph, group: RowGroup, inner: _Inner, values: dict[Node, Node]
) -> None:
    name, count = f"{group.rows}_rows_{group.level}", 0
    while hasattr(root, name):
        count += 1
        name = f"{group.rows}_rows_{group.level}_{count}"
    root.add_module(name, inner.fused)
    call = graph.call_module(name, tuple(values[a] for a in inner.inputs))
    for k, node in enumerate(inner.results):
        values[node] = graph.call_function(operator.getitem, (call, k))
        values[node].meta = dict(node.meta)
