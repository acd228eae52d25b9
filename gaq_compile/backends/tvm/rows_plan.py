"""The order in which a fused group of row operators is computed: views resolved, stages formed.

A stage is one loop, or one linear. Values held across rows (few elements per row) need no loop at all:
their stage is a straight line of vector expressions. Values held along rows share a loop if they have
one shape; sums over the last axis run in the loop of what they add up.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.fx import Node

from ...passes.fuse_rows import reduced_axes
from ...passes.graph_tools import VIEWS, aten, attribute, gaq
from ...passes.indices import GATHERS, gather_index
from ...passes.row_groups import FusedRows
from ...passes.row_shapes import NARROW
from ..base import Refused
from .dense_plan import DenseSchedule, default_schedule
from .linear import LinearKernel, lower_linear
from .linear_nodes import LINEARS, lower_linear_node
from .rows_values import TILE, Base, View, places, whole
from .vnni import vector_unit

Shape = tuple[int, ...]


SUM = gaq.sum_sorted.default


class UnsupportedRowsError(Exception):
    """A group has something that no row kernel is generated for."""


@dataclass(frozen=True)
class Step:
    """One value to be computed.

    Attributes:
        node: what computes it; for a copy, the node whose view is copied.
        op: "each" (element by element), "sum" (over the last axis of its operand), "product" (with a
            constant matrix), "linear" (an equivariant one, :mod:`.dense_kernel`), "cat", "copy" or
            "add" (to the row that owns it).
        operands: views, broadcast to ``shape`` for "each".
        shape: of the loop: the result's, or for sums and narrow products the operand's.
        result: the value.
    """

    node: Node
    op: str
    operands: tuple[View, ...]
    shape: Shape
    result: Base

    @property
    def reduces(self) -> bool:
        """Whether the result is known only when a loop over its operand has ended."""
        return self.op == "sum" or (self.op == "product" and self.shape != (self.result.size,))


@dataclass
class Stage:
    """Steps that are computed together; ``across`` rows, or in a loop over ``shape``."""

    across: bool
    shape: Shape
    steps: list[Step] = field(default_factory=list)


@dataclass
class Plan:
    """Everything that the kernel's text is written from.

    Attributes:
        stages: in order.
        arguments: per argument: its base kind's buffer (name, row size or table's width, dtype, kind).
        constants: buffers that are the same at every call, by name.
        outputs: per result: its value's base, and its row shape and dtype.
        linears: their packed weights and the text's plan, by their results.
        owner: of a group of sums, who adds up what.
    """

    stages: list[Stage]
    arguments: list[Argument]
    constants: dict[str, Tensor]
    outputs: list[tuple[Base, Shape, torch.dtype]]
    linears: dict[Base, LinearKernel] = field(default_factory=dict)
    owner: Owner | None = None


@dataclass(frozen=True)
class Owner:
    """The order of a group that sums: row n of every result adds up ``order[starts[n] : starts[n + 1]]``.

    Attributes:
        index: the buffer that says to which row of the results a row of the group belongs.
        order: the group's rows, those of one result after another.
        starts: where each result's rows begin.
        rows: place of the argument that says how many results there are.
    """

    index: str
    order: str
    starts: str
    rows: int


@dataclass(frozen=True)
class Argument:
    """A tensor that the kernel is called with.

    Attributes:
        name: of the buffer.
        kind: "rows" (of the group), "table" (rows that are gathered), "index", "starts" (one number for
            each result, and one more) or "fixed".
        row: the sizes of all axes but the first; of "fixed", all.
        dtype: as torch has it.
    """

    name: str
    kind: str
    row: Shape
    dtype: torch.dtype
    single: bool = False  # a tensor without axes, which the kernel takes as one of one element


def make_plan(fused: FusedRows, target: str) -> Plan:
    """Resolve a group into stages.

    Args:
        fused: the group.
        target: a TVM target in JSON, which decides how weights are packed.

    Raises:
        UnsupportedRowsError: for what no kernel is generated for.
    """
    return _Planner(fused, target).plan()


class _Planner:
    def __init__(self, fused: FusedRows, target: str) -> None:
        self.fused, self.shapes, self.target = fused, fused.shapes, target
        self.linears: dict[Base, LinearKernel] = {}
        self.views: dict[Node, View] = {}
        self.parts: dict[Node, list[View]] = {}
        self.steps: list[Step] = []
        self.arguments: dict[object, Argument] = {}
        self.constants: dict[str, Tensor] = {}

    def plan(self) -> Plan:
        nodes = list(self.fused.graph.nodes)
        self._arguments([n for n in nodes if n.op == "placeholder"])
        for node in nodes:
            if node.op == "get_attr":
                if not all(u.target in LINEARS for u in node.users):  # they pack their weights
                    self._constant(node)
            elif node.op == "call_function":
                self._call(node)
        (results,) = next(n for n in nodes if n.op == "output").args
        outputs = [self._output(node) for node in results]  # type: ignore[union-attr]
        given = list(self.arguments.values())
        return Plan(
            _stages(_alike(self.steps)),
            given,
            self.constants,
            outputs,
            self.linears,
            self._owner(nodes),
        )

    def _owner(self, nodes: list[Node]) -> Owner | None:
        """Who adds up; a group with sums has nothing else."""
        sums = [n for n in nodes if n.target is SUM]
        if not sums:
            return None
        _, index, order, starts, rows, _ = sums[0].args
        name = {a: self.arguments[a].name for a in (index, order, starts)}  # type: ignore[index]
        places = [n.name for n in nodes if n.op == "placeholder"]
        return Owner(name[index], name[order], name[starts], places.index(str(rows)))

    def _arguments(self, placeholders: list[Node]) -> None:
        """What each argument is: rows, a table to gather from, an index, or fixed."""
        for k, node in enumerate(placeholders):
            users, name = list(node.users), f"a{k}"
            shape = self.shapes.get(node)
            if shape is None:  # a size, which only views by sizes take
                continue
            tables = [u for u in users if u.args[0] is node and _gathers(u)]
            indices = [u for u in users if _indexes(u, node)]
            if any(u.target is SUM and u.args[3] is node for u in users):
                self.arguments[node] = Argument(name, "starts", (), shape.dtype)
                indices = users
            elif indices:
                self.arguments[node] = Argument(name, "index", (), shape.dtype)
            elif tables:
                row = shape.row if shape.rows else shape.row[1:]
                self.arguments[node] = Argument(name, "table", row, shape.dtype)
            else:
                kind = "rows" if shape.rows == self.fused.rows else "fixed"
                single = kind == "fixed" and not shape.row
                self.arguments[node] = Argument(
                    name, kind, (1,) if single else shape.row, shape.dtype, single
                )
                self.views[node] = whole(Base(kind, name, math.prod(shape.row)), shape.row)
            if (tables or indices) and len(users) > max(len(tables), len(indices)):
                raise UnsupportedRowsError(f"{node} is gathered, and read otherwise too")
            if not (tables or indices) and shape.rows not in (self.fused.rows, None):
                raise UnsupportedRowsError(f"{node} has rows of another kind")

    def _constant(self, node: Node) -> None:
        value = attribute(self.fused, node)
        gathers = [u for u in node.users if _gathers(u) and u.args[0] is node]
        if gathers:
            name = f"c{len(self.constants)}"
            self.constants[name] = value
            self.arguments[node] = Argument(name, "table", tuple(value.shape[1:]), value.dtype)
            if len(gathers) == len(node.users):
                return
        shape = tuple(value.shape)
        if value.numel() == 1:
            self.views[node] = View(Base("number", "", 1, number=float(value)), shape, (0,) * len(shape))
            return
        name = f"c{len(self.constants)}"
        self.constants[name] = value.float()
        self.arguments[node, "fixed"] = Argument(name, "fixed", shape, torch.float32)
        self.views[node] = whole(Base("fixed", name, value.numel()), shape)

    def _call(self, node: Node) -> None:
        target, row = node.target, self.shapes[node].row
        if _gathers(node):
            table, index = self.arguments[node.args[0]], self.arguments[gather_index(node)]  # type: ignore[index]
            base = Base("gather", table.name, math.prod(table.row), index.name)
            self.views[node] = whole(base, row)
        elif target is aten.split_with_sizes.default:
            self._split(node)
        elif target is operator.getitem:
            self.views[node] = self.parts[node.args[0]][node.args[1]]  # type: ignore[index]
        elif target in VIEWS:
            self.views[node] = self._viewed(node, row)
        elif target is aten.cat.default:
            parts = tuple(self._row_view(a, row) for a in node.args[0])  # type: ignore[union-attr]
            self._add(node, "cat", parts, row, row)
        elif target is aten.sum.dim_IntList:
            self._sum(node)
        elif target is aten.mm.default:
            self._product(node)
        elif target in LINEARS:
            self._linear(node)
        elif target is SUM:
            view = self.views[node.args[0]]  # type: ignore[index]
            self._add(node, "add", (view,), view.shape, row)
        else:
            operands = [a for a in node.args if isinstance(a, Node)]
            self._add(node, "each", tuple(self._row_view(a, row).broadcast(row) for a in operands), row, row)

    def _row_view(self, node: object, row: Shape) -> View:
        """An operand without the axis that is aligned with the rows of a result with these rows."""
        view = self.views[node]  # type: ignore[index]
        shape = self.shapes.get(node)  # type: ignore[call-overload]
        fixed = shape is None or shape.rows is None
        return view.without(0) if fixed and len(view.shape) == len(row) + 1 else view

    def _check(self, node: Node, views: Sequence[View]) -> None:
        if any(view.size == 0 for view in views):
            raise UnsupportedRowsError(f"{node}: of nothing")

    def _add(self, node: Node, op: str, operands: tuple[View, ...], shape: Shape, row: Shape) -> None:
        self._check(node, operands)
        result = Base("value", node.name, math.prod(row))
        self.steps.append(Step(node, op, operands, shape, result))
        self.views[node] = whole(result, row)

    def _split(self, node: Node) -> None:
        source, sizes = self.views[node.args[0]], node.args[1]  # type: ignore[index]
        axis = int((*node.args, 0)[2]) % (len(source.shape) + 1) - 1  # type: ignore[arg-type]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]  # type: ignore[index,arg-type]
        self.parts[node] = [source.sliced(axis, a, a + n) for a, n in zip(starts, sizes, strict=True)]  # type: ignore[arg-type]

    def _viewed(self, node: Node, row: Shape) -> View:
        source, target = self._row_view(node.args[0], row), node.target
        dims = len(row) + 1
        if target is aten.unsqueeze.default:
            return source.with_axis(int(node.args[1]) % dims - 1)  # type: ignore[arg-type]
        if target is aten.squeeze.dim:
            axis = int(node.args[1]) % (dims + 1) - 1  # type: ignore[arg-type]
            return source.without(axis) if len(source.shape) > len(row) else source
        if target is aten.expand.default:
            return source.broadcast(row)
        if target is aten.slice.Tensor:
            axis = int((*node.args, 0)[1]) % dims - 1  # type: ignore[arg-type]
            start, stop = (node.args[k] if len(node.args) > k else None for k in (2, 3))
            low, high, _ = slice(start, stop).indices(source.shape[axis])
            return source.sliced(axis, low, max(low, high))
        found = source.reshaped(row)
        if found is None and target is aten.clone.default:
            found = source if source.shape == row else None
        if found is None:
            copy = self._copied(node, source)
            found = whole(copy, source.shape).reshaped(row)
        if found is None:
            raise UnsupportedRowsError(f"{node}: a view that strides cannot express")
        return found

    def _copied(self, node: Node, view: View) -> Base:
        result = Base("value", f"{node.name}_copy{len(self.steps)}", view.size)
        self.steps.append(Step(node, "copy", (view,), view.shape, result))
        return result

    def _sum(self, node: Node) -> None:
        source = self.views[node.args[0]]  # type: ignore[index]
        self._check(node, [source])
        axes = [axis - 1 for axis in reduced_axes(node, self.shapes)]
        row = self.shapes[node].row
        if source.size < NARROW:
            kept = tuple(1 if k in axes else n for k, n in enumerate(source.shape))
            result = Base("value", node.name, math.prod(row))
            self.steps.append(Step(node, "sum", (source,), kept, result))
        else:
            real = [k for k, n in enumerate(source.shape) if n > 1]
            summed = [k for k in real if k in axes]
            if summed != real[len(real) - len(summed) :] or not summed:
                raise UnsupportedRowsError(f"{node}: a sum over other than the last axes")
            if len(summed) > 1:
                flat = source.reshaped((math.prod(row), math.prod(source.shape[k] for k in summed)))
                if flat is None:
                    raise UnsupportedRowsError(f"{node}: a sum over axes that do not lie together")
                source = flat
            result = Base("value", node.name, math.prod(row))
            self.steps.append(Step(node, "sum", (source,), source.shape, result))
        self.views[node] = whole(result, row)

    def _product(self, node: Node) -> None:
        left, right = (self.views[a] for a in node.args)  # type: ignore[index]
        if right.base.kind != "fixed":
            raise UnsupportedRowsError(f"{node}: a product with a matrix that is not constant")
        row = self.shapes[node].row
        shape = left.shape if left.size >= NARROW else row
        self._add(node, "product", (left, right), shape, row)

    def _linear(self, node: Node) -> None:
        lower = partial(lower_linear, schedule=_tiles(self.target))
        kernel = lower_linear_node(node, lambda n: attribute(self.fused, n), self.target, lower)
        if isinstance(kernel, Refused):
            raise UnsupportedRowsError(f"{node}: {kernel.reason}")
        view = self.views[node.args[0]]  # type: ignore[index]
        if not view.contiguous or view.base.kind not in ("rows", "value"):
            view = whole(self._copied(node, view), view.shape)
        row = self.shapes[node].row
        self._add(node, "linear", (view,), row, row)
        self.linears[self.views[node].base] = kernel

    def _output(self, node: object) -> tuple[Base, Shape, torch.dtype]:
        view, shape = self.views[node], self.shapes[node]  # type: ignore[index]
        taken = any(step.result == view.base for step in self.steps)
        base = view.base if taken and view.whole else self._copied(node, view)  # type: ignore[arg-type]
        return base, shape.row, shape.dtype


def _gathers(node: Node) -> bool:
    return node.target in GATHERS


def _indexes(user: Node, node: Node) -> bool:
    """Whether a user reads whole numbers from a node: which rows to gather, or to add."""
    return gather_index(user) is node if _gathers(user) else user.target is SUM and node in user.args[1:3]


@lru_cache(maxsize=64)
def _tiles(target: str) -> DenseSchedule:
    """A tile is a task. All its rows at once, where registers suffice: weights are decoded only once."""
    unit = vector_unit(target)
    return replace(
        default_schedule(unit), rows=(TILE if unit.registers >= 32 else TILE // 2,), task_rows=TILE
    )


def kept_values(plan: Plan) -> set[Base]:
    """Values that a later stage reads."""
    found: set[Base] = set()
    for stage in plan.stages:
        own = {step.result for step in stage.steps}
        found |= {v.base for step in stage.steps for v in step.operands if v.base not in own}
    return {base for base in found if base.kind == "value"}


def cat_axis(step: Step) -> int:
    """The axis of a row along which parts are joined."""
    axis = int((*step.node.args, 0)[1])  # type: ignore[arg-type]
    return axis % (len(step.shape) + 1) - 1


def cat_places(step: Step, view: View) -> list[tuple[int, ...]]:
    """The places of a narrow part in the order of the joined row.

    Raises:
        UnsupportedRowsError: where parts do not lie one after another.
    """
    if cat_axis(step) != 0 and len(step.shape) > 1:
        raise UnsupportedRowsError(f"{step.node}: narrow parts joined along an inner axis")
    return places(view.shape)


def _alike(steps: list[Step]) -> list[Step]:
    """Steps in loops of the same shape, where they can be: 128 in a row as 4 x 32 beside a sum over each 32.

    They are then computed together, and what one makes and the other reads stays in registers.
    """
    for shape in dict.fromkeys(_loop(s) for s in steps if not _across(s) and len(_loop(s)) > 1):
        flat = [s for s in steps if not _across(s) and _loop(s) == (math.prod(shape),)]
        each = {s: _reshaped(s, shape) for s in flat if s.op not in ("linear", "cat")}
        if None not in each.values():
            steps = [each.get(s) or s for s in steps]
    return steps


def _reshaped(step: Step, shape: Shape) -> Step | None:
    """A step in a loop of another shape, in the same order; None where its operands do not lie so."""
    if step.op not in ("each", "copy", "add"):
        return None
    operands = []
    for view in (v.squeezed() for v in step.operands):
        same = view.shape == () or not any(view.strides)  # one number for all
        found = View(view.base, shape, (0,) * len(shape), view.offset) if same else view.reshaped(shape)
        if found is None or (not same and not view.contiguous):
            return None
        operands.append(found)
    return replace(step, operands=tuple(operands), shape=shape)


def _stages(steps: list[Step]) -> list[Stage]:
    """Steps in loops, each as early as its operands allow."""
    waiting, done, stages = list(steps), set[Base](), list[Stage]()
    computed = {step.result for step in steps}
    while waiting:
        first = next(step for step in waiting if _ready(step, None, done, computed))
        stage = Stage(_across(first), _loop(first))
        current: dict[Base, Step] = {}
        for step in list(waiting):
            alike = _across(step) == stage.across and (stage.across or _loop(step) == stage.shape)
            alone = step.op == "linear" or (step.op == "cat" and not stage.across)
            if alone and (stage.steps or step is not first):
                continue
            if alike and _ready(step, stage, done, computed, current):
                stage.steps.append(step)
                current[step.result] = step
                waiting.remove(step)
                if alone:
                    break
        done |= set(current)
        stages.append(stage)
    return stages


def _across(step: Step) -> bool:
    """Whether the step is a straight line of expressions across rows."""
    if step.op == "linear":
        return False
    if step.op in ("sum", "product") and step.operands[0].size >= NARROW:
        return False
    return step.result.across


def _loop(step: Step) -> Shape:
    return tuple(n for n in step.shape if n != 1)


def _ready(
    step: Step,
    stage: Stage | None,
    done: set[Base],
    computed: set[Base],
    current: Mapping[Base, Step] | None = None,
) -> bool:
    for view in step.operands:
        base = view.base
        if base in done or base not in computed:
            continue
        inside = current.get(base) if current else None
        if stage is None or inside is None or (inside.reduces and not stage.across):
            return False
        if stage.across:
            continue
        if (
            inside.op not in ("each", "copy")
            or not view.squeezed().whole
            or view.squeezed().shape != stage.shape
        ):
            return False
        if step.op == "product" and not step.reduces:
            return False
    return True
