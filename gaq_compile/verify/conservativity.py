"""Are the forces the derivative of the energy, and the stress that with respect to strain?

Central differences. Two errors oppose each other: truncation, ``h^2/6 E'''``, falls with the step
h, and rounding, ``(resolution of E)/h``, grows. In float32 neither a small nor a large step alone
is trustworthy, therefore:

* steps are **RMS displacements per atom**: a direction d, a unit vector of the 3n-dimensional
  space, is walked by ``h * sqrt(n) * d``. Energy change and rounding then scale alike with the
  number of atoms, and one set of steps fits 9 atoms and 900;
* energies are differenced atom by atom in float64 where predictions carry ``energies``; only a
  total is left where they do not (a constant offset would cancel, and digits lost in the model's
  own float32 sum cannot be brought back);
* several steps are taken, each pair of neighbouring ones also gives a Richardson extrapolation
  (truncation ``h^4``), and the **best of them, judged over all directions together**, is the
  error. All are kept: an energy that is piecewise constant (rounded activations) shows by growing
  errors at small steps;
* the errors are seen against the size that ``F.d`` has on average over isotropic directions,
  ``|F| / sqrt(3n)``, so that a direction nearly perpendicular to F does not blow up.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, StructureError
from .structures import displaced, strained
from .types import Evaluate, Prediction, energy_difference, energy_resolution, evaluated

if TYPE_CHECKING:
    from ase import Atoms

STEPS = (2e-2, 1e-2, 5e-3)  # Å, RMS displacement of an atom
STRAINS = (8e-3, 4e-3, 2e-3)
FORCE_FLOOR = 1e-2  # eV/Å: forces below it are compared absolutely
STRESS_FLOOR = 1e-3  # eV/Å^3


@dataclass(frozen=True)
class StepError:
    """The error with one step, or (``order`` 4) with Richardson of it and the next larger step."""

    step: float
    order: int
    error: float


@dataclass(frozen=True)
class Conservativity:
    """How far forces (or stress) are from the derivative of the energy.

    Attributes:
        error: relative error of the best step: RMS over directions and structures of
            ``|dE_numeric - dE_analytic| / scale``, scale the larger of the analytic and the
            numeric RMS derivative (and a floor).
        absolute: the same without the division: meV/Å per force component, or meV/Å^3.
        scale: mean scale, meV/Å or meV/Å^3.
        resolution: the relative error that rounding of the energies alone would cause at the best
            step. An ``error`` of this size says nothing against the forces.
        best: the step that gave ``error``.
        steps: the error of every step and extrapolation.
    """

    error: float
    absolute: float
    scale: float
    resolution: float
    best: StepError
    steps: tuple[StepError, ...]


@dataclass(frozen=True)
class _Derivatives:
    """Along the directions k of one structure: analytic (k,), numeric (steps, k), rounding (steps,).

    ``size`` is the typical analytic derivative of any direction, not only the drawn ones.
    """

    analytic: np.ndarray
    numeric: np.ndarray
    rounding: np.ndarray
    size: float

    @property
    def scale(self) -> float:
        """What to see differences against; the steadiest numeric one counts too, so that forces
        that are zero where they should not be give an error of 1."""
        return max(self.size, min(_rms(row) for row in self.numeric))


def conservativity(
    evaluate: Evaluate,
    structures: list[Atoms],
    *,
    directions: int = 4,
    steps: tuple[float, ...] = STEPS,
    seed: int = 0,
) -> Conservativity:
    """Compare ``F . d`` with ``-dE/dd`` along random unit directions d of the 3n coordinates.

    Costs ``1 + 2 * directions * len(steps)`` evaluations per structure.

    Args:
        evaluate: the potential.
        structures: rattled ones; at a minimum of the energy there is nothing to compare.
        directions: random directions per structure.
        steps: RMS displacements per atom, Å, two or more.
        seed: of the directions.

    Raises:
        StructureError: if there are no structures.
        ConfigError: for fewer than two steps, a step that is not positive, or no direction.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    ordered = _ordered(steps, directions)
    rng = np.random.default_rng(seed)
    found = []
    for atoms, origin in zip(structures, evaluated(evaluate, structures), strict=True):
        units = rng.normal(size=(directions, len(atoms), 3))
        units /= np.linalg.norm(units, axis=(1, 2), keepdims=True)
        walks = [h * np.sqrt(len(atoms)) for h in ordered]
        numeric = np.array(
            [
                _central(evaluate, [displaced(atoms, sign * w * d) for d in units for sign in (1, -1)], w)
                for w in walks
            ]
        )
        forces = np.asarray(origin.forces, dtype=np.float64)
        analytic = -np.einsum("knc,nc->k", units, forces)
        # |F|/sqrt(3n), the RMS of F.d over all directions: the drawn ones' own chance drops out
        found.append(
            _Derivatives(analytic, numeric, _rounding(origin, walks), max(_rms(forces), FORCE_FLOOR))
        )
    return _judged(found, ordered)


def stress_consistency(
    evaluate: Evaluate, structures: list[Atoms], *, strains: tuple[float, ...] = STRAINS
) -> Conservativity:
    """Compare the stress with ``(1/V) dE/dstrain``, for all six strain components.

    Costs ``1 + 12 * len(strains)`` evaluations per structure. An antisymmetric part of the stress
    counts as an error.

    Raises:
        StructureError: if there are no structures, or one without a volume or without a stress.
        ConfigError: for fewer than two strains, or one that is not positive.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    ordered = _ordered(strains, 1)
    bases = _strain_bases()
    found = []
    for index, (atoms, origin) in enumerate(zip(structures, evaluated(evaluate, structures), strict=True)):
        volume = abs(float(np.linalg.det(atoms.cell.array)))
        if origin.stress is None or volume == 0.0:
            raise StructureError(
                "no stress to compare", where=f"structure {index}", fix="give periodic structures"
            )
        numeric = np.array(
            [
                _central(evaluate, [strained(atoms, sign * w * b) for b in bases for sign in (1, -1)], w)
                for w in ordered
            ]
        )
        # three antisymmetric directions have derivative 0: a rotation costs no energy
        numeric = np.concatenate([numeric / volume, np.zeros((len(ordered), 3))], axis=1)
        stress = np.asarray(origin.stress, dtype=np.float64)
        twist = np.array([stress[i, j] - stress[j, i] for i, j in ((0, 1), (0, 2), (1, 2))]) / np.sqrt(2.0)
        analytic = np.concatenate([np.einsum("kij,ij->k", bases, stress), twist])
        rounding = _rounding(origin, [h * volume for h in ordered])
        found.append(_Derivatives(analytic, numeric, rounding, max(_rms(analytic), STRESS_FLOOR)))
    return _judged(found, ordered)


def _ordered(steps: tuple[float, ...], directions: int) -> list[float]:
    if len(set(steps)) < 2 or min(steps) <= 0.0 or directions < 1:
        raise ConfigError(
            f"central differences cannot use steps {steps} along {directions} directions",
            fix="give two or more different positive steps and at least one direction",
        )
    return sorted(set(steps), reverse=True)


def _strain_bases() -> np.ndarray:
    """Six symmetric matrices of Frobenius norm 1, orthogonal to each other: ``(6, 3, 3)``."""
    bases = np.zeros((6, 3, 3))
    for k, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        bases[k, i, j] = bases[k, j, i] = 1.0 if i == j else np.sqrt(0.5)
    return bases


def _central(evaluate: Evaluate, pairs: list[Atoms], walk: float) -> np.ndarray:
    """dE along each direction from structures ordered (+, -, +, -, ...), ``walk`` from the middle."""
    answers = evaluated(evaluate, pairs)
    return np.array(
        [energy_difference(a, b) / (2.0 * walk) for a, b in zip(answers[::2], answers[1::2], strict=True)]
    )


def _rounding(origin: Prediction, walks: list[float]) -> np.ndarray:
    # two independent roundings, uniform within half a spacing: sqrt(2/12) of it
    return np.array([energy_resolution(origin) * np.sqrt(2.0 / 12.0) / (2.0 * w) for w in walks])


def _judged(found: list[_Derivatives], steps: list[float]) -> Conservativity:
    candidates = [_candidate(found, row) for row in np.eye(len(steps)).tolist()]
    labels = [(step, 2) for step in steps]
    for i, (large, small) in enumerate(pairwise(steps)):
        ratio = (large / small) ** 2
        weights = [0.0] * len(steps)
        weights[i], weights[i + 1] = -1.0 / (ratio - 1.0), ratio / (ratio - 1.0)
        candidates.append(_candidate(found, weights))
        labels.append((small, 4))
    best = min(range(len(candidates)), key=lambda k: candidates[k][0])
    table = tuple(StepError(step, order, c[0]) for (step, order), c in zip(labels, candidates, strict=True))
    error, absolute, scale, resolution = candidates[best]
    return Conservativity(error, 1e3 * absolute, 1e3 * scale, resolution, table[best], table)


def _candidate(found: list[_Derivatives], weights: list[float]) -> tuple[float, float, float, float]:
    """(relative error, absolute error, mean scale, relative rounding) of one mix of the steps."""
    relative, absolute, scales, rounding = [], [], [], []
    for d in found:
        numeric = np.asarray(weights) @ d.numeric
        difference = numeric - d.analytic
        relative.append(difference / d.scale)
        absolute.append(difference)
        scales.append(d.scale)
        rounding.append(float(np.linalg.norm(np.asarray(weights) * d.rounding)) / d.scale)
    return (
        _rms(np.concatenate(relative)),
        _rms(np.concatenate(absolute)),
        float(np.mean(scales)),
        _rms(np.array(rounding)),
    )


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
