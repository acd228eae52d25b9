from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gaq_compile.verify.parity import parity
from gaq_compile.verify.types import Prediction


def test_the_same_evaluator_has_no_error(emt, crystal):
    found = parity(emt, emt, crystal)
    assert found.energy_mev_per_atom == found.force_mae_mev_per_a == found.force_rel == 0.0
    assert found.stress_mae == 0.0
    assert (found.structures, found.stress_structures) == (2, 2)


def test_known_differences_come_out_in_the_stated_units(emt, crystal, planted):
    def fault(atoms, p: Prediction):
        assert p.stress is not None
        forces = p.forces * 1.1
        return replace(p, energy=p.energy + 0.032, energies=None, forces=forces, stress=p.stress + 0.001)

    found = parity(emt, planted(emt, fault), crystal)
    assert found.energy_mev_per_atom == pytest.approx(1.0)  # 32 meV on 32 atoms
    assert found.energy_max_mev_per_atom == pytest.approx(1.0)
    assert found.force_rel == pytest.approx(0.1)
    assert found.stress_mae == pytest.approx(1.0)
    forces = np.concatenate([np.abs(p.forces).ravel() for p in emt(crystal)])
    assert found.force_mae_mev_per_a == pytest.approx(100 * forces.mean())
    assert found.force_max_mev_per_a == pytest.approx(100 * forces.max())


def test_one_wrong_atom_shows_in_the_maximum(emt, crystal, planted):
    def fault(atoms, p: Prediction):
        forces = p.forces.copy()
        forces[3, 1] += 1.0
        return replace(p, forces=forces, stress=None)

    found = parity(emt, planted(emt, fault), crystal)
    assert found.force_max_mev_per_a == pytest.approx(1000.0)
    assert found.force_mae_mev_per_a == pytest.approx(1000.0 / 96)
    assert found.stress_mae is None and found.stress_structures == 0


def test_relative_error_without_a_reference_force_is_not_small(emt, crystal, planted):
    none = planted(emt, lambda _, p: replace(p, forces=np.zeros_like(p.forces)))
    assert parity(none, emt, crystal).force_rel == float("inf")
    assert parity(none, none, crystal).force_rel == 0.0
    assert parity(emt, none, crystal).force_rel == pytest.approx(1.0)
