"""Constant-energy (NVE) dynamics of a compiled potential, and whether the energy stays constant.

    python examples/md.py [--steps 2000] [--scheme w8] [--molecule azobenzene|ethanol]
    python examples/md.py --potential out/so3lr-w8.gaq

Writes ``out/md-<name>.csv`` and ``.png``. Rounded activations (w8a8, w4a8) make the energy a
staircase whose forces are not quite its slope: compare their drift with that of w8.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from pathlib import Path

import numpy as np
from ase import Atoms
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

import gaq_compile
from gaq_compile.datasets import EXAMPLES, example_structures
from gaq_compile.integrations.ase import GAQCalculator
from gaq_compile.verify.dynamics import Dynamics, Settings, nve


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")  # the model packages' own
    frames = example_structures(options.molecule)
    if options.potential:
        potential = gaq_compile.load(options.potential, backend=options.backend)
    else:
        potential = gaq_compile.quantize(
            options.model, frames[:4], options.scheme, backend=options.backend, measure=False
        )
    name = f"{potential.report.model}-{potential.report.scheme}-{options.molecule}"
    dynamics = run(potential, frames[0], options)

    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / f"md-{name}.csv", folder / f"md-{name}.png"
    write_csv(table, dynamics)
    plot(picture, dynamics, f"{name}, {options.timestep} fs, {options.temperature:.0f} K start")
    print(f"{name}: {dynamics.steps} steps of {options.timestep} fs")
    if dynamics.diverged:
        print(f"ended early: {dynamics.diverged}")
    drift = dynamics.drift
    print(f"drift        {drift.slope:+.4f} +- {drift.error:.4f} meV/atom/ps")
    print(f"fluctuation  {drift.fluctuation:.4f} meV/atom (standard deviation about the line)")
    print(f"wrote {table} and {picture}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--potential", help="a .gaq file; without it one is compiled")
    parser.add_argument("--model", default="so3lr")
    parser.add_argument("--scheme", default=gaq_compile.config.DEFAULT_SCHEME)
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--molecule", choices=EXAMPLES, default="azobenzene")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K, of the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out")
    return parser.parse_args()


def run(potential: gaq_compile.Potential, atoms: Atoms, options: argparse.Namespace) -> Dynamics:
    """Velocity Verlet from a Maxwell-Boltzmann start, with a progress bar."""
    settings = Settings(options.timestep, options.temperature, options.seed)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("dynamics", total=options.steps)
        return nve(
            GAQCalculator(potential),
            atoms,
            options.steps,
            settings,
            progress=lambda step: bar.update(task, completed=step),
        )


def write_csv(path: Path, dynamics: Dynamics) -> None:
    """One row per step, the start included: time (fs), potential, kinetic and total energy (eV)."""
    columns = (1e3 * dynamics.time_ps, dynamics.potential, dynamics.kinetic, dynamics.total)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["time_fs", "potential_ev", "kinetic_ev", "total_ev"])
        writer.writerows(
            [f"{time:.4f}", *(f"{e:.8f}" for e in row)] for time, *row in zip(*columns, strict=True)
        )


def plot(path: Path, dynamics: Dynamics, title: str) -> None:
    """Total energy above, its two parts below; both relative to the start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    time, drift = dynamics.time_ps, dynamics.drift
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    top.plot(time, 1e3 * risen(dynamics.total), lw=0.8, color="tab:blue")
    label = f"drift {drift.slope:+.3f} $\\pm$ {drift.error:.3f} meV/atom/ps"
    top.set(title=title, ylabel="total energy (meV)")
    top.legend([label], loc="best")
    bottom.plot(time, risen(dynamics.potential), lw=0.8, label="potential", color="tab:orange")
    bottom.plot(time, risen(dynamics.kinetic), lw=0.8, label="kinetic", color="tab:green")
    bottom.set(xlabel="time (ps)", ylabel="energy (eV)")
    bottom.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def risen(energy: np.ndarray) -> np.ndarray:
    """What has been added since the start."""
    return energy - energy[0]


if __name__ == "__main__":
    main()
