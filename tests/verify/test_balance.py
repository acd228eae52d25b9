from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from gaq_compile.verify.balance import balance


def test_true_forces_add_up_to_nothing(lennard_jones, morse, crystal, molecules):
    isolated = balance(morse, molecules)
    assert isolated.force < 1e-12 and isolated.torque is not None and isolated.torque < 1e-12
    periodic = balance(lennard_jones, crystal)
    assert periodic.force < 1e-12 and periodic.torque is None and periodic.torque_mev is None


def test_a_push_is_seen_at_its_size(morse, molecules, planted):
    pushed = planted(morse, lambda _, p: replace(p, forces=p.forces + np.array([0.01, 0.0, 0.0])))
    found = balance(pushed, molecules[:1])
    assert found.force_mev_per_a == pytest.approx(90.0)
    forces = pushed(molecules[:1])[0].forces
    assert found.force == pytest.approx(0.09 / np.linalg.norm(forces, axis=1).sum())


def test_a_turn_without_a_push_is_seen(morse, molecules, planted):
    def fault(atoms, p):
        arms = atoms.positions - atoms.positions.mean(axis=0)
        return replace(p, forces=p.forces + 0.05 * np.cross([0.0, 0.0, 1.0], arms))

    found = balance(planted(morse, fault), molecules)
    assert found.force < 1e-12
    assert found.torque is not None and found.torque > 1e-3


def test_a_single_atom_has_a_scale(morse):
    found = balance(morse, [Atoms("C")])
    assert found.force == 0.0 and found.torque == 0.0
