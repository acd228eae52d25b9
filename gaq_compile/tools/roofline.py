"""What each kernel of a potential must do at least, and how long it takes beside that.

Operations are counted from the problem, not from a kernel's text: a multiplication and an addition
are two, any function of one number is one. Bytes are the compulsory traffic: every argument and
constant is read once, every result written once, of a table that is gathered from no more rows than
there are indices. The limit of a kernel is then the larger of operations over the machine's measured
peak and bytes over its measured bandwidth (:mod:`.machine`).
"""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..backends.tvm.build import host_target
from ..backends.tvm.conv_terms import PathTerms, conv_problem
from ..backends.tvm.dense_plan import DensePlan, make_plan
from ..backends.tvm.linear import LinearKernel
from ..backends.tvm.linear_nodes import linear_problem
from ..errors import VerificationError
from ..passes.graph_tools import LINEARS, VIEWS, aten, attribute, copied
from ..passes.indices import GATHERS
from ..passes.lower import HOST_OPERATORS, KernelCall
from ..passes.row_groups import FusedRows, fused_rows
from ..potential import Potential
from .machine import Machine

TORCH = "torch"  # the family of what stays with torch
_MOVES = {*VIEWS, *GATHERS, aten.cat.default, aten.split_with_sizes.default, operator.getitem}
_OF_EDGES = {"conv": 1, "conv_backward": 2, "tensor_product": 1, "tensor_product_backward": 2}
"""The argument that has a row per edge."""


@dataclass(frozen=True)
class Work:
    """Operations by arithmetic ("f32", "s16", "s8"), and bytes that are read and written."""

    operations: dict[str, float] = field(default_factory=dict)
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class KernelTime:
    """One kernel's part of a step.

    Attributes:
        node: its name in the lowered graph.
        label: the module that it came from.
        family: what kind of kernel it is, e.g. ``"conv_backward"``; ``"torch"`` for torch's operators.
        arithmetic: what it computes in.
        ms: median time of its call.
        computing_ms: its operations over the machine's peak.
        moving_ms: its bytes over the machine's bandwidth.
        work: what it does at least.
    """

    node: str
    label: str
    family: str
    arithmetic: str
    ms: float
    computing_ms: float
    moving_ms: float
    work: Work

    @property
    def limit_ms(self) -> float:
        """The least time that the machine could need."""
        return max(self.computing_ms, self.moving_ms)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "limit_ms": self.limit_ms}


@dataclass(frozen=True)
class StepTimes:
    """A potential's step and its parts.

    Attributes:
        ms: median time of a step that nobody watches.
        watched_ms: with a clock around every call, alternating with the other.
        kernels: in the order of the graph.
    """

    ms: float
    watched_ms: float
    kernels: tuple[KernelTime, ...]


def step_times(
    potential: Potential, tensors: Mapping[str, Tensor], machine: Machine, runs: int = 20, warmup: int = 5
) -> StepTimes:
    """Time a potential's kernels one by one, beside their limits.

    All steps are of one structure: what depends on its atoms and neighbours alone is no part of them.

    Args:
        potential: compiled for the "tvm" backend.
        tensors: its inputs.
        machine: what to compare with.
        runs: timed steps, watched and not.
        warmup: untimed steps before.

    Raises:
        VerificationError: if the lowered graph is not what became of the grouped one.
    """
    calls: dict[Node, _TimedCall] = {}
    graph = _watched(potential, calls)
    _with_lowered(potential, graph).evaluate(tensors)  # each call is made on its own, and counted
    for call in calls.values():
        call.join_others()
    watched = _with_lowered(potential, graph)
    for _ in range(max(1, warmup)):
        potential.evaluate(tensors)
        watched.evaluate(tensors)
    for call in calls.values():
        call.times.clear()
    steps: tuple[list[int], list[int]] = ([], [])
    for _ in range(runs):
        for side, times in zip((potential, watched), steps, strict=True):
            start = time.perf_counter_ns()
            side.evaluate(tensors)
            times.append(time.perf_counter_ns() - start)
    ran = ((node, call) for node, call in calls.items() if call.times)  # others were remembered
    kernels = tuple(_kernel_time(node, call, machine) for node, call in ran)
    return StepTimes(_median_ms(steps[0]), _median_ms(steps[1]), kernels)


def _with_lowered(potential: Potential, graph: GraphModule) -> Potential:
    """A potential that runs another lowered graph."""
    graphs = {**potential.graphs, "lower": graph}
    return Potential(graphs, potential.form, potential.config, potential.report)


def _kernel_time(node: Node, call: _TimedCall, machine: Machine) -> KernelTime:
    computing, moving = machine.seconds(call.work.operations, call.work.read, call.work.written)
    return KernelTime(
        node.name,
        str(node.meta.get("label", node.name)),
        call.family,
        str(node.meta.get("runs_on", TORCH)),
        _median_ms(call.times),
        1e3 * computing,
        1e3 * moving,
        call.work,
    )


def _median_ms(nanoseconds: Sequence[int]) -> float:
    return 1e-6 * statistics.median(nanoseconds)


# --- calls --------------------------------------------------------------------------------------

Count = Callable[[Sequence[Any], Sequence[Tensor]], Work]


class _TimedCall:
    """A call that keeps its times; the first one is counted.

    Attributes:
        times: of its calls, in nanoseconds.
    """

    def __init__(self, run: Callable[..., Any], family: str, count: Count) -> None:
        self.run, self.family, self.count = run, family, count
        self.times: list[int] = []
        self._work: Work | None = None
        self.__name__ = family  # for torch.fx, which prints what it calls

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter_ns()
        result = self.run(*arguments, **named)
        self.times.append(time.perf_counter_ns() - start)
        if self._work is None:
            self._work = self.count((*arguments, *named.values()), _tensors(result))
        return result

    def join_others(self) -> None:
        """Be called from now on as a potential calls its kernels: with results that lie where they are
        planned, not in fresh memory, whose pages would be made while the clock runs."""
        if hasattr(self.run, "launch"):
            self.launch = self.run.launch

    @property
    def work(self) -> Work:
        """What it does, once it has been called."""
        return self._work or Work()


def _watched(potential: Potential, calls: dict[Node, _TimedCall]) -> GraphModule:
    """The lowered graph with a clock around every kernel and operator."""
    grouped, gm = potential.graphs["group_rows"], copied(potential.graphs["lower"])
    sources = _sources(grouped, gm)
    for node in gm.graph.nodes:
        module = getattr(gm, str(node.target), None) if node.op == "call_module" else None
        if isinstance(module, KernelCall):
            source = sources[node]
            calls[node] = _TimedCall(
                module.run, _family(node, module.run), counter(grouped, source, module.run)
            )
            setattr(gm, str(node.target), KernelCall(calls[node], module.description))
        elif node.op == "call_function" and hasattr(node.target, "_schema") and not _asks_a_size(node):
            calls[node] = _TimedCall(node.target, TORCH, _traffic)
            node.target = calls[node]
    return gm


def _asks_a_size(node: Node) -> bool:
    return "sym_size" in str(node.target)


def _sources(grouped: GraphModule, lowered: GraphModule) -> dict[Node, Node]:
    """What each kernel's node was before it was lowered: one became one, in order."""
    before = [n for n in grouped.graph.nodes if _became_a_kernel(grouped, n)]
    after = [n for n in lowered.graph.nodes if "runs_on" in n.meta]
    if [_operator(grouped, n) for n in before] != [n.meta["op"] for n in after]:
        raise VerificationError("the lowered graph is not what became of the grouped one")
    return dict(zip(after, before, strict=True))


def _became_a_kernel(grouped: GraphModule, node: Node) -> bool:
    operators = getattr(node.target, "namespace", "") == "gaq" and node.target not in HOST_OPERATORS
    return operators or fused_rows(grouped, node) is not None


def _operator(grouped: GraphModule, node: Node) -> str:
    return "rows" if fused_rows(grouped, node) is not None else str(node.target).removesuffix(".default")


def _family(node: Node, run: object) -> str:
    name = str(node.meta["op"]).removeprefix("gaq.").removeprefix("int_")
    if isinstance(run, LinearKernel):
        return "linear_backward" if run.plan.problem.transpose else "linear"
    return name


def _tensors(values: Any) -> list[Tensor]:
    """All tensors among values, each once."""
    return list({id(t): t for t in _walked(values)}.values())


def _walked(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _walked(value)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- counting -----------------------------------------------------------------------------------


def counter(grouped: GraphModule, node: Node, run: object) -> Count:
    """How to count the work of a call of a kernel.

    Args:
        grouped: the graph before it was lowered.
        node: the kernel's node in it.
        run: the kernel.
    """
    fused = fused_rows(grouped, node)
    if fused is not None:
        return _rows_counter(fused)
    constants = _bytes(attribute(grouped, a) for a in node.all_input_nodes if a.op == "get_attr")
    if isinstance(run, LinearKernel):
        return _linear_counter(run, constants)
    name = _operator(grouped, node).removeprefix("gaq.")
    if name in _OF_EDGES:
        return _edges_counter(name, str(node.args[-2]))
    return lambda arguments, results: _elementwise(arguments, results, constants)


def _traffic(arguments: Sequence[Any], results: Sequence[Tensor]) -> Work:
    """A torch operator's bytes; views write nothing."""
    given = _tensors(arguments)
    here = {t.untyped_storage().data_ptr() for t in given}
    made = [t for t in results if t.untyped_storage().data_ptr() not in here]
    return Work({}, _bytes(given) if made else 0, _bytes(made))


def _elementwise(arguments: Sequence[Any], results: Sequence[Tensor], constants: int) -> Work:
    """Gates, harmonics, quantization, sums by index: one operation for each element of the larger side."""
    given = _tensors(arguments)
    count = max(sum(t.numel() for t in given if t.is_floating_point()), sum(t.numel() for t in results))
    return Work({"f32": float(count)}, constants + _bytes(given), _bytes(results))


def _linear_counter(run: LinearKernel, constants: int) -> Count:
    each = linear_operations(run.plan)

    def count(arguments: Sequence[Any], results: Sequence[Tensor]) -> Work:
        rows = arguments[0].shape[0]
        operations = {kind: float(rows * one) for kind, one in each.items()}
        return Work(operations, constants + _bytes(_tensors(arguments)), _bytes(results))

    return count


def linear_operations(plan: DensePlan) -> dict[str, int]:
    """Per row of a linear, by the arithmetic of its products."""
    found: dict[str, int] = {}
    for p in plan.products:
        kind = plan.operands[p.operand].kind
        found[kind] = found.get(kind, 0) + 2 * p.depth * p.block.mul * p.block.components
    return found


def _edges_counter(name: str, spec: str) -> Count:
    each = product_gradient_operations(spec) if "backward" in name else product_operations(spec)

    def count(arguments: Sequence[Any], results: Sequence[Tensor]) -> Work:
        edges = arguments[_OF_EDGES[name]].shape[0]
        given = [a for a in arguments if isinstance(a, Tensor)]
        orders = [a for a in arguments if isinstance(a, list | tuple)]  # of both directions: one is read
        read = _bytes(_tensors(given)) + _bytes(_tensors(orders)) // 2
        return Work({"f32": float(edges * each)}, read, _bytes(results))

    return count


def product_operations(spec: str) -> int:
    """Per edge of a tensor product, in the cheapest order: constants and harmonics are joined once,
    and a path's weight multiplies whichever of its sides is smaller."""
    return _harmonics_operations(spec) + sum(
        terms.path.block_x.mul * (2 * len(terms.pairs) + _scalings(terms))
        for terms in conv_problem(spec).terms
    )


def product_gradient_operations(spec: str) -> int:
    """Per edge, with respect to all three: ``H = A g`` gives those of x and of the weight; for that of
    the harmonics the products of x and g are summed over channels first, then meet the constants."""
    total = _harmonics_operations(spec)
    for terms in conv_problem(spec).terms:
        pairs, inputs = len(terms.pairs), len({p.m1 for p in terms.pairs})
        gathered = (2 * pairs - inputs) + 2 * inputs + (2 * inputs - 1)
        total += terms.path.block_x.mul * (gathered + inputs + 2 * pairs) + 2 * len(terms.triples)
    return total


def _scalings(terms: PathTerms) -> int:
    """Multiplications by the weight, per channel."""
    path = terms.path
    return 1 if len(terms.symbols) == 1 else min(path.block_x.components, path.block_out.components)


def _harmonics_operations(spec: str) -> int:
    """``A = C sh``, per edge."""
    return sum(2 * len(form) - 1 for form in conv_problem(spec).symbols)


def _rows_counter(fused: FusedRows) -> Count:
    each = rows_operations(fused)
    inputs = [n for n in fused.graph.nodes if n.op == "placeholder"]
    buffers = {n: attribute(fused, n) for n in fused.graph.nodes if n.op == "get_attr"}

    def count(arguments: Sequence[Any], results: Sequence[Tensor]) -> Work:
        given = {n: a for n, a in zip(inputs, arguments, strict=True) if isinstance(a, Tensor)}
        rows = next(len(t) for n, t in given.items() if fused.shapes[n].rows == fused.rows)
        read = sum(_read(n, t, rows) for n, t in {**given, **buffers}.items())
        operations = {kind: float(rows * one) for kind, one in each.items()}
        return Work(operations, read, _bytes(results))

    return count


def _read(node: Node, tensor: Tensor, rows: int) -> int:
    """Bytes of an argument that are needed: of a gathered table a row for each of the group's."""
    whole = _bytes([tensor])
    gathered = node.users and all(user.target in GATHERS and user.args[0] is node for user in node.users)
    if not gathered or not len(tensor):
        return whole
    return min(whole, len(node.users) * rows * (whole // len(tensor)))


def rows_operations(fused: FusedRows) -> dict[str, int]:
    """Per row of a group: one for each element that an operator computes; views and gathers none.

    Linears count as on their own, by the arithmetic of their products.
    """
    total, linears = 0, Counter[str]()
    for node in fused.graph.nodes:
        shape = fused.shapes.get(node)
        if node.op != "call_function" or node.target in _MOVES or shape is None or shape.rows is None:
            continue
        if node.target in LINEARS:
            linears.update(linear_operations(make_plan(linear_problem(node), host_target())))
            continue
        size = math.prod(shape.row)  # a sum over edges, too, adds so many for each of them
        if node.target is aten.mm.default:
            size *= 2 * math.prod(fused.shapes[node.args[0]].row)  # type: ignore[index]
        elif node.target is aten.sum.dim_IntList:
            size = math.prod(fused.shapes[node.args[0]].row)  # type: ignore[index]
        total += size
    return dict(Counter({"f32": total}) + linears)
