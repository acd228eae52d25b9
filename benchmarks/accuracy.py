"""Accuracy and symmetry of every scheme and baseline, over fixed structure sets.

    python benchmarks/accuracy.py --models sevennet-0 so3lr --schemes w8 w8a8 naive-w8a8 \\
        --json benchmarks/results/accuracy.json

Measured on structures that calibration has not seen, against the original model in float32 run through
its own package. No labels are used. With ``--calibration all`` there is one potential per model and
scheme, calibrated on a few structures of every set: what one file for many systems can do. With
``--calibration each`` every set has a potential of its own, as one makes for a simulation.

* so3lr: rMD17 frames of azobenzene, ethanol, aspirin and paracetamol (calibration: frames 0 and 1).
* sevennet-0: rattled and strained silicon, rock salt and copper, a molecule (ethanol), and a surface
  (CO on copper).

A run that was killed continues, and runs add up: figures that the JSON already has are kept unless
``--fresh``. Writes JSON, Markdown tables and a plot of force error against equivariance error.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111
from rich.console import Console
from rich.progress import Progress

import gaq_compile
from gaq_compile.capture import find_recipe
from gaq_compile.capture.pretrained import load_model
from gaq_compile.config import AUTO, BASELINES, PRESETS
from gaq_compile.datasets import example_structures
from gaq_compile.subject import evaluator
from gaq_compile.verify.equivariance import equivariance
from gaq_compile.verify.parity import compare
from gaq_compile.verify.structures import rattled, strained
from gaq_compile.verify.types import Prediction

SCHEMES = [name for name in PRESETS if name != AUTO]
REFERENCE = "naive-w8a8"  # whose LEE others are compared with
ROTATIONS = 6


@dataclass(frozen=True)
class StructureSet:
    """Structures of one kind: some to calibrate with, others to measure on."""

    name: str
    calibration: tuple[Atoms, ...]
    tests: tuple[Atoms, ...]


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")  # the model packages' own
    console = Console()
    result = known(options)
    todo = [
        (model, scheme, sets)
        for model in options.models
        for scheme in options.schemes
        for sets in together(SETS[model](), options.calibration)
        if not measured(result, model, scheme, options.calibration, sets)
    ]
    with Progress(console=console, transient=True) as bar:
        for model, scheme, sets in bar.track(todo, description="quantizing and measuring"):
            found = rows(model, scheme, sets, options.backend)
            result["rows"] += [{"calibration": options.calibration} | row for row in found]
            write(result, options.json)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write(result, options.json)
    text = tables(result)
    options.json.with_suffix(".md").write_text(text)
    plot(result, options.json.with_suffix(".png"))
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"wrote {options.json}, and .md and .png beside it")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES, metavar="SCHEME")
    parser.add_argument("--calibration", choices=("all", "each"), default="all")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--json", type=Path, default=Path("out/accuracy.json"))
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON already has")
    return parser.parse_args()


# --- structures ---------------------------------------------------------------------------------


def frames(molecule: str) -> StructureSet:
    """Frames of a molecule's dynamics."""
    found = example_structures(molecule)
    return StructureSet(molecule, tuple(found[:2]), tuple(found[5:10]))


def variants(name: str, atoms: Atoms) -> StructureSet:
    """Rattled and strained copies: 0 and 2 % either way to calibrate; 0, 1.5 % either way and 3 % to test."""
    calibration = (changed(atoms, 0.0, 1), changed(atoms, 0.02, 2), changed(atoms, -0.02, 3))
    tests = tuple(changed(atoms, s, seed) for s, seed in ((0.0, 11), (0.015, 12), (-0.015, 13), (0.03, 14)))
    return StructureSet(name, calibration, tests)


def changed(atoms: Atoms, strain: float, seed: int) -> Atoms:
    """Stretched along x by ``strain``, sheared by as much in the plane, and rattled by 0.05 Å."""
    return rattled(strained(atoms, strain * np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]])), 0.05, seed)


def surface() -> Atoms:
    """Three layers of copper (111) with carbon monoxide on top."""
    slab = fcc111("Cu", (2, 2, 3), vacuum=8.0)
    add_adsorbate(slab, Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.15]]), 1.85, "ontop")
    slab.pbc = True
    return slab


def molecules() -> list[StructureSet]:
    return [frames(name) for name in ("azobenzene", "ethanol", "aspirin", "paracetamol")]


def materials() -> list[StructureSet]:
    return [
        variants("Si", bulk("Si", cubic=True) * (2, 1, 1)),
        variants("NaCl", bulk("NaCl", "rocksalt", 5.64, cubic=True) * (2, 1, 1)),
        variants("Cu", bulk("Cu", cubic=True) * (2, 2, 1)),
        frames("ethanol"),
        variants("CO on Cu(111)", surface()),
    ]


SETS: dict[str, Callable[[], list[StructureSet]]] = {"sevennet-0": materials, "so3lr": molecules}


# --- measuring ----------------------------------------------------------------------------------


def together(sets: list[StructureSet], calibration: str) -> list[list[StructureSet]]:
    """The sets that share a potential."""
    return [sets] if calibration == "all" else [[s] for s in sets]


def rows(model: str, scheme: str, sets: list[StructureSet], backend: str) -> list[dict[str, Any]]:
    """One row per structure set, of one model and scheme."""
    potential, shared = compiled(model, scheme, sets, backend)
    return [shared | figures(s, originals(model, s), potential) for s in sets]


def compiled(
    model: str, scheme: str, sets: list[StructureSet], backend: str = "tvm"
) -> tuple[gaq_compile.Potential, dict[str, Any]]:
    """A potential for all of the sets, and what its own report says of it."""
    calibration = [atoms for s in sets for atoms in s.calibration]
    potential = gaq_compile.quantize(
        model, calibration, scheme, backend=backend, measure=False, progress=False
    )
    memory = potential.report.memory
    return potential, {
        "model": model,
        "scheme": scheme,
        "weights_share": memory["weights_bytes"] / memory["weights_fp32_bytes"],
        "fallbacks": len(potential.report.fallback),
    }


_ORIGINALS: dict[tuple[str, str], list[Prediction]] = {}


def originals(model: str, structures: StructureSet) -> list[Prediction]:
    """What the original model says of the tests; asked once."""
    if (model, structures.name) not in _ORIGINALS:
        network = load_model(model)
        evaluate = evaluator(find_recipe(network).original(network))
        _ORIGINALS[model, structures.name] = evaluate(list(structures.tests))
    return _ORIGINALS[model, structures.name]


def figures(
    structures: StructureSet,
    truth: list[Prediction],
    potential: gaq_compile.Potential,
    turned_structures: int = 2,
    rotations: int = ROTATIONS,
) -> dict[str, Any]:
    """Errors over the tests, and LEE over the first of them."""
    tests = list(structures.tests)
    errors = compare(truth, potential.predict(tests))
    turned = equivariance(potential.predict, tests[:turned_structures], rotations=rotations)
    return {
        "set": structures.name,
        "force_rel": errors.force_rel,
        "force_mae_mev_per_a": errors.force_mae_mev_per_a,
        "force_max_mev_per_a": errors.force_max_mev_per_a,
        "energy_mev_per_atom": errors.energy_mev_per_atom,
        "energy_max_mev_per_atom": errors.energy_max_mev_per_atom,
        "lee_force_mev_per_a": turned.force_mev_per_a,
        "lee_force_max_mev_per_a": turned.force_max_mev_per_a,
    }


def known(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run has left, or nothing."""
    command = " ".join(["python", *sys.argv])
    machine = platform.processor() or platform.machine()
    result: dict[str, Any] = {"command": command, "machine": machine, "rows": []}
    if options.json.exists():
        result["rows"] = json.loads(options.json.read_text())["rows"]
    if options.fresh:
        result["rows"] = [r for r in result["rows"] if not asked_for(r, options)]
    return result


def asked_for(row: dict[str, Any], options: argparse.Namespace) -> bool:
    chosen = row["model"] in options.models and row["scheme"] in options.schemes
    return chosen and row["calibration"] == options.calibration


def measured(
    result: dict[str, Any], model: str, scheme: str, calibration: str, sets: list[StructureSet]
) -> bool:
    key = (model, scheme, calibration, sets[0].name)
    return any((r["model"], r["scheme"], r["calibration"], r["set"]) == key for r in result["rows"])


def write(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all, should it be killed here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


# --- tables and plot ----------------------------------------------------------------------------

Rows = list[dict[str, Any]]
CALIBRATIONS = {
    "all": "one potential for all sets",
    "each": "a potential for each set",
}


def parts(result: dict[str, Any]) -> list[tuple[str, str, Rows]]:
    """(model, calibration, rows) of everything that was measured."""
    found: dict[tuple[str, str], Rows] = {}
    for row in result["rows"]:
        found.setdefault((row["model"], row["calibration"]), []).append(row)
    return [(*key, of) for key, of in sorted(found.items())]


def summary(rows: Rows) -> Rows:
    """One row per scheme: means over the structure sets, in the order of PRESETS."""
    found = []
    for scheme in SCHEMES:
        of = [r for r in rows if r["scheme"] == scheme]
        if of:
            keys = ("force_rel", "force_mae_mev_per_a", "energy_mev_per_atom", "lee_force_mev_per_a")
            means = {key: float(np.mean([r[key] for r in of])) for key in (*keys, "weights_share")}
            found.append({"scheme": scheme, "worst": max(r["force_rel"] for r in of), **means})
    return found


def tables(result: dict[str, Any]) -> str:
    """Markdown: per model, the schemes' means over all sets, and the errors set by set."""
    lines: list[str] = []
    for model, calibration, rows in parts(result):
        schemes = summary(rows)
        naive = next((s["lee_force_mev_per_a"] for s in schemes if s["scheme"] == REFERENCE), None)
        lines += [
            f"### {model}, {CALIBRATIONS[calibration]}",
            "",
            "Means over the structure sets:",
            "",
            "| scheme | force error % | worst set % | meV/Å | energy meV/atom | LEE meV/Å "
            f"| `{REFERENCE}`'s over it | bytes of float32 |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for s in schemes:
            lee = s["lee_force_mev_per_a"]
            ratio = f"{naive / lee:.0f}" if naive and lee else "–"
            lines.append(
                f"| `{s['scheme']}` | {100 * s['force_rel']:.3f} | {100 * s['worst']:.2f} "
                f"| {s['force_mae_mev_per_a']:.2f} | {s['energy_mev_per_atom']:.3f} | {lee:.4f} | {ratio} "
                f"| {s['weights_share']:.3f} |"
            )
        lines += ["", "Force error % / energy meV/atom / LEE meV/Å, set by set:", "", *by_set(rows), ""]
    return "\n".join(lines)


def by_set(rows: Rows) -> list[str]:
    """Markdown lines: force error in percent, energy error and LEE of every scheme on every set."""
    sets = list(dict.fromkeys(r["set"] for r in rows))
    lines = ["| scheme | " + " | ".join(sets) + " |", "|---" * (1 + len(sets)) + "|"]
    for scheme in (s["scheme"] for s in summary(rows)):
        cells = []
        for name in sets:
            row = next((r for r in rows if (r["scheme"], r["set"]) == (scheme, name)), None)
            cells.append("–" if row is None else _cell(row))
        lines.append(f"| `{scheme}` | " + " | ".join(cells) + " |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    figures = f"{100 * row['force_rel']:.2f} / {row['energy_mev_per_atom']:.2f}"
    return f"{figures} / {row['lee_force_mev_per_a']:.4f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Force error against LEE, one point per scheme, one panel per model and calibration."""
    from matplotlib.figure import Figure

    found = parts(result)
    figure = Figure(figsize=(7.5 * len(found), 6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (model, calibration, rows) in zip(panels, found, strict=True):
        for s in summary(rows):
            x, y = 100 * s["force_rel"], max(s["lee_force_mev_per_a"], 1e-5)  # 0 has no place
            ours = s["scheme"].rpartition("-")[0] not in BASELINES
            panel.plot(x, y, marker="o" if ours else "x", color="tab:blue" if ours else "tab:red")
            panel.annotate(s["scheme"], (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8)
        panel.set(xscale="log", yscale="log")
        panel.set_title(f"{model}, {CALIBRATIONS[calibration]} (crosses: baselines)")
        panel.set_xlabel("force error, % of the mean force component")
        panel.set_ylabel("equivariance error (LEE), meV/Å")
        panel.grid(which="both", alpha=0.25)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
