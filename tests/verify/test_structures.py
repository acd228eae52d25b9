from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms

from gaq_compile.errors import StructureError
from gaq_compile.verify.structures import (
    check_structure,
    random_rotations,
    rattled,
    rotated,
    strained,
)


def _cell(vectors, pbc=True):
    return Atoms("Cu", [[0, 0, 0]], cell=vectors, pbc=pbc)


@pytest.mark.parametrize(
    "atoms",
    [
        Atoms("H"),
        Atoms("H2", [[0, 0, 0], [0, 0, 0.11]]),
        bulk("Cu"),
        bulk("NaCl", "rocksalt", a=5.64) * 2,
        _cell([[3, 0, 0], [0, 3, 0], [0, 0, 0]], pbc=(True, True, False)),  # a slab without a third vector
        _cell([[3, 0, 0], [0, 3, 0], [0, 0, -3]]),  # left-handed
    ],
    ids=["atom", "close", "primitive", "salt", "slab", "left-handed"],
)
def test_good_structures_pass(atoms):
    check_structure(atoms)


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms(), "without atoms"),
        (Atoms("CO", [[0, 0, 0], [0, 0, np.nan]]), r"NaN or infinite: O\[1\]"),
        (Atoms("CO", [[np.inf, 0, 0], [0, 0, 1]]), r"NaN or infinite: C\[0\]"),
        (Atoms("HCO", [[0, 0, 0], [0, 0, 3], [0, 0.05, 3]]), r"[CO]\[[12]\] and [CO]\[[12]\] are 0.0500"),
        (Atoms("Cu2", [[0.01, 0, 0], [2.99, 0, 0]], cell=[3, 3, 3], pbc=True), r"are 0.0200 Å"),
        (_cell([0.05, 3, 3]), "its own periodic image"),
        (_cell([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), "cell is singular"),
        (_cell([0, 0, 0]), "cell is singular"),
        (_cell([[3, 0, 0], [0, 3, 0], [0, 0, np.nan]]), "cell with NaN"),
    ],
    ids=["empty", "nan", "inf", "coincident", "across", "image", "flat", "none", "nan-cell"],
)
def test_bad_structures_are_named(atoms, message):
    with pytest.raises(StructureError, match=message):
        check_structure(atoms)


def test_wrong_shapes_are_refused():
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 1]])
    atoms.arrays["positions"] = np.zeros((2, 2))
    with pytest.raises(StructureError, match=r"positions of shape \(2, 2\)"):
        check_structure(atoms)


def test_rattled_is_seeded_and_leaves_its_argument():
    atoms = bulk("Cu") * 5
    atoms.set_constraint(FixAtoms(range(len(atoms))))
    first, again, other = (rattled(atoms, 0.1, seed) for seed in (1, 1, 2))
    assert (first.positions == again.positions).all()
    assert (first.positions != other.positions).any()
    assert (first.positions - atoms.positions).std() == pytest.approx(0.1, rel=0.1)
    assert (atoms.positions == (bulk("Cu") * 5).positions).all()


def test_rotations_are_orthogonal_and_cover_reflections_on_request():
    proper, both = random_rotations(6, 3), random_rotations(6, 3, reflections=True)
    for matrix in both:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(proper), 1.0)
    np.testing.assert_allclose(np.linalg.det(both), [1, -1, 1, -1, 1, -1])


def test_rotation_keeps_minimum_image_distances():
    atoms = rattled(bulk("NaCl", "rocksalt", a=5.64) * 2, 0.1, 0)
    turned = rotated(atoms, random_rotations(1, 5)[0])
    np.testing.assert_allclose(
        turned.get_all_distances(mic=True), atoms.get_all_distances(mic=True), atol=1e-10
    )


def test_strain_scales_the_cell_and_keeps_fractions():
    atoms = rattled(bulk("Cu") * 2, 0.1, 0)
    deformed = strained(atoms, np.diag([0.1, 0.0, 0.0]))
    assert deformed.get_volume() == pytest.approx(1.1 * atoms.get_volume())
    np.testing.assert_allclose(
        deformed.get_scaled_positions(wrap=False), atoms.get_scaled_positions(wrap=False), atol=1e-12
    )
