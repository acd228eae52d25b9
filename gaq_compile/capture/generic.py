"""Any module built from e3nn: captured from the tensors that its own forward takes.

The model must return its energy (a tensor, or a dictionary with one of ``ENERGY_KEYS``) from
inputs one of which is the positions (called ``positions`` or ``pos``). Its graph (edges, batch,
species) is the caller's business: what the model took before, the compiled one takes after.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from ..errors import CaptureError, StructureError
from .base import EnergyModel, RawPrediction
from .graphs import GraphFormat, Tensors
from .modules import swap

POSITION_NAMES = ("positions", "pos")
ENERGY_KEYS = ("energy", "total_energy", "energies", "node_energy")


class TensorModel:
    """A model together with example tensors of its own.

    Args:
        model: the module; ``model(*args)`` or ``model(dict)``.
        example: the positional tensors, or the dictionary, that its forward takes.

    Raises:
        StructureError: if the example has no positions, or they are not (n, 3) finite numbers.
        CaptureError: if the model returns no energy.
    """

    def __init__(self, model: nn.Module, example: Sequence[Tensor] | Mapping[str, Tensor] | Tensor) -> None:
        self.model = model
        self.takes_dict = isinstance(example, Mapping)
        self.tensors = _named(model, example)
        self.positions = _positions_name(self.tensors)
        self.form = GraphFormat(tuple(self.tensors), 0.0, positions=self.positions)

    def energy_model(self) -> EnergyModel:
        """A swapped copy that returns energies (float64) of shape (-1,)."""
        module = _Energy(swap(self.model), tuple(self.tensors), self.takes_dict)
        return EnergyModel(module, self.form, type(self.model).__name__, (True, False))

    def structures(self) -> list[Atoms]:
        """The example's positions as structures of unnamed atoms, for the instruments."""
        positions = self.tensors[self.positions].detach().double().numpy()
        return [Atoms("X" * len(positions), positions=positions)]

    def collate(self, structures: Sequence[Atoms]) -> Tensors:
        """The example's tensors with a structure's positions in place of its own."""
        (atoms,) = structures
        kind = self.tensors[self.positions].dtype
        return {**self.tensors, self.positions: torch.tensor(atoms.positions, dtype=kind)}

    @property
    def rotates_whole(self) -> bool:
        """Whether positions are the only vectors among the inputs, so that turning them turns all."""
        others = (t for name, t in self.tensors.items() if name != self.positions)
        return not any(t.is_floating_point() and t.dim() > 1 and t.shape[-1] == 3 for t in others)

    # --- the original, for comparison -------------------------------------------------------------

    def prepare(self, atoms: Atoms) -> Tensors:
        """The model's own input."""
        return self.collate([atoms])

    def run(self, prepared: Tensors) -> tuple[Tensor, Tensor]:
        """Energy and forces through the unchanged model."""
        tensors = dict(prepared)
        tensors[self.positions] = tensors[self.positions].detach().clone().requires_grad_(True)
        energy = _energy_of(_call(self.model, tensors, self.takes_dict))
        (gradient,) = torch.autograd.grad(energy.sum(), tensors[self.positions])
        return energy.detach(), -gradient

    def predict(self, atoms: Atoms) -> RawPrediction:
        """The answer for one structure."""
        energy, forces = self.run(self.prepare(atoms))
        return RawPrediction(float(energy.double().sum()), forces.numpy(), None, None)


class _Energy(nn.Module):
    def __init__(self, model: nn.Module, names: tuple[str, ...], takes_dict: bool) -> None:
        super().__init__()
        self.model, self.names, self.takes_dict = model, names, takes_dict

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        return _energy_of(_call(self.model, named, self.takes_dict)).reshape(-1).double()


def _call(model: nn.Module, tensors: Mapping[str, Tensor], takes_dict: bool) -> Any:
    return model(dict(tensors)) if takes_dict else model(*tensors.values())


def _energy_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ENERGY_KEYS:
            if isinstance(output.get(key), Tensor):
                return output[key]
    raise CaptureError(
        f"the model returns {type(output).__name__}, not an energy",
        fix=f"return a tensor, or a dictionary with one of: {', '.join(ENERGY_KEYS)}",
    )


def _named(model: nn.Module, example: Any) -> Tensors:
    if isinstance(example, Mapping):
        named = dict(example)
    else:
        if not isinstance(example, Tensor | Sequence) or isinstance(example, str):
            raise StructureError(
                f"the example is {type(example).__name__}, neither structures nor tensors",
                fix="pass an ase.Atoms, a list of them, or the tensors that the model's forward takes",
            )
        values = [example] if isinstance(example, Tensor) else list(example)
        names = [n for n in inspect.signature(model.forward).parameters if n not in ("args", "kwargs")]
        if len(values) > len(names):
            raise StructureError(
                f"{len(values)} example tensors for a forward with {len(names)} named inputs"
            )
        named = dict(zip(names, values, strict=False))
    bad = [name for name, value in named.items() if not isinstance(value, Tensor)]
    if bad:
        raise StructureError(
            f"example inputs that are not tensors: {', '.join(map(str, bad))}",
            fix="pass ase.Atoms for a known model family, or exactly the tensors that forward takes",
        )
    return {name: copy.copy(value.detach()) for name, value in named.items()}


def _positions_name(tensors: Tensors) -> str:
    name = next((n for n in POSITION_NAMES if n in tensors), None)
    if name is None:
        raise StructureError(
            f"no positions among the inputs {', '.join(tensors)}",
            fix=f"name them {' or '.join(POSITION_NAMES)}",
        )
    value = tensors[name]
    if value.dim() != 2 or value.shape[1] != 3 or not bool(torch.isfinite(value).all()):
        raise StructureError(f"{name} must be finite numbers of shape (n, 3), not {tuple(value.shape)}")
    return name
