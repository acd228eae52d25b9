"""SevenNet (``sevenn``): NequIP's architecture on e3nn.

The model is a sequence of modules over a dictionary; the energy is the part before its force
output. It takes edge vectors directly, so that is what the captured graph takes too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import EnergyModel
from .graphs import GraphFormat
from .modules import swap

_BEHIND_THE_ENERGY = ("AtomReduce", "ForceOutput", "ForceStressOutput", "ForceStressOutputFromEdge")


class SevenNetRecipe:
    """Recipe for ``sevenn.nn.sequential.AtomGraphSequential``."""

    def matches(self, model: nn.Module) -> bool:
        """True for SevenNet's sequential model (or a calculator's ``.model``)."""
        return type(model).__name__ == "AtomGraphSequential" and type(model).__module__.startswith("sevenn")

    def energy_model(self, model: nn.Module) -> EnergyModel:
        """The layers up to the atomic energies, with e3nn modules swapped."""
        swapped = swap(model)
        type_map: dict[int, int] = dict(model.type_map)  # type: ignore[arg-type]
        module = _SevenNetEnergy(swapped, type_map)
        form = GraphFormat(
            ("numbers", "edge_vec", "receivers", "senders", "batch", "ptr"),
            float(model.cutoff),  # type: ignore[arg-type]
            elements=tuple(sorted(type_map)),
        )
        return EnergyModel(module, form, "SevenNet")


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

    def forward(
        self, numbers: Tensor, edge_vec: Tensor, receivers: Tensor, senders: Tensor, batch: Tensor, ptr: Tensor
    ) -> Tensor:
        # batch and ptr are taken for the sake of one input format; atomic energies do not need them
        data = {
            "x": self.species_of[numbers],  # type: ignore[index]
            "edge_vec": edge_vec,
            "edge_index": torch.stack([receivers, senders]),
        }
        for child in self.children():
            data = child(data)
        return data["atomic_energy"].squeeze(-1)
