from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from ase import Atoms

from gaq_compile.errors import ConfigError, StructureError
from gaq_compile.verify.batching import batching
from gaq_compile.verify.extensivity import doubled, extensivity


def test_twice_the_system_is_twice_the_energy(lennard_jones, morse, crystal, molecules):
    for evaluate, structures in ((lennard_jones, crystal), (morse, molecules)):
        found = extensivity(evaluate, structures)
        assert found.energy_mev_per_atom < 1e-6 and found.force_mev_per_a < 1e-6
        assert found.pairs == 2


def test_an_energy_per_pair_of_atoms_is_seen(morse, molecules, planted):
    def fault(atoms, p):
        return replace(p, energy=p.energy + 1e-3 * len(atoms) ** 2, energies=None)

    found = extensivity(planted(morse, fault), molecules[:1])
    assert found.energy_mev_per_atom == pytest.approx(9.0)  # (18^2 - 2 9^2) / 18


def test_copies_within_reach_feel_each_other(morse, molecules):
    assert extensivity(morse, molecules, far=4.0).energy_mev_per_atom > 0.01
    with pytest.raises(ConfigError, match=r"cannot be 0\.0 Å apart"):
        extensivity(morse, molecules, far=0.0)


def test_the_gap_is_between_nearest_atoms_and_charge_doubles(molecules):
    atoms = molecules[0].copy()
    atoms.info.update(charge=1, note="kept")
    both = doubled(atoms, 15.0)
    distances = both.get_all_distances()[:9, 9:]
    assert distances.min() >= 15.0
    assert both.info == {"charge": 2, "note": "kept"} and atoms.info["charge"] == 1


def test_a_wire_is_repeated_along_its_period():
    wire = Atoms("Cu2", [[0, 0, 0], [0, 0.3, 2.4]], cell=[10, 10, 5], pbc=(False, False, True))
    both = doubled(wire, 20.0)
    np.testing.assert_allclose(both.cell.lengths(), [10, 10, 10])
    assert len(both) == 4


def test_batches_of_a_sound_evaluator(morse, molecules):
    found = batching(morse, molecules)
    assert found.energy_mev_per_atom == found.force_mev_per_a == 0.0
    assert found.pairs == 8
    with pytest.raises(StructureError, match="a batch of one"):
        batching(morse, molecules[:1])


def test_a_neighbour_in_the_batch_is_seen(morse, molecules):
    def leaks(structures):  # the next structure's first force, as with an offset off by one
        answers = morse(structures)
        for answer, other in pairwise(answers):
            answer.forces[-1] = other.forces[0]
        return answers

    assert batching(leaks, molecules).force_mev_per_a > 100.0
