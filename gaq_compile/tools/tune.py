"""Tuning: find the constants with which a potential's kernels run fastest on this machine.

:func:`tune_file` and :func:`tune_potential` collect the distinct kernels of a potential, order them by
their share of the multiplications, spend a budget of trials on them from the top, and store everything
in the database (:mod:`..backends.tvm.database`), where ``quantize`` and ``load`` find it the next time
they lower.

What of TVM's MetaSchedule is used, and what not. The kernels are generated as text, with loops already in
the order that the quantization inside them needs; they are no TIR workload that a schedule transforms, and
so they have no traces. MetaSchedule's post-order rules and cost model (features of loops) have nothing to
hold on to; its evolutionary search over a trace of categorical decisions works but took minutes where this
needs milliseconds. Its ``LocalBuilder`` compiles the candidates and its process pool runs them
(:mod:`.tune_measure`); the space (:mod:`.tune_space`), the search (:mod:`.tune_search`) and the database
are our own. A schedule changes no result: every candidate's outputs are compared with the default's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.fx import GraphModule, Interpreter, Node

from ..api import load
from ..backends.tvm.build import host_target, import_tvm
from ..backends.tvm.database import KernelKey, problem_text
from ..backends.tvm.linear import LinearKernel
from ..backends.tvm.tune_measure import Workers
from ..backends.tvm.tune_search import Outcome, search
from ..backends.tvm.tune_space import FAMILIES
from ..capture.graphs import collate
from ..errors import ConfigError, LoweringError
from ..operators.registration import ops
from ..passes.lower import KernelCall
from ..potential import Potential

GRANT = 16
"""Trials that a kernel gets before the next one in line gets some."""
_SIZES = {"nodes": (512, 64), "edges": (6048, 512)}  # rows in a large and in a small structure
_LABEL = 28  # characters of a module's name that a table shows
_CONVOLUTIONS = {ops.conv.default: "conv", ops.conv_backward.default: "conv_backward"}


@dataclass(frozen=True)
class KernelTask:
    """One kernel to tune.

    Attributes:
        key: the kernel and the rows it is tuned for.
        label: the first module that uses it.
        uses: nodes of the graph that run it.
        share: its share of the multiplications in a structure of that size.
    """

    key: KernelKey
    label: str
    uses: int
    share: float


def tune_file(path: str | Path, *, trials: int = 256, console: Console | None = None) -> list[Outcome]:
    """Tune the kernels of a saved potential for this machine; print progress and a table.

    Args:
        path: a ``.gaq`` file.
        trials: candidates to measure at most, over all kernels; known ones count, and are not repeated.
        console: where to print; by default stdout.

    Returns:
        One :class:`Outcome` per kernel that got trials.

    Raises:
        FileFormatError: for a damaged or foreign file.
        MissingPackageError: if TVM is not installed.
        LoweringError: if there is no linker.
    """
    return tune_potential(load(path), trials=trials, console=console)


def tune_potential(
    potential: Potential,
    *,
    trials: int = 256,
    families: Sequence[str] = tuple(FAMILIES),
    console: Console | None = None,
) -> list[Outcome]:
    """Tune a potential's kernels for this machine; arguments and errors as for :func:`tune_file`.

    Args:
        potential: what ``quantize`` or ``load`` returned.
        trials: candidates to measure at most, over all kernels.
        families: which kinds of kernels: "linear", "conv", "conv_backward".
        console: where to print; by default stdout.

    Raises:
        ConfigError: for an unknown family.
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ConfigError(f"unknown kernels {', '.join(unknown)}", fix=f"use {', '.join(FAMILIES)}")
    tasks = [t for t in kernel_tasks(potential) if t.key.family in families]
    return tune_tasks(tasks, trials, console or Console())


def tune_tasks(tasks: Sequence[KernelTask], trials: int, console: Console) -> list[Outcome]:
    """Tune kernels in order, ``GRANT`` trials each and round again until the budget is spent."""
    if shutil.which("g++") is None:
        raise LoweringError("tuning links with g++, which is not there", fix="install a C++ compiler")
    import_tvm()  # sets the threads that candidates are measured on
    granted = grants(len(tasks), trials)
    outcomes: list[Outcome] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    with _workers() as workers, Progress(*columns, console=console, transient=True) as bar:
        total = bar.add_task("tuning", total=sum(granted), state="")
        for task, share in zip(tasks, granted, strict=False):
            bar.update(total, description=title(task), state="")
            outcomes.append(
                search(task.key, share, workers, lambda n, state: bar.update(total, advance=n, state=state))
            )
    if not outcomes:
        console.print("there are no kernels to tune")
        return outcomes
    console.print(outcome_table(tasks, outcomes))
    console.print(summary(tasks, outcomes))
    return outcomes


def grants(tasks: int, trials: int) -> list[int]:
    """How the budget is divided: ``GRANT`` each from the first on, then again from the first."""
    shares = [0] * tasks
    index = 0
    while trials > 0 and tasks:
        shares[index % tasks] += min(GRANT, trials)
        trials -= GRANT
        index += 1
    return [s for s in shares if s]


def kernel_tasks(potential: Potential, target: str | None = None) -> list[KernelTask]:
    """The distinct kernels of a potential, at two sizes each, by falling share of the multiplications.

    Args:
        potential: lowered with the tvm backend.
        target: a TVM target in JSON; by default this machine's CPU.
    """
    target = target or host_target()
    found: dict[tuple[str, str, str], list[str]] = {}
    for family, problem, kind, label in _kernels(potential):
        found.setdefault((family, problem, kind), []).append(label)
    tasks: list[KernelTask] = []
    for size in range(2):
        work = {
            k: _SIZES[k[2]][size] * FAMILIES[k[0]].work(k[1]) * len(labels) for k, labels in found.items()
        }
        whole = sum(work.values())
        for (family, problem, kind), labels in found.items():
            key = KernelKey(family, problem, _SIZES[kind][size], target)
            share = work[family, problem, kind] / whole if whole else 0.0
            tasks.append(KernelTask(key, labels[0], len(labels), share))
    return sorted(tasks, key=lambda t: (-t.share, -t.key.rows, t.key.family, t.key.problem))


def outcome_table(tasks: Sequence[KernelTask], outcomes: Sequence[Outcome]) -> Table:
    """Default against tuned, one kernel a row."""
    table = Table(title="kernels, default against tuned", title_justify="left")
    table.add_column("kernel @rows, module", overflow="fold")
    for name in ("share", "default\nms", "tuned\nms", "ratio", "tried\n(new)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("changed", overflow="fold")
    for task, o in zip(tasks, outcomes, strict=False):
        default = FAMILIES[task.key.family].default(task.key)
        constants = [f"{k}={_short(v)}" for k, v in o.schedule.items() if default.get(k) != v]
        table.add_row(
            title(task),
            f"{task.share:.1%}",
            f"{o.default_seconds * 1e3:.3f}",
            f"{o.seconds * 1e3:.3f}",
            f"{o.speedup:.2f}x",
            f"{o.tried} ({o.fresh})",
            "\n".join(constants) or "nothing",
        )
    return table


def summary(tasks: Sequence[KernelTask], outcomes: Sequence[Outcome]) -> str:
    """How many candidates were measured now, and how much was won."""
    fresh, failed = sum(o.fresh for o in outcomes), sum(o.failed for o in outcomes)
    known = sum(o.tried for o in outcomes) - fresh
    changed = [(t, o) for t, o in zip(tasks, outcomes, strict=False) if o.changed]
    lines = [f"{fresh} candidates measured, {known} known from the database, {failed} of them failed"]
    if not fresh:
        lines = [f"nothing was measured anew: all {known} candidates are in the database"]
    if changed:
        task, best = max(changed, key=lambda pair: pair[1].speedup)
        lines.append(
            f"{len(changed)} of {len(outcomes)} kernels are faster than their default,"
            f" the best by {best.speedup:.2f}x ({title(task)})"
        )
    elif outcomes:
        lines.append(f"{len(outcomes)} kernels: no candidate beats its default by more than noise")
    return "\n".join(lines)


def title(task: KernelTask) -> str:
    """A kernel in one line: family, operands, rows, and the first module that uses it."""
    problem = json.loads(task.key.problem)
    kind = task.key.family
    if kind == "linear":
        kind += f" {problem['activation']}·{problem['weight']}" + ("ᵀ" if problem["transpose"] else "")
    more = f" (+{task.uses - 1})" if task.uses > 1 else ""
    label = task.label if len(task.label) <= _LABEL else "…" + task.label[-_LABEL + 1 :]
    return f"{kind} @{task.key.rows} {label}{more}"


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def _workers() -> Iterator[Any]:
    """A function that starts the workers when they are first needed."""
    with ExitStack() as stack:
        started: list[Workers] = []

        def get() -> Workers:
            if not started:
                started.append(stack.enter_context(Workers()))
            return started[0]

        yield get


# Collecting -------------------------------------------------------------------------------------


class _Rows(Interpreter):
    """Runs a lowered graph and notes the rows that each linear kernel gets."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: list[tuple[LinearKernel, int, str]] = []

    def run_node(self, n: Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, KernelCall) and isinstance(module.run, LinearKernel):
            (x, *_), _ = self.fetch_args_kwargs_from_env(n)
            self.found.append((module.run, int(x.shape[0]), str(n.meta.get("label", n.name))))
        return super().run_node(n)


def _kernels(potential: Potential) -> Iterator[tuple[str, str, str, str]]:
    """``(family, problem, "nodes" or "edges", label)`` of every kernel that can be tuned."""
    tensors = _probe(potential)
    atoms = 3
    runner = _Rows(potential.graphs["lower"])
    runner.run(*(tensors[name] for name in potential.form.inputs))
    for kernel, rows, label in runner.found:
        if rows != 1:  # the graph's own sums are no work
            kind = "nodes" if rows == atoms else "edges"
            yield "linear", problem_text(asdict(kernel.plan.problem)), kind, label
    for node in potential.graphs["fold_integers"].graph.nodes:
        if node.target in _CONVOLUTIONS:
            problem = problem_text({"spec": str(node.args[-2])})
            yield _CONVOLUTIONS[node.target], problem, "edges", str(node.args[-1])


def _probe(potential: Potential) -> Any:
    """Three atoms with six edges, whose row counts tell atoms from edges."""
    form = potential.form
    if not form.inputs:
        raise ConfigError("only potentials that take structures can be tuned", where=repr(potential))
    number = 6 if not form.elements or 6 in form.elements else form.elements[0]
    side = 0.5 * form.cutoff
    places = [[0.0, 0.0, 0.0], [side, 0.0, 0.0], [0.3 * side, 0.8 * side, 0.2 * side]]
    return collate([Atoms([number] * 3, positions=places)], form)
