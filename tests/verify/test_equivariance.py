from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from gaq_compile.verify.equivariance import equivariance
from gaq_compile.verify.types import Prediction


@pytest.mark.parametrize("reflections", [False, True])
def test_true_potentials_are_equivariant(emt, morse, crystal, molecules, reflections):
    for evaluate, structures in ((emt, crystal), (morse, molecules)):
        found = equivariance(evaluate, structures, rotations=3, reflections=reflections)
        assert found.force_scale_mev_per_a > 100
        assert found.force_max_mev_per_a < 1e-6
        assert found.energy_max_mev_per_atom < 1e-6
    assert found.stress_mae is None


def test_a_term_in_x_only_is_seen_at_its_size(emt, crystal, planted):
    def fault(atoms: Atoms, p: Prediction):
        return replace(p, forces=p.forces + np.array([0.01, 0.0, 0.0]))

    found = equivariance(planted(emt, fault), crystal, rotations=48)
    # |x - Rx| has mean 4/3 over SO(3)
    assert found.force_mev_per_a == pytest.approx(10.0 * 4 / 3, rel=0.15)
    assert found.force_max_mev_per_a <= 20.0
    assert found.energy_max_mev_per_atom < 1e-6


def test_an_energy_that_knows_x_is_seen(emt, crystal, planted):
    def fault(atoms: Atoms, p: Prediction):
        field = 1e-2 * (atoms.positions[:, 0] - atoms.positions[:, 0].mean()) ** 2
        return replace(p, energy=p.energy + float(field.sum()), energies=p.energies + field)

    found = equivariance(planted(emt, fault), crystal)
    assert found.energy_mev_per_atom > 0.1 and found.force_mev_per_a < 1e-6


def test_a_stress_that_does_not_turn_is_seen(emt, crystal, planted):
    stress = np.diag([0.01, 0.0, 0.0])
    found = equivariance(planted(emt, lambda _, p: replace(p, stress=stress)), crystal)
    assert found.stress_mae is not None and found.stress_mae > 0.5
    true = equivariance(emt, crystal)
    assert true.stress_mae is not None and true.stress_mae < 1e-6


def test_a_chiral_force_needs_reflections_to_be_seen(morse, molecules, planted):
    def fault(atoms: Atoms, p: Prediction):  # a cross product is a pseudo-vector: fine under SO(3)
        arms = atoms.positions - atoms.positions.mean(axis=0)
        return replace(p, forces=p.forces + 0.01 * np.cross(arms, np.roll(arms, 1, axis=0)))

    chiral = planted(morse, fault)
    assert equivariance(chiral, molecules).force_max_mev_per_a < 1e-6
    assert equivariance(chiral, molecules, reflections=True).force_mev_per_a > 1.0


def test_the_same_seed_measures_the_same(emt, crystal, planted):
    broken = planted(emt, lambda _, p: replace(p, forces=p.forces + np.array([0.01, 0, 0])))
    first = equivariance(broken, crystal[:1], seed=4)
    assert first == equivariance(broken, crystal[:1], seed=4)
    assert first != equivariance(broken, crystal[:1], seed=5)
