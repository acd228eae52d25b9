"""Time and memory beside the alternatives, over models and sizes, and kernels beside the machine's limits.

    python benchmarks/speed.py --json benchmarks/results/speed.json --page docs/performance.md

Sides: the original model (``eager``), ``torch.compile`` of it (``compile``), AOTInductor on our own
graph of energy and forces, compiled for each case (``aoti``; ``speed_sides.py`` says why), and schemes of
this package.

* time: all sides of a case in one fresh process, round by round, in an order that alternates, on inputs
  that are prepared; medians and quartiles, ratios within a round;
* memory: each side alone in a process of its own; of the whole process, and its growth over imports;
* kernels: time of each beside its limit, the larger of operations over the measured peak and bytes over the
  measured bandwidth (``gaq_compile.tools.roofline``), peaks measured in the same process.

All processes have the same number of threads and the same caching allocator (apt install
libjemalloc2). A side that fails, whose forces are not the original's, or that does not fit into
``--memory`` is out, with its reason.

Every result is added to the JSON when it is there: a run that was killed continues, and runs add up; figures
that the JSON already has are kept unless ``--fresh``. Writes Markdown tables and plots beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from accuracy import write
from gaq_compile.config import AUTO, PRESETS
from gaq_compile.errors import GaqError, VerificationError
from gaq_compile.tools.bench import Settings, environment, find_allocator
from gaq_compile.tools.machine import processor
from gaq_compile.verify.measure import measured_run
from speed_cases import CASES, TIMESTEP_FS, Case
from speed_children import MARK
from speed_page import fill_page, plots, tables
from speed_sides import AOTI, COMPILE, EAGER, aoti_file, form_file, gaq_file

SIDES = (EAGER, COMPILE, AOTI, "fp32", "w8", "w8a8", "w4a8", "exact-w8a8")
FULL = "does not fit into memory"
NO_MEMORY = ("allocate memory", "MemoryError", "bad_alloc", "failed to map")  # as processes say it
MODES = ("default", "max-autotune-no-cudagraphs")

Row = dict[str, Any]


def main() -> None:
    options = arguments()
    console = Console()
    result = known(options)
    for model in options.models:
        console.print(f"{model}: compiling what is not compiled yet")
        quantize(options, model)
        for case in chosen(options, model):
            measure(result, case, options, console)
    finish(result, options, console)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = list(dict.fromkeys(case.model for case in CASES))
    cases = list(dict.fromkeys(case.name for case in CASES))
    schemes = [*SIDES, *(s for s in PRESETS if s not in (*SIDES, AUTO))]
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases, metavar="CASE")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=schemes, metavar="SIDE")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="of torch.compile, to try")
    parser.add_argument("--runs", type=int, default=30, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=400.0, help="of a case's rounds; fewer runs then")
    parser.add_argument("--threads", type=int, default=2, help="of every process")
    parser.add_argument("--memory", type=float, help="GiB for a process; by default what is free, nearly")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for a process")
    parser.add_argument("--json", type=Path, default=Path("out/speed.json"))
    parser.add_argument("--page", type=Path, help="a Markdown page whose tables are to be filled")
    parser.add_argument("--work", type=Path, default=Path("out/speed"), help="compiled files")
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON already has")
    return parser.parse_args()


def known(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run has left, or nothing."""
    result: dict[str, Any] = {"rows": []}
    if options.json.exists():
        result = json.loads(options.json.read_text())
    if options.fresh:
        result["rows"] = [r for r in result["rows"] if not asked_for(r, options)]
    facts = {
        "commands": list(dict.fromkeys([*result.get("commands", ()), shlex.join(["python", *sys.argv])])),
        "machine": processor(),
        "threads": options.threads,
        "versions": {name: metadata.version(name) for name in ("torch", "apache-tvm")},
        "timestep_fs": TIMESTEP_FS,
    }
    return {**facts, "rows": result["rows"]}


def asked_for(row: Row, options: argparse.Namespace) -> bool:
    """Whether a row is of what this run measures."""
    side = row.get("side")
    return row["model"] in options.models and row["case"] in options.cases and side in (None, *options.sides)


def chosen(options: argparse.Namespace, model: str) -> list[Case]:
    return [case for case in CASES if case.model == model and case.name in options.cases]


def find(result: dict[str, Any], kind: str, case: Case, side: str | None = None) -> Row | None:
    """A row that is there already."""
    key = (kind, case.model, case.name, side)
    return next((r for r in result["rows"] if (r["kind"], r["model"], r["case"], r.get("side")) == key), None)


def keep(result: dict[str, Any], row: Row, path: Path) -> None:
    """Add a row, in place of one that it repeats, and write all to the disk."""
    key = ("kind", "model", "case", "side")
    result["rows"] = [r for r in result["rows"] if any(r.get(k) != row.get(k) for k in key)] + [row]
    write(result, path)


def measure(result: dict[str, Any], case: Case, options: argparse.Namespace, console: Console) -> None:
    """Everything about one case that is not there yet."""
    for side in options.sides:
        if side != COMPILE and find(result, "memory", case, side) is None:
            console.print(f"{case.model}, {case.name}: memory of {side}")
            keep(result, memory_row(result, case, side, options), options.json)
    before = find(result, "time", case)
    sides = list(dict.fromkeys([*(before["sides"] if before else ()), *options.sides]))
    if before is None or set(sides) != set(before["sides"]):
        console.print(f"{case.model}, {case.name}: time of {', '.join(sides)}")
        keep(result, time_row(result, case, sides, options), options.json)
    for side in options.sides:
        if side in PRESETS and find(result, "kernels", case, side) is None and not out(result, case, side):
            console.print(f"{case.model}, {case.name}: kernels of {side}")
            keep(result, tried("kernels", case, options, side), options.json)


def out(result: dict[str, Any], case: Case, side: str) -> str | None:
    """Why a side cannot run a case, as far as is known."""
    row = find(result, "memory", case, side)
    return row.get("reason") if row else None


def memory_row(result: dict[str, Any], case: Case, side: str, options: argparse.Namespace) -> Row:
    """A side's memory, or why there is none."""
    if side == AOTI:
        package = build(result, case, options)
        keep(result, package, options.json)
        if "reason" in package:
            row = {"kind": "memory", "model": case.model, "case": case.name, "side": side}
            return row | {"reason": package["reason"]}
    return tried("memory", case, options, side)


def time_row(result: dict[str, Any], case: Case, sides: Iterable[str], options: argparse.Namespace) -> Row:
    """All sides' times; those that cannot run are left out, with their reasons. Where they do not fit into
    one process together, the one that needs most memory is left out, and so on."""
    reasons = {side: reason for side in sides if (reason := out(result, case, side))}
    row: Row = {"kind": "time", "model": case.model, "case": case.name}
    while running := [side for side in sides if side not in reasons]:
        row = tried("time", case, options, *running)
        if any(found.get("reason") != FULL for found in row["sides"].values()) or len(running) == 1:
            break
        reasons[hungriest(result, case, running)] = f"{FULL} beside the others"
    row["sides"] = {**row.get("sides", {}), **{side: {"reason": why} for side, why in reasons.items()}}
    return row


def hungriest(result: dict[str, Any], case: Case, sides: Sequence[str]) -> str:
    """The side whose memory grows most; one whose memory is not known, if there is one."""

    def growth(side: str) -> float:
        row = find(result, "memory", case, side)
        return row["growth_bytes"] if row else float("inf")

    return max(sides, key=growth)


def tried(kind: str, case: Case, options: argparse.Namespace, *sides: str) -> Row:
    """A child's answer as a row; a child that fails gives its reason."""
    row: Row = {"kind": kind, "model": case.model, "case": case.name}
    if kind != "time":
        row["side"] = sides[0]
    try:
        peak, answer = child(kind, options, case.model, sides, case.name)
    except VerificationError as error:
        why = reason_of(error)
        return row | ({"sides": {s: {"reason": why} for s in sides}} if kind == "time" else {"reason": why})
    return row | answer | ({"peak_bytes": peak} if kind == "memory" else {})


def reason_of(error: GaqError) -> str:
    """Why a process failed, in one line: what it said last of an error, or how it ended."""
    said = error.where.partition("\n")[2]  # after the command
    killed = any(f"status {code}" in error.what for code in (-9, -6))
    if killed or any(words in said for words in NO_MEMORY):
        return FULL
    last = [line.strip() for line in said.splitlines() if re.match(r"\s*[\w.]+(Error|Exception)\b", line)]
    return (last[-1] if last else error.what)[:200]


def child(
    kind: str, options: argparse.Namespace, model: str, sides: Sequence[str], case: str | None = None
) -> tuple[int, dict[str, Any]]:
    """Peak bytes and the answer of a fresh process.

    Raises:
        VerificationError: if it fails.
    """
    script = Path(__file__).with_name("speed_children.py")
    argv = [sys.executable, str(script), kind, "--model", model, "--sides", *sides, "--modes", *options.modes]
    argv += ["--runs", str(options.runs), "--seconds", str(options.seconds), "--work", str(options.work)]
    argv += ["--case", case] if case else []
    argv += ["--memory", str(options.memory)] if options.memory else []
    env = environment(Settings(preload=find_allocator(), threads=options.threads))
    # torch's compiler keeps what it has made, so that the next process need not make it again
    env["TORCHINDUCTOR_CACHE_DIR"] = str((options.work / "inductor").resolve())
    done = measured_run(argv, env=env, timeout=options.timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise VerificationError("the measured process gave no answer", where=" ".join(argv))
    return done.peak_bytes, json.loads(lines[-1].removeprefix(MARK))


def quantize(options: argparse.Namespace, model: str) -> None:
    """Compile the potentials that ``--work`` does not hold; AOTInductor is given the ``fp32`` graph."""
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [s for s in options.sides if s in PRESETS] + (["fp32"] if AOTI in options.sides else [])
    for scheme in dict.fromkeys(wanted):
        if not gaq_file(options.work, model, scheme).exists():
            child("quantize", options, model, [scheme])


def build(result: dict[str, Any], case: Case, options: argparse.Namespace) -> Row:
    """A case's AOTInductor package, as a row: how long it took, or why there is none. One that ``--work``
    holds is not made again."""
    known = find(result, "built", case, AOTI)
    file, form = aoti_file(options.work, case.model, case.name), form_file(options.work, case.model)
    if known is not None and ("reason" in known or (file.exists() and form.exists())):
        return known
    row: Row = {"kind": "built", "model": case.model, "case": case.name, "side": AOTI}
    try:
        return row | child("aoti", options, case.model, [AOTI], case.name)[1]
    except VerificationError as error:
        return row | {"reason": reason_of(error)}


def finish(result: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    """The tables and plots."""
    write(result, options.json)
    text = tables(result)
    options.json.with_suffix(".md").write_text(text)
    drawn = plots(result, options.json.with_suffix(""))
    if options.page:
        options.page.write_text(fill_page(options.page.read_text(), result))
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"wrote {options.json}, {', '.join(p.name for p in drawn)} and .md beside it")


if __name__ == "__main__":
    main()
