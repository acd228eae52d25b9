"""The bundled frames: geometry, labels and units as in the data set."""

from __future__ import annotations

import numpy as np
import pytest

from gaq_compile.datasets import EXAMPLES, evenly_spaced, example_structures
from gaq_compile.errors import ConfigError

SIZES = {
    "azobenzene": (24, "C12H10N2"),
    "ethanol": (9, "C2H6O"),
    "aspirin": (21, "C9H8O4"),
    "paracetamol": (20, "C8H9NO2"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_frames(name: str) -> None:
    atoms, formula = SIZES[name]
    frames = example_structures(name)
    assert len(frames) == 10
    assert len({frame.info["rmd17_index"] for frame in frames}) == 10
    for frame in frames:
        assert len(frame) == atoms
        assert frame.get_chemical_formula() == formula
        assert not frame.pbc.any()
        forces = frame.get_forces()
        assert forces.shape == (atoms, 3)
        assert 0.1 < np.abs(forces).mean() < 3.0  # eV/Å at a few hundred kelvin
        assert np.abs(forces.sum(axis=0)).max() < 1e-2


def test_energies_are_total_energies_in_ev() -> None:
    """Ethanol's PBE energy is about -155 hartree; frames differ by thermal energies."""
    energies = np.array([frame.get_potential_energy() for frame in example_structures("ethanol")])
    assert np.all(np.abs(energies / 27.2114 + 154.7) < 0.5)
    assert 0.01 < energies.std() < 2.0


def test_each_call_returns_its_own_frames() -> None:
    example_structures("ethanol")[0].positions[:] = 0.0
    assert np.ptp(example_structures("ethanol")[0].positions) > 1.0


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="azobenzene, ethanol"):
        example_structures("water")


@pytest.mark.parametrize(
    ("count", "most", "taken"),
    [(0, 3, []), (2, 3, [0, 1]), (3, 3, [0, 1, 2]), (7, 1, [0]), (10, 2, [0, 9]), (40, 4, [0, 13, 26, 39])],
)
def test_some_of_many_reach_from_the_first_to_the_last(count: int, most: int, taken: list[int]) -> None:
    assert evenly_spaced(range(count), most) == taken
