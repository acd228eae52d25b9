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
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

import gaq_compile
from gaq_compile.datasets import EXAMPLES, example_structures
from gaq_compile.integrations.ase import GAQCalculator


class Drift(NamedTuple):
    """Straight line through E(t)/N: slope and its uncertainty (meV/atom/ps), scatter about it (meV/atom)."""

    slope: float
    uncertainty: float
    fluctuation: float


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
    atoms = frames[0].copy()
    atoms.calc = GAQCalculator(potential)
    energies = run(atoms, options)

    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / f"md-{name}.csv", folder / f"md-{name}.png"
    write_csv(table, energies)
    drift = fit_drift(energies, len(atoms))
    plot(picture, energies, drift, f"{name}, {options.timestep} fs, {options.temperature:.0f} K start")
    print(f"{name}: {options.steps} steps of {options.timestep} fs")
    print(f"drift        {drift.slope:+.4f} +- {drift.uncertainty:.4f} meV/atom/ps")
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


def run(atoms: Atoms, options: argparse.Namespace) -> np.ndarray:
    """Rows of time (fs), potential, kinetic and total energy (eV): one per step, the start included."""
    rng = np.random.default_rng(options.seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=options.temperature, rng=rng)
    Stationary(atoms)
    ZeroRotation(atoms)
    dynamics = VelocityVerlet(atoms, timestep=options.timestep * units.fs)
    rows: list[tuple[float, ...]] = []

    def record() -> None:
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        rows.append((len(rows) * options.timestep, potential, kinetic, potential + kinetic))

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("dynamics", total=options.steps + 1)
        dynamics.attach(record)
        dynamics.attach(lambda: bar.advance(task))
        dynamics.run(options.steps)
    return np.array(rows)


def fit_drift(energies: np.ndarray, atoms: int, blocks: int = 10) -> Drift:
    """Least squares over block means of the total energy.

    Neighbouring steps are correlated, so the uncertainty of a fit through single steps would be
    far too small; block means are nearly independent.
    """
    time, total = 1e-3 * energies[:, 0], 1e3 * (energies[:, 3] - energies[0, 3]) / atoms
    slope, offset = np.polyfit(time, total, 1)
    fluctuation = float(np.std(total - slope * time - offset))
    count = min(blocks, len(time) // 2)
    if count < 4:
        return Drift(float(slope), float("nan"), fluctuation)
    times = np.array([part.mean() for part in np.array_split(time, count)])
    means = np.array([part.mean() for part in np.array_split(total, count)])
    (slope, _), covariance = np.polyfit(times, means, 1, cov=True)
    return Drift(float(slope), float(np.sqrt(covariance[0, 0])), fluctuation)


def write_csv(path: Path, energies: np.ndarray) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["time_fs", "potential_ev", "kinetic_ev", "total_ev"])
        writer.writerows([f"{time:.4f}", *(f"{e:.8f}" for e in row)] for time, *row in energies)


def plot(path: Path, energies: np.ndarray, drift: Drift, title: str) -> None:
    """Total energy above, its two parts below; both relative to the start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    time = 1e-3 * energies[:, 0]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    total = 1e3 * (energies[:, 3] - energies[0, 3])
    top.plot(time, total, lw=0.8, color="tab:blue")
    label = f"drift {drift.slope:+.3f} $\\pm$ {drift.uncertainty:.3f} meV/atom/ps"
    top.set(title=title, ylabel="total energy (meV)")
    top.legend([label], loc="best")
    bottom.plot(time, energies[:, 1] - energies[0, 1], lw=0.8, label="potential", color="tab:orange")
    bottom.plot(time, energies[:, 2] - energies[0, 2], lw=0.8, label="kinetic", color="tab:green")
    bottom.set(xlabel="time (ps)", ylabel="energy (eV)")
    bottom.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
