"""What a recipe knows about a model family, and how a model finds its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from .graphs import GraphFormat


@dataclass(frozen=True)
class EnergyModel:
    """A copy of a model, made of gaq operators, that returns atomic energies.

    Attributes:
        module: ``module(*tensors) -> (N,) or (N, 1)`` atomic energies (eV), in evaluation mode.
        form: how structures become those tensors.
        family: the model family's name, for messages.
    """

    module: nn.Module
    form: GraphFormat
    family: str


class Recipe(Protocol):
    """One model family: how to recognise a model and state its energy over edge vectors."""

    def matches(self, model: nn.Module) -> bool:
        """Whether this recipe knows ``model``."""

    def energy_model(self, model: nn.Module) -> EnergyModel:
        """A swapped copy of ``model`` over the tensors of its ``GraphFormat``."""
