"""Graph modules whose Python is written when somebody calls or reads it.

A pass makes a module for what it returns, and most are only ever read by the next pass: writing and compiling
their Python, each time that a graph has changed, was a quarter of loading a file.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule


def module_of(root: nn.Module, graph: Graph) -> GraphModule:
    """``GraphModule(root, graph)``, but for when its code is made."""
    return _LazyGraphModule(root, graph)
