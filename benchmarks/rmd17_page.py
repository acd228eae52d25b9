"""The table of :mod:`rmd17` as Markdown, and its plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ABOUT = """\
Every row starts from the same float32 model of its molecule (`gaq_compile.models.EuclideanTransformer`,
bundled) and learns for the same extra epochs, from the same frames, at the same rate (Adam, 3e-5, falling
to 0): to be compared with *FP32, the same extra epochs*, the float32 model that was given them too. All
figures are of compiled kernels, on the whole test file of revised MD17 (split 01): mean absolute errors
of energies, and of force components; LEE, the mean of |F(R x) - R F(x)| over atoms, 8 rotations and 10
test frames; the drift of the total energy over dynamics of 0.5 fs from 300 K, with its standard error;
bytes of all weights with their scales; the time of a step beside the float32 model run by torch, by
turns.

W4A8 is 4-bit weights (the costliest layers 8) and 8-bit scalars, magnitudes and directions, of which
three tenths of the multiplications have 16 bits (`max_wide_share`); *half of it at 16 bits* takes five
tenths; *a fifth of the bytes* does, too, and has 8-bit weights in more layers, up to a fifth of float32's
bytes (`max_weight_share`); W4A16 is 16 bits throughout. The exact schemes keep directions in float. The
naive rows, Degree-Quant and SVQ-KMeans round as others do, with the same training.
"""
HEAD = (
    "| | E-MAE (meV) | F-MAE (meV/Å) | F before training | LEE (meV/Å) | drift (meV/atom/ps) | weights (kB) "
    "| ms/step | × eager |"
)


def page(known: Mapping[str, Any]) -> str:
    """All molecules, one table each, ablations below."""
    lines = ["# Trained on revised MD17", "", ABOUT]
    for molecule, result in known.items():
        rows, timed = result["rows"], result.get("times", {})
        lines += [f"## {molecule[0].upper()}{molecule[1:]}", "", *_about(result), "", HEAD, "|---" * 9 + "|"]
        lines += [_line(row, timed.get(name)) for name, row in rows.items() if not row["ablation"]]
        ablations = {name: row for name, row in rows.items() if row["ablation"]}
        if ablations and "w4a8" in rows:
            whole = {**rows["w4a8"], "title": "GAQ W4A8, as above"}
            lines += [
                "",
                "One thing changed at a time:",
                "",
                HEAD,
                "|---" * 9 + "|",
                _line(whole, timed.get("w4a8")),
            ]
            lines += [_line(row, timed.get(name)) for name, row in ablations.items()]
        if "eager" in timed:
            lines += ["", f"Eager float32: {timed['eager']['ms']:.2f} ms a step."]
        lines.append("")
    return "\n".join(lines)


def _about(result: Mapping[str, Any]) -> list[str]:
    runs = [run for row in result["rows"].values() for run in row["runs"]]
    seeds = max(len(row["runs"]) for row in result["rows"].values())
    ps = max(run["dynamics"]["ps"] for run in runs)
    spread = "; ± is the standard deviation over seeds" if seeds > 1 else ""
    return [
        f"{result['epochs']} extra epochs on {result['frames']} frames ({result['data']}), {seeds} "
        f"seed{'s' if seeds > 1 else ''}{spread}; dynamics of {ps:g} ps. Machine: {result['machine']}.",
        "",
        f"    {result['command']}",
    ]


def _line(row: Mapping[str, Any], timed: Mapping[str, float] | None) -> str:
    runs = row["runs"]
    cells = [
        _over(runs, lambda r: r["after"]["energy_mae_mev"], ".2f"),
        _over(runs, lambda r: r["after"]["force_mae_mev_per_a"], ".2f"),
        _over(runs, lambda r: r["before"]["force_mae_mev_per_a"], ".2f"),
        _over(runs, lambda r: r["after"]["lee_mev_per_a"], ".3g"),
        _drift(runs),
        f"{runs[0]['weights_bytes'] / 1e3:.0f}",
        f"{timed['ms']:.2f}" if timed else "–",
        f"{timed['ratio']:.1f}" if timed else "–",
    ]
    return f"| {row['title']} | " + " | ".join(cells) + " |"


def _over(runs: list[Any], figure: Callable[[Any], float], form: str) -> str:
    """Mean over seeds, and their spread."""
    values = [figure(run) for run in runs]
    text = format(float(np.mean(values)), form)
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):{form}}"


def _drift(runs: list[Any]) -> str:
    ended = [run["dynamics"]["diverged"] for run in runs if run["dynamics"]["diverged"]]
    if ended:
        return f"diverged ({ended[0]})"
    if len(runs) > 1:
        return _over(runs, lambda r: r["dynamics"]["drift_mev_per_atom_ps"], ".4f")
    found = runs[0]["dynamics"]
    return f"{found['drift_mev_per_atom_ps']:+.4f} ± {found['drift_error']:.4f}"


def plot(known: Mapping[str, Any], path: Path) -> None:
    """Force error against equivariance error, a panel for each molecule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(known), 4.5), layout="constrained")
    panels = figure.subplots(1, len(known), squeeze=False)[0]
    for panel, (molecule, result) in zip(panels, known.items(), strict=True):
        for row in result["rows"].values():
            after = [run["after"] for run in row["runs"]]
            lee = [max(a["lee_mev_per_a"], 1e-5) for a in after]
            force = [a["force_mae_mev_per_a"] for a in after]
            panel.plot(lee, force, marker="x" if row["ablation"] else "o", ls="", label=row["title"])
        panel.set(xlabel="LEE (meV/Å)", ylabel="error of forces (meV/Å)", xscale="log", title=molecule)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)
