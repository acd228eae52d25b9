"""quantize from the outside: what it returns, what it refuses and how it says so."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from e3nn import nn as enn
from e3nn import o3
from small_models import Small, neighbours
from torch import nn

import gaq_compile
from gaq_compile import api
from gaq_compile.capture.pretrained import load_model
from gaq_compile.config import PRESETS
from gaq_compile.errors import (
    AccuracyWarning,
    CaptureError,
    ConfigError,
    GaqError,
    NoEdgesError,
    StructureError,
    UnknownElementError,
    VerificationError,
)
from gaq_compile.operators import reference
from gaq_compile.verify import checks
from gaq_compile.verify.types import Prediction

QUIET = {"backend": "reference", "measure": False, "progress": False}


class Gated(Small):
    """A potential of one's own: one convolution, a gate, a radial network."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = o3.Linear("4x0e+4x1o", "8x0e+4x1o")
        self.gate = enn.Gate("4x0e", [torch.tanh], "4x0e", [torch.sigmoid], "4x1o")
        self.head = o3.Linear("4x0e", "1x0e")

    def forward(self, positions, species, senders, receivers):
        y = self.last(self.gate(self.mix(self.sums(positions, species, senders, receivers))))
        return self.head(y[:, :4]).squeeze(-1) + y[:, 4:].square().sum(1)


def _truth(model: nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    x = tensors["positions"].clone().requires_grad_(True)
    energy = model(x, *list(tensors.values())[1:])
    return energy.detach(), -torch.autograd.grad(energy.sum(), x)[0]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return Gated()


@pytest.fixture(scope="module")
def potential(small):
    return gaq_compile.quantize(small, list(neighbours(6).values()), "w8", **QUIET)


@pytest.fixture(scope="module")
def sevennet():
    pytest.importorskip("sevenn")
    return load_model("sevennet-0")


# --- a model of one's own -----------------------------------------------------------------------


def test_an_error_that_is_missed_on_other_structures_is_told(small):
    """Bits are chosen on some structures and the result is measured on others."""
    example = list(neighbours(6).values())
    plain = gaq_compile.quantize(small, example, "w4", **QUIET).report.accuracy["force_mae_mev_per_a"]
    potential = gaq_compile.quantize(small, example, "auto", max_force_error=0.5 * plain, **QUIET)
    assert potential.report.choice["force_mae_mev_per_a"] <= 0.5 * plain
    assert potential.report.accuracy["force_mae_mev_per_a"] < plain
    assert potential.config.max_force_error == 0.5 * plain
    api._warn_if_missed(potential.report, 2 * plain)
    with pytest.warns(AccuracyWarning, match="not used to choose"):
        api._warn_if_missed(potential.report, 1e-6)


def test_a_choice_survives_a_file(small, tmp_path):
    potential = gaq_compile.quantize(
        small, list(neighbours(6).values()), "auto", max_force_error=50.0, overrides={"last": "w8"}, **QUIET
    )
    loaded = gaq_compile.load(potential.save(tmp_path / "small.gaq"), backend="reference")
    assert loaded.config == potential.config and loaded.config.max_force_error == 50.0
    assert loaded.report.choice == json.loads(json.dumps(potential.report.choice)) != {}
    assert loaded.report.to_dict()["choice"]["trials"]


def test_auto_wants_to_know_the_force_error(small):
    with pytest.raises(ConfigError, match="none is given"):
        gaq_compile.quantize(small, list(neighbours(6).values()), "auto", **QUIET)


def test_report_and_stages(potential):
    prepared = ("simplify", "cancel_relayouts", "fuse_tensor_products", "scale_convolutions", "tag_irreps")
    made = ("insert_mddq", "derive_forces", "fold_integers", "lower")
    assert {"capture", *prepared, *made} <= set(potential.graphs)
    report = json.loads(potential.report.to_json())
    assert {"model", "scheme", "backend", "target", "atoms", "edges", "nodes", "accuracy"} <= set(report)
    assert report["model"] == "Gated" and report["scheme"] == "w8" and report["nodes"]["fallback"] == []
    assert report["conservativity"]["scheme_is_conservative"] is True
    assert report["conservativity"]["gradient_rel_error"] < 1e-2
    assert report["equivariance"]["lee_force_mev_per_a"] < 0.05
    assert report["accuracy"]["fp32_force_mae_mev_per_a"] < 0.05
    assert any(p.integer_weights for p in potential.report.placements)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 11])
def test_other_sizes(small, potential, n):
    """Rounded weights are close to the original for every number of atoms and edges, 2 included."""
    tensors = neighbours(n, seed=n)
    energy, forces = _truth(small, tensors)
    out = potential(tensors)
    assert out["energy"].shape == energy.shape and out["forces"].shape == forces.shape
    assert (out["energy"] - energy).abs().max() < 0.05 * (1 + energy.abs().max())
    assert (out["forces"] - forces).abs().max() < 0.05 * (0.1 + forces.abs().max())


def test_missing_tensors_are_named(potential):
    with pytest.raises(StructureError, match="senders"):
        potential({k: v for k, v in neighbours(4).items() if k != "senders"})
    with pytest.raises(StructureError, match="tensors of its own"):
        potential(molecule("H2O"))


def test_the_model_is_untouched(small):
    fresh = Gated()
    assert small.training and all(p.requires_grad and p.grad is None for p in small.parameters())
    assert all(
        torch.equal(a, b)
        for a, b in zip(small.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert [type(m).__name__ for m in small.modules()] == [type(m).__name__ for m in fresh.modules()]
    tensors = list(neighbours(5).values())
    assert torch.equal(small(*tensors), fresh(*tensors))


def test_stage_simplify_comes_before_fusion(potential):
    assert not any("gaq.conv" in str(n.target) for n in potential.graphs["simplify"].graph.nodes)


class PerAtom(nn.Module):
    """The number of atoms enters the energy: as a size, or as a Python number that export fixes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = o3.Linear("1x0e", "1x0e"), how

    def forward(self, positions):
        pair = torch.cdist(positions, positions + 1e-3)
        energy = self.linear(torch.exp(-pair).sum(1, keepdim=True)).sum()
        if self.how == "size":
            return energy / positions.shape[0]
        return sum(energy for _ in range(positions.shape[0])) / 36


@pytest.mark.parametrize("how", ["size", "loop"])
def test_a_number_of_atoms_in_the_energy(how):
    """Right for another number of atoms, or a typed error."""
    model = PerAtom(how)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)) * 2
    try:
        potential = gaq_compile.quantize(model, x[:6], "fp32", **QUIET)
        out = potential({"positions": x})
    except GaqError:
        return
    assert float(out["energy"].sum()) == pytest.approx(float(model(x)), rel=1e-4)


# --- a result that is not the model's is refused --------------------------------------------------


def _scaled(function, factor):
    def run(*arguments):
        return function(*arguments) * factor

    return run


@pytest.mark.parametrize("name", ["irreps_linear", "gate_backward", "spherical_harmonics_backward"])
def test_a_tampered_operator_is_refused(small, monkeypatch, name):
    """A kernel that is off by a fifth of a percent, in energy and forces or in forces alone."""
    monkeypatch.setattr(reference, name, _scaled(getattr(reference, name), 1.002))
    with pytest.raises(VerificationError) as error:
        gaq_compile.quantize(small, list(neighbours(6).values()), "w8", **QUIET)
    assert "float32" in str(error.value) and "allowed" in str(error.value) and error.value.fix


def _sides(change):
    def original(structures):
        return [Prediction(1.0, np.ones((len(a), 3)), np.eye(3) * 0.01, None) for a in structures]

    return checks.Sides(original, lambda structures: [change(p) for p in original(structures)])


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, energy=p.energy + 1e-3),
        lambda p: replace(p, energy=float("nan")),
        lambda p: replace(p, forces=p.forces * 1.01),
        lambda p: replace(p, forces=p.forces * np.nan),
        lambda p: replace(p, forces=-p.forces),
        lambda p: replace(p, stress=-p.stress),
    ],
    ids=["energy", "nan energy", "forces", "nan forces", "sign", "stress"],
)
def test_fp32_check(change):
    structures = [molecule("H2O")]
    checks.check_fp32(_sides(lambda p: p), structures, "here")
    with pytest.raises(VerificationError):
        checks.check_fp32(_sides(change), structures, "here")


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, forces=p.forces * 1.05),
        lambda p: replace(p, forces=p.forces * np.nan),
        lambda p: replace(p, forces=-p.forces),
    ],
    ids=["scaled", "nan", "sign"],
)
def test_kernels_are_compared_with_torch(change, smooth):
    """Where activations are rounded the graph in torch is off by 1 %, and kernels may be by twice that."""
    structures = [molecule("H2O")]
    in_torch = _sides(lambda p: p if smooth else replace(p, forces=p.forces * 1.01))
    checks.check_kernels(in_torch, in_torch.compiled, structures, smooth, "here")
    checks.check_kernels(in_torch, in_torch.original, structures, False, "here")
    with pytest.raises(VerificationError, match=r"kernels do not compute|not finite"):
        kernels = _sides(change).compiled
        checks.check_kernels(in_torch, kernels, structures, smooth, "here")


def test_a_wrong_kernel_is_not_handed_out(monkeypatch):
    """A gate that is 2 % too large."""
    from gaq_compile.backends.tvm import gate_kernel

    text = gate_kernel.gate_source.__wrapped__
    monkeypatch.setattr(
        gate_kernel,
        "gate_source",
        lambda spec, schedule: text(spec, schedule).replace("T.float32(1.0)", "T.float32(1.02)"),
    )
    with pytest.raises(VerificationError, match="kernels do not compute"):
        gaq_compile.quantize("sevennet-0", molecule("H2O"), "w8", measure=False, progress=False)


# --- bad arguments --------------------------------------------------------------------------------


def test_unknown_scheme_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        gaq_compile.quantize("sevennet-0", molecule("H2O"), "w3a5")
    assert "w3a5" in str(error.value) and all(name in error.value.fix for name in PRESETS)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        gaq_compile.quantize("sevennet-0", molecule("H2O"), backend="onnx")
    assert "onnx" in str(error.value) and "reference" in error.value.fix and "tvm" in error.value.fix


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        gaq_compile.quantize("sevennet-9", molecule("H2O"), **QUIET)
    assert "sevennet-0" in error.value.fix and "so3lr" in error.value.fix


def test_override_that_matches_nothing(small):
    with pytest.raises(ConfigError, match=r"\*weight_nn\*[\s\S]*radial\.layer0"):
        gaq_compile.quantize(
            small, list(neighbours(6).values()), "w8", overrides={"*weight_nn*": "fp32"}, **QUIET
        )


def test_structures_for_a_model_without_a_recipe(small):
    with pytest.raises(CaptureError) as error:
        gaq_compile.quantize(small, molecule("H2O"), **QUIET)
    assert "Gated" in str(error.value) and "forward" in error.value.fix


class Branching(nn.Module):
    def forward(self, positions):
        if positions.sum() > 0:  # the line to be named
            return positions.square().sum()
        return positions.sum()


class NoEnergy(nn.Module):
    def forward(self, positions):
        return positions, positions


def test_a_model_that_cannot_be_captured_names_the_line():
    with pytest.raises(CaptureError) as error:
        gaq_compile.quantize(Branching(), torch.randn(4, 3), **QUIET)
    assert "test_api.py" in error.value.where and "positions.sum() > 0" in str(error.value)


def test_a_model_without_energy():
    with pytest.raises(CaptureError, match="tuple"):
        gaq_compile.quantize(NoEnergy(), torch.randn(4, 3), **QUIET)


@pytest.mark.parametrize(
    "example",
    [
        [torch.zeros(4, 2)],
        [torch.full((4, 3), float("nan"))],
        {"coordinates": torch.zeros(4, 3)},
        {"positions": [[0.0, 0, 0]]},
        [torch.zeros(4, 3), torch.zeros(1), torch.zeros(1)],
    ],
    ids=["shape", "nan", "name", "list", "too many"],
)
def test_bad_tensors(example):
    with pytest.raises(StructureError):
        gaq_compile.quantize(Branching(), example, **QUIET)


@pytest.mark.parametrize("example", [None, 3], ids=str)
def test_no_example(sevennet, example):
    with pytest.raises(GaqError):
        gaq_compile.quantize(sevennet, example, **QUIET)


def _water(**changes) -> Atoms:
    atoms = molecule("H2O")
    for name, value in changes.items():
        setattr(atoms, name, value)
    return atoms


def _nan(value: float) -> Atoms:
    atoms = molecule("H2O")
    atoms.positions[1, 0] = value
    return atoms


BAD = {
    "nan": (lambda: _nan(np.nan), StructureError, r"H\[1\]"),
    "infinite": (lambda: _nan(np.inf), StructureError, r"H\[1\]"),
    "coincident": (lambda: Atoms("OHH", [[0, 0, 0], [1, 0, 0], [1, 0, 0]]), StructureError, "coincident"),
    "no edges": (lambda: Atoms("H"), NoEdgesError, "5.0 Å"),
    "far apart": (lambda: Atoms("H2", [[0, 0, 0], [50, 0, 0]]), NoEdgesError, "no edges"),
    "element": (lambda: Atoms("PoO", [[0, 0, 0], [2, 0, 0]]), UnknownElementError, "Po"),
    "singular cell": (lambda: _water(pbc=True), StructureError, "singular"),
    "empty": (lambda: Atoms(), StructureError, "without atoms"),
    "none": (lambda: [], StructureError, "no structures"),
    "one bad of two": (lambda: [molecule("H2O"), _nan(np.nan)], StructureError, r"H\[1\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_structures(sevennet, name):
    make, kind, text = BAD[name]
    with pytest.raises(kind, match=text) as error:
        gaq_compile.quantize(sevennet, make(), **QUIET)
    assert error.value.fix or error.value.where


# --- kernels --------------------------------------------------------------------------------------


def test_kernels_batch_and_single_atoms(so3lr_w8a8):
    """Generated kernels: a batch equals its members, atoms alone and apart have an answer."""
    water, methane = molecule("H2O"), molecule("CH4")
    lonely = water + Atoms("O", [[30, 0, 0]])
    structures = [water, Atoms("H"), methane, lonely]
    together = so3lr_w8a8(structures)
    for atoms, prediction in zip(structures, together, strict=True):
        alone = so3lr_w8a8(atoms)
        assert prediction.energy == pytest.approx(alone.energy, abs=1e-4 * len(atoms))
        assert np.abs(prediction.forces - alone.forces).max() < 1e-3
        assert np.isfinite(prediction.forces).all()
    assert np.abs(together[1].forces).max() == 0 and np.abs(together[3].forces[3]).max() == 0
    assert not so3lr_w8a8.report.fallback
