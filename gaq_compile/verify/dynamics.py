"""Does the total energy stay what it was while the atoms move (NVE)?

Velocity Verlet conserves an energy that oscillates about the true one with an amplitude of order
``dt^2``; what remains, a straight trend of potential plus kinetic energy, is the potential's:
forces that are not its derivative, or an energy that jumps.

**The trend's uncertainty.** Neighbouring steps are anything but independent, so the textbook error
of a straight line would be far too small. With residuals e_i about the line and ``u_i = (t_i -
mean t) e_i``, the error of the slope is that of ``sum u_i``; blocks longer than the correlation
time are nearly independent, hence::

    error = sqrt(B / (B - 2) * sum_b (sum_(i in b) u_i)^2) / sum_i (t_i - mean t)^2

for B = 20, 10 and 5 blocks, the largest of which counts: it also serves where 1/20 of the run is
not yet long. Where it is the energy itself that walks at random (rounded activations: each stair
is a small random gift), residuals are correlated over the whole run and no block is long enough.
That shows in the von Neumann ratio of 20 block means (2 for independent ones, 0 for a smooth
curve): below 1.2 the slopes of five separate fifths, which are independent even then, give the
error as ``std / sqrt(5)`` if that is larger. On 200 synthetic runs each, the true slope lay
within one error in 0.7 (white noise, correlation times of 1/80 to 1/2 of the run) and 0.5 to 0.6
(random walk), within two in 0.9 and 0.8.

**Runs can be cut and continued.** Positions, momenta, forces and the energies so far are saved
(:mod:`.checkpoints`); a continued run equals an uninterrupted one bit for bit if the calculator's
answers repeat bit for bit.

The integrator is ASE's ``VelocityVerlet`` written out, operation by operation, so that trajectories
are the same to the last bit: a step here is the calculator's call and a dozen operations on arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import units
from ase.calculators.calculator import CalculatorError
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation

from ..errors import ConfigError, StructureError
from .checkpoints import Checkpoint, State, room
from .structures import displaced

if TYPE_CHECKING:
    from ase import Atoms

BLOCKS = (20, 10, 5)
WALKING = 1.2  # von Neumann ratio of 20 block means below which the energy walks


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        timestep_fs: of velocity Verlet, fs.
        temperature_k: of the Maxwell-Boltzmann distribution of the first velocities, K.
        seed: of the velocities.
        keep_every: steps between the positions that are kept.
        save_every: steps between checkpoints.
        hottest_k: a temperature above it counts as an explosion, K.
    """

    timestep_fs: float = 0.5
    temperature_k: float = 300.0
    seed: int = 0
    keep_every: int = 100
    save_every: int = 500
    hottest_k: float = 20_000.0

    def __post_init__(self) -> None:
        positive = (self.timestep_fs, self.temperature_k, self.keep_every, self.save_every, self.hottest_k)
        if not all(value > 0 for value in positive):
            raise ConfigError("dynamics need positive times, temperatures and intervals", where=repr(self))


@dataclass(frozen=True)
class Drift:
    """The straight line through an energy per atom, by least squares.

    Attributes:
        slope: meV/atom/ps.
        error: standard error of the slope, aware of correlations (see the module); NaN for fewer
            than 20 values.
        fluctuation: RMS of the energy about the line, meV/atom.
    """

    slope: float
    error: float
    fluctuation: float


@dataclass(frozen=True, eq=False)
class Dynamics:
    """A run at constant energy.

    Attributes:
        drift: of the total energy.
        kinetic_fluctuation: standard deviation of the kinetic energy, meV/atom: what the total's
            fluctuation is to be seen against.
        temperature_k: mean of ``2 K / (f kB)`` with f = 3n - 6 degrees of freedom (3n - 3 with
            periodic directions).
        diverged: what went wrong and when, or None; the series end before it.
        time_ps, potential, kinetic: one value per step, the start included; ps, eV, eV.
        frames: kept positions, ``(k, n, 3)`` Å.
        frame_steps: the steps they belong to.
    """

    drift: Drift
    kinetic_fluctuation: float
    temperature_k: float
    diverged: str | None
    time_ps: np.ndarray
    potential: np.ndarray
    kinetic: np.ndarray
    frames: np.ndarray
    frame_steps: np.ndarray

    @property
    def steps(self) -> int:
        """Steps that were made."""
        return len(self.time_ps) - 1

    @property
    def total(self) -> np.ndarray:
        """Potential and kinetic energy, eV."""
        return self.potential + self.kinetic


def nve(
    calculator: Any,
    atoms: Atoms,
    steps: int,
    settings: Settings | None = None,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Dynamics:
    """Run ``steps`` steps of velocity Verlet and judge the total energy.

    The first velocities are drawn from ``settings.seed``, without total momentum and, without
    periodic directions, without angular momentum. Constraints are ignored.

    Args:
        calculator: any ASE calculator with ``energy`` and ``forces``.
        atoms: where to start.
        steps: of the whole run, those of its checkpoint included.
        settings: how to run.
        checkpoint: an ``.npz`` file to continue from where it exists, and to write; the series lie
            beside it. One process at a time.
        progress: told the step that was reached, after each.

    Raises:
        ConfigError: for a negative number of steps.
        StructureError: if the very first structure cannot be evaluated.
        FileFormatError: for a checkpoint that is damaged or of another run, or that another process
            writes to.
    """
    if steps < 0:
        raise ConfigError(f"cannot run {steps} steps")
    settings = settings or Settings()
    moving = displaced(atoms, np.zeros(3))
    moving.calc = calculator
    files = None if checkpoint is None else Checkpoint(checkpoint, _identity(moving, settings))
    state = files.read(steps, settings.keep_every) if files else None
    if state is None:
        state = _started(moving, settings, steps)
    _run(moving, state, steps, settings, files, progress or (lambda step: None))
    return _judged(state, moving, steps, settings)


def recorded(atoms: Atoms, steps: int, settings: Settings, checkpoint: Path) -> Dynamics | None:
    """What :func:`nve` has saved of a run of ``steps`` steps, as far as it has come; None before that.

    Nothing is run or written, so another process may be at it.

    Raises:
        FileFormatError: for a checkpoint that is damaged or of another run.
    """
    start = displaced(atoms, np.zeros(3))
    state = Checkpoint(checkpoint, _identity(start, settings)).read(0, settings.keep_every)
    return None if state is None else _judged(state, start, steps, settings)


def energy_drift(time_ps: np.ndarray, energy: np.ndarray) -> Drift:
    """The trend of ``energy`` (meV/atom) at equally spaced ``time_ps``, with its uncertainty.

    Raises:
        ConfigError: for fewer than two values, or as many times as energies are not.
    """
    if len(time_ps) != len(energy) or len(energy) < 2:
        raise ConfigError(f"no line through {len(energy)} energies at {len(time_ps)} times")
    time = np.asarray(time_ps, dtype=np.float64) - np.mean(time_ps)
    values = np.asarray(energy, dtype=np.float64) - np.mean(energy)
    weight = float(time @ time)
    slope = float(time @ values) / weight
    residual = values - slope * time
    fluctuation = float(np.sqrt(np.mean(residual**2)))
    if len(energy) < max(BLOCKS):
        return Drift(slope, float("nan"), fluctuation)
    errors = [_block_error(time * residual, count) / weight for count in BLOCKS]
    if _von_neumann(residual) < WALKING:
        errors.append(_fifths_error(time, values))
    return Drift(slope, max(errors), fluctuation)


def _block_error(products: np.ndarray, count: int) -> float:
    sums = np.array([block.sum() for block in np.array_split(products, count)])
    return float(np.sqrt(count / (count - 2) * (sums @ sums)))


def _von_neumann(residual: np.ndarray) -> float:
    means = np.array([block.mean() for block in np.array_split(residual, max(BLOCKS))])
    size = float(means @ means)
    return float(np.sum(np.diff(means) ** 2)) / size if size > 0.0 else 2.0


def _fifths_error(time: np.ndarray, values: np.ndarray) -> float:
    parts = zip(np.array_split(time, 5), np.array_split(values, 5), strict=True)
    slopes = [np.polyfit(t - t.mean(), v, 1)[0] for t, v in parts]
    return float(np.std(slopes, ddof=1) / np.sqrt(5))


# --- running ------------------------------------------------------------------------------------


def _started(moving: Atoms, settings: Settings, steps: int) -> State:
    """The first velocities and forces; projecting momenta out keeps the distribution canonical."""
    rng = np.random.default_rng(settings.seed)
    MaxwellBoltzmannDistribution(moving, temperature_K=settings.temperature_k, rng=rng)
    Stationary(moving, preserve_temperature=False)
    if not moving.pbc.any() and len(moving) > 1:
        with np.errstate(divide="ignore", invalid="ignore"):  # ASE's own: no inertia along a line of atoms
            ZeroRotation(moving, preserve_temperature=False)
    positions, momenta, forces = moving.get_positions(), moving.get_momenta(), moving.get_forces(md=True)
    state = State(
        positions, momenta, forces, *room(steps, settings.keep_every, len(moving)), settings.keep_every
    )
    state.energies[0] = moving.get_potential_energy(), moving.get_kinetic_energy()
    state.frames[0] = positions
    if not np.isfinite(forces).all() or not np.isfinite(state.energies[0, 0]):
        raise StructureError("energy or forces of the start are not finite")
    return state


def _run(
    moving: Atoms,
    state: State,
    steps: int,
    settings: Settings,
    files: Checkpoint | None,
    progress: Callable[[int], None],
) -> None:
    moving.set_momenta(state.momenta)  # there has to be such an array
    masses, freedom = moving.get_masses()[:, None], _freedom(moving)
    saved, known = state.step, state.diverged
    while state.step < steps and not state.diverged:
        # the forces of the last step are kept, not computed again: a continued run needs them so
        _step(moving, state, settings, masses, freedom)
        progress(state.step)
        if files and state.step % settings.save_every == 0:
            files.write(state)
            saved = state.step
    if files and (state.step > saved or state.diverged != known):
        files.write(state)


def _step(moving: Atoms, state: State, settings: Settings, masses: np.ndarray, freedom: int) -> None:
    """One step; a run that cannot go on is marked, its last good step stays the last one."""
    dt = settings.timestep_fs * units.fs
    momenta = state.momenta + 0.5 * dt * state.forces
    positions = state.positions + dt * momenta / masses
    moving.arrays["positions"][:] = positions
    moving.arrays["momenta"][:] = momenta
    try:
        forces = moving.get_forces(md=True)
        momenta = momenta + 0.5 * dt * forces
        moving.arrays["momenta"][:] = momenta
        potential = float(moving.get_potential_energy())
    except (StructureError, CalculatorError, ArithmeticError) as error:
        state.diverged = f"the calculator gave up after step {state.step}: {error}"
        return
    kinetic = 0.5 * float(np.vdot(momenta, momenta / masses))
    heat = 2.0 * kinetic / (freedom * units.kB)
    if not (heat <= settings.hottest_k and math.isfinite(potential)):  # a force that is not finite heats
        finite = np.isfinite(forces).all() and math.isfinite(potential)
        what = f"{heat:.0f} K" if finite else "energy or forces are not finite"
        state.diverged = f"{what} after step {state.step}"
        return
    state.positions, state.momenta, state.forces = positions, momenta, forces
    state.step += 1
    state.energies[state.step] = potential, kinetic
    if state.step % state.keep_every == 0:
        state.frames[state.step // state.keep_every] = positions


def _freedom(atoms: Atoms) -> int:
    """Degrees of freedom that velocities without total (angular) momentum have."""
    removed = 3 if atoms.pbc.any() else 6
    return max(1, 3 * len(atoms) - removed)


def _judged(state: State, moving: Atoms, steps: int, settings: Settings) -> Dynamics:
    count = min(state.step, steps) + 1
    potential, kinetic = state.energies[:count].T.copy()
    time = np.arange(count) * settings.timestep_fs * 1e-3
    total = 1e3 * (potential + kinetic) / len(moving)
    kept = 1 + (count - 1) // settings.keep_every
    return Dynamics(
        drift=energy_drift(time, total) if count > 1 else Drift(float("nan"), float("nan"), float("nan")),
        kinetic_fluctuation=1e3 * float(np.std(kinetic)) / len(moving),
        temperature_k=2.0 * float(np.mean(kinetic)) / (_freedom(moving) * units.kB),
        diverged=state.diverged if state.diverged and state.step <= steps else None,
        time_ps=time,
        potential=potential,
        kinetic=kinetic,
        frames=state.frames[:kept].copy(),
        frame_steps=np.arange(kept) * settings.keep_every,
    )


def _identity(atoms: Atoms, settings: Settings) -> str:
    """What must be the same for a run to be continued; how often it is saved need not be."""
    chosen = {key: value for key, value in asdict(settings).items() if key != "save_every"}
    start = [atoms.numbers.tolist(), atoms.positions.tolist(), atoms.cell.array.tolist(), atoms.pbc.tolist()]
    return json.dumps({"format": 2, "settings": chosen, "start": start})
