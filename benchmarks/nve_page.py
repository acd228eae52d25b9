"""What :mod:`nve` writes: the figures of a run for JSON, the Markdown table, the plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from gaq_compile.verify.dynamics import Drift, Dynamics, energy_drift

POINTS = 2000  # of a series in JSON, at most
BINS = 600  # of a series in the plot
BOND = {"NN": 1.40, "CN": 1.65}  # Å, the longest that count: an N=N double bond, any C-N bond


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


# --- figures --------------------------------------------------------------------------------------


def figures(run: Run, atoms: Atoms) -> dict[str, Any]:
    """What goes into the JSON; thinned series too, the dense ones stay in the checkpoints."""
    d = run.dynamics
    time_ps, reported, real = kept(run, len(atoms))
    offset = reported - real  # what the scheme's energy says beyond the reference's, of each position
    angles = dihedral(d.frames, atoms)
    some = slice(None, None, -(-len(time_ps) // POINTS))
    return {
        "scheme": run.scheme,
        "steps": d.steps,
        "ps": float(d.time_ps[-1]),
        "diverged": d.diverged,
        "temperature_k": d.temperature_k,
        **_drift(d.drift),
        "kinetic_fluctuation_mev_per_atom": d.kinetic_fluctuation,
        "reference": None if len(real) < 2 else _drift(energy_drift(time_ps, real)),
        "offset_mev_per_atom": {"mean": float(offset.mean()), "std": float(offset.std())},
        "dihedral_deg": None
        if angles is None
        else {"mean": float(angles.mean()), "std": float(angles.std())},
        "ms_per_step": run.ms_per_step,
        "time_ps": _rounded(time_ps[some], 4),
        "total_mev_per_atom": _rounded((reported - reported[0])[some], 5),
        "reference_total_mev_per_atom": _rounded((real - real[0])[some], 5),
        "dihedral_series_deg": None if angles is None else _rounded(angles[some], 2),
    }


def kept(run: Run, atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def azo_bridge(atoms: Atoms) -> tuple[int, int, int, int] | None:
    """The atoms C-N=N-C of a structure that has one such bridge; None for others."""
    distances, symbols = atoms.get_all_distances(), np.array(atoms.get_chemical_symbols())
    carbons, nitrogens = np.flatnonzero(symbols == "C"), np.flatnonzero(symbols == "N")
    found = []
    for a, b in ((a, b) for a in nitrogens for b in nitrogens if a < b and distances[a, b] < BOND["NN"]):
        ends = [[c for c in carbons if distances[c, n] < BOND["CN"]] for n in (a, b)]
        if all(len(end) == 1 for end in ends):
            found.append((int(ends[0][0]), int(a), int(b), int(ends[1][0])))
    return found[0] if len(found) == 1 else None


def dihedral(frames: np.ndarray, atoms: Atoms) -> np.ndarray | None:
    """The C-N=N-C angle (degrees) of each frame: around their circular mean, which is in [-90, 270).

    So a trans molecule's angles are near 180 and a cis molecule's near 0, without a jump in either.
    """
    bridge = azo_bridge(atoms)
    if bridge is None:
        return None
    a, b, c, d = (frames[:, i] for i in bridge)
    first, axis, last = b - a, c - b, d - c
    left, right = np.cross(first, axis), np.cross(axis, last)
    y = (np.cross(left, right) * axis).sum(1) / np.linalg.norm(axis, axis=1)
    return around_mean(np.degrees(np.arctan2(y, (left * right).sum(1))))


def around_mean(angles: np.ndarray) -> np.ndarray:
    """Angles in degrees, each less than half a turn from their circular mean."""
    turns = np.exp(1j * np.radians(angles))
    mean = (np.degrees(np.angle(turns.mean())) + 90.0) % 360.0 - 90.0
    return mean + np.degrees(np.angle(turns * np.exp(-1j * np.radians(mean))))


# --- table ----------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    s = result["settings"]
    turning = any(r["dihedral_deg"] for r in result["runs"])
    dihedrals = " C-N=N-C: mean and standard deviation of the dihedral over the run." if turning else ""
    head = ["scheme", "ps", "drift", "noise", "drift, fp32 energy", "noise, fp32 energy", "T (K)"]
    head += ["C-N=N-C (°)"] * turning + ["ms/step", ""]
    lines = [
        f"{result['model']}, {result['molecule']} ({result['atoms']} atoms), steps of "
        f"{s['timestep_fs']:g} fs from {s['temperature_k']:g} K, backend {result['backend']}. ps: the length "
        "that was reached. Drift: meV/atom/ps, slope ± standard error; noise: RMS about the line, meV/atom. "
        '"fp32 energy": the same trajectory, its potential energy evaluated by the fp32 potential.'
        f"{dihedrals}",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *(_line(r, turning, result["steps"]) for r in result["runs"]),
    ]
    if result["not_begun"]:
        lines += ["", f"Not begun: {', '.join(result['not_begun'])}."]
    return "\n".join(lines) + "\n"


def _line(r: dict[str, Any], turning: bool, steps: int) -> str:
    real, angle = r["reference"] or {}, r["dihedral_deg"] or {}
    cells = [
        f"`{r['scheme']}`",
        f"{r['ps']:.6g}",
        _with_error(r["drift_mev_per_atom_ps"], r["drift_error"]),
        _number(r["fluctuation_mev_per_atom"]),
        _with_error(real.get("drift_mev_per_atom_ps"), real.get("drift_error")),
        _number(real.get("fluctuation_mev_per_atom")),
        f"{r['temperature_k']:.0f}",
        *[f"{_number(angle.get('mean'), '.1f')} ± {_number(angle.get('std'), '.1f')}"] * turning,
        _number(r["ms_per_step"], ".2f"),
        _end(r, steps),
    ]
    return "| " + " | ".join(cells) + " |"


def _end(r: dict[str, Any], steps: int) -> str:
    """Why the run is shorter than it was to be; nothing for a complete one."""
    if r["diverged"]:
        return f"diverged at {r['ps']:.6g} ps: {r['diverged'].splitlines()[0]}"
    return f"unfinished, {100 * r['steps'] / steps:.3g} %" if r["steps"] < steps else ""


def _with_error(value: float | None, error: float | None) -> str:
    """To two digits of the error."""
    if error is None or not 0.0 < error < np.inf:
        return f"{_number(value, '+.4f')} ± –"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{_number(value, f'+.{digits}f')} ± {error:.{digits}f}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None or not np.isfinite(value) else format(value, form)


# --- plot -----------------------------------------------------------------------------------------


def plot(path: Path, runs: list[Run], atoms: Atoms, title: str) -> None:
    """One row per scheme: the total energy, as reported and with the fp32 energy; beside it the dihedral."""
    from matplotlib.figure import Figure

    turning = azo_bridge(atoms) is not None
    size = (12 if turning else 8, 1 + 2 * len(runs))
    figure = Figure(figsize=size, layout="constrained")
    widths = [2, 1] if turning else [1]
    panels = figure.subplots(len(runs), len(widths), sharex=True, squeeze=False, width_ratios=widths)
    for row, r in zip(panels, runs, strict=True):
        _energies(row[0], r, len(atoms))
        angles = dihedral(r.dynamics.frames, atoms)
        if angles is not None:
            _draw(row[1], r.dynamics.time_ps[r.dynamics.frame_steps], angles, "tab:green", "")
            row[1].set_ylabel("C-N=N-C (°)")
            row[1].set_title(f"{angles.mean():.1f} ± {angles.std():.1f}°", fontsize=9)
    panels[0, 0].legend(fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("time (ps)")
    figure.suptitle(f"Total energy, {title}")
    figure.savefig(path, dpi=100)


def _energies(panel: Any, r: Run, atoms: int) -> None:
    d = r.dynamics
    time_ps, _, real = kept(r, atoms)
    _draw(panel, d.time_ps, 1e3 * (d.total - d.total[0]) / atoms, "tab:blue", "as reported")
    _draw(panel, time_ps, real - real[0], "tab:orange", "with the fp32 energy")
    end = f", diverged at {d.time_ps[-1]:.6g} ps" if d.diverged else ""
    panel.set_title(f"{r.scheme}: {_with_error(d.drift.slope, d.drift.error)} meV/atom/ps{end}", fontsize=9)
    panel.set_ylabel("meV/atom")


def _draw(panel: Any, time_ps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """A curve; a long one as the means of bins, with their extremes as a shade behind."""
    if len(values) <= 2 * BINS:
        panel.plot(time_ps, values, lw=0.8, color=color, label=label)
        return
    time, mean, low, high = envelope(time_ps, values, BINS)
    panel.fill_between(time, low, high, color=color, alpha=0.25, lw=0)
    panel.plot(time, mean, lw=0.9, color=color, label=label)


def envelope(
    time: np.ndarray, values: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of consecutive bins of nearly equal size: mean time, and mean, least and largest value."""
    edges = np.linspace(0, len(values), bins + 1).round().astype(int)[:-1]
    sizes = np.diff([*edges, len(values)])
    means = (np.add.reduceat(time, edges) / sizes, np.add.reduceat(values, edges) / sizes)
    return *means, np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
