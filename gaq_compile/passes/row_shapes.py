"""Which of a graph's tensors have one row per atom, edge, long-range pair or graph.

The graph is run on tensors without data whose numbers of atoms, bonds (edges that are each other's
reverse), pairs and graphs are distinctive primes; a first axis of such a size is a row axis. Works on
loaded graphs too, which have no recorded shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from ..capture.graphs import EDGE_VECTORS, GraphFormat

# No static size of a model is a prime this large, and none is larger than what rows make: twice them, half.
PRIMES = {"atom": 1000003, "bond": 1000033, "edge": 2 * 1000033, "pair": 1000037, "graph": 1000039}
_LARGEST = 300_000
NARROW = 16  # elements per row from which on a row is worth a loop of its own
_KINDS = {size: kind for kind, size in PRIMES.items()}


@dataclass(frozen=True)
class RowShape:
    """The shape of a tensor, or of each part of a tuple's first.

    Attributes:
        rows: "atom", "edge", "bond", "pair", "graph", or None where the first axis is none of these.
        row: the sizes of the other axes; of all, where there are no rows.
        dtype: of its elements.
    """

    rows: str | None
    row: tuple[int, ...]
    dtype: torch.dtype

    @property
    def static(self) -> bool:
        """Whether all sizes but the number of rows are fixed."""
        return all(size <= _LARGEST for size in self.row)


def row_shapes(graph_module: GraphModule, form: GraphFormat) -> dict[Node, RowShape]:
    """The row shape of every tensor of a graph (of a tuple: its first part's).

    Args:
        graph_module: a graph with the inputs ``form.inputs``.
        form: of a potential that takes structures, not tensors of its own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        runner = _Shapes(graph_module, mode)
        runner.run(*(_input(name) for name in form.inputs))
    return runner.found


def _input(name: str) -> Tensor:
    atoms, edges, pairs, graphs = (PRIMES[kind] for kind in ("atom", "edge", "pair", "graph"))
    if name in EDGE_VECTORS:
        return torch.empty(pairs if name.endswith("_lr") else edges, 3)
    if name in ("charge", "spin"):
        return torch.empty(graphs)
    sizes = {"numbers": atoms, "batch": atoms, "ptr": graphs + 1}
    return torch.empty(sizes.get(name, pairs if name.endswith("_lr") else edges), dtype=torch.int64)


class _Shapes(Interpreter):
    def __init__(self, graph_module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self._mode = mode
        self.found: dict[Node, RowShape] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = self._mode.from_tensor(value)
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor) and n.op != "output":
            sizes = tuple(first.shape)
            rows = _KINDS.get(sizes[0]) if sizes else None
            self.found[n] = RowShape(rows, sizes[1:] if rows else sizes, first.dtype)
        return value
