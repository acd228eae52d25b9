"""SevenNet-0 against its own code: molecules, cells, batches, atoms alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from gaq_compile.capture import find_recipe
from gaq_compile.capture.fingerprint import fingerprint
from gaq_compile.errors import CaptureError, StructureError, UnknownElementError
from gaq_compile.operators.registration import ops
from gaq_compile.verify.structures import rattled, strained

pytest.importorskip("sevenn")


@pytest.fixture(scope="module")
def original(sevennet):
    return find_recipe(sevennet).original(sevennet)


def test_the_model_is_the_one_that_its_own_package_builds(sevennet):
    """Ours is built faster, with constants of activations found once."""
    from e3nn.math import _normalize_activation as activations
    from sevenn.calculator import SevenNetCalculator

    plain = SevenNetCalculator("7net-0", device="cpu").model
    assert not hasattr(activations.moment, "cache_info")
    found, expected = (fingerprint(find_recipe(m).energy_model(m).module, {}) for m in (sevennet, plain))
    assert found == expected is not None


def test_captured_graph_is_made_of_gaq_operators(sevennet_compiled):
    count = {}
    for node in sevennet_compiled.graphs["tag_irreps"].graph.nodes:
        if getattr(node.target, "namespace", "") == "gaq":
            count[str(node.target).split(".")[1]] = count.get(str(node.target).split(".")[1], 0) + 1
    assert count.pop("conv") == 5 and count.pop("gate") >= 5 and count.pop("spherical_harmonics") == 1
    assert count.pop("sort_edges") == 1 and count.pop("irreps_linear") > 30
    assert not count, count  # no relayout, no unfused tensor product


def test_every_equivariant_operator_is_tagged(sevennet_compiled):
    for node in sevennet_compiled.graphs["tag_irreps"].graph.nodes:
        if node.target in (ops.conv.default, ops.irreps_linear.default, ops.gate.default):
            assert node.meta.get("irreps"), node


def test_molecules_and_batches(sevennet_compiled, original, agree, ethanol):
    agree(sevennet_compiled, original, [ethanol, rattled(molecule("H2O"), 0.1, 1), molecule("O2")])


def test_atoms_without_neighbours(sevennet_compiled, original, agree):
    """One atom; two out of reach; a molecule with an atom that has no edge."""
    isolated = molecule("H2O") + Atoms("O", [[20, 0, 0]])
    structures = [Atoms("H"), Atoms("Fe"), Atoms("NaCl", [[0, 0, 0], [30, 0, 0]]), isolated]
    agree(sevennet_compiled, original, structures[3:])
    for prediction in sevennet_compiled(structures[:3]):
        assert np.isfinite(prediction.energy) and np.abs(prediction.forces).max() == 0
    free = sevennet_compiled(structures)
    assert free[3].energies[3] == pytest.approx(sevennet_compiled(Atoms("O")).energy, abs=1e-5)
    assert np.abs(free[3].forces[3]).max() == 0


def test_cells(sevennet_compiled, original, agree):
    """Small cells whose atoms are their own neighbours, skewed cells, a slab."""
    salt = rattled(bulk("NaCl", "rocksalt", 5.64), 0.05, 1)
    skewed = rattled(
        strained(bulk("Si"), np.array([[0.02, 0.03, 0], [0.03, -0.01, 0.02], [0, 0.02, 0.01]])), 0.05, 2
    )
    agree(
        sevennet_compiled,
        original,
        [salt, skewed, bulk("Cu"), rattled(fcc111("Al", (1, 1, 2), vacuum=6), 0.05, 3)],
    )


def test_stress(sevennet_compiled, original, sevennet):
    """Against SevenNet's own ASE calculator: sign, order and units."""
    from ase.stress import voigt_6_to_full_3x3_stress
    from sevenn.calculator import SevenNetCalculator

    strain = np.array([[0.03, 0.02, 0.01], [0.02, -0.02, -0.03], [0.01, -0.03, 0.01]])
    atoms = rattled(strained(bulk("NaCl", "rocksalt", 5.64, cubic=True), strain), 0.05, 4)
    got = sevennet_compiled(atoms).stress
    atoms.calc = SevenNetCalculator(sevennet, file_type="model_instance", device="cpu")
    expected = atoms.get_stress(voigt=False)
    assert np.abs(expected).max() > 1e-3 and np.abs(expected[0, 1]) > 1e-4
    assert np.abs(got - expected).max() < 1e-6
    assert np.abs(voigt_6_to_full_3x3_stress(original.predict(atoms).stress) - expected).max() < 1e-6


def test_elements(sevennet_compiled):
    assert len(sevennet_compiled.form.elements) == 89
    with pytest.raises(UnknownElementError, match="Po"):
        sevennet_compiled(Atoms("Po"))
    with pytest.raises(StructureError):
        sevennet_compiled([])


def test_raw_tensors_equal_structures(sevennet_compiled, ethanol):
    from gaq_compile.capture.graphs import collate

    out = sevennet_compiled(collate([ethanol, molecule("CO")], sevennet_compiled.form))
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "energy": (2,), "atomic_energies": (11,), "forces": (11, 3), "virial": (2, 3, 3),
    }  # fmt: skip
    assert out["energy"].dtype == torch.float64
    assert float(out["energy"][0]) == pytest.approx(sevennet_compiled(ethanol).energy, abs=1e-5)


def test_raw_tensors_with_edges_in_any_order(sevennet_compiled, ethanol):
    from gaq_compile.capture.graphs import collate

    tensors = collate([ethanol], sevennet_compiled.form)
    order = torch.randperm(len(tensors["edge_vec"]), generator=torch.Generator().manual_seed(0))
    shuffled = tensors | {name: tensors[name][order] for name in ("edge_vec", "receivers", "senders")}
    expected, found = sevennet_compiled(tensors), sevennet_compiled(shuffled)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


@pytest.mark.parametrize("fault", ["element", "type", "index", "one direction"])
def test_raw_tensors_that_do_not_fit_are_refused(sevennet_compiled, ethanol, fault):
    from gaq_compile.capture.graphs import collate

    tensors = collate([ethanol], sevennet_compiled.form)
    if fault == "element":
        tensors["numbers"] = torch.full_like(tensors["numbers"], 84)
    elif fault == "type":
        tensors["edge_vec"] = tensors["edge_vec"].double()
    elif fault == "index":
        tensors["senders"] = tensors["senders"] + 5
    else:
        half = len(tensors["edge_vec"]) // 2
        tensors |= {name: tensors[name][:half] for name in ("edge_vec", "receivers", "senders")}
    with pytest.raises(StructureError):
        sevennet_compiled(tensors)


def test_the_model_is_untouched(sevennet):
    """Modules, weights, buffers and modes of the model that was given stay as they are, to the bit."""
    state = {k: v.clone() for k, v in sevennet.state_dict().items()}
    kinds = [(n, type(m), id(m), m.training) for n, m in sevennet.named_modules()]
    weights = [(id(p), p.requires_grad) for p in sevennet.parameters()]
    find_recipe(sevennet).energy_model(sevennet)
    assert kinds == [(n, type(m), id(m), m.training) for n, m in sevennet.named_modules()]
    assert weights == [(id(p), p.requires_grad) for p in sevennet.parameters()]
    assert all(torch.equal(state[k], v) for k, v in sevennet.state_dict().items())


def test_no_recipe():
    with pytest.raises(CaptureError, match="Linear"):
        find_recipe(torch.nn.Linear(2, 2))
