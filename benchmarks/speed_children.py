"""The processes that ``speed.py`` starts: each measures one thing, and prints it as a line of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

import gaq_compile
from gaq_compile.capture.graphs import collate, neighbours
from gaq_compile.tools.bench import allocator_in_use, import_original
from gaq_compile.tools.machine import measure_machine
from gaq_compile.tools.roofline import KernelTime, StepTimes, step_times
from gaq_compile.verify.measure import alternate_all, memory_growth
from speed_cases import CASES, Case, calibration
from speed_sides import (
    AOTI,
    EAGER,
    EXACT,
    TOLERANCE,
    Forces,
    build_aoti,
    disagreement,
    first_line,
    gaq_file,
    make_side,
)

MARK = "gaq-speed "
FEWEST_RUNS, WARMUP = 5, 10  # eager models need about eight calls
SHOWN_KERNELS = 20  # the slowest of a step, which the JSON lists one by one
CUTOFF = 5.0  # Å, of the edges that a case is described by

Row = dict[str, Any]


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")  # the model packages' own
    limit_memory(options.memory)
    try:
        answer = CHILDREN[options.child](options)
    except Exception as error:  # noqa: BLE001 - whatever it is, its first line is the reason
        sys.exit(first_line(error))
    print(MARK + json.dumps(answer), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("child", choices=list(CHILDREN))
    parser.add_argument("--model", required=True)
    parser.add_argument("--case")
    parser.add_argument("--sides", nargs="+", required=True)
    parser.add_argument("--modes", nargs="+", default=[])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--work", type=Path, required=True)
    return parser.parse_args()


def limit_memory(gibibytes: float | None) -> None:
    """Fail beyond so much memory, before the system ends this process, or another one."""
    import resource  # not on every system: only where it is used

    bytes_ = int((gibibytes or 0.9 * available()) * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))


def available() -> float:
    """GiB that are free, or soon can be."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/meminfo does not say what is available")


def the_case(options: argparse.Namespace) -> Case:
    return next(c for c in CASES if (c.model, c.name) == (options.model, options.case))


def sizes(structures: Sequence[Atoms]) -> Row:
    """What a case is made of."""
    pairs = sum(len(neighbours(atoms, CUTOFF)[0]) for atoms in structures)
    return {"structures": len(structures), "atoms": sum(map(len, structures)), f"pairs_{CUTOFF:g}": pairs}


# --- building -----------------------------------------------------------------------------------


def quantize_child(options: argparse.Namespace) -> Row:
    """A potential for all cases of a model."""
    model, scheme = options.model, options.sides[0]
    made = gaq_compile.quantize(model, calibration(model), scheme, measure=False, progress=False)
    file = gaq_file(options.work, model, scheme)
    made.save(file.with_suffix(".part.gaq")).replace(file)  # whole or not at all, should it be killed here
    return {}


def aoti_child(options: argparse.Namespace) -> Row:
    """The AOTInductor package of a case; its forces are checked when it is timed."""
    start, case = time.perf_counter(), the_case(options)
    reason = build_aoti(case.model, case.name, case.structures(), options.work)
    return {"reason": reason} if reason else {"seconds": time.perf_counter() - start}


# --- memory -------------------------------------------------------------------------------------


def memory_child(options: argparse.Namespace) -> Row:
    """One side alone: growth over the state after imports."""
    case, side = the_case(options), options.sides[0]
    if side == EAGER:
        import_original(case.model)
    elif side == AOTI:
        importlib.import_module("torch._inductor.package")
    structures = case.structures()
    with memory_growth() as memory:
        run = make_side(side, case.model, case.name, structures, options.work, options.modes).run
        for _ in range(3):
            run()
    return {
        "growth_bytes": memory.growth_bytes,
        "imports_bytes": memory.baseline_bytes,
        "method": memory.method,
        "allocator": allocator_in_use(),
        **sizes(structures),
    }


# --- time ---------------------------------------------------------------------------------------


def time_child(options: argparse.Namespace) -> Row:
    """All sides, alternating; those that fail, or whose forces are wrong, with the reason."""
    case = the_case(options)
    structures = case.structures()
    found: dict[str, Row] = {}
    running: dict[str, Forces] = {}
    truth = None
    for name in options.sides:
        try:
            side = make_side(name, case.model, case.name, structures, options.work, options.modes)
            forces = side.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            found[name] = {"reason": first_line(error)}
            continue
        truth = forces if truth is None else truth
        found[name] = {"force_error": disagreement(truth, forces), **side.notes}
        reason = objection(name, found[name]["force_error"])
        if reason:
            found[name]["reason"] = reason
        else:
            running[name] = side.run
    warmup, runs = rounds(running, options.runs, options.seconds)
    times = alternate_all(running, runs, warmup)
    for name in running:
        found[name] |= summary(times[name], times.get(EAGER))
    return {
        "sides": found,
        "reference": next(iter(running), None),
        "runs": runs,
        "warmup": warmup,
        "allocator": allocator_in_use(),
        **sizes(structures),
    }


def objection(side: str, error: float) -> str | None:
    """Why a side's forces are not accepted; rounded weights may change them."""
    if side in EXACT and not error <= TOLERANCE:
        return f"forces differ by {100 * error:.3g} % of the largest"
    return None


def rounds(running: Mapping[str, Forces], runs: int, seconds: float) -> tuple[int, int]:
    """Rounds to warm up and rounds to time, within so many seconds if these are enough for a few."""
    start = time.perf_counter()
    for run in running.values():
        run()
    one = time.perf_counter() - start
    warmup = max(2, min(WARMUP, int(seconds / 4 / one)))
    return warmup, max(min(FEWEST_RUNS, runs), min(runs, int(seconds / one)))


def summary(times: Sequence[float], eager: Sequence[float] | None) -> Row:
    """Median and quartiles, and the same of how many times faster than eager, round by round."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    found: Row = {"ms": middle, "quartiles_ms": [low, high], "fastest_ms": min(times)}
    if eager is not None:
        ratios = [a / b for a, b in zip(eager, times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found |= {"ratio": middle, "ratio_quartiles": [low, high]}
    return found


# --- kernels ------------------------------------------------------------------------------------


def kernels_child(options: argparse.Namespace) -> Row:
    """A scheme's kernels beside what the machine can do, which is measured here too."""
    case = the_case(options)
    structures = case.structures()
    potential = gaq_compile.load(gaq_file(options.work, case.model, options.sides[0]))
    tensors = collate(structures, potential.form)
    machine = measure_machine()
    _, runs = rounds(
        {"step": lambda: potential.evaluate(tensors)["forces"]}, options.runs, options.seconds / 4
    )
    found = step_times(potential, tensors, machine, runs=runs)
    slowest = sorted(found.kernels, key=lambda k: -k.ms)[:SHOWN_KERNELS]
    return {
        "machine": machine.to_dict(),
        "ms": found.ms,
        "watched_ms": found.watched_ms,
        "runs": runs,
        "families": families(found),
        "kernels": [k.to_dict() for k in slowest],
        **sizes(structures),
    }


def families(found: StepTimes) -> dict[str, Row]:
    """Kernels of one kind together, the slowest kind first."""
    members: dict[str, list[KernelTime]] = {}
    for kernel in found.kernels:
        members.setdefault(kernel.family, []).append(kernel)
    ordered = sorted(members.items(), key=lambda item: -sum(k.ms for k in item[1]))
    return {name: _together(kernels) for name, kernels in ordered}


def _together(kernels: Sequence[KernelTime]) -> Row:
    operations: Counter[str] = Counter()
    for kernel in kernels:
        operations.update(kernel.work.operations)
    return {
        "kernels": len(kernels),
        "ms": sum(k.ms for k in kernels),
        "limit_ms": sum(k.limit_ms for k in kernels),
        "computing_ms": sum(k.computing_ms for k in kernels),
        "moving_ms": sum(k.moving_ms for k in kernels),
        "operations": dict(operations),
        "bytes": sum(k.work.read + k.work.written for k in kernels),
    }


CHILDREN: dict[str, Callable[[argparse.Namespace], Row]] = {
    "quantize": quantize_child,
    "aoti": aoti_child,
    "memory": memory_child,
    "time": time_child,
    "kernels": kernels_child,
}

if __name__ == "__main__":
    main()
