"""Constant-energy dynamics of each scheme: drift, noise, temperature, and what is real in them.

    python benchmarks/nve.py --model so3lr --molecule azobenzene --schemes fp32 w8 w8a8 --ps 20 \\
        --json out/nve.json --work out/nve

Velocity Verlet from 300 K, no total momentum or spin, the same start for every scheme. A run that
was killed continues from its last checkpoint in ``--work``, where the compiled potentials are kept
too. Beside each trajectory's own energy stands that of the fp32 potential at positions kept every
50 fs, with the trajectory's kinetic energy: rounded activations make the *reported* energy a
staircase, and only the difference tells its noise from energy that was really gained. Writes JSON,
a Markdown table and a plot of the total energies beside each other.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import gaq_compile
from gaq_compile.datasets import EXAMPLES, example_structures
from gaq_compile.integrations.ase import GAQCalculator
from gaq_compile.potential import Potential
from gaq_compile.verify.dynamics import Drift, Dynamics, Settings, energy_drift, nve
from gaq_compile.verify.structures import displaced

SCHEMES = ("fp32", "w8", "w4", "w8a16", "w4a16", "w8a8", "w4a8", "exact-w8a8", "naive-w8a8")
REFERENCE = "fp32"
CALIBRATION, START = slice(0, 3), 5  # frames of the molecule
KEPT_FS = 50.0  # between positions that are kept for the reference energy
BATCH = 16  # positions evaluated at once


@dataclass(frozen=True)
class Run:
    """One scheme's dynamics.

    ``reference`` is the fp32 energy (eV) of the kept positions; its kinetic energy is the run's.
    """

    scheme: str
    dynamics: Dynamics
    reference: np.ndarray
    ms_per_step: float | None
    versions: dict[str, str]


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")  # the model packages' own
    console = Console()
    reference = potential(options, REFERENCE, console)
    runs = [run(options, scheme, reference, console) for scheme in options.schemes]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "versions": runs[0].versions,
        "model": options.model,
        "molecule": options.molecule,
        "backend": options.backend,
        "atoms": len(start(options)),
        "settings": asdict(settings(options)),
        "runs": [figures(r, len(start(options))) for r in runs],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    text = table(result)
    options.json.with_suffix(".md").write_text(text)
    plot(options.json.with_suffix(".png"), runs, options)
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"wrote {options.json}, and .md and .png beside it")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="so3lr")
    parser.add_argument("--molecule", choices=EXAMPLES, default="azobenzene")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--ps", type=float, default=20.0, help="length of each run")
    parser.add_argument("--dt", type=float, default=0.5, help="time step, fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="of the start, K")
    parser.add_argument("--seed", type=int, default=0, help="of the first velocities")
    parser.add_argument("--json", type=Path, default=Path("out/nve.json"))
    parser.add_argument("--work", type=Path, default=Path("out/nve"), help="checkpoints and potentials")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> Settings:
    return Settings(
        timestep_fs=options.dt,
        temperature_k=options.temperature,
        seed=options.seed,
        keep_every=max(1, round(KEPT_FS / options.dt)),
        save_every=500,
    )


def start(options: argparse.Namespace) -> Any:
    """A frame that calibration has not seen."""
    return example_structures(options.molecule)[START]


def potential(options: argparse.Namespace, scheme: str, console: Console) -> Potential:
    """The compiled potential, from ``--work`` where it is there already."""
    file = options.work / f"{options.model}-{options.molecule}-{scheme}.gaq"
    if not file.exists():
        console.print(f"compiling {options.model} {scheme}")
        frames = example_structures(options.molecule)[CALIBRATION]
        compiled = gaq_compile.quantize(
            options.model, frames, scheme, backend=options.backend, measure=False, progress=False
        )
        options.work.mkdir(parents=True, exist_ok=True)
        # whole or not at all, should it be killed here
        compiled.save(file.with_suffix(".part.gaq")).replace(file)
    return gaq_compile.load(file, backend=options.backend)


def run(options: argparse.Namespace, scheme: str, reference: Potential, console: Console) -> Run:
    """One scheme's dynamics, continued if there is a checkpoint."""
    compiled = potential(options, scheme, console)
    steps = round(options.ps * 1e3 / options.dt)
    name = f"{options.model}-{options.molecule}-{scheme}-{options.backend}-{options.dt:g}fs-{options.seed}"
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), console=console, transient=True) as bar:
        task = bar.add_task(scheme, total=steps, speed="")
        timer = Stopwatch()

        def tell(step: int) -> None:
            timer.lap()
            if step % 20 == 0:
                bar.update(task, completed=step, speed=f"{timer.median_ms or 0:.1f} ms/step")

        dynamics = nve(
            GAQCalculator(compiled),
            start(options),
            steps,
            settings(options),
            checkpoint=options.work / f"{name}.npz",
            progress=tell,
        )
    energies = reference_energies(reference, options, dynamics)
    return Run(scheme, dynamics, energies, timer.median_ms, dict(compiled.report.versions))


class Stopwatch:
    """The median time between laps; a continued run counts its own steps only."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._times: list[float] = []

    def lap(self) -> None:
        now = time.perf_counter_ns()
        if self._last is not None:
            self._times.append(1e-6 * (now - self._last))
        self._last = now

    @property
    def median_ms(self) -> float | None:
        return float(np.median(self._times)) if self._times else None


def reference_energies(reference: Potential, options: argparse.Namespace, dynamics: Dynamics) -> np.ndarray:
    """The fp32 energy at each kept position, eV."""
    atoms = start(options)
    frames = [displaced(atoms, positions - atoms.positions) for positions in dynamics.frames]
    batches = [frames[i : i + BATCH] for i in range(0, len(frames), BATCH)]
    return np.array([answer.energy for batch in batches for answer in reference.predict(batch)])


def figures(run: Run, atoms: int) -> dict[str, Any]:
    """What goes into the JSON; the sparse series too, the dense ones stay in the checkpoints."""
    d = run.dynamics
    time_ps, reported, real = sparse(run, atoms)
    offset = reported - real  # what the scheme's energy says beyond the reference's, of each position
    return {
        "scheme": run.scheme,
        "steps": d.steps,
        "diverged": d.diverged,
        "temperature_k": d.temperature_k,
        "drift_mev_per_atom_ps": d.drift.slope,
        "drift_error": d.drift.error,
        "fluctuation_mev_per_atom": d.drift.fluctuation,
        "kinetic_fluctuation_mev_per_atom": d.kinetic_fluctuation,
        "reference": None if len(real) < 2 else _drift(energy_drift(time_ps, real)),
        "offset_mev_per_atom": {"mean": float(offset.mean()), "std": float(offset.std())},
        "ms_per_step": run.ms_per_step,
        "time_ps": time_ps.tolist(),
        "total_mev_per_atom": (reported - reported[0]).tolist(),
        "reference_total_mev_per_atom": (real - real[0]).tolist(),
    }


def sparse(run: Run, atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At kept positions: time (ps), the total energy as reported, and with the fp32 energy (meV/atom)."""
    d = run.dynamics
    kinetic, reported = d.kinetic[d.frame_steps], d.total[d.frame_steps]
    return d.time_ps[d.frame_steps], 1e3 * reported / atoms, 1e3 * (run.reference + kinetic) / atoms


def _drift(drift: Drift) -> dict[str, float | None]:
    """NaN is not JSON."""
    found = {
        "drift_mev_per_atom_ps": drift.slope,
        "drift_error": drift.error,
        "fluctuation_mev_per_atom": drift.fluctuation,
    }
    return {key: value if np.isfinite(value) else None for key, value in found.items()}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    s = result["settings"]
    length = max(r["steps"] for r in result["runs"]) * s["timestep_fs"] * 1e-3
    lines = [
        f"{result['model']}, {result['molecule']} ({result['atoms']} atoms), {length:g} ps of "
        f"{s['timestep_fs']:g} fs from {s['temperature_k']:g} K, backend {result['backend']}. Drift: "
        'meV/atom/ps, slope ± standard error; noise: RMS about the line, meV/atom. "fp32 energy": the '
        "same trajectory, its potential energy evaluated by the fp32 potential.",
        "",
        "| scheme | drift | noise | drift, fp32 energy | noise, fp32 energy | T (K) | ms/step | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["runs"]:
        real = r["reference"] or {}
        own = _with_error(r["drift_mev_per_atom_ps"], r["drift_error"])
        other = _with_error(real.get("drift_mev_per_atom_ps"), real.get("drift_error"))
        noise, noise_real = r["fluctuation_mev_per_atom"], real.get("fluctuation_mev_per_atom")
        end = f"diverged: {r['diverged']}" if r["diverged"] else ""
        speed = _number(r["ms_per_step"], ".1f")
        lines.append(
            f"| `{r['scheme']}` | {own} | {_number(noise)} | {other} | {_number(noise_real)} "
            f"| {r['temperature_k']:.0f} | {speed} | {end} |"
        )
    return "\n".join(lines) + "\n"


def _with_error(value: float | None, error: float | None) -> str:
    return f"{_number(value, '+.4f')} ± {_number(error, '.4f')}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None or not np.isfinite(value) else format(value, form)


def plot(path: Path, runs: list[Run], options: argparse.Namespace) -> None:
    """One panel per scheme: the total energy at every step, and with the fp32 energy where kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    atoms = len(start(options))
    figure, panels = plt.subplots(
        len(runs), 1, sharex=True, squeeze=False, figsize=(8, 1 + 1.8 * len(runs)), layout="constrained"
    )
    for panel, r in zip(panels[:, 0], runs, strict=True):
        d = r.dynamics
        time_ps, _, real = sparse(r, atoms)
        panel.plot(d.time_ps, 1e3 * (d.total - d.total[0]) / atoms, lw=0.6, label="as reported")
        panel.plot(time_ps, real - real[0], lw=0.9, marker=".", ms=2, label="with the fp32 energy")
        end = f", diverged: {d.diverged}" if d.diverged else ""
        title = f"{r.scheme}: {_with_error(d.drift.slope, d.drift.error)} meV/atom/ps{end}"
        panel.set_title(title, fontsize=9)
        panel.set_ylabel("meV/atom")
    panels[0, 0].legend(fontsize=8)
    panels[-1, 0].set_xlabel("time (ps)")
    figure.suptitle(f"Total energy, {options.model}, {options.molecule}, {options.dt:g} fs")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
