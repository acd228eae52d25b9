"""Energy and forces of an energy graph by autograd: for choosing and comparing, before kernels exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from ..capture.graphs import GraphFormat
from .derive_forces import forces_and_virial


@dataclass(frozen=True)
class GraphError:
    """How far one energy graph is from another on some structures.

    Attributes:
        force_mev_per_a: mean over components of ``|dF|``.
        force_rel: that over the mean ``|F|`` of a component.
        energy_mev_per_atom: mean over structures of ``|dE|`` per atom, of these graphs as they are.
    """

    force_mev_per_a: float
    force_rel: float
    energy_mev_per_atom: float


class Comparison:
    """Energy graphs against a float one, whose answers are computed once.

    Args:
        exact: the float energy graph.
        form: its inputs.
        tests: input batches of one structure each.
    """

    def __init__(self, exact: GraphModule, form: GraphFormat, tests: Sequence[Sequence[Tensor]]) -> None:
        self._form, self._tests = form, list(tests)
        self._truth = [energy_and_forces(exact, form, inputs) for inputs in self._tests]

    @property
    def atoms(self) -> int:
        """How many atoms the structures have together."""
        return sum(len(forces) for _, forces in self._truth)

    def error(self, graph: GraphModule) -> GraphError:
        """How far ``graph`` is from the float graph."""
        found = [energy_and_forces(graph, self._form, inputs) for inputs in self._tests]
        pairs = list(zip(found, self._truth, strict=True))
        force = float(np.concatenate([np.abs(f - t).ravel() for (_, f), (_, t) in pairs]).mean())
        scale = float(np.concatenate([np.abs(t).ravel() for _, t in self._truth]).mean())
        energy = float(np.mean([abs(e - t) / len(f) for (e, f), (t, _) in pairs]))
        return GraphError(1e3 * force, force / scale if scale > 0 else float("inf"), 1e3 * energy)


def energy_and_forces(
    graph: GraphModule, form: GraphFormat, inputs: Sequence[Tensor]
) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (n, 3) (eV/Å) of an energy graph.

    Args:
        graph: inputs ``form.inputs`` -> atomic energies.
        form: the inputs.
        inputs: one batch.
    """
    named = dict(zip(form.inputs, inputs, strict=True))
    leaves = {name: named[name].detach().requires_grad_(True) for name in form.vectors}
    with torch.enable_grad():
        energy = graph(*(leaves.get(name, value) for name, value in named.items())).sum()
        slopes = torch.autograd.grad(energy, list(leaves.values()))
    if form.positions is None:
        forces, _ = forces_and_virial(named, dict(zip(leaves, slopes, strict=True)))
    else:
        forces = -slopes[0]
    return float(energy.detach()), forces.double().numpy()
