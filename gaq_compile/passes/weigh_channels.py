"""How much each input channel of every irreps-linear matters to the energy and to the forces.

An error D in a layer's weights changes the energy by ``sum_n g_n^T D^T x_n`` to first order, with
inputs ``x_n`` and gradients ``g_n = dE/dy_n`` of its rows, and the forces by that sum's derivative
along a displacement, where both ``x`` and ``g`` vary. Leaving cross terms out, what D costs is
``tr(D^T H D)`` with

    H = sum_n |g|^2 xdot xdot^T + |gdot|^2 x x^T      (forces)
      + ENERGY_WEIGHT * |g|^2 x x^T                   (energy)

where a dot is a central difference along random displacements of the atoms. Rounding against this
H (:mod:`..numerics.second_order`) spares what forces feel, not merely what is large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..capture.graphs import EDGE_VECTORS, GraphFormat
from ..errors import StructureError
from ..ir.specs import linear_spec
from ..numerics.second_order import Irrep, channel_hessians
from .graph_tools import gaq

ENERGY_WEIGHT = 3.0  # Å^-2: how an error of the energy counts beside one of the forces
DISPLACEMENT = 5e-3  # Å, of each atom's coordinates (standard deviation)
DRAWS = 2  # displacements per calibration batch

Hessians = dict[str, dict[Irrep, Tensor]]


def weigh_channels(
    graph_module: GraphModule,
    form: GraphFormat,
    batches: Sequence[Sequence[Tensor]],
    progress: bool = False,
) -> Hessians:
    """H of every irreps-linear, per atom, by the layer's label.

    Args:
        graph_module: the float energy graph.
        form: its inputs.
        batches: positional inputs of the graph, one entry per calibration batch.
        progress: show a progress bar.

    Raises:
        StructureError: if calibration meets NaN or infinite activations or gradients.
    """
    found: Hessians = {}
    random = torch.Generator().manual_seed(0)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("weighing channels", total=len(batches) * (1 + 2 * DRAWS))
        for batch in batches:
            inputs = dict(zip(form.inputs, batch, strict=True))
            here = _Rows.of(graph_module, form, inputs)
            bar.advance(task)
            share = 1.0 / (_atoms(inputs, form) * len(batches))
            here.add(found, share * ENERGY_WEIGHT)
            for _ in range(DRAWS):
                move = torch.randn(_atoms(inputs, form), 3, generator=random)
                ahead, behind = (
                    _Rows.of(graph_module, form, _moved(inputs, form, sign * DISPLACEMENT * move))
                    for sign in (1, -1)
                )
                here.add_varied(found, ahead, behind, share / DRAWS)
                bar.advance(task, 2)
    for label, hessians in found.items():
        if not all(bool(torch.isfinite(h).all()) for h in hessians.values()):
            raise StructureError(
                f"inputs or gradients of {label} are not finite during calibration",
                fix="look at the structures: atoms too close, or outside what the potential knows",
            )
    return found


def _atoms(inputs: Mapping[str, Tensor], form: GraphFormat) -> int:
    return len(inputs[form.positions or "numbers"])


def _moved(inputs: Mapping[str, Tensor], form: GraphFormat, move: Tensor) -> dict[str, Tensor]:
    """The inputs after a displacement (N, 3) of the atoms, with the same edges."""
    moved = dict(inputs)
    for name in form.vectors:
        step = move
        if name != form.positions:
            receivers, senders = (inputs[end] for end in EDGE_VECTORS[name])
            step = move[senders] - move[receivers]
        moved[name] = inputs[name] + step.to(inputs[name].dtype)
    return moved


@dataclass
class _Rows:
    """Inputs and output gradients of every call of an irreps-linear, in graph order."""

    specs: list[tuple[str, str]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(graph_module: GraphModule, form: GraphFormat, inputs: Mapping[str, Tensor]) -> _Rows:
        """Evaluate the energy and its gradient."""
        leaves = [
            value.detach().requires_grad_(True) if name in form.vectors else value
            for name, value in inputs.items()
        ]
        recorder = _Recorder(graph_module)
        with torch.enable_grad():
            energy = recorder.run(*leaves).sum()
            outputs = [output for *_, output in recorder.calls]
            gradients = torch.autograd.grad(energy, outputs, allow_unused=True)
        rows = _Rows()
        for (label, spec, x, output), gradient in zip(recorder.calls, gradients, strict=True):
            rows.specs.append((label, spec))
            rows.inputs.append(x.detach())
            rows.gradients.append(torch.zeros_like(output) if gradient is None else gradient.detach())
        return rows

    def add(self, found: Hessians, factor: float) -> None:
        """``factor * |g|^2 x x^T``."""
        for place, x, g in zip(self.specs, self.inputs, self.gradients, strict=True):
            _add(found, place, x, factor * _squares(g))

    def add_varied(self, found: Hessians, ahead: _Rows, behind: _Rows, factor: float) -> None:
        """``factor * (|g|^2 xdot xdot^T + |gdot|^2 x x^T)`` from both ends of a displacement."""
        for i, place in enumerate(self.specs):
            x_dot = (ahead.inputs[i] - behind.inputs[i]) / (2 * DISPLACEMENT)
            g_dot = (ahead.gradients[i] - behind.gradients[i]) / (2 * DISPLACEMENT)
            _add(found, place, x_dot, factor * _squares(self.gradients[i]))
            _add(found, place, self.inputs[i], factor * _squares(g_dot))


def _squares(gradient: Tensor) -> Tensor:
    return gradient.double().square().sum(1)


def _add(found: Hessians, place: tuple[str, str], x: Tensor, weight: Tensor) -> None:
    label, spec = place
    sums = found.setdefault(label, {})
    for irrep, hessian in channel_hessians(x, linear_spec(spec), weight).items():
        sums[irrep] = sums[irrep] + hessian if irrep in sums else hessian


class _Recorder(Interpreter):
    """Runs the energy graph and keeps what goes into and comes out of each irreps-linear."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.calls: list[tuple[str, str, Tensor, Tensor]] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.target is gaq.irreps_linear.default:
            if not value.requires_grad:  # a constant of the structure (one-hot species) has a gradient too
                value = value.detach().requires_grad_(True)
            self.calls.append((str(n.args[-1]), str(n.args[3]), self.env[n.args[0]], value))  # type: ignore[index]
        return value
