"""Tables, plots and the page of what ``speed.py`` has measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]

NOTHING = "Nothing has been measured yet."
SHOWN_SCHEME = "w8a8"  # whose kernels are drawn, where it was measured
MIB = 2**20


# --- what there is ------------------------------------------------------------------------------


def of_kind(result: Result, kind: str, model: str) -> list[Row]:
    """A model's rows, the smallest case first; those that failed have no size and come last."""
    rows = [r for r in result["rows"] if (r["kind"], r["model"]) == (kind, model)]
    return sorted(rows, key=lambda r: r.get("atoms", math.inf))


def models(result: Result) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in result["rows"]))


def sides(rows: Sequence[Row]) -> list[str]:
    """Of rows of times, in the order in which they were asked for."""
    return list(dict.fromkeys(side for row in rows for side in row["sides"]))


def ns_per_day(ms: float, timestep_fs: float) -> float:
    """Of dynamics whose steps take so long."""
    return 86.4 * timestep_fs / ms


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """p of ``y ~ x^p`` by least squares on logarithms, of the larger half of the sizes (two at least)."""
    some = sorted(points)[min(len(points) // 2, max(0, len(points) - 2)) :]
    if len({x for x, _ in some}) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in some]
    x0, y0 = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - x0) * (y - y0) for x, y in logs) / sum((x - x0) ** 2 for x, _ in logs)


# --- tables -------------------------------------------------------------------------------------


def tables(result: Result) -> str:
    """All tables, as Markdown."""
    return "\n\n".join(f"## {name}\n\n{make(result)}" for name, make in SECTIONS.items()) + "\n"


def fill_page(page: str, result: Result) -> str:
    """A page with what lies between ``<!-- NAME -->`` and ``<!-- end -->`` made anew.

    Raises:
        KeyError: for a name that no section has.
    """
    return re.sub(
        r"<!-- (?!end)([^>]+?) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{SECTIONS[found[1]](result)}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


def per_model(table: Callable[[Result, str], str]) -> Callable[[Result], str]:
    """One table under each model's name."""

    def make(result: Result) -> str:
        parts = [(model, table(result, model)) for model in models(result)]
        return "\n\n".join(f"**{model}**\n\n{text}" for model, text in parts if text) or NOTHING

    return make


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; nothing without lines."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if lines else ""


def settings_text(result: Result) -> str:
    """What it was measured on."""
    if not result["rows"]:
        return NOTHING
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    used = list(dict.fromkeys(r["allocator"] for r in result["rows"] if "allocator" in r))
    text = f"{result['machine']}, {result['threads']} threads, {versions}; allocator: {', '.join(used)}."
    return "\n".join([text, "", *(f"    {command}" for command in result["commands"])])


def time_table(result: Result, model: str) -> str:
    """Milliseconds of energy and forces, and how many times faster than eager."""
    rows = [r for r in of_kind(result, "time", model) if "atoms" in r]
    names = sides(rows)
    lines = [
        [row["case"], str(row["atoms"]), *(time_cell(row["sides"].get(name)) for name in names)]
        for row in rows
    ]
    return markdown(["case", "atoms", *(f"`{name}`" for name in names)], lines)


def time_cell(side: Row | None) -> str:
    """The median, and its ratio to eager's with the quartiles of the rounds."""
    if side is None or "ms" not in side:
        return "–"
    if side.get("ratio") in (None, 1.0):
        return number(side["ms"])
    low, high = side["ratio_quartiles"]
    return f"{number(side['ms'])}, **{number(side['ratio'])} x** ({number(low)}–{number(high)})"


def number(value: float) -> str:
    """Three digits, as far as they say something."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def spread_table(result: Result, model: str) -> str:
    """How far the middle half of each side's times reaches, in percent of the median."""
    rows = [r for r in of_kind(result, "time", model) if "atoms" in r]
    names = sides(rows)
    lines = []
    for row in rows:
        cells = []
        for name in names:
            side = row["sides"].get(name, {})
            low, high = side.get("quartiles_ms", (0.0, 0.0))
            cells.append(f"{100 * (high - low) / side['ms']:.0f} %" if "ms" in side else "–")
        lines.append([row["case"], str(row["runs"]), *cells])
    return markdown(["case", "rounds", *(f"`{name}`" for name in names)], lines)


def dynamics_table(result: Result, model: str) -> str:
    """Nanoseconds a day, if a step were energy and forces alone."""
    rows = [r for r in of_kind(result, "time", model) if "atoms" in r]
    names, step = sides(rows), result["timestep_fs"][model] if rows else 0.0
    lines = []
    for row in rows:
        found = [row["sides"].get(name, {}).get("ms") for name in names]
        cells = ["–" if ms is None else number(ns_per_day(ms, step)) for ms in found]
        lines.append([row["case"], str(row["atoms"]), f"{step:g}", *cells])
    return markdown(["case", "atoms", "fs", *(f"`{name}`" for name in names)], lines)


def memory_table(result: Result, model: str) -> str:
    """Peak of the process, and growth over the state after imports, MiB."""
    rows = of_kind(result, "memory", model)
    names = list(dict.fromkeys(r["side"] for r in rows))
    found = {(r["case"], r["side"]): r for r in rows}
    cases = {r["case"]: r["atoms"] for r in rows if "atoms" in r}
    lines = [
        [case, str(atoms), *(memory_cell(found.get((case, name))) for name in names)]
        for case, atoms in cases.items()
    ]
    return markdown(["case", "atoms", *(f"`{name}`" for name in names)], lines)


def memory_cell(row: Row | None) -> str:
    if row is None or "peak_bytes" not in row:
        return "–"
    return f"{row['peak_bytes'] / MIB:.0f} ({row['growth_bytes'] / MIB:.0f})"


def growth_table(result: Result, model: str) -> str:
    """Exponents p of time and memory ``~ atoms^p``."""
    times = [r for r in of_kind(result, "time", model) if "atoms" in r]
    memory = of_kind(result, "memory", model)
    lines = []
    for name in sides(times):
        time = [(r["atoms"], r["sides"][name]["ms"]) for r in times if "ms" in r["sides"].get(name, {})]
        grown = [(r["atoms"], r["growth_bytes"]) for r in memory if r["side"] == name and "peak_bytes" in r]
        powers = [exponent(time), exponent(grown)]
        if powers != [None, None]:
            largest = max((atoms for atoms, _ in time), default=0)
            lines.append([f"`{name}`", str(largest), *("–" if p is None else f"{p:.2f}" for p in powers)])
    return markdown(["side", "largest, atoms", "time", "memory"], lines)


def reason_table(result: Result, model: str) -> str:
    """Who is out, and why; for the cases that share a reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in of_kind(result, "time", model):
        for name, side in row["sides"].items():
            if "reason" in side:
                found.setdefault((name, side["reason"]), []).append(row["case"])
    lines = [[f"`{name}`", ", ".join(cases), escaped(why)] for (name, why), cases in found.items()]
    return markdown(["side", "cases", "reason"], lines)


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def modes_table(result: Result, model: str) -> str:
    """What each mode of torch.compile gave."""
    lines = []
    for row in of_kind(result, "time", model):
        for mode, found in row["sides"].get("compile", {}).get("modes", {}).items():
            took = isinstance(found, dict)
            text = (
                f"{number(found['ms'])} ms, compiled in {found['compile_seconds']:.0f} s" if took else found
            )
            lines.append([row["case"], f"`{mode}`", escaped(text)])
    return markdown(["case", "mode", "result"], lines)


def accuracy_table(result: Result, model: str) -> str:
    """The largest difference of a force component from eager's, in percent of the largest component."""
    rows = [r for r in of_kind(result, "time", model) if r.get("reference") == "eager"]
    names = [name for name in sides(rows) if name != "eager"]
    lines = []
    for row in rows:
        errors = [row["sides"].get(name, {}).get("force_error") for name in names]
        lines.append([row["case"], *("–" if e is None else f"{100 * e:.2g}" for e in errors)])
    return markdown(["case", *(f"`{name}`" for name in names)], lines)


def peaks_table(result: Result) -> str:
    """What the machine can do: the best that any process of kernels has seen."""
    found = [r["machine"] for r in result["rows"] if "machine" in r]
    if not found:
        return NOTHING
    lines = [
        [f"{kind} operations", f"{max(m['operations'][kind] for m in found) / 1e9:.0f} G/s"]
        for kind in found[0]["operations"]
    ]
    for what in ("read", "write"):
        for size in dict(found[0][what]):
            speed = max(dict(map(tuple, m[what]))[size] for m in found)
            lines.append([f"{what}, {size / MIB:g} MiB again and again", f"{speed / 1e9:.1f} GB/s"])
    return markdown(["", "measured"], lines)


def step_table(result: Result, model: str) -> str:
    """Whole steps: the limits of all kernels together, over the time of the step."""
    lines = []
    for row in of_kind(result, "kernels", model):
        if "families" in row:
            kinds = row["families"].values()
            limit, spent = (sum(k[name] for k in kinds) for name in ("limit_ms", "ms"))
            share = f"{100 * limit / row['ms']:.0f} %"
            cells = (row["ms"], spent, limit)
            lines.append([row["case"], f"`{row['side']}`", *map(number, cells), share])
    header = ["case", "side", "step, ms", "in kernels, ms", "limits, ms", "limits over step"]
    return markdown(header, lines)


def family_table(result: Result, model: str) -> str:
    """Kernels of one kind together, of the largest case."""
    row = shown_kernels(result, model)
    if row is None:
        return ""
    lines = [
        [
            name,
            str(kind["kernels"]),
            *(f"{kind[key]:.3f}" for key in ("ms", "computing_ms", "moving_ms", "limit_ms")),
            f"{100 * kind['limit_ms'] / kind['ms']:.0f} %",
        ]
        for name, kind in row["families"].items()
    ]
    header = ["kind", "kernels", "ms", "computing, ms", "moving, ms", "limit, ms", "limit over time"]
    return f"{row['case']}, `{row['side']}`:\n\n{markdown(header, lines)}"


def kernel_table(result: Result, model: str, shown: int = 12) -> str:
    """The slowest kernels of the largest case."""
    row = shown_kernels(result, model)
    if row is None:
        return ""
    lines = [
        [
            f"`{k['node']}`",
            k["family"],
            escaped(k["arithmetic"].removeprefix("tvm ")),
            *(f"{k[key]:.3f}" for key in ("ms", "computing_ms", "moving_ms")),
            f"{100 * k['limit_ms'] / k['ms']:.0f} %",
        ]
        for k in row["kernels"][:shown]
    ]
    header = ["kernel", "kind", "computes in", "ms", "computing, ms", "moving, ms", "limit over time"]
    return f"{row['case']}, `{row['side']}`:\n\n{markdown(header, lines)}"


def shown_kernels(result: Result, model: str) -> Row | None:
    """The kernels of the largest case, of ``SHOWN_SCHEME`` if they were timed."""
    rows = [r for r in of_kind(result, "kernels", model) if "families" in r]
    some = [r for r in rows if r["side"] == SHOWN_SCHEME] or rows
    return some[-1] if some else None


SECTIONS: dict[str, Callable[[Result], str]] = {
    "settings": settings_text,
    "time": per_model(time_table),
    "spread": per_model(spread_table),
    "dynamics": per_model(dynamics_table),
    "memory": per_model(memory_table),
    "growth": per_model(growth_table),
    "reasons": per_model(reason_table),
    "modes": per_model(modes_table),
    "forces": per_model(accuracy_table),
    "peaks": peaks_table,
    "steps": per_model(step_table),
    "families": per_model(family_table),
    "kernels": per_model(kernel_table),
}


# --- plots --------------------------------------------------------------------------------------


def plots(result: Result, stem: Path) -> list[Path]:
    """Time and memory against atoms, and kernels beside their limits; those that have something to show."""
    drawn = [
        plot_sizes(result, stem.with_name(f"{stem.name}-time.png"), time_points, "energy and forces, ms"),
        plot_sizes(
            result, stem.with_name(f"{stem.name}-memory.png"), memory_points, "growth over imports, MiB"
        ),
        plot_kernels(result, stem.with_name(f"{stem.name}-kernels.png")),
    ]
    return [path for path in drawn if path is not None]


Points = dict[str, list[tuple[float, float, float, float]]]


def time_points(result: Result, model: str) -> Points:
    """Side -> (atoms, ms, lower and upper quartile)."""
    found: Points = {}
    for row in of_kind(result, "time", model):
        for name, side in row["sides"].items():
            if "ms" in side:
                found.setdefault(name, []).append((row["atoms"], side["ms"], *side["quartiles_ms"]))
    return found


def memory_points(result: Result, model: str) -> Points:
    """Side -> (atoms, MiB), which has no spread."""
    found: Points = {}
    for row in of_kind(result, "memory", model):
        if "peak_bytes" in row:
            grown = row["growth_bytes"] / MIB
            found.setdefault(row["side"], []).append((row["atoms"], grown, grown, grown))
    return found


def plot_sizes(
    result: Result, path: Path, points: Callable[[Result, str], Points], label: str
) -> Path | None:
    """One panel per model, one line per side, both axes logarithmic."""
    from matplotlib.figure import Figure

    found = [(model, of) for model in models(result) if (of := points(result, model))]
    if not found:
        return None
    figure = Figure(figsize=(7.5 * len(found), 6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (model, lines) in zip(panels, found, strict=True):
        for name, line in lines.items():
            atoms, middle, low, high = zip(*line, strict=True)
            drawn = panel.plot(atoms, middle, marker="o", ms=4, lw=1.2, label=name)
            panel.fill_between(atoms, low, high, alpha=0.2, color=drawn[0].get_color())
        panel.set(xscale="log", yscale="log", title=model, xlabel="atoms", ylabel=label)
        panel.grid(which="both", alpha=0.25)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def plot_kernels(result: Result, path: Path, shown: int = 16) -> Path | None:
    """The slowest kernels of each model's largest case: time, and in front of it the limit."""
    from matplotlib.figure import Figure

    found = [(model, row) for model in models(result) if (row := shown_kernels(result, model))]
    if not found:
        return None
    figure = Figure(figsize=(9 * len(found), 1.5 + 0.34 * shown), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (model, row) in zip(panels, found, strict=True):
        kernels = row["kernels"][:shown]
        places = range(len(kernels))
        panel.barh(places, [k["ms"] for k in kernels], color="tab:blue", alpha=0.35, label="time")
        panel.barh(
            places, [k["moving_ms"] for k in kernels], 0.5, color="tab:orange", label="bytes / bandwidth"
        )
        panel.barh(
            places, [k["computing_ms"] for k in kernels], 0.25, color="tab:red", label="operations / peak"
        )
        panel.set_yticks(places, [k["node"].removeprefix("tvm_") for k in kernels], fontsize=7)
        panel.invert_yaxis()
        panel.set_xlabel("ms")
        panel.set_title(f"{model}, {row['case']}, {row['side']}: the slowest kernels and their limits")
        panel.grid(axis="x", alpha=0.25)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path
