"""Structures that nobody can evaluate are turned away, with the atom's name."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from gaq_compile.capture.structures import check_structure
from gaq_compile.errors import StructureError


def _refused(atoms) -> str:
    with pytest.raises(StructureError) as error:
        check_structure(atoms)
    return str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_positions_that_are_not_finite(value):
    atoms = molecule("CH3CH2OH")
    atoms.positions[2, 1] = value
    assert "O[2]" in _refused(atoms)


def test_coincident_atoms_are_named():
    text = _refused(Atoms("HOH", [[0, 0, 0], [1, 0, 0], [1, 0, 0.01]]))
    assert "O[1]" in text and "H[2]" in text and "0.01" in text


def test_own_image_and_wrapped_duplicates():
    assert "own periodic image" in _refused(Atoms("H", cell=[0.05, 5, 5], pbc=True))
    wrapped = Atoms("H2", [[0, 0, 0], [5, 0, 0]], cell=[5, 5, 5], pbc=True)
    assert "coincident" in _refused(wrapped)
    wrapped.pbc = False
    check_structure(wrapped)


@pytest.mark.parametrize(
    "cell", [np.zeros((3, 3)), [[5, 0, 0], [5, 0, 0], [0, 0, 5]], [[5, 0, 0], [0, 5, 0], [0, 0, 0]]]
)
def test_singular_cells(cell):
    assert "singular" in _refused(Atoms("H", cell=cell, pbc=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_cells_that_are_not_finite(value):
    atoms = bulk("Cu", cubic=True)
    atoms.cell[0, 0] = value
    assert "cell" in _refused(atoms)


def test_slabs_and_wires_need_no_cell_where_they_are_not_periodic():
    check_structure(fcc111("Cu", (2, 2, 2)))
    check_structure(Atoms("H", cell=[3, 0, 0], pbc=(True, False, False)))


def test_empty_and_foreign():
    assert "without atoms" in _refused(Atoms())
    assert "str" in _refused("H2O") and "list" in _refused([Atoms("H")])


def test_one_atom_is_fine():
    check_structure(Atoms("H"))
