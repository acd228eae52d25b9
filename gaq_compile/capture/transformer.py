"""The package's own :class:`~gaq_compile.models.EuclideanTransformer`: e3nn modules over edge vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from ..models.transformer import TINY, EuclideanTransformer, Interaction
from ..operators.registration import ops
from .base import EnergyModel, RawPrediction
from .graphs import GraphFormat, Tensors, collate
from .modules import swap_first

INPUTS = ("numbers", "edge_vec", "receivers", "senders", "batch", "ptr")


class TransformerRecipe:
    """Recipe for :class:`~gaq_compile.models.EuclideanTransformer`."""

    def matches(self, model: nn.Module) -> bool:
        """True for the class itself and what is derived from it."""
        return isinstance(model, EuclideanTransformer)

    def energy_model(self, model: nn.Module) -> EnergyModel:
        """The model with its e3nn modules swapped, and lengths taken as kernels take them."""
        swapped = swap_first(model)
        for layer in swapped.layers:  # type: ignore[union-attr]
            layer.interaction = _Interaction(layer.interaction)  # type: ignore[union-attr]
        return EnergyModel(swapped, form_of(model), "EuclideanTransformer", (True,))

    def original(self, model: nn.Module, ours: bool = False) -> TransformerOriginal:
        """The model as it is."""
        return TransformerOriginal(model if ours else copy.deepcopy(model))


class _Interaction(nn.Module):
    """The model's interaction on component-major vectors: sums and products of whole rows of channels."""

    def __init__(self, plain: Interaction) -> None:
        super().__init__()
        self.mix, self.exchange = plain.mix, plain.exchange
        self.irreps, self.channels = plain.mix.irreps_in, plain.channels
        self.components = [slice(l * l - 1, (l + 1) ** 2 - 1) for l in plain.degrees]  # l = 0 is not there

    def forward(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        mixed = ops.relayout(self.mix(vectors), self.irreps, "ir_mul")
        rows = mixed.split([self.channels] * self.components[-1].stop, dim=1)
        parts = [rows[components] for components in self.components]
        lengths = [torch.sqrt(sum(row.square() for row in part) + TINY) for part in parts]
        given = self.exchange(torch.cat([x, *lengths], dim=1))
        to_x, *gates = given.split([self.channels] * (1 + len(parts)), dim=1)
        scaled = [gate * row for gate, part in zip(gates, parts, strict=True) for row in part]
        return x + to_x, vectors + ops.relayout(torch.cat(scaled, dim=1), self.irreps, "mul_ir")


def form_of(model: nn.Module) -> GraphFormat:
    """The inputs of an :class:`~gaq_compile.models.EuclideanTransformer`."""
    config = model.config
    return GraphFormat(INPUTS, config.cutoff, elements=config.elements)  # type: ignore[union-attr, arg-type]


class TransformerOriginal:
    """A model on structures, through its own code."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._form = model.eval(), form_of(model)
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._run: Callable[..., Any] = self._model.energy_and_forces  # type: ignore[assignment]

    def change(self, wrap: Callable[[nn.Module], Any]) -> None:
        """Run what ``wrap`` makes of the model, e.g. ``torch.compile``, in its place."""
        self._model = wrap(self._model)
        self._run = self._model.energy_and_forces  # type: ignore[assignment]

    def prepare(self, atoms: Atoms) -> Tensors:
        """The model's inputs."""
        return collate([atoms], self._form)

    def run(self, prepared: Tensors) -> tuple[Tensor, Tensor]:
        """Energy and forces; what is timed."""
        return self._run(prepared)  # type: ignore[no-any-return]

    def predict(self, atoms: Atoms) -> RawPrediction:
        """The model's answer for one structure."""
        tensors = self.prepare(atoms)
        _, forces = self.run(tensors)
        energies = self._model(**tensors).detach().numpy()
        return RawPrediction(float(energies.sum()), forces.detach().numpy(), None, energies)
