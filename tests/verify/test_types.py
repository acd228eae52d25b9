from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from gaq_compile.errors import StructureError, VerificationError
from gaq_compile.verify.types import (
    Prediction,
    energy_difference,
    energy_resolution,
    evaluated,
    from_calculator,
    full_stress,
)


def test_calculator_answers_with_raw_forces_of_constrained_atoms():
    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 1.0]], constraint=FixAtoms([0, 1]))
    (answer,) = from_calculator(LennardJones())([atoms])
    assert np.abs(answer.forces).max() > 1.0
    assert answer.energies is not None and answer.energies.sum() == pytest.approx(answer.energy)
    assert answer.stress is None  # not periodic
    assert atoms.constraints  # the caller's structure is as it was


def test_voigt_order_is_ases():
    tensor = full_stress(np.arange(6.0))
    assert (tensor == tensor.T).all()
    assert tensor[1, 2] == 3 and tensor[0, 2] == 4 and tensor[0, 1] == 5
    assert (full_stress(tensor) == tensor).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, energy=float("nan")), "energy is not finite"),
        (lambda p: replace(p, forces=p.forces[:1]), "forces of shape"),
        (lambda p: replace(p, forces=p.forces + np.inf), "forces is not finite"),
        (lambda p: replace(p, stress=np.zeros(6)), "stress of shape"),
        (lambda p: replace(p, energies=p.energies + 1.0), "per-atom energies sum to"),
    ],
)
def test_answers_that_nobody_can_judge_are_refused(lennard_jones, planted, change, message):
    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 2.2]])
    with pytest.raises(VerificationError, match=message):
        evaluated(planted(lennard_jones, lambda _, p: change(p)), [atoms])


def test_number_of_answers_and_of_structures(lennard_jones):
    with pytest.raises(VerificationError, match="0 predictions for 1"):
        evaluated(lambda structures: [], [Atoms("Ar")])
    with pytest.raises(StructureError, match="no structures"):
        evaluated(lennard_jones, [])


def test_energy_difference_keeps_digits_that_the_float32_total_lost():
    energies = np.full(1000, -5.0, dtype=np.float32)
    moved = energies.copy()
    moved[0] += np.float32(1e-5)
    forces = np.zeros((1000, 3))
    a = Prediction(float(moved.sum(dtype=np.float32)), forces, energies=moved)
    b = Prediction(float(energies.sum(dtype=np.float32)), forces, energies=energies)
    assert a.energy == b.energy
    assert energy_difference(a, b) == pytest.approx(1e-5, rel=0.1)
    assert energy_difference(replace(a, energies=None), b) == 0.0
    assert energy_resolution(replace(a, energies=None)) == np.spacing(np.float32(5000))
    assert energy_resolution(replace(a, energies=None, energy=-5000.1)) == np.spacing(5000.1)
