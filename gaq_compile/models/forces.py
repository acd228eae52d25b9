"""Energies and forces of a function of edge vectors, as training and the models themselves need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

VECTORS = "edge_vec"  # how names of edge vectors begin; of "edge_vec_lr" the ends are "receivers_lr", ...


def energy_and_forces(
    atomic_energies: Callable[..., Tensor], tensors: Mapping[str, Tensor], create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Energies (graphs,) in eV, and forces (N, 3) in eV/Å, the negative gradient by positions.

    Args:
        atomic_energies: gives (N,) eV of named tensors.
        tensors: the names and values; edge vectors (E, 3) Å point from receivers to senders.
        create_graph: whether what is returned can be differentiated again, as training needs.
    """
    vectors = {n: t.detach().requires_grad_(True) for n, t in tensors.items() if n.startswith(VECTORS)}
    energies = atomic_energies(**{**tensors, **vectors})
    gradients = torch.autograd.grad(energies.sum(), list(vectors.values()), create_graph=create_graph)
    atoms, graphs = tensors["numbers"].shape[0], tensors["ptr"].shape[0] - 1
    forces = gradients[0].new_zeros(atoms, 3)
    for name, gradient in zip(vectors, gradients, strict=True):
        suffix = name.removeprefix(VECTORS)
        forces = forces.index_add(0, tensors["receivers" + suffix], gradient)
        forces = forces.index_add(0, tensors["senders" + suffix], -gradient)
    return energies.new_zeros(graphs).index_add(0, tensors["batch"], energies), forces
