"""What tuning wins over the default schedules, kernel by kernel, beside what the machine could do.

    python benchmarks/tuning.py --json benchmarks/results/tuning.json --page docs/architecture.md --ship

For the kernels of both models at every scheme, at a large and at a small number of rows: the tuner
(``gaq_compile/tools/tune.py``) searches, then every schedule that it chose is compared with the default
once more, by turns and in another process, and that figure counts: the search has picked the best of
several noisy ones. A schedule that this comparison does not confirm counts as the default.

``--ship`` writes the confirmed choices into the package, for the family of this machine's processor; run it
with ``TVM_NUM_THREADS=1`` for choices that hold on machines with more (what depends on threads is not asked
then). The search's database is the user's (``$GAQ_CACHE_DIR``): what it holds is not measured again, so give
it a fresh one where everything shall be. Figures add up: those of kernels that were not measured now stay in
the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import gaq_compile
from accuracy import write
from gaq_compile import load, quantize
from gaq_compile.backends.tvm.build import host_target, tvm_version
from gaq_compile.backends.tvm.database import KernelKey
from gaq_compile.backends.tvm.dense_plan import LinearProblem, make_plan
from gaq_compile.backends.tvm.target_family import target_families
from gaq_compile.backends.tvm.tune_measure import Built, Timing
from gaq_compile.backends.tvm.tune_search import FINAL_ROUNDS, MARGIN, WINS, Outcome
from gaq_compile.backends.tvm.tune_space import FAMILIES, ROW_KERNELS, candidate, graph_size
from gaq_compile.datasets import example_structures
from gaq_compile.ir.layout import dim
from gaq_compile.ir.specs import tensor_product_spec
from gaq_compile.potential import Potential
from gaq_compile.tools.machine import Machine, measure_machine, processor
from gaq_compile.tools.roofline import linear_operations, product_gradient_operations, product_operations
from gaq_compile.tools.tune import GRANT, GetWorkers, KernelTask, kernel_tasks, measured_on, tune_tasks

NEAR = 0.9
"""A default whose limit is at least this share of its time has nothing that tuning could find."""
_SLACK = 1.25  # beyond: a cache faster than its size says explains a little, a busy machine the rest
_THEN = " ; "  # between the commands of a result that several made
_BYTES = {"f32": 4.0, "s16": 2.0, "s8": 1.0, "s4": 0.5}

Rows = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sevennet-0", "so3lr"])
    parser.add_argument("--schemes", nargs="+", default=["fp32", "w8", "w8a8"])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--trials", type=int, default=GRANT, help="candidates of each kernel (default: 16)")
    parser.add_argument("--keep", type=Path, help="folder where potentials are kept, and looked for")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--page", type=Path, help="fill the table of this page")
    parser.add_argument("--ship", action="store_true", help="write confirmed choices into the package")
    options = parser.parse_args()
    if options.trials < GRANT:
        parser.error(f"--trials: fewer than {GRANT} would leave kernels out")
    console = Console()
    made = [potential(m, s, options.keep) for m in options.models for s in options.schemes]
    tasks = distinct(made, options.families)
    console.print(f"{len(tasks)} kernels")
    with measured_on(None) as (machines, (workers,)):
        found = tune_tasks(tasks, options.trials * len(tasks), console, machines, [workers])
        before = measure_machine()
        kernels = [facts(t, o, machines.threads, workers) for t, o in zip(tasks, found, strict=True)]
        machine = best_of([before, measure_machine()])
    for task, kernel in zip(tasks, kernels, strict=True):
        limit = 1e3 * max(machine.seconds(*work(task.key)))
        kernel |= {"limit_ms": limit, "limit_share": limit / kernel["default_ms"]}
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "processor": processor(),
        "target": json.loads(host_target()),
        "versions": {"gaq_compile": gaq_compile.__version__, "tvm": tvm_version()},
        "threads": machines.threads,
        "machine": machine.to_dict(),
        "families": summaries(kernels),
        "kernels": kernels,
    }
    if options.json:
        result = joined(result, options.json)
        write(result, options.json)
    console.print(table(result))
    if options.page:
        options.page.write_text(filled(options.page.read_text(), result))
    if options.ship:
        path = shipped_path(host_target())
        number = ship(kernels, machines.threads, host_target(), path)
        console.print(f"{number} choices in {path}")
    return 0


def potential(model: str, scheme: str, folder: Path | None) -> Potential:
    """A model at a scheme, from the folder if it is there."""
    path = folder / f"{model}-{scheme}.gaq" if folder else None
    if path and path.exists():
        return load(path)
    made = quantize(model, example_structures("azobenzene")[0], scheme, measure=False)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
    return made


def distinct(potentials: Iterable[Potential], families: Sequence[str]) -> list[KernelTask]:
    """The kernels of all potentials, each once."""
    found = {t.key: t for p in potentials for t in kernel_tasks(p) if t.key.family in families}
    return list(found.values())


def best_of(machines: Sequence[Machine]) -> Machine:
    """The highest peaks that any measurement saw: others' work on the machine can only lower them."""
    first = machines[0]
    return Machine(
        first.threads,
        {kind: max(m.operations[kind] for m in machines) for kind in first.operations},
        {size: max(m.read[size] for m in machines) for size in first.read},
        {size: max(m.write[size] for m in machines) for size in first.write},
    )


def facts(task: KernelTask, outcome: Outcome, threads: int, workers: GetWorkers) -> dict[str, Any]:
    """One kernel: its default and its confirmed choice; milliseconds."""
    key = task.key
    again = compare(key, outcome.schedule, threads, workers) if outcome.changed else None
    kept = again is not None and not again.error and again.ratio <= MARGIN and again.wins >= WINS
    default = again.default_seconds if again is not None and not again.error else outcome.default_seconds
    if not default:  # a kernel with one schedule only: nothing had to be compared
        default = compare(key, outcome.schedule, threads, workers).default_seconds
    tuned = again.seconds if again is not None and kept else default
    return {
        "family": key.family,
        "problem": json.loads(key.problem),
        "rows": key.rows,
        "label": task.label,
        "tried": outcome.tried,
        "failed": outcome.failed,
        "proposed": outcome.changed,
        "search_ratio": outcome.speedup,
        "confirmed": kept,
        "schedule": outcome.schedule if kept else FAMILIES[key.family].default(key),
        "default_ms": 1e3 * default,
        "tuned_ms": 1e3 * tuned,
        "ratio": default / tuned,
    }


def compare(key: KernelKey, schedule: dict[str, Any], threads: int, workers: GetWorkers) -> Timing:
    """A schedule against the default once more."""
    both = [candidate(key, fields, threads) for fields in (FAMILIES[key.family].default(key), schedule)]
    libraries = [str(path) for path in workers().build(both, key.target)]
    default, other = (Built(c.schedule, path) for c, path in zip(both, libraries, strict=True))
    return workers().measure(key, default, other, FINAL_ROUNDS)


def work(key: KernelKey) -> tuple[dict[str, float], float, float]:
    """Operations by arithmetic, and bytes that must be read and written (as ``tools/roofline.py`` counts)."""
    problem = json.loads(key.problem)
    if key.family == "linear":
        plan = make_plan(LinearProblem(**problem), key.target)
        each = linear_operations(plan)
        weights = _BYTES[problem["weight"]] * plan.problem.linear.weight_numel
        operations = {kind: float(key.rows * one) for kind, one in each.items()}
        given, made = (2.0 if half else 4.0 for half in (plan.problem.half_in, plan.problem.half_out))
        return operations, weights + given * key.rows * plan.dim_in, made * key.rows * plan.dim_out
    if key.family in ROW_KERNELS:
        *given, made = ROW_KERNELS[key.family].widths(problem)
        operations = {"f32": float(key.rows * max(sum(given), made))}
        return operations, 4.0 * key.rows * sum(given), 4.0 * key.rows * made
    spec, nodes = tensor_product_spec(str(problem["spec"])), graph_size(key.rows)
    x, out = 4.0 * nodes * dim(spec.irreps_x), 4.0 * nodes * dim(spec.irreps_out)
    weights = (2.0 if spec.half else 4.0) * key.rows / 2 * spec.weight_numel  # one row for each bond
    edges = 4.0 * key.rows * dim(spec.irreps_sh) + weights
    if key.family == "conv":
        return {"f32": float(key.rows * product_operations(problem["spec"]))}, x + edges, out
    operations = {"f32": float(key.rows * product_gradient_operations(problem["spec"]))}
    return operations, x + out + edges, x + edges


def joined(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """A result with the kernels of an earlier one on this processor and as many threads that it lacks."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if any(earlier.get(name) != result[name] for name in ("processor", "target", "threads")):
        return result
    measured = [_identity(k) for k in result["kernels"]]
    kernels = [k for k in earlier["kernels"] if _identity(k) not in measured] + result["kernels"]
    commands = dict.fromkeys([*earlier["command"].split(_THEN), result["command"]])
    return result | {"command": _THEN.join(commands), "families": summaries(kernels), "kernels": kernels}


def summaries(kernels: Rows) -> Rows:
    """Per family and number of rows, and per family."""
    found = []
    for family in dict.fromkeys(k["family"] for k in kernels):
        own = [k for k in kernels if k["family"] == family]
        for rows in (*sorted({k["rows"] for k in own}), None):
            some = [k for k in own if rows in (None, k["rows"])]
            ratios = [k["ratio"] for k in some]
            found.append(
                {
                    "family": family,
                    "rows": rows,
                    "kernels": len(some),
                    "changed": sum(k["confirmed"] for k in some),
                    "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
                    "best": max(ratios),
                    "near_limit": sum(k["limit_share"] >= NEAR for k in some),
                    "limit_share": math.exp(sum(math.log(k["limit_share"]) for k in some) / len(some)),
                }
            )
    return found


def table(result: Mapping[str, Any]) -> str:
    """The summaries as Markdown; without limits where kernels beat them, for then they are none."""
    quiet = max(k["limit_share"] for k in result["kernels"]) <= _SLACK
    lines = [
        "| family | rows | kernels | changed | default / tuned, mean | best | limit / default, mean |"
        " default at its limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in result["families"]:
        lines.append(
            f"| {s['family']} | {s['rows'] or 'all'} | {s['kernels']} | {s['changed']} |"
            f" {s['geometric_mean']:.2f} | {s['best']:.2f} |"
            + (
                f" {100 * s['limit_share']:.0f} % | {s['near_limit']} of {s['kernels']} |"
                if quiet
                else " | |"
            )
        )
    where = f"{result['processor']}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    busy = (
        ""
        if quiet
        else (
            "\n\nThe machine was too busy with other work for its peaks to be measured: some kernels were"
            " faster than these would allow, so no limits are given."
        )
    )
    return "\n".join([*lines, "", f"{where}: `{result['command']}`{busy}"])


def filled(page: str, result: Mapping[str, Any]) -> str:
    """A page with the table between its marks made anew."""
    made = f"<!-- tuning -->\n{table(result)}\n<!-- end -->"
    return re.sub(r"<!-- tuning -->\n.*?<!-- end -->", lambda _: made, page, flags=re.DOTALL)


def shipped_path(target: str) -> Path:
    """The package's file for a processor: the family's, which its relatives find too."""
    return Path(gaq_compile.__file__).parent / "data" / "tuning" / f"{target_families(target)[0]}.jsonl"


def ship(kernels: Rows, threads: int, target: str, path: Path) -> int:
    """Write the confirmed choices, a line each; what was not measured now stays as it is.

    Returns:
        How many lines the file has.
    """
    measured = [_identity(k) for k in kernels]
    old = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in old if _identity(json.loads(line)) not in measured]
    for k in kernels:
        if k["confirmed"]:
            key = KernelKey(k["family"], json.dumps(k["problem"], sort_keys=True), k["rows"], target)
            facts = {"schedule": k["schedule"], "changed": True, "ratio": round(k["ratio"], 3)}
            lines.append(json.dumps(key.record("choice", threads, **facts), sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in sorted(lines)))
    return len(lines)


def _identity(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return facts["family"], facts["problem"], facts["rows"]


if __name__ == "__main__":  # candidates are built and measured in processes that import this file
    sys.exit(main())
