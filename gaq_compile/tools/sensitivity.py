"""Which nodes cost accuracy: each one's quantization alone, measured in forces and energies.

One node at a time is quantized as the scheme would do it, everything else stays in float32, and
forces and energies are compared with those of the float graph on perturbed structures that
calibration has not seen. Nothing is lowered: this is about numbers, not kernels.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ase import Atoms
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule

from ..config import Override, QuantConfig, resolve
from ..errors import ConfigError
from ..ir.specs import linear_spec
from ..numerics.weights import weight_bytes
from ..passes.graph_tools import calls, gaq
from ..passes.insert_mddq import insert_mddq
from ..passes.observe import Observed
from ..passes.round_weights import round_weights
from ..passes.widen_activations import RoundedSite
from ..subject import trace

SHOWN = 25  # nodes in a printed table and in a plot


@dataclass(frozen=True)
class NodeError:
    """What the quantization of one node costs, alone.

    Attributes:
        label: the layer, or the gathered features.
        what: "weights" or "activations".
        bits: e.g. "s8", or an activation scheme.
        force_mev_per_a: mean over components of ``|dF|``.
        force_rel: that over the mean ``|F|`` of a component.
        energy_mev_per_atom: mean over structures of ``|dE|`` per atom, before energies are shifted.
        bytes: of the stored weights; 0 for activations.
    """

    label: str
    what: str
    bits: str
    force_mev_per_a: float
    force_rel: float
    energy_mev_per_atom: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """Nodes in the order of the force error that their quantization causes, largest first.

    Attributes:
        model, scheme: what was measured.
        nodes: one entry per node.
        together: the force error of all of them at once, meV/Å.
    """

    model: str
    scheme: str
    nodes: tuple[NodeError, ...]
    together: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def print(self, console: Console | None = None, shown: int = SHOWN) -> None:
        """Print the most sensitive nodes as a table."""
        table = Table(title=f"{self.model} · {self.scheme}: each node alone", title_justify="left")
        for column in ("node", "what", "bits"):
            table.add_column(column, overflow="fold")
        for column in ("dF meV/Å", "dF %", "dE meV/atom", "bytes"):
            table.add_column(column, justify="right")
        for n in self.nodes[:shown]:
            figures = (f"{n.force_mev_per_a:.3f}", f"{100 * n.force_rel:.3f}", f"{n.energy_mev_per_atom:.3f}")
            table.add_row(n.label, n.what, n.bits, *figures, str(n.bytes or ""))
        console = console or Console()
        console.print(table)
        console.print(f"all {len(self.nodes)} nodes together: {self.together:.3f} meV/Å")

    def plot(self, path: str | Path, shown: int = SHOWN) -> Path:
        """Draw the most sensitive nodes as bars; returns the path."""
        from matplotlib.figure import Figure

        nodes = self.nodes[:shown][::-1]
        figure = Figure(figsize=(9, 1.2 + 0.26 * len(nodes)), layout="constrained")
        axes = figure.subplots()
        colours = ["tab:blue" if n.what == "weights" else "tab:orange" for n in nodes]
        axes.barh([f"{n.label} ({n.bits})" for n in nodes], [n.force_mev_per_a for n in nodes], color=colours)
        axes.set_xlabel("force error of this node's quantization alone, meV/Å (blue: weights)")
        axes.set_title(f"{self.model}, {self.scheme}")
        figure.savefig(path, dpi=120)
        return Path(path)


def sensitivity(
    model: nn.Module | str,
    example_graph: Atoms | Sequence[Atoms] | Sequence[Tensor] | Mapping[str, Tensor],
    scheme: str | QuantConfig = "w8a8",
    *,
    nodes: str = "*",
    progress: bool = True,
) -> Sensitivity:
    """Rank a model's nodes by the force error that each one's quantization causes.

    Args:
        model: as for :func:`gaq_compile.quantize`.
        example_graph: as for :func:`gaq_compile.quantize`; calibration uses them and rattled copies,
            the errors are measured on others.
        scheme: how nodes are quantized.
        nodes: a shell pattern of the labels to measure.
        progress: show progress bars.

    Raises:
        ConfigError: if the scheme quantizes no node that the pattern matches.
        StructureError, NoEdgesError, UnknownElementError, CaptureError: as :func:`gaq_compile.quantize`.
    """
    config = resolve(scheme)
    subject, stages = trace(model, example_graph)
    prepared = subject.centered(stages["tag_irreps"], config)
    variants = _Variants(prepared, config, subject.observe(prepared, config, progress))
    alone = list(variants.alone(nodes))
    if not alone:
        raise ConfigError(
            f"{config.scheme!r} quantizes no node that matches {nodes!r}",
            fix="use another scheme, or nodes='*'",
        )
    comparison = subject.comparison(prepared, subject.tests)
    found = []
    with Progress(disable=not progress, transient=True) as bar:
        for label, what, bits, size, graph in bar.track(alone, description="one node at a time"):
            found.append(NodeError(label, what, bits, **asdict(comparison.error(graph)), bytes=size))
    together = comparison.error(variants.together()).force_mev_per_a
    found.sort(key=lambda node: -node.force_mev_per_a)
    return Sensitivity(subject.name, config.scheme, tuple(found), together)


@dataclass(frozen=True)
class _Variants:
    """Energy graphs with some of the quantization that a configuration asks for."""

    prepared: GraphModule
    config: QuantConfig
    observed: Observed

    def alone(self, nodes: str) -> Iterator[tuple[str, str, str, int, GraphModule]]:
        """(label, what, bits, bytes, graph) of every node that a pattern matches, quantized alone."""
        nothing = QuantConfig("nothing")
        specs = {
            str(n.args[-1]): linear_spec(str(n.args[3]))
            for n in calls(self.prepared, gaq.irreps_linear.default)
        }
        for label, weight in round_weights(self.prepared, self.config, self.observed.costs).items():
            if not fnmatchcase(label, nodes):
                continue
            graph = insert_mddq(self.prepared, nothing, {}, {label: weight})
            yield label, "weights", f"s{weight.bits}", weight_bytes(specs[label], weight.bits), graph
        for label, site in self._activations().items():
            if not fnmatchcase(label, nodes):
                continue
            only = QuantConfig("one", overrides=(Override(glob.escape(label), None, site.scheme),))
            yield label, "activations", site.scheme, 0, insert_mddq(self.prepared, only, {label: site}, {})

    def together(self) -> GraphModule:
        activations = self._activations()
        weights = round_weights(self.prepared, self.config, self.observed.costs, activations)
        return insert_mddq(self.prepared, self.config, activations, weights)

    def _activations(self) -> dict[str, RoundedSite]:
        return self.observed.activations(self.config.max_wide_share)
