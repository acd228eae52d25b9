"""Fake quantization and the kernels agree; finetune gives a potential that is better, and runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm")

import gaq_compile
from gaq_compile.capture.graphs import collate
from gaq_compile.capture.transformer import form_of
from gaq_compile.datasets import example_structures
from gaq_compile.errors import ConfigError, StructureError
from gaq_compile.models import EuclideanTransformer, TransformerConfig
from gaq_compile.training.distill import shaken, taught
from gaq_compile.training.fake_quant import FakeQuantized
from gaq_compile.training.fit import FitSettings, fit, loss_of, missing_energies, rotation
from gaq_compile.training.frames import Frames, labelled
from gaq_compile.verify.parity import parity

FRAMES = example_structures("ethanol")
ELEMENTS = (1, 6, 8)


@pytest.fixture(scope="module")
def model() -> EuclideanTransformer:
    torch.manual_seed(0)
    made = EuclideanTransformer(TransformerConfig(ELEMENTS, 8, l_max=1, layers=2, heads=2, radial=6))
    frames = Frames(FRAMES, form_of(made))
    made.set_scales(frames.element_energies(ELEMENTS), frames.force_rms, frames.neighbours)
    return made.eval()


@pytest.fixture(scope="module")
def quantized(model) -> dict[str, gaq_compile.Potential]:
    return {
        scheme: gaq_compile.quantize(model, FRAMES[:3], scheme, measure=False, progress=False)
        for scheme in ("fp32", "w4a8", "exact-w4a8")
    }


@pytest.mark.parametrize("scheme", ["w4a8", "exact-w4a8"])
def test_training_sees_what_kernels_compute(quantized, scheme: str) -> None:
    potential = quantized[scheme]
    fake = FakeQuantized(potential.graphs["tag_irreps"], potential.graphs["insert_mddq"], potential.form)
    tensors = collate(FRAMES[3:6], potential.form)
    out = potential.evaluate(tensors)
    energies, forces = fake.energy_and_forces(tensors)
    torch.testing.assert_close(energies.detach(), out["energy"].reshape(-1).double(), atol=2e-3, rtol=0)
    scale = float(out["forces"].abs().mean())
    assert float((forces.detach() - out["forces"]).abs().mean()) < 2e-3 * scale


@pytest.mark.parametrize("scheme", ["w4a8", "exact-w4a8"])
def test_integers_are_those_of_the_training(quantized, scheme: str) -> None:
    """Before the first step those that calibration chose, to the bit; after some, the trained ones."""
    potential = quantized[scheme]
    before = potential.graphs["insert_mddq"]
    fake = FakeQuantized(potential.graphs["tag_irreps"], before, potential.form)
    tensors = collate(FRAMES[3:6], potential.form)
    inputs = [tensors[name] for name in potential.form.inputs]
    untouched = {name: t.clone() for name, t in before.named_buffers()}
    made = fake.integer_graph()
    for node in made.graph.nodes:
        if node.op == "get_attr" and "codes" in node.target:
            original = next(t for name, t in untouched.items() if node.target.startswith(name))
            assert torch.equal(getattr(made, node.target), original)
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).abs()
        found, expected = fake.integer_graph()(*inputs), fake(**tensors)
        moved = before(*inputs)
    assert float((found - expected).abs().max()) < 2e-3 < 0.1 * float((moved - expected).abs().max())
    for name, t in before.named_buffers():
        assert torch.equal(t, untouched[name])  # the potential itself is as it was


def test_what_energies_lack_on_average_is_added(quantized) -> None:
    """Per element, in training's graph and in the integers' alike; forces stay."""
    potential = quantized["w4a8"]
    fake = FakeQuantized(potential.graphs["tag_irreps"], potential.graphs["insert_mddq"], potential.form)
    higher = [labelled(a.copy(), 3.0 + a.get_potential_energy(), a.get_forces()) for a in FRAMES]
    frames = Frames(higher, potential.form)
    tensors = collate(FRAMES[3:6], potential.form)
    before = fake.energy_and_forces(tensors)
    lacking = missing_energies(fake, frames)
    fake.shift_energies(lacking)
    assert list(lacking) == sorted({int(z) for z in FRAMES[0].numbers})
    assert all(abs(energy) < 1e-6 for energy in missing_energies(fake, frames).values())
    energies, forces = fake.energy_and_forces(tensors)
    added = sum(lacking[int(z)] for z in FRAMES[0].numbers)
    torch.testing.assert_close((energies - before[0]).detach(), torch.full((3,), added, dtype=torch.float64))
    assert torch.equal(forces, before[1])
    whole = fake.integer_graph()(*(tensors[name] for name in potential.form.inputs))
    torch.testing.assert_close(whole, fake(**tensors).detach(), atol=2e-3, rtol=0)


def test_every_parameter_learns(quantized) -> None:
    potential = quantized["w4a8"]
    fake = FakeQuantized(potential.graphs["tag_irreps"], potential.graphs["insert_mddq"], potential.form)
    energies, forces = fake.energy_and_forces(collate(FRAMES[:2], potential.form), create_graph=True)
    (forces.square().mean() + energies.mean().float()).backward()
    for name, parameter in fake.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert len(fake.weights) > 10 and len(fake.logs) > len(fake.weights)


def test_vectors_are_held_while_scalars_learn(quantized) -> None:
    potential = quantized["w4a8"]
    fake = FakeQuantized(potential.graphs["tag_irreps"], potential.graphs["insert_mddq"], potential.form)
    parts, before = fake.vector_parts(), {n: p.detach().clone() for n, p in fake.named_parameters()}
    some = Frames(taught(FRAMES[:3], quantized["fp32"].predict), potential.form)
    settings = FitSettings(epochs=1, batch=1, warmup=1, ema=0.0, vectors_from=1)
    fit(fake, some, some, settings, progress=False)
    assert 0 < len(parts) < len(before)
    for name, parameter in fake.named_parameters():
        part = parts.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter.detach()[part], before[name][part])
        assert part.all() or not torch.equal(parameter.detach()[~part], before[name][~part]), name


def test_rotations_cost_what_rounded_directions_do(quantized) -> None:
    """The regularizer is the square of LEE, and it can be learned from; exact directions have none."""
    turn, found = rotation(3), {}
    for scheme in ("w4a8", "exact-w4a8"):
        potential = quantized[scheme]
        fake = FakeQuantized(potential.graphs["tag_irreps"], potential.graphs["insert_mddq"], potential.form)
        batch = Frames(FRAMES[:4], potential.form).batch(range(4))
        extra = loss_of(fake, batch, 0.0, 1e9, turn) - loss_of(
            fake, batch, 0.0
        )  # beside it the rest is small
        found[scheme] = 1e-9 * float(extra.detach())
        _, forces = fake.energy_and_forces(batch.tensors)
        turned = {**batch.tensors, "edge_vec": batch.tensors["edge_vec"] @ turn.T}
        difference = fake.energy_and_forces(turned)[1] - forces @ turn.T
        lee = float(difference.square().mean().detach())
        assert found[scheme] == pytest.approx(lee, rel=0.02, abs=1e-9)
    assert found["w4a8"] > 30 * found["exact-w4a8"]
    loss_of(fake, batch, 0.0, 1.0, turn).backward()


def test_a_teacher_makes_it_better(quantized, tmp_path) -> None:
    """Label-free: closer to the float form on structures that training has not seen."""
    teacher = quantized["fp32"].predict
    settings = FitSettings(epochs=6, batch=4, learning_rate=3e-4, warmup=5, ema=0.9)
    potential = quantized["w4a8"]
    found = gaq_compile.finetune(
        potential, FRAMES[:3], teacher=teacher, structures=40, settings=settings, progress=False
    )
    unseen = shaken(FRAMES[5:], 12, seed=7)
    before, after = (parity(teacher, p.predict, unseen) for p in (potential, found))
    assert after.force_mae_mev_per_a < 0.9 * before.force_mae_mev_per_a
    assert found.report.accuracy == {} and found.report.equivariance["lee_force_mev_per_a"] >= 0
    loaded = gaq_compile.load(found.save(tmp_path / "tuned.gaq"))
    assert parity(found.predict, loaded.predict, unseen).force_mae_mev_per_a == 0


def test_what_cannot_be_finetuned(quantized, tmp_path) -> None:
    potential = quantized["w4a8"]
    loaded = gaq_compile.load(potential.save(tmp_path / "a.gaq"))
    with pytest.raises(ConfigError, match="float weights"):
        gaq_compile.finetune(loaded, FRAMES)
    with pytest.raises(StructureError, match="without energy"):
        gaq_compile.finetune(potential, [a.copy() for a in FRAMES], progress=False)
    with pytest.raises(ConfigError, match="no structures"):
        gaq_compile.finetune(potential, [], teacher=quantized["fp32"].predict)


def test_shaken_structures_differ_and_can_be_made_again(quantized) -> None:
    some = shaken(FRAMES[:2], 9, seed=3)
    assert len(some) == 9 and len({a.positions.tobytes() for a in some}) == 9
    assert all(
        (a.positions == b.positions).all() for a, b in zip(some, shaken(FRAMES[:2], 9, seed=3), strict=True)
    )
    labelled = taught(some[:2], quantized["fp32"].predict)
    assert labelled[1].get_potential_energy() == quantized["fp32"](some[1]).energy
