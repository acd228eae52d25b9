"""SevenNet (``sevenn``): NequIP's architecture on e3nn.

The model is a sequence of modules over a dictionary; the energy is the part before its force
output. It takes edge vectors directly, so that is what the captured graph takes too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from .base import EnergyModel, RawPrediction
from .graphs import GraphFormat
from .modules import swap_first

_BEHIND_THE_ENERGY = ("AtomReduce", "ForceOutput", "ForceStressOutput", "ForceStressOutputFromEdge")


class SevenNetRecipe:
    """Recipe for ``sevenn.nn.sequential.AtomGraphSequential``."""

    def matches(self, model: nn.Module) -> bool:
        """True for SevenNet's sequential model (or a calculator's ``.model``)."""
        return type(model).__name__ == "AtomGraphSequential" and type(model).__module__.startswith("sevenn")

    def energy_model(self, model: nn.Module) -> EnergyModel:
        """The layers up to the atomic energies, with e3nn modules swapped."""
        swapped = swap_first(model)
        type_map: dict[int, int] = dict(model.type_map)  # type: ignore[arg-type]
        module = _SevenNetEnergy(swapped, type_map)
        form = GraphFormat(
            ("numbers", "edge_vec", "receivers", "senders", "batch", "ptr"),
            float(model.cutoff),  # type: ignore[arg-type]
            elements=tuple(sorted(type_map)),
        )
        return EnergyModel(module, form, "SevenNet", (True,))

    def original(self, model: nn.Module, ours: bool = False) -> SevenNetOriginal:
        """The model as its own package runs it."""
        return SevenNetOriginal(model if ours else copy.deepcopy(model))


class SevenNetOriginal:
    """A model on structures, through SevenNet's own code, which may change what it is given."""

    def __init__(self, model: nn.Module) -> None:
        from sevenn.calculator import SevenNetCalculator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._calculator = SevenNetCalculator(model, file_type="model_instance", device="cpu")

    def change(self, wrap: Callable[[nn.Module], Any]) -> None:
        """Run what ``wrap`` makes of the model, e.g. ``torch.compile``, in its place."""
        self._calculator.model = wrap(self._calculator.model)

    def prepare(self, atoms: Atoms) -> Any:
        """SevenNet's graph of a structure."""
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph

        graph = unlabeled_atoms_to_graph(atoms, self._calculator.cutoff, with_shift=False)
        return AtomGraphData.from_numpy_dict(graph)

    def run(self, prepared: Any) -> Any:
        """Energy, forces and stress of a prepared graph; what is timed."""
        return self._calculator.model(prepared.clone())

    def predict(self, atoms: Atoms) -> RawPrediction:
        """The model's answer for one structure."""
        results = self._calculator.output_to_results(self.run(self.prepare(atoms)))
        energies = results["energies"].astype("float64")
        stress = results["stress"] if atoms.pbc.all() else None
        return RawPrediction(float(energies.sum()), results["forces"], stress, energies)


class _SevenNetEnergy(nn.Module):
    """Atomic energies from species and edge vectors."""

    def __init__(self, model: nn.Module, type_map: dict[int, int]) -> None:
        super().__init__()
        for name, child in model.named_children():
            if type(child).__name__ not in _BEHIND_THE_ENERGY:
                self.add_module(name, child)
        table = torch.zeros(max(type_map) + 1, dtype=torch.int64)
        for number, index in type_map.items():
            table[number] = index
        self.register_buffer("species_of", table)
        rescale = self.rescale_atomic_energy
        shift = rescale.shift.detach().double()  # type: ignore[union-attr, operator]
        self.register_buffer("energy_shift", shift.expand(max(type_map.values()) + 1).clone())
        rescale.shift = nn.Parameter(torch.zeros_like(rescale.shift), requires_grad=False)  # type: ignore[union-attr, arg-type]

    def forward(
        self,
        numbers: Tensor,
        edge_vec: Tensor,
        receivers: Tensor,
        senders: Tensor,
        batch: Tensor,
        ptr: Tensor,
    ) -> Tensor:
        # batch and ptr are taken for the sake of one input format; atomic energies do not need them
        species = self.species_of[numbers]  # type: ignore[index]
        data = {
            "x": species,
            "edge_vec": edge_vec,
            "edge_index": torch.stack([receivers, senders]),
        }
        for child in self.children():
            data = child(data)
        # The reference energies of atoms are added in float64: in float32 they would cost digits.
        shift = self.energy_shift[species]  # type: ignore[index]
        return data["atomic_energy"].squeeze(-1).double() + shift
