"""Training: it learns, two runs agree to the bit, and one that was cut off goes on as if it had not been."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT

pytest.importorskip("tvm")

from gaq_compile.capture.transformer import form_of
from gaq_compile.errors import (
    ConfigError,
    FileFormatError,
    StructureError,
    UnknownElementError,
    VerificationError,
)
from gaq_compile.models import EuclideanTransformer, TransformerConfig
from gaq_compile.training import fit as fitting
from gaq_compile.training.convolution import with_fast_convolutions
from gaq_compile.training.fit import FitSettings, errors_of, fit
from gaq_compile.training.frames import Frames, labelled, read_rmd17

SETTINGS = FitSettings(epochs=4, batch=3, learning_rate=4e-3, warmup=5, ema=0.9)


def structures(count: int, seed: int = 0) -> list[Atoms]:
    """Small clusters of copper, with EMT's energies and forces."""
    rng = np.random.default_rng(seed)
    corners = 2.4 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    found = []
    for _ in range(count):
        atoms = Atoms("Cu5", corners + 0.1 * rng.normal(size=(5, 3)), calculator=EMT())
        found.append(labelled(atoms.copy(), atoms.get_potential_energy(), atoms.get_forces()))
    return found


def model() -> EuclideanTransformer:
    torch.manual_seed(0)
    made = EuclideanTransformer(TransformerConfig((29,), 8, 1, layers=1, heads=2, radial=6))
    made.set_scales([1.0], 1.0, 4.0)
    return made


@pytest.fixture(scope="module")
def frames() -> tuple[Frames, Frames]:
    form = form_of(model())
    return Frames(structures(12), form), Frames(structures(4, 1), form)


def trained(frames, folder=None, settings=SETTINGS) -> EuclideanTransformer:
    made = model()
    fit(with_fast_convolutions(made), *frames, settings, folder, progress=False)
    return made


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns(frames) -> None:
    before = errors_of(model(), frames[1])
    made = model()
    history = fit(made, *frames, FitSettings(30, 3, 1e-2, 5, ema=0.9), progress=False)
    after = errors_of(made, frames[1])
    assert after.force < 0.6 * before.force and after.energy < 0.5 * before.energy
    assert history[-1]["force_mae_mev_per_a"] == pytest.approx(after.force, rel=1e-4)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(frames, tmp_path, monkeypatch, optimizer) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)
    whole = trained(frames, settings=settings)
    assert same(whole, trained(frames, settings=settings)) and not same(whole, model())
    kept = fitting._keep

    def cut_off(home, model, state, about):
        kept(home, model, state, about)
        if state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "_keep", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trained(frames, tmp_path, settings)
    monkeypatch.setattr(fitting, "_keep", kept)
    assert same(whole, trained(frames, tmp_path, settings))
    assert len(json.loads((tmp_path / "history.json").read_text())["history"]) == 4
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert same(whole, trained(frames, tmp_path, settings))  # it is done: nothing is trained any more


def test_a_folder_of_something_else(frames, tmp_path) -> None:
    trained(frames, tmp_path)
    with pytest.raises(FileFormatError, match="other settings"):
        trained(frames, tmp_path, FitSettings(epochs=5))
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="no state"):
        trained(frames, tmp_path)


def test_a_loss_that_is_no_number_stops_the_training(frames, tmp_path, monkeypatch) -> None:
    calls, real = [], fitting.loss_of  # four of an epoch

    def loss_of(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(fitting, "loss_of", loss_of)
    with pytest.raises(VerificationError, match="diverged"):
        trained(frames, tmp_path)
    kept = json.loads((tmp_path / "history.json").read_text())["history"]
    assert len(kept) == 1  # what was learned before is not lost


def test_the_rate_rises_and_falls() -> None:
    rates = [FitSettings(warmup=10, learning_rate=1.0).rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) > 0.95 and rates[-1] < 1e-3
    assert rates[:9] == sorted(rates[:9]) and rates[10:] == sorted(rates[10:], reverse=True)
    with pytest.raises(ConfigError):
        FitSettings(epochs=0)
    with pytest.raises(ConfigError, match="no optimizer"):
        FitSettings(optimizer="sgd")  # type: ignore[arg-type]


def test_batches_hold_every_frame_once_and_their_labels(frames) -> None:
    train = frames[0]
    seen = torch.cat([b.energies for b in train.batches(5, seed=3)])
    assert sorted(seen.tolist()) == sorted(train.energies.tolist())
    assert not torch.equal(seen, torch.cat([b.energies for b in train.batches(5, seed=4)]))
    batch = train.batch([2, 7])
    assert torch.equal(batch.forces[5:], torch.from_numpy(train.forces[7]))
    assert batch.tensors["ptr"].tolist() == [0, 5, 10] and batch.atoms.tolist() == [5.0, 5.0]
    assert train.element_energies((29,)) == pytest.approx([train.energies.mean() / 5])
    assert 3.0 < train.neighbours <= 4.0


def test_frames_that_cannot_be_learned() -> None:
    form = form_of(model())
    with pytest.raises(StructureError, match="without energy or forces"):
        Frames([a.copy() for a in structures(1)], form)
    with pytest.raises(UnknownElementError):
        Frames([labelled(Atoms("H2", [[0, 0, 0], [0, 0, 1]]), 0.0, np.zeros((2, 3)))], form)
    with pytest.raises(StructureError, match="NaN"):
        Frames([labelled(a, float("nan"), a.get_forces()) for a in structures(1)], form)


def test_rmd17_files(tmp_path) -> None:
    path, rng = tmp_path / "x.npz", np.random.default_rng(0)
    arrays = {"nuclear_charges": np.array([6, 1]), "coords": rng.normal(size=(3, 2, 3))}
    arrays |= {"energies": np.arange(3.0), "forces": rng.normal(size=(3, 2, 3))}
    np.savez(path, **arrays)
    frames = read_rmd17(path)
    assert frames[1].get_potential_energy() == pytest.approx(0.0433641, rel=1e-5)
    assert np.allclose(frames[2].get_forces(), 0.0433641 * arrays["forces"][2], rtol=1e-5)
    np.savez(path, **{**arrays, "energies": np.arange(4.0)})
    with pytest.raises(FileFormatError, match="do not match"):
        read_rmd17(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileFormatError, match="no rMD17 frames"):
        read_rmd17(path)
