from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from gaq_compile.errors import ConfigError
from gaq_compile.verify.smoothness import FINEST, crossing, smoothness
from gaq_compile.verify.structures import rattled
from gaq_compile.verify.types import Prediction


def pair(distance: float) -> Atoms:
    return Atoms("Cu2", [[0, 0, 0], [0, 0, distance]])


def stepped(where: float, energy: float = 0.0, force: float = 0.0):
    """A smooth pair potential with a step of the energy (eV) and of the force (eV/Å)."""

    def evaluate(structures):
        found = []
        for atoms in structures:
            r = atoms.get_distance(0, 1)
            pull = np.exp(-r) + force * (r < where)
            forces = np.array([[0, 0, -pull], [0, 0, pull]])
            value = np.exp(-r) + force * min(0.0, where - r) + energy * (r < where)
            found.append(Prediction(value, forces))
        return found

    return evaluate


def test_a_smooth_potential_has_no_jump():
    found = smoothness(stepped(5.0), pair, 4.98, 5.02)
    assert found.energy_mev < 1e-6 and found.force_mev_per_a < 1e-6
    assert found.step == pytest.approx(FINEST) and found.evaluations == 21


@pytest.mark.parametrize(("low", "high", "points"), [(4.98, 5.02, 21), (2.0, 8.0, 121)])
def test_steps_are_found_at_their_height_and_place(low, high, points):
    found = smoothness(stepped(5.0003, 2e-3, 0.05), pair, low, high, points=points)
    assert found.energy_mev == pytest.approx(2.0, rel=0.1)
    assert found.force_mev_per_a == pytest.approx(50.0, rel=0.01)
    assert found.energy_at == pytest.approx(5.0003, abs=FINEST)
    assert found.force_at == pytest.approx(5.0003, abs=FINEST)
    assert found.step <= FINEST * (1 + 1e-9)


def test_a_steep_slope_is_not_a_step():
    def steep(structures):
        found = []
        for atoms in structures:
            r = atoms.get_distance(0, 1)
            found.append(Prediction(r**-12, np.array([[0, 0, -12 * r**-13], [0, 0, 12 * r**-13]])))
        return found

    coarse = smoothness(steep, pair, 0.8, 4.0, points=65)
    assert coarse.force_mev_per_a < 0.5  # of 218 eV/Å at the start


def test_the_pair_that_is_nearest_to_the_cutoff_crosses_it():
    crystal = rattled(bulk("Cu", cubic=True) * (2, 2, 2), 0.05, 1)
    path = crossing(crystal, 4.4)
    low, high = path(4.39), path(4.41)
    moved = np.linalg.norm(high.positions - low.positions, axis=1)
    (atom,) = np.flatnonzero(moved)
    assert moved[atom] == pytest.approx(0.02)
    for atoms, distance in ((low, 4.39), (high, 4.41)):
        lengths = atoms.get_distances(atom, np.arange(len(atoms)), mic=True)
        assert np.abs(lengths - distance).min() < 1e-9


def test_a_small_molecule_is_approached_from_outside(molecules):
    found = crossing(molecules[0], 12.0)(12.0)
    assert len(found) == 10
    assert found.get_all_distances()[-1, :-1].min() == pytest.approx(12.0)


def test_what_cannot_be_crossed_is_refused():
    with pytest.raises(ConfigError, match=r"no distance within 0\.3 Å"):
        crossing(bulk("Cu"), 3.0)
    with pytest.raises(ConfigError, match="in 5 samples"):
        smoothness(stepped(5.0), pair, 4.0, 5.0, points=5)


def test_a_cut_off_force_of_a_real_potential(lennard_jones, planted, crystal):
    from ase.calculators.lj import LennardJones

    from gaq_compile.verify.types import from_calculator

    path = crossing(crystal[0], 6.0)
    cut = from_calculator(LennardJones(sigma=2.3, epsilon=0.3, rc=6.0))
    assert smoothness(lennard_jones, path, 5.98, 6.02).force_mev_per_a < 0.1
    assert smoothness(cut, path, 5.98, 6.02).force_mev_per_a > 0.5
    shifted = planted(cut, lambda _, p: replace(p, energy=p.energy + 1.0, energies=None))
    assert smoothness(shifted, path, 5.98, 6.02).energy_mev < 0.1
