"""The reference model: symmetries, forces, smoothness at the cutoff, files."""

from __future__ import annotations

import pytest
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

from gaq_compile.capture.graphs import Tensors, collate
from gaq_compile.capture.transformer import form_of
from gaq_compile.datasets import example_structures
from gaq_compile.errors import ConfigError, FileFormatError
from gaq_compile.models import EuclideanTransformer, TransformerConfig, load_checkpoint, save_checkpoint
from gaq_compile.models.transformer import RadialBasis, unit

KINDS = ("normalized", "plain")


def model_of(attention: str = "normalized", **more: object) -> EuclideanTransformer:
    torch.manual_seed(3)
    sizes = {"channels": 8, "heads": 2, "layers": 2, "radial": 6, "attention": attention}
    model = EuclideanTransformer(TransformerConfig((1, 6, 8), **{**sizes, **more}))
    model.set_scales([-13.0, -1000.0, -2000.0], 1.5, 7.0)
    return model.eval()


def ethanol(model: EuclideanTransformer, count: int = 2) -> Tensors:
    return collate(example_structures("ethanol")[:count], form_of(model))


def doubled(model: EuclideanTransformer, tensors: Tensors) -> tuple[EuclideanTransformer, Tensors]:
    return model.double(), {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("l_max", [1, 2, 3])
def test_energies_do_not_turn_and_forces_do(attention: str, l_max: int) -> None:
    model = model_of(attention, l_max=l_max)
    model, tensors = doubled(model, ethanol(model))
    turn = torch.tensor(Rotation.random(random_state=5).as_matrix() @ [[1, 0, 0], [0, -1, 0], [0, 0, 1]])
    energies, forces = model.energy_and_forces(tensors)
    turned = {**tensors, "edge_vec": tensors["edge_vec"] @ turn.T}  # with a reflection: parity holds too
    again, moved = model.energy_and_forces(turned)
    assert float(forces.abs().max()) > 1e-4
    # e3nn's constants are float32
    torch.testing.assert_close(again, energies, atol=1e-6, rtol=0)
    torch.testing.assert_close(moved, forces @ turn.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", KINDS)
def test_forces_are_the_energys_gradient(attention: str) -> None:
    model = model_of(attention)
    atoms = example_structures("ethanol")[0]

    def energy(moved: Atoms) -> float:
        tensors = doubled(model, collate([moved], form_of(model)))[1]
        tensors["edge_vec"] = torch.tensor(moved.positions)[tensors["senders"]]
        tensors["edge_vec"] = tensors["edge_vec"] - torch.tensor(moved.positions)[tensors["receivers"]]
        return float(model.double().energy_and_forces(tensors)[0])

    _, forces = model.double().energy_and_forces(doubled(model, collate([atoms], form_of(model)))[1])
    for atom, axis in ((0, 0), (4, 1), (8, 2)):
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * 1e-3
            ends.append(energy(moved))
        assert -(ends[0] - ends[1]) / 2e-3 == pytest.approx(float(forces[atom, axis]), rel=1e-3, abs=1e-4)


def test_batches_and_order_change_nothing() -> None:
    model = model_of()
    one, two = (collate([a], form_of(model)) for a in example_structures("ethanol")[:2])
    energies, forces = model.energy_and_forces(ethanol(model))
    for k, alone in enumerate((one, two)):
        energy, force = model.energy_and_forces(alone)
        torch.testing.assert_close(energy[0], energies[k], atol=1e-4, rtol=0)
        torch.testing.assert_close(force, forces[9 * k : 9 * k + 9], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", KINDS)
def test_a_neighbour_leaves_the_cutoff_smoothly(attention: str) -> None:
    """Attention's weights go to 0 with the cutoff, also where an atom has one neighbour only."""
    model = model_of(attention)

    def energy(distance: float) -> float:
        tensors = collate([Atoms("OH", [[0, 0, 0], [0, 0, distance]])], form_of(model))
        return float(model(**tensors).sum())

    alone = energy(5.1)
    near = [abs(energy(5.0 - gap) - alone) for gap in (0.4, 0.2, 0.1)]
    assert near[0] > near[1] > near[2] and near[2] < 0.1 * near[0]
    assert abs(energy(4.999) - alone) < 1e-5 * abs(alone)


def test_scores_are_bounded_whatever_the_features() -> None:
    """Robust normalization: features a thousand times larger keep every score within tau."""
    x = torch.randn(50, 4, 16)
    scores = 4.0 * (unit(1e3 * x) * unit(x.flip(0))).sum(-1)
    assert float(scores.abs().max()) <= 4.0 * (1 + 1e-5)
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_the_radial_basis_vanishes_at_the_cutoff() -> None:
    basis = RadialBasis(6, 5.0)
    r = torch.tensor([[2.0, 0.0, 0.0], [0.0, 4.9999, 0.0], [0.0, 0.0, 5.0]])
    values, envelope = basis(r)
    assert values.shape == (3, 6) and float(values[2].abs().max()) < 1e-5 and float(envelope[2]) < 1e-5
    assert float(envelope[1]) < 1e-6 and float(values[0].abs().min()) > 0


def test_a_checkpoint_gives_the_same_bits(tmp_path) -> None:
    model = model_of()
    path = save_checkpoint(model, tmp_path / "model.safetensors", "of a test")
    again = load_checkpoint(path)
    assert again.config == model.config and not again.training
    for a, b in zip(
        model.energy_and_forces(ethanol(model)), again.energy_and_forces(ethanol(model)), strict=True
    ):
        assert torch.equal(a, b)


def test_files_that_are_no_checkpoint(tmp_path) -> None:
    path = save_checkpoint(model_of(), tmp_path / "model.safetensors")
    (tmp_path / "short").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text").write_text("no model")
    for name in ("short", "text", "missing"):
        with pytest.raises(FileFormatError, match="not a checkpoint"):
            load_checkpoint(tmp_path / name)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(FileFormatError, match="a file of kind None"):
        load_checkpoint(tmp_path / "other")
    with pytest.raises(FileFormatError, match="no such folder"):
        save_checkpoint(model_of(), tmp_path / "nowhere" / "model.safetensors")


@pytest.mark.parametrize(
    "wrong", [{"channels": 6, "heads": 4}, {"layers": 0}, {"attention": "other"}, {"elements": ()}]
)
def test_settings_that_make_no_model(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        TransformerConfig(**{"elements": (1,), **wrong})
    with pytest.raises(ConfigError):
        TransformerConfig.from_dict({"elements": [1], "no_such": 1})


def test_elements_that_it_does_not_know_are_refused() -> None:
    from gaq_compile.errors import UnknownElementError

    with pytest.raises(UnknownElementError, match="N"):
        collate([Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])], form_of(model_of()))
