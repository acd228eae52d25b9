"""The ASE calculator: one evaluation per structure, ASE's conventions, typed errors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.md.verlet import VelocityVerlet

from gaq_compile.capture.structures import check_structure
from gaq_compile.datasets import example_structures
from gaq_compile.errors import FileFormatError, StructureError, UnknownElementError
from gaq_compile.integrations.ase import GAQCalculator
from gaq_compile.potential import Potential
from gaq_compile.verify.types import Prediction

SPRING = 2.0  # eV/Å^2


class Springs(Potential):
    """Every atom on a spring to the origin; counts its evaluations."""

    def __init__(self) -> None:
        self.report = SimpleNamespace()
        self.evaluations = 0

    def predict(self, structures):
        found = []
        for atoms in structures:
            check_structure(atoms)
            self.evaluations += 1
            x = atoms.positions
            energies = 0.5 * SPRING * (x**2).sum(axis=1) + atoms.info.get("charge", 0.0)
            stress = np.arange(9.0).reshape(3, 3) if atoms.pbc.all() else None
            stress = None if stress is None else (stress + stress.T) / 2
            forces = (-SPRING * x).astype(np.float32)
            found.append(Prediction(float(energies.sum()), forces, stress, energies))
        return found


@pytest.fixture
def springs() -> Springs:
    return Springs()


@pytest.fixture
def dimer(springs: Springs) -> Atoms:
    return Atoms("CO", positions=[[0.5, 0, 0], [-0.6, 0.1, 0]], calculator=GAQCalculator(springs))


def test_energy_and_forces(dimer: Atoms) -> None:
    assert dimer.get_potential_energy() == pytest.approx(0.25 + 0.37)
    assert dimer.get_potential_energy(force_consistent=True) == dimer.get_potential_energy()
    assert dimer.get_potential_energies().sum() == pytest.approx(dimer.get_potential_energy())
    assert dimer.get_forces().dtype == np.float64
    np.testing.assert_allclose(dimer.get_forces(), -SPRING * dimer.positions, rtol=1e-6)


def test_nothing_is_computed_twice(dimer: Atoms, springs: Springs) -> None:
    dimer.get_forces()
    dimer.get_potential_energy()
    dimer.get_potential_energies()
    dimer.set_initial_charges([0.1, -0.1])
    dimer.get_forces()
    for _ in range(2):
        with pytest.raises(PropertyNotImplementedError):
            dimer.get_stress()
    assert springs.evaluations == 1
    dimer.positions[0, 0] += 1e-4
    dimer.get_forces()
    assert springs.evaluations == 2


def test_every_number_that_potentials_read_counts_as_a_change(dimer: Atoms, springs: Springs) -> None:
    def moved() -> None:
        dimer.positions[1, 2] = np.nextafter(dimer.positions[1, 2], 1.0)

    changes = {
        "positions": moved,
        "numbers": lambda: dimer.set_atomic_numbers([6, 7]),
        "cell": lambda: dimer.set_cell([5, 5, 5]),
        "pbc": lambda: dimer.set_pbc([True, False, False]),
    }
    assert set(dimer.calc.check_state(dimer)) >= set(changes)  # nothing was evaluated yet
    for count, (name, change) in enumerate(changes.items(), 1):
        dimer.get_forces()
        assert dimer.calc.check_state(dimer) == [] and springs.evaluations == count
        change()
        assert dimer.calc.check_state(dimer) == [name]
    dimer.get_forces()
    del dimer[1]
    assert set(dimer.calc.check_state(dimer)) == {"positions", "numbers"}


def test_the_evaluated_structure_is_a_copy_of_its_own(dimer: Atoms) -> None:
    kept = []
    for step in range(3):
        dimer.positions[0, 0] = 0.5 + 0.1 * step
        dimer.set_momenta(np.full((2, 3), float(step)))
        dimer.info["step"] = step
        dimer.get_forces()
        kept.append(dimer.calc.atoms)
    dimer.positions[:] = 0.0
    assert [atoms.positions[0, 0] for atoms in kept] == [0.5, 0.6, 0.7]
    assert [atoms.get_momenta()[0, 0] for atoms in kept] == [0.0, 1.0, 2.0]
    assert [atoms.info["step"] for atoms in kept] == [0, 1, 2]


def test_a_callers_changes_of_results_do_not_come_back(dimer: Atoms) -> None:
    dimer.get_forces()[:] = 7.0
    assert np.abs(dimer.get_forces()).max() < 7.0


def test_charge_counts_as_a_change(dimer: Atoms, springs: Springs) -> None:
    neutral = dimer.get_potential_energy()
    dimer.info["charge"] = 1
    assert dimer.get_potential_energy() == pytest.approx(neutral + 2)
    assert springs.evaluations == 2
    dimer.info["comment"] = "does not matter"
    dimer.get_forces()
    assert springs.evaluations == 2


def test_stress_is_voigt_and_for_full_periodicity_only(dimer: Atoms) -> None:
    dimer.set_cell([5, 5, 5])
    dimer.pbc = (True, True, False)
    with pytest.raises(PropertyNotImplementedError):
        dimer.get_stress()
    dimer.pbc = True
    np.testing.assert_allclose(dimer.get_stress(), [0, 4, 8, 6, 4, 2])
    assert dimer.get_stress(voigt=False).shape == (3, 3)


def test_a_bad_structure_raises_and_leaves_no_old_answer(dimer: Atoms) -> None:
    dimer.get_forces()
    good = dimer.positions.copy()
    dimer.positions[1] = np.nan
    for _ in range(2):
        with pytest.raises(StructureError, match="NaN"):
            dimer.get_forces()
    dimer.positions[:] = good[0]
    with pytest.raises(StructureError, match="coincident"):
        dimer.get_potential_energy()
    dimer.positions[:] = good
    np.testing.assert_allclose(dimer.get_forces(), -SPRING * good, rtol=1e-6)


def test_dynamics_conserve_energy(dimer: Atoms, springs: Springs) -> None:
    dimer.positions[:] = [[0.5, 0, 0], [0, 0.6, 0]]
    dimer.set_momenta([[0, 2, 0], [-2, 0, 0]])  # round the springs' centre, a quarter turn apart
    dynamics = VelocityVerlet(dimer, timestep=0.2 * units.fs)
    before = dimer.get_total_energy()
    dynamics.run(200)
    assert dimer.get_total_energy() == pytest.approx(before, abs=1e-3)
    assert springs.evaluations == 201


def test_foreign_file(tmp_path) -> None:
    path = tmp_path / "foreign.gaq"
    path.write_text("not a potential")
    with pytest.raises(FileFormatError):
        GAQCalculator(path)


def test_so3lr_through_ase(monkeypatch, so3lr_w8a8: Potential, so3lr_file) -> None:
    atoms = example_structures("azobenzene")[5]
    wanted = so3lr_w8a8(atoms)
    for potential in (so3lr_w8a8, so3lr_file, str(so3lr_file)):
        atoms.calc = GAQCalculator(potential)
        assert atoms.get_potential_energy() == wanted.energy
        # gradients of gathers are summed in the order in which threads arrive, and rounded after
        np.testing.assert_allclose(atoms.get_forces(), wanted.forces, atol=2e-3)
    monkeypatch.setattr(so3lr_w8a8, "form", replace(so3lr_w8a8.form, elements=(1, 6)))
    atoms.calc = GAQCalculator(so3lr_w8a8)
    with pytest.raises(UnknownElementError, match="does not know N"):
        atoms.get_forces()
