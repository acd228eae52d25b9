"""So3krates against its own code: small random models with every option, and SO3LR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.stress import voigt_6_to_full_3x3_stress

from gaq_compile.capture import find_recipe
from gaq_compile.capture.pretrained import load_model
from gaq_compile.verify.structures import rattled

pytest.importorskip("so3krates_torch")

PLAIN = {
    "r_max": 4.0,
    "num_radial_basis_fn": 8,
    "num_features": 16,
    "num_heads": 2,
    "num_layers": 1,
    "num_elements": 20,
}
SHORT = {"electrostatic_energy_bool": False, "dispersion_energy_bool": False}
OPTIONS = {
    "norms": {
        **SHORT,
        "degrees": [1, 2, 3, 4],
        "message_normalization": "sqrt_num_features",
        "layer_normalization_1": True,
        "layer_normalization_2": True,
        "residual_mlp_1": True,
        "residual_mlp_2": True,
        "cutoff_fn": "phys",
        "radial_basis_fn": "bernstein",
    },
    "options": {
        **SHORT,
        "zbl_repulsion_bool": False,
        "degrees": [0, 1],
        "message_normalization": "identity",
        "qk_non_linearity": "silu",
        "initialize_ev_to_zeros": False,
        "avg_num_neighbors": 6.0,
        "interaction_bias": False,
        "use_charge_embed": True,
        "use_spin_embed": True,
        "energy_learn_atomic_type_shifts": True,
        "energy_learn_atomic_type_scales": True,
        "energy_regression_dim": 8,
        "cutoff_fn": "polynomial",
        "activation_fn": "tanh",
    },
}


def _model(name: str) -> torch.nn.Module:
    from so3krates_torch.modules.models import SO3LR

    torch.manual_seed(1)
    model = SO3LR(**PLAIN, **OPTIONS[name])
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def _structures() -> list[Atoms]:
    water = rattled(molecule("H2O"), 0.05, 1)
    ion = rattled(molecule("CH4"), 0.1, 2)
    ion.info.update(charge=1.0, spin=0.5)
    return [water, ion, molecule("H2O") + Atoms("O", [[20, 0, 0]])]


@pytest.mark.parametrize("name", OPTIONS)
def test_small_models(name, compiled, agree):
    model = _model(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    potential = compiled(model, [molecule("C6H6"), molecule("H2O")])
    agree(potential, find_recipe(model).original(model), _structures(), forces=2e-5)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert model._get_graph.__func__ is type(model)._get_graph


def test_model_without_physics(compiled, agree):
    from so3krates_torch.modules.models import So3krates

    torch.manual_seed(1)
    model = So3krates(**PLAIN, degrees=[1, 2]).float().eval()
    potential = compiled(model, [molecule("C6H6"), molecule("H2O")])
    agree(potential, find_recipe(model).original(model), _structures(), forces=2e-5)


@pytest.fixture(scope="module")
def so3lr():
    return load_model("so3lr")


@pytest.fixture(scope="module")
def so3lr_compiled(so3lr, compiled, ethanol):
    return compiled(so3lr, [ethanol, molecule("H2O")])


def test_so3lr(so3lr, so3lr_compiled, agree, ethanol):
    ion = rattled(molecule("CH4"), 0.1, 2)
    ion.info["charge"] = 1.0
    pair = molecule("H2O") + molecule("H2O")
    pair.positions[3:] += [7.0, 0, 0]  # beyond the short range, within the long range
    # The original adds its reference energies (thousands of eV) in float32; ours does so in float64.
    agree(so3lr_compiled, find_recipe(so3lr).original(so3lr), [ethanol, ion, pair])


def test_so3lr_feels_charge_and_long_range(so3lr_compiled):
    water = molecule("H2O")
    ion = water.copy()
    ion.info["charge"] = 1.0
    assert abs(so3lr_compiled(ion).energy - so3lr_compiled(water).energy) > 0.1
    far = water + molecule("H2O")
    far.positions[3:] += [8.0, 0, 0]
    near = far.copy()
    near.positions[3:] -= [1.0, 0, 0]
    assert abs(so3lr_compiled(far).energy - so3lr_compiled(near).energy) > 1e-4


def test_so3lr_in_a_cell(so3lr, so3lr_compiled):
    """Stress: sign, order and units, with all long-range terms."""
    atoms = rattled(bulk("C", cubic=True), 0.05, 3)
    got, expected = so3lr_compiled(atoms), find_recipe(so3lr).original(so3lr).predict(atoms)
    scale = np.abs(expected.forces).max()
    assert np.abs(got.forces - expected.forces).max() < 1e-4 * max(1.0, scale)
    stress = voigt_6_to_full_3x3_stress(expected.stress)
    assert np.abs(got.stress - stress).max() < 1e-4 * np.abs(stress).max()


def test_so3lr_atoms_alone(so3lr_compiled):
    one, *two = so3lr_compiled([Atoms("H"), Atoms("H"), Atoms("C")])
    assert one.energy == two[0].energy and np.abs(one.forces).max() == 0 and np.isfinite(two[1].energy)
