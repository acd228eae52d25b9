"""Watch the inputs of the layers to be quantized over example graphs, and choose their steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.progress import Progress
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..config import QuantConfig, activation_scheme
from ..errors import StructureError
from ..ir.specs import linear_spec
from ..numerics.observers import ObserverState, make_observer
from .graph_tools import aten, calls, gaq, is_call


def quantized_inputs(graph_module: GraphModule, config: QuantConfig) -> dict[Node, str]:
    """The irreps-linear nodes whose input is to be quantized, with their activation schemes.

    A one-hot input is left alone: its zeros and ones select rows of the weights, exactly.
    """
    found = {}
    for node in calls(graph_module, gaq.irreps_linear.default):
        scheme = config.for_layer(str(node.args[-1])).activation
        if scheme is not None and not _is_one_hot(node.args[0]):
            found[node] = scheme
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
        ``{label: (n_blocks,) float32 steps}``.

    Raises:
        StructureError: if calibration meets NaN or infinite activations.
    """
    layers = quantized_inputs(graph_module, config)
    observer = make_observer(config.observer, config.headroom)
    states = {node: observer.start() for node in layers}
    if not layers:
        return {}
    with Progress(disable=not progress, transient=True) as bar, torch.no_grad():
        task = bar.add_task("calibrating", total=len(batches))
        for batch in batches:
            _Watcher(graph_module, layers, states).run(*batch)
            bar.advance(task)
    return {str(node.args[-1]): state.scale() for node, state in states.items()}


class _Watcher(Interpreter):
    """Runs the graph and shows each watched layer's input to its observer."""

    def __init__(self, module: GraphModule, layers: dict[Node, str], states: dict[Node, ObserverState]) -> None:
        super().__init__(module)
        self._layers, self._states = layers, states

    def run_node(self, n: Node):  # type: ignore[no-untyped-def]
        if n in self._layers:
            x = self.env[n.args[0]]
            if not bool(torch.isfinite(x).all()):
                raise StructureError(
                    f"activations of {n.args[-1]} are not finite during calibration",
                    fix="look at the calibration structures: atoms too close, or outside what the potential knows",
                )
            irreps = linear_spec(str(n.args[3])).irreps_in
            self._states[n].observe(x, irreps, activation_scheme(self._layers[n]))
        return super().run_node(n)


def _is_one_hot(node: object) -> bool:
    while is_call(node, aten._to_copy.default, aten.view.default):
        node = node.args[0]  # type: ignore[union-attr]
    return is_call(node, aten.one_hot.default)
