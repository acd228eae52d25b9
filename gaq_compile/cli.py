"""``gaq-compile``: quantize, inspect, check, bench and tune from a shell.

Results go to stdout, progress and errors to stderr. Errors that gaq_compile raises on purpose are
printed without a traceback, and the exit status is 1.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .config import AUTO, DEFAULT_SCHEME, PRESETS
from .errors import ConfigError, GaqError, GaqWarning, MissingPackageError, StructureError

if TYPE_CHECKING:
    from ase import Atoms

    from .capture.base import Original
    from .potential import Potential
    from .verify.report import Report

# What a report's JSON always holds, measured (a figure) or not (null).
REPORT_KEYS: Mapping[str, Sequence[str]] = {
    "accuracy": ("energy_mev_per_atom", "force_mae_mev_per_a", "force_rel"),
    "equivariance": ("lee_force_mev_per_a", "lee_energy_mev_per_atom"),
    "conservativity": ("gradient_rel_error", "scheme_is_conservative"),
    "speed": ("eager_ms", "compiled_ms", "ratio", "runs"),
    "memory": ("weights_fp32_bytes", "weights_bytes", "eager_peak_bytes", "compiled_peak_bytes"),
}
_FRAMES = 16
_QUIET = 0.2  # spread of the ratio beyond which a timing is not to be trusted
_PLAIN_WIDTH = 120  # columns where the output is no terminal
# What ASE's many readers raise on files that are not theirs, or damaged.
_READ_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError,
    ArithmeticError, EOFError, ImportError, StopIteration, SyntaxError,
)  # fmt: skip

app = typer.Typer(
    help="Trained equivariant potentials in low-bit integers, with their symmetry intact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_Model = Annotated[
    str, typer.Argument(help="sevennet-0, so3lr, or a SevenNet checkpoint.", show_default=False)
]
_File = Annotated[Path, typer.Argument(help="A .gaq file.", show_default=False)]
_Structures = Annotated[
    Path,
    typer.Argument(help="Anything that ase.io.read reads; the first is measured on.", show_default=False),
]
_Backend = Annotated[
    str, typer.Option("--backend", "-b", help="tvm (generated kernels) or reference (torch).")
]
_Frames = Annotated[int, typer.Option(help="Use at most so many structures, evenly spaced.", min=1)]
_Json = Annotated[Path | None, typer.Option("--json", help="Write the report here too.", show_default=False)]
_Original = Annotated[
    str | None,
    typer.Option(help="The model a file was made from, where it is no pretrained one.", show_default=False),
]
_Output = Annotated[Path, typer.Option("--output", "-o", help="The .gaq file to write.", show_default=False)]


@app.command()
def quantize(
    model: _Model,
    structures: _Structures,
    output: _Output,
    scheme: Annotated[str, typer.Option("--scheme", "-s", help=", ".join(PRESETS))] = DEFAULT_SCHEME,
    backend: _Backend = "tvm",
    max_force_error: Annotated[
        float | None,
        typer.Option(
            help="Give layers more bits than the scheme's until the mean force error is at most this, meV/Å; "
            "auto needs it.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a node has no kernel.")] = False,
    frames: _Frames = _FRAMES,
    json_path: _Json = None,
) -> None:
    """Compile MODEL to a scheme, calibrated and checked on STRUCTURES, and write it to a file."""
    from .api import quantize as compile_model

    _check_writable(output, json_path)
    read = _read_structures(structures, frames)
    live = _stderr().is_terminal
    potential = compile_model(
        model,
        read,
        scheme,
        max_force_error=max_force_error,
        backend=backend,
        strict=strict,
        progress=live,
    )
    path = potential.save(output)
    _hand_over(potential.report, json_path)
    _stdout().print(f"wrote {escape(str(path))} ({path.stat().st_size / 1024:.0f} KiB)", highlight=False)


@app.command()
def inspect(
    file: _File,
    stage: Annotated[str, typer.Option(help="The graph to show.")] = "lower",
    svg: Annotated[Path | None, typer.Option(help="Draw the graph here.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Draw it as a page here.", show_default=False)] = None,
    backend: _Backend = "tvm",
) -> None:
    """Print a file's report, who runs each node, and a graph as text."""
    from .api import load
    from .ir.draw import draw
    from .ir.printing import format_graph

    potential = load(file, backend=backend)
    if stage not in potential.graphs:
        fix = f"use one of: {', '.join(potential.graphs)}"
        raise ConfigError(f"no stage named {stage!r} in the file", where=str(file), fix=fix)
    console = _stdout()
    potential.report.print(console, nodes=True)
    graph = potential.graphs[stage]
    console.print(f"\n# {stage}", highlight=False)
    console.out(format_graph(graph), highlight=False, end="")
    for path, suffix in ((svg, ".svg"), (html, ".html")):
        if path is not None:
            if path.suffix != suffix:
                raise ConfigError(f"--{suffix[1:]} writes {suffix} files", where=str(path))
            made = draw(graph, path, title=f"{potential.report.model} · {potential.report.scheme} · {stage}")
            console.print(f"wrote {escape(str(made))}", highlight=False)


@app.command()
def check(
    file: _File,
    structures: _Structures,
    backend: _Backend = "tvm",
    frames: _Frames = _FRAMES,
    original: _Original = None,
    json_path: _Json = None,
) -> None:
    """Measure a saved potential on STRUCTURES: errors, equivariance, and F = -dE/dx.

    Errors are against the pretrained model that the file was made from, where its package is
    installed, or against --original.
    """
    from .api import load
    from .tools.recheck import recheck

    _check_writable(json_path)
    potential = load(file, backend=backend)
    read = _read_structures(structures, frames)
    name = _original_name(potential, original)
    model, reason = None, "it is no known pretrained model; name it by --original"
    if name is not None:
        model, reason = _load_original(name, required=original is not None)
    with _status("checking"):
        report = recheck(potential, read, model)
    _hand_over(report, json_path)
    if model is None:
        _stderr().print(f"not compared with the original: {escape(reason)}", style="yellow", highlight=False)


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="sevennet-0, so3lr, a checkpoint, or a .gaq file.", show_default=False)
    ],
    structures: _Structures,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", "-s", help=f"{', '.join(s for s in PRESETS if s != AUTO)}. Default: {DEFAULT_SCHEME}."
        ),
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed pairs.", min=2)] = 20,
    warmup: Annotated[int, typer.Option(help="Untimed pairs before them.", min=0)] = 10,
    threads: Annotated[int | None, typer.Option(help="Threads of both sides.", min=1)] = None,
    preload: Annotated[
        str | None,
        typer.Option(
            help="Caching allocator for both sides, e.g. libjemalloc.so.2, or 'none'. "
            "Default: $GAQ_PRELOAD, else jemalloc where the system has it."
        ),
    ] = None,
    frames: _Frames = _FRAMES,
    original: _Original = None,
    json_path: _Json = None,
) -> None:
    """Measure time and peak memory against the original model, in fresh processes."""
    from .tools.bench import Settings, find_allocator, memory_figures, speed_figures

    _check_writable(json_path)
    settings = Settings(runs, warmup, preload=find_allocator(preload), threads=threads)
    read = _read_structures(structures, frames)
    with tempfile.TemporaryDirectory() as folder:
        if model.endswith(".gaq"):
            made = _loaded_for_bench(Path(model), read, scheme, original)
        else:
            made = _compiled_for_bench(model, read, scheme, Path(folder))
        with _status("measuring in fresh processes"):
            speed = speed_figures(made.original, made.file, structures, settings)
            memory = memory_figures(made.original, made.file, structures, settings)
    report = replace(made.report, speed=speed, memory={**made.report.memory, **memory})
    _hand_over(report, json_path)
    _print_bench(speed, memory)


@app.command()
def tune(
    file: _File,
    trials: Annotated[int, typer.Option(help="Measurements to make at most.", min=1)] = 256,
    tracker: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a TVM RPC tracker, on whose machines to measure.", show_default=False
        ),
    ] = None,
    key: Annotated[str, typer.Option(help="The name of these machines.", show_default=False)] = "",
) -> None:
    """Search for faster kernels of a saved potential; they are found by later runs of quantize and load.

    With --tracker and --key, other machines measure, and what is found is for their processor.
    """
    try:
        from .backends.tvm.tune_remote import tracker_at
        from .tools.tune import tune_file
    except ImportError as error:
        raise MissingPackageError(
            f"tuning needs TVM's compiler: {error}", fix="pip install 'gaq-compile[tvm]'"
        ) from error
    machines = tracker_at(tracker, key) if tracker is not None else None
    tune_file(file, trials=trials, console=_stdout(), tracker=machines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``gaq-compile``; exits with status 1 after an error of gaq_compile's own."""
    with warnings.catch_warnings():
        # Model packages warn of their own future on every import; a user of this command cannot act on it.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", GaqWarning)
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            app(args=None if argv is None else list(argv), prog_name="gaq-compile")
        except GaqError as error:
            _tell("error:", "bold red", error)
            raise SystemExit(1) from None


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _tell("warning:", "bold yellow", message)


def _tell(kind: str, style: str, what: object) -> None:
    console = _stderr()
    console.print(kind, style=style, end=" ")
    console.print(str(what), markup=False, highlight=False, soft_wrap=True)


# --- structures and originals -------------------------------------------------------------------


def _read_structures(path: Path, frames: int) -> list[Atoms]:
    """At most ``frames`` structures of a file, evenly spaced, the first included."""
    from ase.io import read
    from ase.io.formats import UnknownFileTypeError

    from .datasets import evenly_spaced

    try:
        found = read(str(path), index=":")
    except (UnknownFileTypeError, *_READ_ERRORS) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise StructureError(
            f"cannot read structures: {what}", where=str(path), fix="pass a file that ase.io.read reads"
        ) from error
    structures = found if isinstance(found, list) else [found]
    if not structures:
        raise StructureError("a file without structures", where=str(path), fix="pass one that has some")
    if len(structures) > frames:
        _stderr().print(f"using {frames} of {len(structures)} structures (--frames)", highlight=False)
    return evenly_spaced(structures, frames)


def _original_name(potential: Potential, named: str | None) -> str | None:
    """The model that a file was made from, by the user's word or the file's.

    The file's word counts for pretrained models only: a checkpoint is a pickle, and a foreign file
    must not choose what is unpickled.
    """
    from .capture.pretrained import PRETRAINED

    return named or (potential.report.model if potential.report.model in PRETRAINED else None)


def _load_original(name: str, required: bool) -> tuple[Original | None, str]:
    """The model as its own package runs it; unless ``required``, the reason if that is not installed."""
    from .capture import find_recipe
    from .capture.pretrained import load_model

    try:
        model = load_model(name)
    except MissingPackageError as error:
        if required:
            raise
        return None, error.what
    return find_recipe(model).original(model), ""


@dataclass(frozen=True)
class _Measured:
    """A file to measure, the model to measure it against, and the report to complete."""

    file: Path
    original: str
    report: Report


def _compiled_for_bench(model: str, read: list[Atoms], scheme: str | None, folder: Path) -> _Measured:
    from .api import quantize as compile_model

    live = _stderr().is_terminal
    potential = compile_model(model, read, scheme or DEFAULT_SCHEME, measure=False, progress=live)
    return _Measured(potential.save(folder / "bench.gaq"), model, potential.report)


def _loaded_for_bench(file: Path, read: list[Atoms], scheme: str | None, named: str | None) -> _Measured:
    from .api import load
    from .tools.recheck import recheck

    potential = load(file)
    stored = potential.config.scheme
    if scheme not in (None, stored):
        raise ConfigError(
            f"the file's scheme is {stored!r}, not {scheme!r}", where=str(file), fix="leave out --scheme"
        )
    name = _original_name(potential, named)
    if name is None:
        raise ConfigError(
            f"the file's original, {potential.report.model!r}, is no known pretrained model",
            where=str(file),
            fix="name it by --original: there is nothing else to measure against",
        )
    with _status("checking"):
        report = recheck(potential, read, _load_original(name, required=True)[0])
    return _Measured(file, name, report)


# --- output -------------------------------------------------------------------------------------


def _stdout() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def _stderr() -> Console:
    return Console(stderr=True)


def _status(text: str) -> Any:
    return _stderr().status(text)


def _hand_over(report: Report, json_path: Path | None) -> None:
    report.print(_stdout())
    if json_path is not None:
        _write_atomically(json_path, json.dumps(report_json(report), indent=2, ensure_ascii=False) + "\n")


def report_json(report: Report) -> dict[str, Any]:
    """A report's JSON with every key of the public interface; what was not measured is null."""
    found = report.to_dict()
    for group, names in REPORT_KEYS.items():
        found[group] = dict.fromkeys(names) | found[group]
    return found


def _print_bench(speed: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
    mebi = 1024.0**2
    low, high = speed["ratio_quartiles"]
    console = _stdout()
    console.print(
        f"{speed['threads']} threads, allocator: {speed['allocator']}; "
        f"ratio's quartiles {low:.2f} to {high:.2f}\n"
        f"peak of the whole process: {memory['eager_peak_bytes'] / mebi:.0f} MiB original, "
        f"{memory['compiled_peak_bytes'] / mebi:.0f} MiB compiled\n"
        f"growth over its imports: {memory['eager_growth_bytes'] / mebi:.1f} MiB original, "
        f"{memory['compiled_growth_bytes'] / mebi:.1f} MiB compiled",
        highlight=False,
    )
    if speed["spread"] > _QUIET:
        _stderr().print(
            f"the machine was not quiet: the ratio's quartiles lie {100 * speed['spread']:.0f} % apart",
            style="yellow",
            highlight=False,
        )


def _check_writable(*paths: Path | None) -> None:
    """Minutes of work should not end at a folder that does not exist.

    Raises:
        ConfigError: naming the folder.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise ConfigError("a folder, not a file", where=str(path), fix="give a file's path")
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            fix = "make it, or choose another path"
            raise ConfigError("no folder to write to", where=str(path.parent), fix=fix)


def _write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
