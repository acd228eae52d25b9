"""What a recipe knows about a model family, and how a model finds its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from ase import Atoms
from torch import nn

from .graphs import GraphFormat


class RawPrediction(NamedTuple):
    """One structure's energy (eV), forces (n, 3) eV/Å, Voigt stress eV/Å^3 and atomic energies."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None
    energies: np.ndarray | None


@dataclass(frozen=True)
class EnergyModel:
    """A copy of a model, made of gaq operators, that returns atomic energies.

    Attributes:
        module: ``module(*tensors) -> (N,)`` atomic energies (eV, float64), in evaluation mode.
        form: how structures become those tensors.
        family: the model family's name, for messages.
        export_modes: ``torch.export`` modes to try in order, strict (True) or not.
    """

    module: nn.Module
    form: GraphFormat
    family: str
    export_modes: Sequence[bool] = (True, False)


class Original(Protocol):
    """The user's model as its own package runs it: what the result is measured against."""

    def prepare(self, atoms: Atoms) -> Any:
        """The package's own input for a structure."""

    def run(self, prepared: Any) -> Any:
        """Energy and forces from a prepared input; what is timed."""

    def predict(self, atoms: Atoms) -> RawPrediction:
        """The answer for one structure."""


class Recipe(Protocol):
    """One model family: how to recognise a model and state its energy over edge vectors."""

    def matches(self, model: nn.Module) -> bool:
        """Whether this recipe knows ``model``."""

    def energy_model(self, model: nn.Module) -> EnergyModel:
        """A swapped copy of ``model`` over the tensors of its ``GraphFormat``."""

    def original(self, model: nn.Module, ours: bool = False) -> Original:
        """The unchanged model, for comparison; a copy of it, unless it is ``ours`` alone."""
