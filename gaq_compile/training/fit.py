"""Training on energies and forces: seeded, resumable, with a running average of the weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from ..errors import ConfigError, FileFormatError, VerificationError
from ..models.forces import VECTORS
from .frames import Batch, Frames
from .muon import Muon, matrices_of

STATE, LOG, PLOT = "state.pt", "history.json", "loss.png"
_MEV = 1e3


class Trainable(Protocol):
    """What :func:`fit` trains: an ``nn.Module`` with energies and forces that can be differentiated."""

    def energy_and_forces(
        self, tensors: Mapping[str, Tensor], create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Energies (graphs,) eV and forces (N, 3) eV/Å."""


@dataclass(frozen=True)
class FitSettings:
    """How :func:`fit` trains.

    Attributes:
        epochs: how often all frames are seen.
        batch: frames of a step.
        learning_rate: the largest; it rises over ``warmup`` steps, then falls to 0 as a cosine.
        warmup: steps.
        energy_weight: of (error of a graph's energy)^2 / atoms, eV^2, beside the mean square of a force
            component's error, (eV/Å)^2.
        ema: decay of the running average of the weights, per step; what is kept is the average.
        clip: the largest norm of the gradient.
        lee_weight: of the mean square of ``F(R x) - R F(x)`` for a random rotation R at every step, (eV/Å)^2:
            the local equivariance error that rounded directions make. A step then takes twice as long.
        vectors_from: the epoch from which on vectors learn too; before it, of a quantized model
            (:class:`.fake_quant.FakeQuantized`), only what acts on scalars does.
        seed: of the order of frames, and of rotations.
        optimizer: "adam", or "muon" (:class:`.muon.Muon`), which learns a float model much faster.
    """

    epochs: int = 200
    batch: int = 5
    learning_rate: float = 2e-3
    warmup: int = 500
    energy_weight: float = 1.0
    ema: float = 0.999
    clip: float = 10.0
    lee_weight: float = 0.0
    vectors_from: int = 0
    seed: int = 0
    optimizer: Literal["adam", "muon"] = "adam"

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1 or not 0 <= self.ema < 1 or self.learning_rate <= 0:
            raise ConfigError("settings that cannot train", where=repr(self))
        if self.optimizer not in ("adam", "muon"):
            raise ConfigError(f"no optimizer {self.optimizer!r}", fix="'adam' or 'muon'")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step of so many."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        return self.learning_rate * rising * 0.5 * (1.0 + math.cos(math.pi * step / max(1, steps)))


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors: of energies in meV, and of force components in meV/Å."""

    energy: float
    force: float


@dataclass
class _State:
    """What a run that was cut off goes on from."""

    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return len(self.history)


def fit(
    model: nn.Module,
    train: Frames,
    valid: Frames,
    settings: FitSettings,
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a model in place; afterwards its weights are the running average.

    Args:
        model: a :class:`Trainable` module.
        train: frames to learn from.
        valid: frames whose errors are watched; nothing is chosen by them.
        settings: how.
        folder: where the state is kept after each epoch, with a plot of the errors. A run that finds one of
            the same settings and frames goes on from it.
        progress: show a progress bar.

    Returns:
        Of each epoch the loss, and the errors on ``valid`` of the averaged weights (``energy_mae_mev``,
        ``force_mae_mev_per_a``).

    Raises:
        FileFormatError: if the folder holds a state of other settings, or none that can be read.
        VerificationError: if the loss is no longer a number; the model is then of no use.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = _State(
        _optimizer(model, weights, settings), {name: p.detach().clone() for name, p in weights.items()}
    )
    about = {"settings": asdict(settings), "frames": [len(train), len(valid)]}
    home = Path(folder) if folder is not None else None
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
        _resume(home / STATE, model, state, about)
    with _bar(progress) as bar:
        task = bar.add_task("training", total=settings.epochs, completed=state.epoch)
        while state.epoch < settings.epochs:
            start = time.perf_counter()
            loss = _epoch(model, train, settings, state, weights)
            errors = _averaged_errors(model, valid, state, weights, settings.batch)
            row = {"loss": loss, "energy_mae_mev": errors.energy, "force_mae_mev_per_a": errors.force}
            state.history.append(row | {"seconds": time.perf_counter() - start})
            if home is not None:
                _keep(home, model, state, about)
            text = f"training: energy {errors.energy:.1f} meV, forces {errors.force:.1f} meV/Å"
            bar.update(task, advance=1, description=text)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state.average[name])
    if home is not None:
        plot(state.history, home / PLOT)
    return state.history


def _optimizer(
    model: nn.Module, weights: Mapping[str, nn.Parameter], settings: FitSettings
) -> torch.optim.Optimizer:
    if settings.optimizer == "muon":
        return Muon(weights, matrices_of(model), settings.learning_rate)
    return torch.optim.Adam(weights.values(), lr=settings.learning_rate, amsgrad=True)


def _epoch(
    model: Any, train: Frames, settings: FitSettings, state: _State, weights: Mapping[str, Tensor]
) -> float:
    """All frames once; the mean loss."""
    batches = -(-len(train) // settings.batch)
    model.train()
    total, step = 0.0, state.epoch * batches
    held = model.vector_parts() if state.epoch < settings.vectors_from else {}
    for batch in train.batches(settings.batch, settings.seed * 100_003 + state.epoch):
        for group in state.optimizer.param_groups:
            group["lr"] = settings.rate(step, settings.epochs * batches)
        state.optimizer.zero_grad()
        turn = rotation(settings.seed + step) if settings.lee_weight else None
        loss = loss_of(model, batch, settings.energy_weight, settings.lee_weight, turn)
        if not bool(torch.isfinite(loss)):
            raise VerificationError(
                f"the loss is {float(loss)}: training has diverged",
                where=f"epoch {state.epoch + 1}, step {step + 1}",
                fix="a smaller learning_rate, or look at the labels; the last whole epoch is kept",
            )
        loss.backward()  # type: ignore[no-untyped-call]
        for name, part in held.items():
            _hold(weights[name], part)
        torch.nn.utils.clip_grad_norm_(list(weights.values()), settings.clip)
        state.optimizer.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in weights.items():
                state.average[name].lerp_(parameter, 1.0 - decay)
        total, step = total + float(loss.detach()), step + 1
    return total / batches


def _hold(parameter: Tensor, part: Tensor) -> None:
    """No gradient for a part of a parameter: Adam then leaves it where it is."""
    if parameter.grad is not None:
        parameter.grad.masked_fill_(part, 0.0)


def rotation(seed: int) -> Tensor:
    """A random rotation (3, 3), uniform."""
    return torch.tensor(Rotation.random(random_state=seed % 2**32).as_matrix(), dtype=torch.float32)


def loss_of(
    model: Trainable, batch: Batch, energy_weight: float, lee_weight: float = 0.0, turn: Tensor | None = None
) -> Tensor:
    """``mean |F - F'|^2 + energy_weight mean (E - E')^2 / atoms``, in eV and Å, and with a rotation ``turn``
    ``lee_weight mean |F(R x) - R F(x)|^2``."""
    energies, forces = model.energy_and_forces(batch.tensors, create_graph=True)
    of_energies = ((energies - batch.energies).square() / batch.atoms).mean()
    loss = (forces - batch.forces).square().mean() + energy_weight * of_energies.float()
    if turn is None:
        return loss
    turned = {n: t @ turn.T if n.startswith(VECTORS) else t for n, t in batch.tensors.items()}
    _, again = model.energy_and_forces(turned, create_graph=True)
    return loss + lee_weight * (again - forces @ turn.T).square().mean()


def errors_of(model: Any, frames: Frames, batch: int = 20) -> Errors:
    """Mean absolute errors of a model on frames."""
    energies, forces, components = 0.0, 0.0, 0
    for part in frames.batches(batch):
        found_energies, found_forces = model.energy_and_forces(part.tensors)
        energies += float((found_energies.detach() - part.energies).abs().sum())
        forces += float((found_forces.detach() - part.forces).abs().double().sum())
        components += part.forces.numel()
    return Errors(_MEV * energies / len(frames), _MEV * forces / components)


def missing_energies(model: Any, frames: Frames, batch: int = 20) -> dict[int, float]:
    """What a model's energies lack on average on frames, by atomic number, eV.

    A mean that moves with every step of training is most of an energy's error, and means nothing to forces.
    """
    found = [
        part.energies - model.energy_and_forces(part.tensors)[0].detach() for part in frames.batches(batch)
    ]
    elements = sorted({int(number) for atoms in frames.structures for number in atoms.numbers})
    errors = torch.cat(found).double().numpy()
    return dict(zip(elements, frames.element_energies(elements, errors), strict=True))


def _averaged_errors(
    model: nn.Module, frames: Frames, state: _State, weights: Mapping[str, Tensor], batch: int
) -> Errors:
    """Errors with the averaged weights in place of the present ones."""
    present = {name: p.detach().clone() for name, p in weights.items()}
    model.eval()
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state.average[name])
    errors = errors_of(model, frames, batch)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(present[name])
    return errors


# --- keeping ------------------------------------------------------------------------------------


def _keep(home: Path, model: nn.Module, state: _State, about: Mapping[str, Any]) -> None:
    """Everything that goes on, whole or not at all."""
    kept = {
        "about": dict(about),
        "model": model.state_dict(),
        "average": state.average,
        "optimizer": state.optimizer.state_dict(),
        "history": state.history,
    }
    part = home / (STATE + ".part")
    torch.save(kept, part)
    part.replace(home / STATE)
    text = json.dumps({**about, "history": state.history}, indent=1) + "\n"
    (home / LOG).write_text(text)


def _resume(path: Path, model: nn.Module, state: _State, about: Mapping[str, Any]) -> None:
    """Take over what an earlier run has left, if anything."""
    if not path.exists():
        return
    try:
        kept = torch.load(path, weights_only=True)
        found = kept["about"]
    except (RuntimeError, KeyError, EOFError, OSError, ValueError, UnpicklingError) as error:
        raise FileFormatError(f"no state of a training: {error}", where=str(path), fix="remove it") from error
    if found != about:
        raise FileFormatError(
            f"a training with other settings: {found}",
            where=str(path),
            fix="use another folder, or remove it",
        )
    model.load_state_dict(kept["model"])
    state.average.update(kept["average"])
    state.optimizer.load_state_dict(kept["optimizer"])
    state.history[:] = kept["history"]


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Errors on validation frames, and the loss, over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(history) + 1)
    for name, label in (("force_mae_mev_per_a", "forces, meV/Å"), ("energy_mae_mev", "energy, meV")):
        axes.plot(epochs, [row[name] for row in history], label=f"error on validation frames: {label}")
    axes.plot(
        epochs, [_MEV * math.sqrt(row["loss"]) for row in history], label="root of the loss, meV/Å", lw=0.8
    )
    axes.set(xlabel="epoch", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def _bar(progress: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        disable=not progress,
    )  # fmt: skip
