"""Energy graphs against a float one, by autograd: for choosing and comparing, before kernels exist.

An instrument knows no graphs; this makes predictions of them, and :mod:`.parity` compares those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..capture.graphs import GraphFormat
from ..passes.choose_bits import GraphError
from ..passes.derive_forces import forces_and_virial
from .parity import compare
from .types import Prediction


class Comparison:
    """Energy graphs against a float one, whose answers are computed once.

    Args:
        exact: the float energy graph.
        form: its inputs.
        tests: input batches of one structure each.
    """

    def __init__(self, exact: GraphModule, form: GraphFormat, tests: Sequence[Sequence[Tensor]]) -> None:
        self._form, self._tests = form, list(tests)
        self._truth = self._predictions(exact)

    @property
    def atoms(self) -> int:
        """How many atoms the structures have together."""
        return sum(len(truth.forces) for truth in self._truth)

    def error(self, graph: GraphModule) -> GraphError:
        """How far ``graph`` is from the float graph."""
        found = compare(self._truth, self._predictions(graph))
        return GraphError(found.force_mae_mev_per_a, found.force_rel, found.energy_mev_per_atom)

    def _predictions(self, graph: GraphModule) -> list[Prediction]:
        return [energy_and_forces(graph, self._form, inputs) for inputs in self._tests]


def energy_and_forces(graph: GraphModule, form: GraphFormat, inputs: Sequence[Tensor]) -> Prediction:
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
    return Prediction(float(energy.detach()), forces.double().numpy())
