"""Real models, captured once, and what runs them without kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from torch import nn

import gaq_compile.backends.reference  # noqa: F401 - registers the backend
from gaq_compile.backends.base import make_backend
from gaq_compile.capture import find_recipe
from gaq_compile.capture.base import Original
from gaq_compile.capture.export import export_energy
from gaq_compile.capture.graphs import collate
from gaq_compile.capture.pretrained import load_model
from gaq_compile.config import preset
from gaq_compile.datasets import example_structures
from gaq_compile.passes.derive_forces import derive_forces
from gaq_compile.passes.lower import lower
from gaq_compile.passes.pipeline import prepare
from gaq_compile.passes.simplify import simplify
from gaq_compile.potential import Potential
from gaq_compile.verify.report import Report


def _compiled(model: nn.Module, structures: Sequence[Atoms]) -> Potential:
    energy_model = find_recipe(model).energy_model(model)
    form = energy_model.form
    tensors = collate(structures, form)
    example = [tensors[name] for name in form.inputs]
    exported = export_energy(energy_model, example)
    form = replace(form, limits=exported.limits)
    stages = prepare(exported.graph)
    forces = simplify(derive_forces(stages["tag_irreps"], form, example))
    lowered, placements = lower(forces, [make_backend("reference")])
    report = Report(type(model).__name__, "fp32", "reference", "torch", 0, 0, placements)
    return Potential({**stages, "fold_integers": forces, "lower": lowered}, form, preset("fp32"), report)


@pytest.fixture(scope="session")
def compiled() -> Callable[[nn.Module, Sequence[Atoms]], Potential]:
    """Capture a model over example structures and run it by the reference operators in float32."""
    return _compiled


@pytest.fixture(scope="session")
def ethanol() -> Atoms:
    return example_structures("ethanol")[0]


@pytest.fixture(scope="session")
def sevennet() -> nn.Module:
    pytest.importorskip("sevenn")
    return load_model("sevennet-0")


@pytest.fixture(scope="session")
def sevennet_compiled(sevennet, ethanol) -> Potential:
    return _compiled(sevennet, [ethanol, ethanol[:4]])


def _agree(potential: Potential, original: Original, structures: list[Atoms], forces: float = 1e-4) -> None:
    together = potential(structures)
    for atoms, prediction in zip(structures, together, strict=True):
        expected = original.predict(atoms)
        assert abs(prediction.energy - expected.energy) <= 1e-5 * len(atoms), atoms
        assert np.abs(prediction.forces - expected.forces).max() <= forces, atoms
        if expected.energies is not None:
            assert np.abs(prediction.energies - expected.energies).max() <= 3e-5, atoms
        assert (prediction.stress is None) == (not atoms.pbc.all())
        alone = potential(atoms)
        assert abs(alone.energy - prediction.energy) <= 1e-5 * len(atoms)
        assert np.abs(alone.forces - prediction.forces).max() <= forces


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Energies to 0.01 meV/atom and forces (eV/Å) as the original's, in one batch and one by one."""
    return _agree
