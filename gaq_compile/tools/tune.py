"""Tuning: find the constants with which a potential's kernels run fastest, here or on other machines.

:func:`tune_file` and :func:`tune_potential` collect the distinct kernels of a potential, order them by
their share of the multiplications, spend a budget of trials on them from the top, and store everything
in the database (:mod:`..backends.tvm.database`), where ``quantize`` and ``load`` find it the next time
they lower. With a :class:`~..backends.tvm.tune_remote.Tracker` the candidates run on the machines that
TVM's tracker lends, as many kernels at once as there are machines, and what is found is stored for theirs.

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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from torch.fx import GraphModule, Interpreter, Node

from ..api import load
from ..backends.tvm.build import host_target, import_tvm
from ..backends.tvm.database import KernelKey, bucket, database_path, problem_text, threads
from ..backends.tvm.launch import Launch
from ..backends.tvm.linear import LinearKernel
from ..backends.tvm.tune_measure import Workers
from ..backends.tvm.tune_remote import Machines, RemoteWorkers, Tracker
from ..backends.tvm.tune_search import Outcome, Progress, search
from ..backends.tvm.tune_space import FAMILIES
from ..capture.graphs import collate
from ..errors import ConfigError, LoweringError, RemoteError
from ..passes.lower import KernelCall
from ..potential import Potential

GRANT = 16
"""Trials that a kernel gets before the next one in line gets some."""
_SIZES = {"nodes": (512, 64), "edges": (6048, 512), "bonds": (3024, 256)}
"""Rows in a large and in a small structure."""
_LABEL = 28  # characters of a module's name that a table shows
_PROBED = {4: "nodes", 6: "bonds", 12: "edges"}  # what so many rows of the probe are


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


def tune_file(
    path: str | Path,
    *,
    trials: int = 256,
    console: Console | None = None,
    tracker: Tracker | None = None,
) -> list[Outcome]:
    """Tune the kernels of a saved potential; print progress and a table.

    Args:
        path: a ``.gaq`` file.
        trials: candidates to measure at most, over all kernels; known ones count, and are not repeated.
        console: where to print; by default stdout.
        tracker: whose machines to tune for; by default this one.

    Returns:
        One :class:`Outcome` per kernel that got trials.

    Raises:
        FileFormatError: for a damaged or foreign file.
        MissingPackageError: if TVM is not installed.
        LoweringError: if there is no linker.
        RemoteError: if there is no tracker, or no machine of its any more; what was measured is stored.
    """
    return tune_potential(load(path), trials=trials, console=console, tracker=tracker)


def tune_potential(
    potential: Potential,
    *,
    trials: int = 256,
    families: Sequence[str] = tuple(FAMILIES),
    console: Console | None = None,
    tracker: Tracker | None = None,
) -> list[Outcome]:
    """Tune a potential's kernels; arguments and errors as for :func:`tune_file`.

    Args:
        potential: what ``quantize`` or ``load`` returned.
        trials: candidates to measure at most, over all kernels.
        families: which kinds of kernels (``tune_space.FAMILIES``).
        console: where to print; by default stdout.
        tracker: whose machines to tune for; by default this one.

    Raises:
        ConfigError: for an unknown family.
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ConfigError(f"unknown kernels {', '.join(unknown)}", fix=f"use {', '.join(FAMILIES)}")
    console = console or Console()
    with measured_on(tracker) as (machines, workers):
        tasks = [t for t in kernel_tasks(potential, machines.target) if t.key.family in families]
        outcomes = tune_tasks(tasks, trials, console, machines, workers)
        console.print(f"database: {database_path(machines.target)}", soft_wrap=True)
    return outcomes


def tune_tasks(
    tasks: Sequence[KernelTask], trials: int, console: Console, machines: Machines, workers: list[GetWorkers]
) -> list[Outcome]:
    """Tune kernels in order, ``GRANT`` trials each and round again until the budget is spent.

    Args:
        tasks: for the machines' target.
        trials: candidates to measure at most, over all kernels.
        console: where to print.
        machines: what the workers measure on.
        workers: one for each machine; each tunes one kernel at a time.
    """
    if shutil.which("g++") is None:
        raise LoweringError("tuning links with g++, which is not there", fix="install a C++ compiler")
    granted = grants(len(tasks), trials)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    with ProgressBar(*columns, console=console, transient=True) as bar:
        total = bar.add_task("tuning", total=sum(granted), state="")

        def tune_one(k: int, where: GetWorkers) -> Outcome:
            bar.update(total, description=title(tasks[k]), state="")
            told: Progress = lambda n, state: bar.update(total, advance=n, state=state)  # noqa: E731
            return search(tasks[k].key, granted[k], machines.threads, where, told)

        found, lost = _shared_out(len(granted), workers, tune_one)
    done, outcomes = [tasks[k] for k in sorted(found)], [found[k] for k in sorted(found)]
    if outcomes:
        console.print(outcome_table(done, outcomes))
        console.print(summary(done, outcomes))
    elif not lost:
        console.print("there are no kernels to tune")
    if lost and len(found) < len(granted):
        raise lost[0]
    return outcomes


def _shared_out(
    number: int, workers: Sequence[GetWorkers], run: Callable[[int, GetWorkers], Outcome]
) -> tuple[dict[int, Outcome], list[RemoteError]]:
    """Run ``number`` tasks on all workers; a worker that loses its machine leaves its task to the others.

    Returns:
        What was done, by number of the task, and what was lost.
    """
    waiting, found, lost = deque(range(number)), dict[int, Outcome](), list[RemoteError]()

    def works(where: GetWorkers) -> bool:
        """Run tasks until there are none (True) or the machine is lost (False)."""
        while True:
            try:
                k = waiting.popleft()
            except IndexError:
                return True
            try:
                found[k] = run(k, where)
            except RemoteError as error:
                waiting.appendleft(k)
                lost.append(error)
                return False

    if len(workers) == 1:  # here, where Ctrl-C arrives
        works(workers[0])
        return found, lost
    alive = list(workers)
    with ThreadPoolExecutor(len(workers)) as threads:
        while waiting and alive:  # once more where the last task was lost after the others had ended
            alive = [w for w, still in zip(alive, threads.map(works, alive), strict=True) if still]
    return found, lost


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
            key = KernelKey(family, problem, bucket(_SIZES[kind][size]), target)
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
            *_times(o),
            f"{o.tried} ({o.fresh})",
            "\n".join(constants) or "nothing",
        )
    return table


def _times(outcome: Outcome) -> tuple[str, str, str]:
    """Default and choice in ms, and their ratio; dashes for a kernel of which nothing was measured."""
    if not outcome.seconds:
        return "–", "–", "–"
    ms = (1e3 * seconds for seconds in (outcome.default_seconds, outcome.seconds))
    default, chosen = (f"{t:.3f}" for t in ms)
    return default, chosen, f"{outcome.speedup:.2f}x"


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


GetWorkers = Callable[[], Workers]
"""Starts the workers of a machine when they are first needed."""


@contextmanager
def measured_on(tracker: Tracker | None) -> Iterator[tuple[Machines, list[GetWorkers]]]:
    """What is measured on, and workers for each machine."""
    import_tvm()  # sets the threads of this machine's pool
    with ExitStack() as stack:
        if tracker is None:
            yield Machines(1, host_target(), threads()), [_once(stack, Workers)]
            return
        first = RemoteWorkers(tracker)
        stack.enter_context(first)
        machines = first.survey()
        others = [_once(stack, partial(RemoteWorkers, tracker)) for _ in range(machines.number - 1)]
        yield machines, [lambda: first, *others]


def _once(stack: ExitStack, make: GetWorkers) -> GetWorkers:
    made: list[Workers] = []

    def get() -> Workers:
        if not made:
            made.append(stack.enter_context(make()))
        return made[0]

    return get


# Collecting -------------------------------------------------------------------------------------


class _Rows(Interpreter):
    """Runs a lowered graph and notes the rows that each kernel gets which is tuned by rows."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: list[tuple[str, str, int, str]] = []

    def run_node(self, n: Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if known := _known(module.run) if isinstance(module, KernelCall) else None:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            family, problem, counted = known
            self.found.append((family, problem, len(arguments[counted]), str(n.meta.get("label", n.name))))
        return super().run_node(n)


def _known(kernel: object) -> tuple[str, str, int] | None:
    """Family and problem by which the database knows a kernel, and the place of what has its rows."""
    if isinstance(kernel, LinearKernel):
        return "linear", problem_text(asdict(kernel.plan.problem)), 0
    return (*kernel.tuning, kernel.counted) if isinstance(kernel, Launch) and kernel.tuning else None


def _kernels(potential: Potential) -> Iterator[tuple[str, str, str, str]]:
    """``(family, problem, "nodes", "edges" or "bonds", label)`` of every kernel that can be tuned."""
    tensors = _probe(potential)
    runner = _Rows(potential.graphs["lower"])
    runner.run(*(tensors[name] for name in potential.form.inputs))
    for family, problem, rows, label in runner.found:
        if rows != 1:  # the graph's own sums are no work
            yield family, problem, _PROBED.get(rows, "edges"), label


def _probe(potential: Potential) -> Any:
    """Four atoms with twelve edges, that is six bonds: row counts tell them apart (:data:`_PROBED`)."""
    form = potential.form
    if not form.inputs:
        raise ConfigError("only potentials that take structures can be tuned", where=repr(potential))
    number = 6 if not form.elements or 6 in form.elements else form.elements[0]
    side = 0.5 * form.cutoff
    places = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.3, 0.8, 0.2], [0.4, 0.3, 0.9]]
    return collate([Atoms([number] * 4, positions=side * np.array(places))], form)
