"""The figures that the README quotes: parity, symmetry, true forces, weights, time, memory.

    python benchmarks/foundation.py --json benchmarks/results/foundation.json

Accuracy is measured on structures that calibration has not seen, against the original model run
through its own package. Time and memory: 216-atom silicon, both sides alternating in one process,
two threads, under the same caching allocator if one is installed (apt install libjemalloc2).
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.build import bulk
from rich.console import Console
from rich.table import Table

import gaq_compile
from accuracy import StructureSet, compiled, figures, originals, write
from gaq_compile.datasets import example_structures
from gaq_compile.tools.bench import Settings, find_allocator, memory_figures, speed_figures
from gaq_compile.verify.conservativity import conservativity
from gaq_compile.verify.structures import rattled

ERRORS = (
    "energy_mev_per_atom",
    "energy_max_mev_per_atom",
    "force_mae_mev_per_a",
    "force_max_mev_per_a",
    "force_rel",
    "lee_force_mev_per_a",
)
SCHEMES = ("fp32", "w8", "w4", "w8a16", "w4a16", "exact-w8a8", "exact-w4a8", "w8a8", "w4a8", "naive-w8a8")


def salt() -> Atoms:
    """64 atoms of rattled rock salt."""
    return rattled(bulk("NaCl", "rocksalt", 5.64, cubic=True) * (2, 2, 2), 0.05, 3)


def silicon() -> Atoms:
    """216 atoms of rattled silicon."""
    return rattled(bulk("Si", cubic=True) * (3, 3, 3), 0.05, 3)


def subjects() -> dict[str, StructureSet]:
    """Model name -> what it is calibrated and tested on."""
    frames = example_structures("azobenzene")
    salts = tuple(rattled(salt(), 0.04, seed) for seed in (11, 12))
    return {
        "sevennet-0": StructureSet("NaCl", (salt(),), salts),
        "so3lr": StructureSet("azobenzene", tuple(frames[:3]), tuple(frames[5:8])),
    }


def accuracy(model: str, scheme: str) -> dict[str, Any]:
    """Errors, LEE and gradient error of one model and scheme."""
    structures = subjects()[model]
    potential, shared = compiled(model, scheme, [structures])
    truth = originals(model, structures)
    errors = figures(structures, truth, potential, turned_structures=1, rotations=8)
    gradient = conservativity(potential.predict, list(structures.tests[:1]))
    report = potential.report
    return {
        "model": model,
        "scheme": scheme,
        **{name: errors[name] for name in ERRORS},
        "gradient_rel_error": gradient.error,
        "gradient_rel_resolution": gradient.resolution,
        "scheme_is_conservative": report.conservativity["scheme_is_conservative"],
        "weights_share": shared["weights_share"],
        "fallbacks": shared["fallbacks"],
        "nodes": len(report.placements),
        "integer_weight_arithmetic": sorted({p.arithmetic for p in report.placements if p.integer_weights}),
    }


def speed(scheme: str, folder: Path, runs: int) -> dict[str, Any]:
    """Time and peak memory of SevenNet-0 on 216-atom silicon, in fresh processes."""
    structure, file = folder / "silicon.xyz", folder / f"silicon-{scheme}.gaq"
    ase.io.write(structure, silicon())
    gaq_compile.quantize("sevennet-0", silicon(), scheme, measure=False, progress=False).save(file)
    settings = Settings(runs=runs, warmup=10, preload=find_allocator(), threads=2)
    arguments = ("sevennet-0", file, structure, settings)
    return {
        "model": "sevennet-0",
        "scheme": scheme,
        **speed_figures(*arguments),
        **memory_figures(*arguments),
    }


def reload_is_bitwise(folder: Path) -> bool:
    """Whether a saved potential gives the same energy, bit for bit, in a new process."""
    atoms = salt()
    potential = gaq_compile.quantize("sevennet-0", atoms, "w8a8", measure=False, progress=False)
    file, structure = potential.save(folder / "salt.gaq"), folder / "salt.traj"
    ase.io.write(structure, atoms)
    here = potential.predict([ase.io.read(structure)])[0].energy.hex()
    code = (
        "import sys, ase.io, gaq_compile\n"
        "print(gaq_compile.load(sys.argv[1])(ase.io.read(sys.argv[2])).energy.hex())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, file, structure], capture_output=True, text=True, check=True
    )
    return run.stdout.split()[-1] == here


def tables(result: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    table = Table(title="against the original model, unseen structures")
    for column in ("model", "scheme", "dE meV/atom", "dF meV/Å", "dF %", "LEE meV/Å", "F=-dE/dx", "weights"):
        table.add_column(column, justify="left" if column in ("model", "scheme") else "right")
    for r in result["accuracy"]:
        error, gradient = f"{100 * r['force_rel']:.3f}", f"{r['gradient_rel_error']:.1e}"
        figures = (r["energy_mev_per_atom"], r["force_mae_mev_per_a"], r["lee_force_mev_per_a"])
        energy, force, lee = (f"{figure:.4f}" for figure in figures)
        table.add_row(
            r["model"], r["scheme"], energy, force, error, lee, gradient, f"{r['weights_share']:.3f}"
        )
    console.print(table)
    for r in result["speed"]:
        time = f"{r['eager_ms']:.0f} -> {r['compiled_ms']:.1f} ms, {r['ratio']:.1f}x"
        peak, growth = (_mebibytes(r, kind) for kind in ("peak", "growth"))
        console.print(f"Si 216, {r['scheme']}: {time}; process peak {peak}, growth over imports {growth}")
    console.print(
        f"saved and loaded in a new process, bitwise the same energy: {result['reload_is_bitwise']}"
    )


def _mebibytes(row: dict[str, Any], kind: str) -> str:
    before, after = (row[f"{side}_{kind}_bytes"] / 2**20 for side in ("eager", "compiled"))
    return f"{before:.0f} -> {after:.0f} MiB ({after / before:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("out/foundation.json"))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--models", nargs="+", default=["sevennet-0", "so3lr"])
    parser.add_argument("--runs", type=int, default=20, help="timed pairs")
    parser.add_argument("--skip-speed", action="store_true")
    options = parser.parse_args()
    console = Console()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        result["speed"] = (
            [] if options.skip_speed else [speed(s, Path(folder), options.runs) for s in ("fp32", "w8a8")]
        )
        result["accuracy"] = [accuracy(m, s) for m in options.models for s in options.schemes]
        result["reload_is_bitwise"] = reload_is_bitwise(Path(folder))
    write(result, options.json)
    tables(result, console)


if __name__ == "__main__":
    main()
