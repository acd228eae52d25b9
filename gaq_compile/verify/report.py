"""What a quantized potential costs and gains, in one table and one JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import FileFormatError
from ..passes.lower import Placement


@dataclass(frozen=True)
class Report:
    """Who runs each node, and every figure that was measured before the result was handed out.

    Attributes:
        model: the model's name or class.
        scheme: the quantization scheme.
        backend: the backend asked for.
        target: the machine that kernels were generated for.
        atoms: atoms of the structure that time and memory were measured on.
        edges: its edges.
        placements: one entry per gaq node (see :class:`.passes.lower.Placement`).
        choice: where bits were chosen for a force error: max_force_error_mev_per_a,
            force_mae_mev_per_a of the choice on the structures (of so many atoms) it was made on,
            max_weight_share, max_wide_share, and every trial; else empty.
        accuracy: against the original: energy_mev_per_atom, force_mae_mev_per_a, force_rel, and
            the same of the fusion-only form (``fp32_*``).
        equivariance: lee_force_mev_per_a, lee_energy_mev_per_atom over random rotations.
        conservativity: gradient_rel_error of F = -dE/dx, scheme_is_conservative.
        speed: eager_ms, compiled_ms, ratio, runs; empty where not measured.
        memory: weights_fp32_bytes, weights_bytes, eager_peak_bytes, compiled_peak_bytes.
        versions: packages and machine.
    """

    model: str
    scheme: str
    backend: str
    target: str
    atoms: int
    edges: int
    placements: tuple[Placement, ...] = ()
    choice: Mapping[str, Any] = field(default_factory=dict)
    accuracy: Mapping[str, float] = field(default_factory=dict)
    equivariance: Mapping[str, float] = field(default_factory=dict)
    conservativity: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def fallback(self) -> tuple[Placement, ...]:
        """The nodes that the wanted backend refused."""
        return tuple(p for p in self.placements if p.reason is not None)

    @property
    def arithmetic(self) -> dict[str, int]:
        """How many nodes compute in which arithmetic, e.g. ``{"tvm s8·s8→s32": 20}``."""
        return dict(Counter(f"{p.backend} {p.arithmetic}" for p in self.placements).most_common())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; its keys are part of the public interface."""
        return {
            "model": self.model,
            "scheme": self.scheme,
            "backend": self.backend,
            "target": self.target,
            "atoms": self.atoms,
            "edges": self.edges,
            "nodes": {
                "lowered": sum(p.reason is None for p in self.placements),
                "fallback": [{"node": p.label, "op": p.op, "reason": p.reason} for p in self.fallback],
                "arithmetic": self.arithmetic,
                "placements": [asdict(p) for p in self.placements],
            },
            "choice": dict(self.choice),
            "accuracy": dict(self.accuracy),
            "equivariance": dict(self.equivariance),
            "conservativity": dict(self.conservativity),
            "speed": dict(self.speed),
            "memory": dict(self.memory),
            "versions": dict(self.versions),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`.

        Raises:
            FileFormatError: if keys are missing or foreign.
        """
        try:
            plain = {k: v for k, v in data.items() if k != "nodes"}
            placements = tuple(Placement(**p) for p in data["nodes"]["placements"])
            return Report(placements=placements, **plain)
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"a report with missing or foreign keys: {error}") from error

    def __str__(self) -> str:
        buffer = io.StringIO()
        self.print(Console(file=buffer, width=100, no_color=True, highlight=False))
        return buffer.getvalue().rstrip()

    def print(self, console: Console | None = None, nodes: bool = False) -> None:
        """Print as a table; ``nodes`` lists every node as well."""
        console = console or Console()
        console.print(_summary(self))
        if self.fallback:
            console.print(_fallbacks(self))
        if nodes:
            console.print(_nodes(self))


def _summary(report: Report) -> Table:
    table = Table(title=f"{report.model} · {report.scheme} · {report.backend}", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for name, value in _rows(report):
        table.add_row(name, value)
    return table


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = [("structure", f"{report.atoms} atoms, {report.edges} edges")]
    lowered = sum(p.reason is None for p in report.placements)
    rows.append(("nodes with a kernel", f"{lowered} of {len(report.placements)}"))
    rows += [(f"  {name}", str(count)) for name, count in report.arithmetic.items()]
    if report.choice:
        c = report.choice
        rows.append(("force error asked for", f"at most {c['max_force_error_mev_per_a']:g} meV/Å"))
        tried = f"{c['force_mae_mev_per_a']:.4f} meV/Å ({len(c['trials'])} tried, {c['atoms']} atoms)"
        rows.append(("force error where bits were chosen", tried))
    rows += _accuracy_rows(report)
    if report.speed:
        s = report.speed
        rows.append(("time, original", f"{s['eager_ms']:.2f} ms"))
        rows.append(("time, compiled", f"{s['compiled_ms']:.2f} ms"))
        rows.append(("faster", f"{s['ratio']:.1f} x (median of {s['runs']} alternating pairs)"))
    m = report.memory
    if m.get("weights_bytes"):
        share = m["weights_bytes"] / m["weights_fp32_bytes"]
        rows.append(
            ("weights", f"{_bytes(m['weights_fp32_bytes'])} -> {_bytes(m['weights_bytes'])} ({share:.3f})")
        )
    if m.get("eager_peak_bytes") is not None:
        share = m["compiled_peak_bytes"] / max(1, m["eager_peak_bytes"])
        sizes = f"{_bytes(m['eager_peak_bytes'])} -> {_bytes(m['compiled_peak_bytes'])} ({share:.2f})"
        rows.append(("peak memory", f"{sizes}, {m['peak_is']}" if "peak_is" in m else sizes))
    return rows


def _accuracy_rows(report: Report) -> list[tuple[str, str]]:
    rows = []
    if report.accuracy:
        a = report.accuracy
        rows.append(("energy error", f"{a['energy_mev_per_atom']:.4f} meV/atom"))
        rows.append(("force error", f"{a['force_mae_mev_per_a']:.4f} meV/Å ({100 * a['force_rel']:.3f} %)"))
    if report.equivariance:
        e = report.equivariance
        rows.append(("equivariance error (LEE), forces", f"{e['lee_force_mev_per_a']:.5f} meV/Å"))
        rows.append(("equivariance error (LEE), energy", f"{e['lee_energy_mev_per_atom']:.5f} meV/atom"))
    if report.conservativity:
        c = report.conservativity
        kind = (
            "forces are the energy's gradient" if c["scheme_is_conservative"] else "straight-through forces"
        )
        rows.append(("F = -dE/dx", f"{c['gradient_rel_error']:.1e} relative ({kind})"))
    return rows


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _fallbacks(report: Report) -> Table:
    table = Table(title="fallbacks", title_justify="left")
    for column in ("node", "operator", "reason"):
        table.add_column(column)
    for p in report.fallback:
        table.add_row(p.label, p.op, p.reason)
    return table


def _nodes(report: Report) -> Table:
    table = Table(title="nodes", title_justify="left")
    for column in ("node", "operator", "runs on"):
        table.add_column(column)
    for p in report.placements:
        table.add_row(p.label, p.op, f"{p.backend} {p.arithmetic}")
    return table
