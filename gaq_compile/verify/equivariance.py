"""Local equivariance error (LEE): what a rotation of the structure does to the answer.

A potential is a function of the structure, not of how it lies in space:
``E(Rx) = E(x)``, ``F(Rx) = R F(x)``, ``stress(Rx) = R stress(x) R^T``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .structures import random_rotations, rotated
from .types import Evaluate, energy_difference, evaluated

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class Equivariance:
    """The equivariance error over structures and rotations.

    Attributes:
        force_mev_per_a: LEE, the mean over structures, rotations and atoms of the vector norm
            ``|F(Rx) - R F(x)|``, meV/Å (each structure weighs the same).
        force_max_mev_per_a: the largest of these norms.
        energy_mev_per_atom: mean of ``|E(Rx) - E(x)| / n``, meV/atom.
        energy_max_mev_per_atom: the largest of these.
        stress_mae: mean over components of ``|stress(Rx) - R stress(x) R^T|``, meV/Å^3, or None.
        force_scale_mev_per_a: mean ``|F|`` of an atom, to see the errors against.
        rotations: rotations per structure.
        reflections: whether every second one was improper.
    """

    force_mev_per_a: float
    force_max_mev_per_a: float
    energy_mev_per_atom: float
    energy_max_mev_per_atom: float
    stress_mae: float | None
    force_scale_mev_per_a: float
    rotations: int
    reflections: bool


def equivariance(
    evaluate: Evaluate,
    structures: list[Atoms],
    *,
    rotations: int = 8,
    seed: int = 0,
    reflections: bool = False,
) -> Equivariance:
    """Measure the LEE of ``evaluate`` under random rotations (a periodic cell turns too).

    Args:
        evaluate: the potential.
        structures: better rattled than symmetric: symmetry hides errors by making forces vanish.
        rotations: random rotations per structure, uniform on SO(3); every structure gets its own.
        seed: of the rotations.
        reflections: also test improper rotations (O(3) instead of SO(3)).

    Raises:
        StructureError: if there are no structures.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    forces, energies, stresses, scales, force_max = [], [], [], [], 0.0
    upright = evaluated(evaluate, structures)
    for index, (atoms, origin) in enumerate(zip(structures, upright, strict=True)):
        matrices = random_rotations(rotations, seed + 7919 * index, reflections=reflections)
        turned = evaluated(evaluate, [rotated(atoms, matrix) for matrix in matrices])
        scales.append(float(np.linalg.norm(np.asarray(origin.forces, np.float64), axis=1).mean()))
        for matrix, answer in zip(matrices, turned, strict=True):
            expected = np.asarray(origin.forces, np.float64) @ matrix.T
            error = np.linalg.norm(np.asarray(answer.forces, np.float64) - expected, axis=1)
            forces.append(float(error.mean()))
            force_max = max(force_max, float(error.max()))
            energies.append(abs(energy_difference(answer, origin)) / len(atoms))
            if origin.stress is not None and answer.stress is not None:
                stresses.append(float(np.abs(answer.stress - matrix @ origin.stress @ matrix.T).mean()))
    return Equivariance(
        force_mev_per_a=1e3 * float(np.mean(forces)),
        force_max_mev_per_a=1e3 * force_max,
        energy_mev_per_atom=1e3 * float(np.mean(energies)),
        energy_max_mev_per_atom=1e3 * max(energies),
        stress_mae=1e3 * float(np.mean(stresses)) if stresses else None,
        force_scale_mev_per_a=1e3 * float(np.mean(scales)),
        rotations=rotations,
        reflections=reflections,
    )
