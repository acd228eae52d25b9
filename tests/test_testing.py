"""The contract on analytic potentials: true ones pass, each broken one fails the check that is named."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential

from gaq_compile.errors import ConfigError
from gaq_compile.testing import (
    CHECKS,
    ContractError,
    Limits,
    NotClaimed,
    PotentialContract,
    Tolerances,
    failures,
)
from gaq_compile.verify.dynamics import Settings
from gaq_compile.verify.types import from_calculator

Results = dict[str, Any]
Fault = Callable[[Atoms, Results], None]


class Faulty(Calculator):
    """A calculator whose results go through a fault; it has no per-atom energies."""

    def __init__(self, inner: Any, fault: Fault) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault
        self.implemented_properties = [p for p in inner.implemented_properties if p != "energies"]

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.inner.calculate(self.atoms.copy(), ["energy", "forces"], all_changes)
        names = ("energy", "forces", "stress")
        self.results = {k: np.copy(v) for k, v in self.inner.results.items() if k in names}
        self.fault(self.atoms, self.results)
        self.results["energy"] = float(self.results["energy"])


def lennard_jones(smooth: bool = True) -> LennardJones:
    return LennardJones(sigma=2.3, epsilon=0.3, rc=6.0, smooth=smooth)


def morse() -> MorsePotential:
    return MorsePotential(epsilon=1.0, r0=1.6, rho0=3.0, rcut1=9.0, rcut2=10.0)


class Crystal(PotentialContract):
    """Copper, 32 atoms."""

    cutoffs: tuple[float, ...] = (6.0,)

    def calculator(self):
        return lennard_jones()

    def structures(self):
        return [bulk("Cu", cubic=True) * (2, 2, 2)]


class Molecules(PotentialContract):
    cutoffs: tuple[float, ...] = (10.0,)

    def calculator(self):
        return morse()

    def structures(self):
        return [molecule("CH3CH2OH"), molecule("C6H6")]


class TestCrystal(Crystal):
    def original(self):
        return lennard_jones()

    def batch(self):
        return from_calculator(lennard_jones())


class TestMolecules(Molecules):
    def original(self):
        return from_calculator(morse())


class TestWithoutACutoff(Molecules):
    cutoffs = ()
    scan = (2.0, 11.0)


class TestEMT(Molecules):
    cutoffs = ()

    def calculator(self):
        return EMT()


# --- broken potentials --------------------------------------------------------------------------


def distances(atoms: Atoms) -> np.ndarray:
    """Of all pairs in a cluster."""
    return atoms.get_all_distances()[np.triu_indices(len(atoms), 1)]


def step_at_the_cutoff(atoms: Atoms, results: Results) -> None:
    results["energy"] += 1e-3 * np.sum(distances(atoms) < 10.0)


def self_propelled(atoms: Atoms, results: Results) -> None:
    results["forces"] += [2e-2, 0.0, 0.0]


def spinning(atoms: Atoms, results: Results) -> None:
    results["forces"] += 1e-2 * np.cross([0.0, 0.0, 1.0], atoms.positions - atoms.positions.mean(axis=0))


def not_extensive(atoms: Atoms, results: Results) -> None:
    results["energy"] += 1e-4 * len(atoms) ** 2


def first_atom_is_special(atoms: Atoms, results: Results) -> None:
    results["energy"] += 1e-2 * (len(atoms) > 1 and distances(atoms)[0])


def knows_where_it_is(atoms: Atoms, results: Results) -> None:
    results["energy"] += 1e-3 * atoms.positions[:, 2].sum()
    results["forces"][:, 2] -= 1e-3


def knows_its_cell(atoms: Atoms, results: Results) -> None:
    inside = atoms.get_scaled_positions(wrap=False)
    results["energy"] += 1e-2 * np.sum((inside < 0.0) | (inside >= 1.0))


def knows_up(atoms: Atoms, results: Results) -> None:
    heights = atoms.positions[:, 2] - atoms.positions[:, 2].mean()
    results["energy"] += 0.1 * np.sum(heights**2)
    results["forces"][:, 2] -= 0.2 * heights


def chiral(atoms: Atoms, results: Results) -> None:
    arms = atoms.positions - atoms.positions.mean(axis=0)
    results["energy"] += 0.1 * np.linalg.det(arms[:3])


def scaled_forces(atoms: Atoms, results: Results) -> None:
    results["forces"] *= 1.01


def zeroed_forces(atoms: Atoms, results: Results) -> None:
    results["forces"] *= 0.0


def wrong_pressure(atoms: Atoms, results: Results) -> None:
    results["stress"] *= 0.9


def energy_from_nowhere(atoms: Atoms, results: Results) -> None:
    noise = np.random.default_rng(abs(hash(atoms.positions.tobytes())) % 2**32)
    results["energy"] += 0.1 * noise.normal() * len(atoms)


def friction(atoms: Atoms, results: Results) -> None:
    """A force along the velocity: what only dynamics can see."""
    results["forces"] += 0.02 * atoms.get_velocities() * atoms.get_masses()[:, None]


def nothing(atoms: Atoms, results: Results) -> None:
    pass


def broken(kind: type[PotentialContract], calculator: Any, **settings: Any) -> PotentialContract:
    """The contract of another calculator, with the sound one as the original."""
    methods = {"calculator": lambda self: calculator, "original": kind.calculator}
    return type("Broken", (kind,), methods | settings)()


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (step_at_the_cutoff, "cutoff"),
        (self_propelled, "net_force"),
        (spinning, "net_torque"),
        (not_extensive, "extensivity"),
        (first_atom_is_special, "permutation"),
        (knows_where_it_is, "translation"),
        (knows_up, "rotation"),
        (knows_up, "net_torque"),
        (chiral, "reflection"),
        (scaled_forces, "gradient"),
        (scaled_forces, "forces"),
        (not_extensive, "energy"),
        (energy_from_nowhere, "dynamics"),
        (friction, "dynamics"),
    ],
)
def test_each_fault_fails_its_check(fault, name):
    contract = broken(Molecules, Faulty(morse(), fault))
    assert name in failures(contract, (name,))
    assert not failures(broken(Molecules, Faulty(morse(), nothing)), (name,))


@pytest.mark.parametrize(
    ("fault", "name"),
    [(wrong_pressure, "stress_gradient"), (wrong_pressure, "stress"), (knows_its_cell, "translation")],
)
def test_each_fault_of_a_crystal_fails_its_check(fault, name):
    assert name in failures(broken(Crystal, Faulty(lennard_jones(), fault)), (name,))
    assert not failures(broken(Crystal, Faulty(lennard_jones(), nothing)), (name,))


def test_a_chiral_energy_turns_with_the_structure():
    assert set(failures(broken(Molecules, Faulty(morse(), chiral)), ("rotation", "reflection"))) == {
        "reflection"
    }


def test_a_force_that_is_cut_off_kicks():
    found = failures(broken(Crystal, lennard_jones(smooth=False)), ("cutoff",))["cutoff"]
    assert "jump of a force" in found.what and "jump of the energy" not in found.what
    assert "a distance of 6.00" in found.where


def test_a_scan_finds_a_step_whose_place_is_not_known():
    contract = broken(Molecules, Faulty(morse(), step_at_the_cutoff), cutoffs=(), scan=(2.0, 11.0))
    found = failures(contract, ("cutoff",))["cutoff"]
    assert "a distance of 9.9996" in found.where


def test_far_is_the_users():
    assert "extensivity" in failures(broken(Molecules, morse(), far=3.0), ("extensivity",))


def test_a_leaking_batch_is_found():
    def leaks(structures):
        answers = from_calculator(morse())(structures)
        mean = np.mean([p.energy for p in answers])
        return [replace(p, energy=p.energy + 1e-3 * (mean - p.energy), energies=None) for p in answers]

    contract = broken(Molecules, morse(), batch=lambda self: leaks)
    assert "batching" in failures(contract, ("batching",))


def test_an_answer_that_is_not_finite_fails_the_check_that_asked():
    def dies(atoms: Atoms, results: Results) -> None:
        results["energy"] *= 1.0 if len(atoms) < 15 else np.nan

    found = failures(broken(Molecules, Faulty(morse(), dies)), ("gradient", "extensivity"))
    assert set(found) == {"extensivity"}
    assert "energy is not finite" in str(found["extensivity"])


# --- refusals, skips and messages ---------------------------------------------------------------


def test_structures_without_forces_are_refused():
    contract = broken(Crystal, lennard_jones(), rattle=0.0)
    with pytest.raises(ContractError, match="forces vanish: the original's RMS force"):
        contract.check("rotation")


def test_zeroed_forces_are_found_with_and_without_an_original():
    calculator = Faulty(morse(), zeroed_forces)
    with_one = failures(broken(Molecules, calculator))
    assert {"forces", "gradient"} <= set(with_one)
    assert "vanish" not in str(with_one["gradient"])
    without = failures(broken(Molecules, calculator, original=lambda self: None))
    assert {"rotation", "gradient", "net_force", "extensivity", "dynamics"} <= set(without)
    assert "its own RMS force is 0" in str(without["gradient"])


def test_a_failure_says_what_how_much_where_and_what_it_means():
    with pytest.raises(ContractError) as caught:
        broken(Molecules, Faulty(morse(), scaled_forces)).check("gradient")
    text = str(caught.value)
    assert text.startswith("gradient: relative error of F = -dE/dx is 0.0")
    assert "allowed is 0.0005" in text
    assert "structure 0 (C2H6O, 9 atoms, not periodic)" in text
    assert "backward pass" in text
    assert isinstance(caught.value, AssertionError)


def test_what_is_not_claimed_is_skipped_with_the_reason():
    tolerances = Tolerances(gradient=NotClaimed("forces of a measured table"))
    contract = broken(Molecules, Faulty(morse(), scaled_forces), tolerances=tolerances)
    with pytest.raises(unittest.SkipTest, match="gradient is not claimed: forces of a measured table"):
        contract.check("gradient")
    assert "gradient" not in failures(contract)
    with pytest.raises(ConfigError, match="only with a reason"):
        NotClaimed(" ")


def test_a_loosened_tolerance_holds():
    loose = Limits(energy=1e3, force=1e3)
    contract = broken(Molecules, Faulty(morse(), knows_up), tolerances=Tolerances(rotation=loose))
    assert set(failures(contract, ("rotation", "net_torque"))) == {"net_torque"}


def test_checks_without_a_subject_are_skipped():
    reasons = {"energy": "no original", "stress_gradient": "no structure has a stress", "batching": "batch()"}
    contract = broken(Molecules, EMT(), original=lambda self: None)
    for name, reason in reasons.items():
        with pytest.raises(unittest.SkipTest) as skipped:
            contract.check(name)
        assert reason in str(skipped.value)
    with pytest.raises(unittest.SkipTest, match="periodic"):
        broken(Crystal, lennard_jones()).check("net_torque")


def test_diverging_dynamics_fail_and_do_not_crash():
    contract = broken(Molecules, morse(), dynamics_settings=Settings(timestep_fs=50.0))
    with pytest.raises(ContractError, match=r"dynamics: .* after step"):
        contract.check("dynamics")


def test_every_check_has_a_test_and_a_tolerance():
    assert {f"test_{name}" for name in CHECKS} == {n for n in dir(PotentialContract) if n.startswith("test_")}
    assert all(hasattr(Tolerances(), name) for name in CHECKS)


def test_calculator_and_structures_must_be_given():
    with pytest.raises(NotImplementedError, match="def calculator"):
        PotentialContract().calculator()
    with pytest.raises(ConfigError, match="cannot evaluate structures with a int"):
        broken(Molecules, morse(), original=lambda self: 3).check("energy")
