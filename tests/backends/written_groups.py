"""Groups of rows that are written operator by operator: ``y = g(aten.exp.default, x)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from gaq_compile.passes.row_groups import FusedRows
from gaq_compile.passes.row_shapes import PRIMES, RowShape


class WrittenGroup:
    """A group of edges.

    Attributes:
        made: what arguments hold, and their rows' shapes.
    """

    def __init__(self) -> None:
        self.graph, self.module = Graph(), nn.Module()
        self.values: dict[Node, Any] = {}  # without data
        self.shapes: dict[Node, RowShape] = {}
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def table(self, *row: int) -> Node:
        """Rows of atoms."""
        return self.input("table", row, (PRIMES["atom"], *row), torch.float32)

    def number(self, holds: str, rows: str) -> Node:
        """How many rows there are."""
        node = self._argument(holds, ())
        self.values[node] = PRIMES[rows]
        return node

    def input(self, holds: str, row: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Node:
        """An argument of any kind; its first size says what it has rows of."""
        return self._known(self._argument(holds, row), torch.empty(tuple(shape), dtype=dtype, device="meta"))

    def _argument(self, holds: str, row: Sequence[int]) -> Node:
        self.made.append((holds, tuple(row)))
        return self.graph.placeholder(f"x{len(self.made)}")

    def constant(self, value: Tensor) -> Node:
        name = f"c{len(self.values)}"
        self.module.register_buffer(name, value)
        return self._known(self.graph.get_attr(name), value.to("meta"))

    def __call__(self, target: Any, *args: Any) -> Node:
        value = target(*map_arg(args, lambda n: self.values[n]))
        return self._known(self.graph.call_function(target, args), value)

    def _known(self, node: Node, value: Any) -> Node:
        first = value[0] if isinstance(value, list | tuple) else value
        kinds = {size: kind for kind, size in PRIMES.items()}
        sizes = tuple(first.shape)
        rows = kinds.get(sizes[0]) if sizes else None
        self.values[node] = value
        self.shapes[node] = RowShape(rows, sizes[1:] if rows else sizes, first.dtype)
        return node

    def fused(self, *results: Node) -> FusedRows:
        self.graph.output(results)
        return FusedRows(self.module, self.graph, "edge", self.shapes)
