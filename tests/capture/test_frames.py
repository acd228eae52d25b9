"""A structure's own frame does not depend on how the structure was turned."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.capture.frames import own_frame
from gaq_compile.capture.graphs import find_pairs
from gaq_compile.verify.structures import random_rotations, rattled, rotated

STRUCTURES = {
    "molecule": rattled(molecule("CH3CH2OH"), 0.05, 1),
    "crystal": rattled(bulk("NaCl", "rocksalt", 5.6) * (2, 2, 2), 0.05, 1),
    "slab": rattled(fcc111("Cu", (2, 2, 3), vacuum=6.0), 0.05, 1),
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(STRUCTURES)), st.integers(0, 10_000))
def test_the_same_in_every_orientation(name, seed):
    atoms = STRUCTURES[name]
    (rotation,) = random_rotations(1, seed)
    here = rotated(atoms, own_frame(atoms))
    there = rotated(atoms, rotation)
    again = rotated(there, own_frame(there))
    x, y = (a.positions - a.positions[0] for a in (here, again))
    assert np.abs(x - y).max() < 1e-10
    assert np.abs(here.cell.array - again.cell.array).max() < 1e-10
    frame = own_frame(there)
    found, expected = (find_pairs(a, 4.0).turned(own_frame(a)) for a in (there, atoms))  # what is evaluated
    for ends in ("receivers", "senders"):
        assert np.array_equal(getattr(found, ends), getattr(expected, ends))
    assert np.abs(found.vectors - expected.vectors).max() < 1e-10
    assert np.allclose(frame @ frame.T, np.eye(3)) and np.linalg.det(frame) == pytest.approx(1)


def test_mirror_images_stay_mirror_images():
    atoms = STRUCTURES["molecule"]
    mirrored = atoms.copy()
    mirrored.positions[:, 0] *= -1
    a, b = (rotated(m, own_frame(m)) for m in (atoms, mirrored))
    assert np.abs((a.positions - a.positions[0]) - (b.positions - b.positions[0])).max() > 0.1


@pytest.mark.parametrize("name", ["CH4", "H2", "C6H6"])
def test_without_axes_of_its_own_a_structure_is_left_alone(name):
    assert np.array_equal(own_frame(molecule(name)), np.eye(3))
    assert np.array_equal(own_frame(molecule("H2O")[:1]), np.eye(3))


def test_charge_and_spin_go_along():
    water = molecule("H2O")
    water.info.update(charge=1.0, spin=0.5)
    assert rotated(water, own_frame(water)).info == {"charge": 1.0, "spin": 0.5}
