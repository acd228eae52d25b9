"""Force error against bytes: what every further byte of weights buys, measured.

From the fewest bits that a scheme gives its layers to the most, one layer at a time gets wider, in the
order that ``scheme="auto"`` follows; some of the choices on the way are measured. Nothing is lowered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from ..config import AUTO, QuantConfig, resolve
from ..datasets import evenly_spaced
from ..errors import ConfigError
from ..passes.choose_bits import Trial, Variants
from ..subject import trace


@dataclass(frozen=True)
class Tradeoff:
    """Choices of bits from the fewest bytes to the most.

    Attributes:
        model, scheme: what was measured.
        points: one per choice, in the order of bytes.
        float_bytes: what the same weights, without those left in float by choice, take in float32.
        atoms: how many atoms the force errors are means over.
    """

    model: str
    scheme: str
    points: tuple[Trial, ...]
    float_bytes: int
    atoms: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def print(self, console: Console | None = None) -> None:
        """Print a table, one choice a line."""
        table = Table(title=f"{self.model} · {self.scheme}: force error against bytes", title_justify="left")
        for column in ("KiB", "of float32", "dF meV/Å", "dF %"):
            table.add_column(column, justify="right")
        for p in self.points:
            e = p.error
            figures = (f"{e.force_mev_per_a:.3f}", f"{100 * e.force_rel:.3f}")
            table.add_row(f"{p.bytes / 1024:.0f}", f"{p.bytes / self.float_bytes:.3f}", *figures)
        (console or Console()).print(table)

    def plot(self, path: str | Path) -> Path:
        """Draw force error against bytes, both logarithmic; returns the path."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 4.5), layout="constrained")
        axes = figure.subplots()
        errors = [p.error.force_mev_per_a for p in self.points]
        axes.plot([p.bytes / 1024 for p in self.points], errors, marker="o", ms=4)
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel(f"bytes of the weights, KiB (float32: {self.float_bytes / 1024:.0f})")
        axes.set_ylabel("mean error of a force component, meV/Å")
        axes.set_title(f"{self.model}, {self.scheme}")
        axes.grid(which="both", alpha=0.3)
        figure.savefig(path, dpi=120)
        return Path(path)


def tradeoff(
    model: nn.Module | str,
    example_graph: Atoms | Sequence[Atoms] | Sequence[Tensor] | Mapping[str, Tensor],
    scheme: str | QuantConfig = AUTO,
    *,
    points: int = 12,
    progress: bool = True,
) -> Tradeoff:
    """Measure force errors along the choices that ``quantize(..., max_force_error=)`` has.

    Args:
        model: as for :func:`gaq_compile.quantize`.
        example_graph: as for :func:`gaq_compile.quantize`; calibration uses them and rattled copies,
            the errors are measured on others.
        scheme: the fewest bits, and how activations are rounded.
        points: how many choices to measure.
        progress: show progress bars.

    Raises:
        ConfigError: if the scheme rounds no weights together, or for fewer than 2 points.
        StructureError, NoEdgesError, UnknownElementError, CaptureError: as :func:`gaq_compile.quantize`.
    """
    config = resolve(scheme)
    if not (isinstance(points, int) and points >= 2 and config.rounds_together):
        raise ConfigError(
            f"{points!r} points of {config.scheme!r} are no trade-off",
            fix="at least 2 points of a scheme with integer weights that is no baseline",
        )
    subject, stages = trace(model, example_graph)
    prepared = subject.centered(stages["tag_irreps"], config)
    observed = subject.observe(prepared, config, progress)
    comparison = subject.comparison(prepared, subject.trials)
    variants = Variants(prepared, config, observed, comparison.error)
    wide = config.max_wide_share
    with Progress(disable=not progress, transient=True) as bar:
        shares = evenly_spaced(variants.shares(wide), points)
        for share in bar.track(shares, description="measuring"):
            variants.measure(share, wide)
    return Tradeoff(
        subject.name, config.scheme, tuple(variants.trials), variants.float_bytes(wide), comparison.atoms
    )
