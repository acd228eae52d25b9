"""Analytic potentials to measure, and faults to plant in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential

from gaq_compile.verify.structures import rattled
from gaq_compile.verify.types import Evaluate, Prediction, from_calculator

Fault = Callable[[Atoms, Prediction], Prediction]


@pytest.fixture
def crystal() -> list[Atoms]:
    """Two rattled copper supercells, 32 atoms, periodic."""
    return [rattled(bulk("Cu", cubic=True) * (2, 2, 2), 0.08, seed) for seed in (1, 2)]


@pytest.fixture
def molecules() -> list[Atoms]:
    return [rattled(molecule(name), 0.05, seed) for seed, name in enumerate(("CH3CH2OH", "C6H6"))]


@pytest.fixture
def emt() -> Evaluate:
    return from_calculator(EMT())


@pytest.fixture
def lennard_jones() -> Evaluate:
    return from_calculator(LennardJones(sigma=2.3, epsilon=0.3, rc=6.0, smooth=True))


@pytest.fixture
def morse() -> Evaluate:
    """Molecules: every pair of atoms, bound by 1 eV at 1.6 Å."""
    return from_calculator(MorsePotential(epsilon=1.0, r0=1.6, rho0=3.0, rcut1=9.0, rcut2=10.0))


def _with(evaluate: Evaluate, fault: Fault) -> Evaluate:
    return lambda structures: [fault(a, p) for a, p in zip(structures, evaluate(structures), strict=True)]


@pytest.fixture
def planted() -> Callable[[Evaluate, Fault], Evaluate]:
    """Wrap an evaluator so that each of its predictions goes through a fault."""
    return _with


def _float32(atoms: Atoms, p: Prediction, *, offset: float = 0.0, per_atom: bool = True) -> Prediction:
    assert p.energies is not None
    energies = (p.energies + offset).astype(np.float32)
    return replace(
        p,
        energy=float(energies.sum(dtype=np.float32)),
        forces=p.forces.astype(np.float32),
        energies=energies if per_atom else None,
    )


@pytest.fixture
def float32() -> Callable[..., Prediction]:
    """What a float32 model would say, each atom's energy ``offset`` eV lower or higher."""
    return _float32
