from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase.calculators.lj import LennardJones

from gaq_compile.verify.symmetry import permutation, translation
from gaq_compile.verify.types import Prediction, from_calculator


def test_true_potentials_do_not_care(lennard_jones, morse, crystal, molecules):
    for evaluate, structures in ((lennard_jones, crystal), (morse, molecules)):
        for found in (translation(evaluate, structures), permutation(evaluate, structures)):
            assert found.energy_mev_per_atom < 1e-6 and found.force_mev_per_a < 1e-6
            assert found.pairs == 6
    assert found.stress_mae is None


def test_a_force_that_knows_its_place_is_seen_at_its_size(lennard_jones, crystal, planted):
    def fault(atoms, p: Prediction):
        return replace(p, forces=p.forces + 1e-3 * np.sign(atoms.positions.mean(axis=0)))

    found = translation(planted(lennard_jones, fault), crystal, trials=8)
    assert 2.0 <= found.force_mev_per_a <= 2e3 * np.sqrt(3) * 1e-3 + 1e-6
    assert found.energy_mev_per_atom < 1e-6


def test_an_atom_in_the_next_cell_is_the_same_atom(crystal, planted):
    def fault(atoms, p: Prediction):  # neighbours are lost where an atom is not wrapped
        outside = np.abs(atoms.get_scaled_positions(wrap=False) - 0.5).max(axis=1) > 0.5
        return replace(p, energies=p.energies + 0.01 * outside, energy=p.energy + 0.01 * outside.sum())

    evaluate = from_calculator(LennardJones(sigma=2.3, epsilon=0.3, rc=6.0, smooth=True))
    assert translation(planted(evaluate, fault), crystal, distance=0.0).energy_mev_per_atom > 1.0


def test_a_special_atom_is_seen(morse, molecules, planted):
    def fault(atoms, p: Prediction):
        forces = p.forces.copy()
        forces[0] *= 1.01
        return replace(p, forces=forces)

    found = permutation(planted(morse, fault), molecules)
    assert found.force_mev_per_a > 5.0
    assert translation(planted(morse, fault), molecules).force_mev_per_a < 1e-6


def test_a_total_cannot_hide_behind_atomic_energies(morse, molecules, planted):
    def fault(atoms, p: Prediction):  # 1e-5 of the energies' sum is within what a float32 sum may be off
        offset = -1000.0 - p.energies.mean()
        energies = p.energies + offset
        return replace(p, energies=energies, energy=energies.sum() + 0.01 * (atoms.positions[0, 0] > 0.0))

    found = translation(planted(morse, fault), molecules[:1], trials=8)
    assert found.energy_mev_per_atom == pytest.approx(10.0 / 9, rel=0.01)
