"""Scalars that enter a linear with a bias are rounded about the middle of their range, not about zero.

Before::

    y = gaq.irreps_linear(x, W, b, '64x0e -> 192x0e')

After, with ``c[u] = (max x[u] + min x[u]) / 2`` over the calibration batches::

    y = gaq.irreps_linear(x - c, W, b + W^T c, '64x0e -> 192x0e')

In float this is the same. Rounded, a channel's integers span its own range, not one that reaches to zero and
as far on the other side (SiLU's results are hardly ever negative), and errors of rounded weights meet
deviations from the middle alone, since what the middle gives is in the bias. Layers without a bias stay:
their result must vanish with their input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..config import QuantConfig
from ..ir.specs import linear_spec
from ..operators import reference as ref
from .calibrate import is_one_hot
from .graph_tools import add_buffer, aten, attribute, calls, copied, finished, gaq


def center_inputs(
    graph_module: GraphModule, config: QuantConfig, batches: Sequence[Sequence[Tensor]]
) -> GraphModule:
    """Subtract the middle of their range from the inputs of linears with a bias, where they are rounded.

    Args:
        graph_module: the float energy graph, tagged.
        config: says which inputs are rounded; a scheme that is not ``centered`` changes nothing.
        batches: positional inputs of the graph, one entry per calibration batch.
    """
    gm = copied(graph_module)
    layers = list(_layers(gm, config)) if config.centered else []
    middles = _middles(gm, {layer.args[0] for layer in layers}, batches)
    centered: dict[Node, Node] = {}
    for layer in layers:
        source = layer.args[0]
        if source in middles:
            if source not in centered:
                centered[source] = _less(gm, source, middles[source])
            _center(gm, layer, centered[source], middles[source])
    return finished(gm)


def _layers(gm: GraphModule, config: QuantConfig) -> Iterator[Node]:
    """Linears of scalars with a bias, both constants of the graph."""
    for node in calls(gm, gaq.irreps_linear.default):
        x, weight, bias, spec, _, label = node.args
        constants = all(isinstance(n, Node) and n.op == "get_attr" for n in (weight, bias))
        scalars = all((b.l, b.p) == (0, 1) for b in linear_spec(str(spec)).inputs)
        if constants and scalars and config.for_layer(str(label)).activation and not is_one_hot(x):
            yield node


def _middles(gm: GraphModule, sources: set[Node], batches: Sequence[Sequence[Tensor]]) -> dict[Node, Tensor]:
    """(C,) of every source that has rows; what is not finite is left to calibration, which says so."""
    watcher = _Watcher(gm, sources)
    with torch.no_grad():
        for batch in batches if sources else ():
            watcher.run(*batch)
    found = {node: (low + high) / 2 for node, (low, high) in watcher.ranges.items()}
    return {node: middle for node, middle in found.items() if bool(torch.isfinite(middle).all())}


def _less(gm: GraphModule, source: Node, middle: Tensor) -> Node:
    name = add_buffer(gm, f"{source.name}_middle", middle)
    with gm.graph.inserting_after(source):
        constant = gm.graph.get_attr(name)
    with gm.graph.inserting_after(constant):
        less = gm.graph.call_function(aten.sub.Tensor, (source, constant))
    less.meta = {key: value for key, value in source.meta.items() if key in ("irreps", "val")}
    return less


def _center(gm: GraphModule, layer: Node, centered: Node, middle: Tensor) -> None:
    _, weight, bias, spec, transposed, label = layer.args
    with torch.no_grad():
        given = attribute(gm, weight), attribute(gm, bias)  # type: ignore[arg-type]
        moved = ref.irreps_linear(middle[None], *given, str(spec), bool(transposed))[0]
    name = add_buffer(gm, f"{label}_centered_bias", moved)
    with gm.graph.inserting_before(layer):
        constant = gm.graph.get_attr(name)
    layer.args = (centered, weight, constant, spec, transposed, label)


class _Watcher(Interpreter):
    """Runs the graph and keeps the smallest and largest value of each channel of some nodes."""

    def __init__(self, module: GraphModule, sources: set[Node]) -> None:
        super().__init__(module)
        self.ranges: dict[Node, tuple[Tensor, Tensor]] = {}
        self._sources = sources

    def run_node(self, n: Node):  # type: ignore[no-untyped-def]
        value = super().run_node(n)
        if n in self._sources and value.shape[0]:
            low, high = value.amin(0), value.amax(0)
            if n in self.ranges:
                low, high = torch.minimum(low, self.ranges[n][0]), torch.maximum(high, self.ranges[n][1])
            self.ranges[n] = low, high
        return value
