"""Watch the inputs of the layers to be quantized over example graphs, and choose their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..config import QuantConfig, activation_scheme
from ..errors import StructureError
from ..ir.layout import lmax, simplified
from ..ir.specs import linear_spec
from ..ir.tags import irreps_of
from ..numerics.observers import ObserverState, make_observer
from .graph_tools import aten, calls, gaq, is_call

FEW_BITS = 8  # of scalars, up to which every channel wants a step of its own


@dataclass(frozen=True)
class Site:
    """An activation to be quantized.

    Attributes:
        source: the node whose tensor is quantized.
        consumers: the nodes that read it quantized, as their first argument.
        irreps: its irreps, simplified.
        scheme: how.
        label: the layer (or, for gathered features, the source) that overrides name.
    """

    source: Node
    consumers: tuple[Node, ...]
    irreps: str
    scheme: str
    label: str


def quantization_sites(graph_module: GraphModule, config: QuantConfig) -> list[Site]:
    """Every activation that ``config`` quantizes, in graph order.

    These are the inputs of irreps-linears, and equivariant features that are gathered from atoms
    to edges. One-hot inputs (species) are integers already and not among them.
    """
    return [*_linear_inputs(graph_module, config), *_gathered_features(graph_module, config)]


def _linear_inputs(graph_module: GraphModule, config: QuantConfig) -> list[Site]:
    found = []
    for node in calls(graph_module, gaq.irreps_linear.default):
        label = str(node.args[-1])
        scheme = config.for_layer(label).activation
        if scheme is not None and not is_one_hot(node.args[0]):
            irreps = simplified(linear_spec(str(node.args[3])).irreps_in)
            found.append(Site(node.args[0], (node,), irreps, scheme, label))
    return found


def _gathered_features(graph_module: GraphModule, config: QuantConfig) -> list[Site]:
    gathers: dict[Node, list[Node]] = {}
    for node in calls(graph_module, aten.index.Tensor):
        irreps = irreps_of(node.args[0])
        if irreps is not None and lmax(irreps) > 0:
            gathers.setdefault(node.args[0], []).append(node)
    found = []
    for source, consumers in gathers.items():
        scheme = config.for_layer(f"gather.{source.name}").activation
        if scheme is not None:
            found.append(
                Site(source, tuple(consumers), str(irreps_of(source)), scheme, f"gather.{source.name}")
            )
    return found


def calibrate(
    graph_module: GraphModule,
    batches: Sequence[Sequence[Tensor]],
    config: QuantConfig,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Activation steps per layer label, from the given batches of graph inputs.

    Args:
        graph_module: the float energy graph.
        batches: positional inputs of the graph, one entry per calibration batch.
        config: says which layers and which observer.
        progress: show a progress bar.

    Returns:
        ``{site.label: (n_channels,) float32 steps}``.

    Raises:
        StructureError: if calibration meets NaN or infinite activations.
    """
    sites = quantization_sites(graph_module, config)
    observer = make_observer(config.observer, config.headroom, config.percentile)
    states = {site.label: observer.start(_granularity(site, config)) for site in sites}
    if not sites:
        return {}
    with Progress(disable=not progress, transient=True) as bar, torch.no_grad():
        task = bar.add_task("calibrating", total=len(batches))
        for batch in batches:
            _Watcher(graph_module, sites, states).run(*batch)
            bar.advance(task)
    return {label: state.scale() for label, state in states.items()}


def _granularity(site: Site, config: QuantConfig) -> str:
    """16 bits are fine enough for a whole block, and unequal steps would make weights unequal."""
    few = activation_scheme(site.scheme).scalar_bits <= FEW_BITS
    return config.granularity if few or config.granularity == "tensor" else "block"


class _Watcher(Interpreter):
    """Runs the graph and shows each site's tensor to its observer."""

    def __init__(
        self, module: GraphModule, sites: Sequence[Site], states: Mapping[str, ObserverState]
    ) -> None:
        super().__init__(module)
        self._states = states
        self._by_source: dict[Node, list[Site]] = {}
        for site in sites:
            self._by_source.setdefault(site.source, []).append(site)

    def run_node(self, n: Node):  # type: ignore[no-untyped-def]
        value = super().run_node(n)
        for site in self._by_source.get(n, ()):
            if not bool(torch.isfinite(value).all()):
                raise StructureError(
                    f"activations of {site.label} are not finite during calibration",
                    fix="look at the structures: atoms too close, or outside what the potential knows",
                )
            if value.numel():
                self._states[site.label].observe(value, site.irreps, activation_scheme(site.scheme))
        return value


def is_one_hot(node: object) -> bool:
    """Whether a node's value is a one-hot encoding: zeros and ones that select rows of weights."""
    while is_call(node, aten._to_copy.default, aten.view.default):
        node = node.args[0]  # type: ignore[union-attr]
    return is_call(node, aten.one_hot.default)
