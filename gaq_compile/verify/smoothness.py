"""Do energy and forces stay continuous while a distance crosses the cutoff?

One atom is moved in small equal steps so that one distance goes through the cutoff. Between
neighbouring samples a smooth quantity V changes nearly as much as between the samples before and
after; what is beyond that is a jump::

    jump_k = |dV_k - (dV_(k-1) + dV_(k+1)) / 2|       dV_k = V_(k+1) - V_k

which is ``O(step^3)`` for a smooth V and the whole jump for a broken one. Where a wide range is
scanned, the worst intervals are sampled again, ever finer: a jump keeps its height, a steep slope
loses it. A jump of the energy also means that forces there are not its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from ase.neighborlist import neighbor_list

from ..errors import ConfigError
from .structures import displaced
from .types import Evaluate, energy_difference, evaluated

if TYPE_CHECKING:
    from ase import Atoms

Path = Callable[[float], "Atoms"]

FINEST = 2e-3  # Å; a smooth force of F''' = 1000 eV/Å^4 seems to jump by 0.01 meV/Å
WINDOW = 0.02  # Å to each side of a cutoff that is known
ZOOMED = 3  # of the intervals that look worst, how many are sampled again
ZOOM_POINTS = 13  # three intervals become twelve


@dataclass(frozen=True)
class Smoothness:
    """The largest jumps along a path.

    Attributes:
        energy_mev: of the total energy, meV.
        force_mev_per_a: of any atom's force (vector norm), meV/Å.
        energy_at, force_at: the distances at which they were found, Å.
        step: the finest spacing of samples, Å.
        evaluations: structures evaluated.
    """

    energy_mev: float
    force_mev_per_a: float
    energy_at: float
    force_at: float
    step: float
    evaluations: int


@dataclass(frozen=True)
class _Scan:
    """Jumps (eV, eV/Å) in the intervals between equally spaced distances; outermost ones have none."""

    distances: np.ndarray
    energy: np.ndarray
    force: np.ndarray

    @property
    def step(self) -> float:
        return float(self.distances[1] - self.distances[0])


def smoothness(evaluate: Evaluate, path: Path, low: float, high: float, *, points: int = 21) -> Smoothness:
    """Look for jumps of energy and forces on ``path`` between two distances.

    Args:
        evaluate: the potential.
        path: the structure at a distance (Å), e.g. :func:`crossing`.
        low, high: the range of distances, Å.
        points: samples in the range, six or more; coarse ones are refined until they are at most
            2 mÅ apart, around the worst intervals only, so the samples must not be so coarse that
            everything looks alike.

    Raises:
        ConfigError: for an empty range or fewer than six points.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    if points < 6 or not low < high:
        raise ConfigError(
            f"cannot look for jumps from {low} to {high} Å in {points} samples",
            fix="six or more points in a range that is not empty",
        )
    scans = [_scan(evaluate, path, low, high, points)]
    evaluations = points
    while scans[0].step > FINEST * (1 + 1e-9):
        scans = [_scan(evaluate, path, *around, ZOOM_POINTS) for around in _worst(scans)]
        evaluations += ZOOM_POINTS * len(scans)
    by_energy = max(scans, key=lambda scan: scan.energy.max())
    by_force = max(scans, key=lambda scan: scan.force.max())
    return Smoothness(
        energy_mev=1e3 * float(by_energy.energy.max()),
        force_mev_per_a=1e3 * float(by_force.force.max()),
        energy_at=_place(by_energy, by_energy.energy),
        force_at=_place(by_force, by_force.force),
        step=min(scan.step for scan in scans),
        evaluations=evaluations,
    )


def crossing(atoms: Atoms, cutoff: float, *, near: float = 0.3) -> Path:
    """A path on which one distance between two atoms takes any value around ``cutoff``.

    The pair whose distance is nearest to the cutoff, if one lies within ``near`` Å of it: its
    first atom moves along the line between them. Else, without periodic directions, an atom like
    the outermost one comes from outside.

    Raises:
        ConfigError: if no distance of a periodic structure is near the cutoff.
    """
    plain = displaced(atoms, np.zeros(3))
    first, second, vectors, lengths = neighbor_list("ijDd", plain, cutoff + near)
    usable = np.flatnonzero((first != second) & (np.abs(lengths - cutoff) <= near))
    if len(usable):
        pair = usable[np.argmin(np.abs(lengths[usable] - cutoff))]
        away = -vectors[pair] / lengths[pair]
        shift = np.zeros((len(plain), 3))
        shift[first[pair]] = away
        start = float(lengths[pair])
        return lambda distance: displaced(plain, (distance - start) * shift)
    if plain.pbc.any():
        raise ConfigError(
            f"no distance within {near} Å of the cutoff of {cutoff} Å",
            where=plain.get_chemical_formula(),
            fix="give the right cutoff, or another structure",
        )
    return _approach(plain)


def _approach(plain: Atoms) -> Path:
    arms = plain.positions - plain.positions.mean(axis=0)
    outermost = int(np.argmax(np.linalg.norm(arms, axis=1)))
    length = float(np.linalg.norm(arms[outermost]))
    outwards = arms[outermost] / length if length > 0.0 else np.array([0.0, 0.0, 1.0])
    both = plain + plain[[outermost]]
    shift = np.zeros((len(both), 3))
    shift[-1] = outwards
    return lambda distance: displaced(both, distance * shift)


def _scan(evaluate: Evaluate, path: Path, low: float, high: float, points: int) -> _Scan:
    distances = np.linspace(low, high, points)
    answers = evaluated(evaluate, [path(float(distance)) for distance in distances])
    energies = np.array([energy_difference(b, a) for a, b in pairwise(answers)])
    forces = np.array([np.asarray(b.forces, np.float64) - a.forces for a, b in pairwise(answers)])
    return _Scan(distances, np.abs(_beyond(energies)), np.linalg.norm(_beyond(forces), axis=2).max(axis=1))


def _beyond(changes: np.ndarray) -> np.ndarray:
    """What each change has beyond the mean of its neighbours; 0 for the outermost two."""
    found = np.zeros_like(changes)
    found[1:-1] = changes[1:-1] - (changes[:-2] + changes[2:]) / 2
    return found


def _worst(scans: list[_Scan]) -> list[tuple[float, float]]:
    """The ranges to sample again: around the worst intervals of all, by energy and by force."""
    chosen: set[tuple[float, float]] = set()
    for name in ("energy", "force"):
        found = [(jump, s, k) for s, scan in enumerate(scans) for k, jump in enumerate(getattr(scan, name))]
        for _, s, k in sorted(found)[-ZOOMED:]:
            scan = scans[s]
            middle = float(scan.distances[k] + scan.distances[k + 1]) / 2
            chosen.add((middle - 1.5 * scan.step, middle + 1.5 * scan.step))
    return sorted(chosen)


def _place(scan: _Scan, jumps: np.ndarray) -> float:
    k = int(jumps.argmax())
    return float((scan.distances[k] + scan.distances[k + 1]) / 2)
