"""What errors cost: of weights, per input channel of every irreps-linear, and of rounded activations.

An error D in a layer's weights changes the energy by ``sum_n g_n^T D^T x_n`` to first order, with
inputs ``x_n`` and gradients ``g_n = dE/dy_n`` of its rows, and the forces by that sum's derivative
along a displacement, where both ``x`` and ``g`` vary. Leaving cross terms out, what D costs is
``tr(D^T H D)`` with

    H = sum_n |g|^2 xdot xdot^T + |gdot|^2 x x^T      (forces)
      + ENERGY_WEIGHT * |g|^2 x x^T                   (energy)

where a dot is a central difference along random displacements of the atoms. Rounding against this
H (:mod:`..numerics.second_order`) spares what forces feel, not merely what is large.

An error d in the activations that a site rounds changes the energy by ``sum_n g_n d_n``, with gradients
``g_n = dE/dx_n`` through the site's readers alone, and the forces by ``sum_n gdot_n d_n``. Errors that
are independent, with variance v[u] in channel u, cost ``sum_u I[u] v[u]`` in the same unit, with

    I[u] = sum_n gdot[n, u]^2 + ENERGY_WEIGHT * g[n, u]^2       (over rows and components)

A bias is a row of weights that meets the constant 1 and is not rounded, so it can take up the mean
of what the others' rounding does. ``sum_n (|gdot|^2 + ENERGY_WEIGHT |g|^2) x``, with x = 1 for the
bias itself, is the part of H that it needs.
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
from ..ir.layout import blocks, view
from ..ir.specs import LinearSpec, linear_spec
from ..numerics.second_order import Irrep, channel_hessians
from .calibrate import Site
from .graph_tools import gaq

ENERGY_WEIGHT = 3.0  # Å^-2: how an error of the energy counts beside one of the forces
DISPLACEMENT = 5e-3  # Å, of each atom's coordinates (standard deviation)
DRAWS = 4  # displacements per calibration batch; with 2, SO3LR at 4 bits is a sixth worse

Hessians = dict[str, dict[Irrep, Tensor]]


@dataclass(frozen=True)
class ChannelCosts:
    """What errors cost, per atom.

    Attributes:
        hessians: H of every irreps-linear by its label, ``{(l, p): (C, C)}``.
        means: of every irreps-linear with a bias by its label, H of its 0e channels with the bias
            (C,), and of the bias with itself at the end: (C + 1,).
        impacts: I of every site by its label, (n_channels,).
        powers: sums of squares of every site's tensor by its label, over rows and components,
            (n_channels,).
        rows: rows of every site's tensor by its label, per atom.
    """

    hessians: Hessians = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    impacts: dict[str, Tensor] = field(default_factory=dict)
    powers: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)


def weigh_channels(
    graph_module: GraphModule,
    form: GraphFormat,
    batches: Sequence[Sequence[Tensor]],
    sites: Sequence[Site] = (),
    progress: bool = False,
) -> ChannelCosts:
    """Costs of every irreps-linear's weights and of every site's activations.

    Args:
        graph_module: the float energy graph.
        form: its inputs.
        batches: positional inputs of the graph, one entry per calibration batch.
        sites: the activations to weigh, of the same graph.
        progress: show a progress bar.

    Raises:
        StructureError: if calibration meets NaN or infinite activations or gradients.
    """
    found = ChannelCosts()
    named = [dict(zip(form.inputs, batch, strict=True)) for batch in batches]
    share = 1.0 / max(1, sum(_atoms(inputs, form) for inputs in named))
    random = torch.Generator().manual_seed(0)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("weighing channels", total=len(batches) * (1 + 2 * DRAWS))
        for inputs in named:
            here = _Rows.of(graph_module, form, inputs, sites)
            bar.advance(task)
            weights = here.add(found, share * ENERGY_WEIGHT)
            for _ in range(DRAWS):
                move = torch.randn(_atoms(inputs, form), 3, generator=random)
                ahead, behind = (
                    _Rows.of(graph_module, form, _moved(inputs, form, sign * DISPLACEMENT * move), sites)
                    for sign in (1, -1)
                )
                here.add_varied(found, weights, ahead, behind, share / DRAWS)
                bar.advance(task, 2)
            here.add_inputs(found, weights)
    weighed = {label: [*hessians.values()] for label, hessians in found.hessians.items()}
    for label, tensors in (weighed | {k: [v] for k, v in found.impacts.items()}).items():
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
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


@dataclass(frozen=True)
class _Layer:
    label: str
    spec: LinearSpec
    biased: bool


@dataclass
class _Rows:
    """Inputs and output gradients of every call of an irreps-linear, in graph order; sites' gradients."""

    layers: list[_Layer] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    sites: list[tuple[Site, Tensor, Tensor]] = field(default_factory=list)

    @staticmethod
    def of(
        graph_module: GraphModule, form: GraphFormat, inputs: Mapping[str, Tensor], sites: Sequence[Site]
    ) -> _Rows:
        """Evaluate the energy and its gradient by what layers return; none by the inputs is needed."""
        recorder = _Recorder(graph_module, sites)
        with torch.enable_grad():
            energy = recorder.run(*inputs.values()).sum()
            outputs = [*(output for *_, output in recorder.calls), *(p for _, p in recorder.probes)]
            found = torch.autograd.grad(energy, outputs, allow_unused=True)
        slopes = [
            torch.zeros_like(output) if gradient is None else gradient.detach()
            for output, gradient in zip(outputs, found, strict=True)
        ]
        count = len(recorder.calls)
        return _Rows(
            [layer for layer, *_ in recorder.calls],
            [x.detach() for _, x, _ in recorder.calls],
            slopes[:count],
            [(site, x.detach(), g) for (site, x), g in zip(recorder.probes, slopes[count:], strict=True)],
        )

    def add(self, found: ChannelCosts, factor: float) -> list[Tensor]:
        """``factor * g^2`` of the sites; returns ``factor * |g|^2``, what the rows of each layer count."""
        for site, x, g in self.sites:
            _add_squares(found.impacts, site, g, factor)
            _add_squares(found.powers, site, x, factor / ENERGY_WEIGHT)
            rows = len(x) * factor / ENERGY_WEIGHT
            found.rows[site.label] = found.rows.get(site.label, 0.0) + rows
        return [factor * _squares(g) for g in self.gradients]

    def add_varied(
        self, found: ChannelCosts, weights: list[Tensor], ahead: _Rows, behind: _Rows, factor: float
    ) -> None:
        """``factor * |g|^2 xdot xdot^T``, and ``factor * gdot^2`` of the sites.

        Args:
            found: what to add to.
            weights: what the rows of each layer count, to which ``factor * |gdot|^2`` is added.
            ahead, behind: both ends of a displacement.
            factor: how much this displacement counts.
        """
        for i, layer in enumerate(self.layers):
            x_dot = (ahead.inputs[i] - behind.inputs[i]) / (2 * DISPLACEMENT)
            g_dot = (ahead.gradients[i] - behind.gradients[i]) / (2 * DISPLACEMENT)
            _add(found, layer, x_dot, factor * _squares(self.gradients[i]))
            weights[i] = weights[i] + factor * _squares(g_dot)
        for (site, _, after), (_, _, before) in zip(ahead.sites, behind.sites, strict=True):
            _add_squares(found.impacts, site, (after - before) / (2 * DISPLACEMENT), factor)

    def add_inputs(self, found: ChannelCosts, weights: Sequence[Tensor]) -> None:
        """``weights * x x^T``: all displacements at once, since they have the same x."""
        for layer, x, weight in zip(self.layers, self.inputs, weights, strict=True):
            _add(found, layer, x, weight)
            _add_mean(found, layer, x, weight)


def _squares(gradient: Tensor) -> Tensor:
    return gradient.double().square().sum(1)


def _add(found: ChannelCosts, layer: _Layer, x: Tensor, weight: Tensor) -> None:
    sums = found.hessians.setdefault(layer.label, {})
    for irrep, hessian in channel_hessians(x, layer.spec, weight).items():
        sums[irrep] = sums[irrep] + hessian if irrep in sums else hessian


def _add_mean(found: ChannelCosts, layer: _Layer, x: Tensor, weight: Tensor) -> None:
    parts = [view(x, b)[:, 0].double() for b in layer.spec.inputs if (b.l, b.p) == (0, 1)]
    if layer.biased and parts:
        sums = torch.cat([weight @ torch.cat(parts, 1), weight.sum()[None]])
        found.means[layer.label] = found.means.get(layer.label, torch.zeros_like(sums)) + sums


def _add_squares(sums: dict[str, Tensor], site: Site, x: Tensor, factor: float) -> None:
    """``factor * x^2`` of a site, summed by channel."""
    squares = x.double().square()
    found = factor * torch.cat([view(squares, block).sum((0, 1)) for block in blocks(site.irreps)])
    sums[site.label] = sums.get(site.label, torch.zeros_like(found)) + found


class _Recorder(Interpreter):
    """Runs the energy graph and keeps what goes into and comes out of each irreps-linear.

    A site's readers get a copy of its tensor (its probe), whose gradient is then theirs alone.
    """

    def __init__(self, module: GraphModule, sites: Sequence[Site]) -> None:
        super().__init__(module)
        self.calls: list[tuple[_Layer, Tensor, Tensor]] = []
        self.probes: list[tuple[Site, Tensor]] = []
        self._of_source: dict[Node, list[Site]] = {}
        self._of_reader: dict[Node, Tensor] = {}
        for site in sites:
            self._of_source.setdefault(site.source, []).append(site)

    def run_node(self, n: Node) -> Any:
        value = self._run(n)
        for site in self._of_source.get(n, ()):
            probe = value.clone() if value.requires_grad else value.detach().clone().requires_grad_(True)
            self.probes.append((site, probe))
            self._of_reader.update(dict.fromkeys(site.consumers, probe))
        return value

    def _run(self, n: Node) -> Any:
        source = n.args[0] if n in self._of_reader else None
        if isinstance(source, Node):
            whole, self.env[source] = self.env[source], self._of_reader[n]
        value = super().run_node(n)
        if isinstance(source, Node):
            self.env[source] = whole
        if n.target is gaq.irreps_linear.default:
            if not value.requires_grad:  # a constant of the structure (one-hot species) has a gradient too
                value = value.detach().requires_grad_(True)
            layer = _Layer(str(n.args[-1]), linear_spec(str(n.args[3])), n.args[2] is not None)
            self.calls.append((layer, self.env[n.args[0]], value))  # type: ignore[index]
        return value
