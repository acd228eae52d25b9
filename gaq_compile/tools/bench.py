"""Time and peak memory of a compiled potential beside its original, each in fresh processes.

Three children, all with the same allocator and the same number of threads:

* ``time``: both sides in one process, alternating, after many warm-up calls of both;
* ``eager``: the original model alone, in its own package;
* ``compiled``: the ``.gaq`` file alone; the model's package must not even be imported.

Memory is given twice: the peak of the whole process, and its growth over the state after imports
(so: model or file, weights, kernels, neighbour lists and evaluation). Eager models allocate and
free large tensors all the time; under the system's allocator they spend most of their time in page
faults, so a caching allocator is preloaded, for both sides, where one is found.

``python -m gaq_compile.tools.bench CHILD ...`` is a child; :func:`speed_figures` and
:func:`memory_figures` start them. A file whose kernels are not in the cache compiles them in the
measured process: time first, then memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from ctypes.util import find_library
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, VerificationError
from ..verify.measure import alternate, measured_run, memory_growth

if TYPE_CHECKING:
    from ase import Atoms

PRELOAD_VARIABLE = "GAQ_PRELOAD"
_JEMALLOC_CONF = "dirty_decay_ms:-1,muzzy_decay_ms:-1"  # never give pages back
_MARK = "gaq-bench "
_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
_MODEL_PACKAGES = ("sevenn", "so3krates_torch")
_SEVENNET_MODULES = ("sevenn.calculator", "sevenn.atom_graph_data", "sevenn.train.dataload")
_SO3LR_MODULES = (
    "so3krates_torch.modules.models",
    "so3krates_torch.data.atomic_data",
    "so3krates_torch.data.utils",
    "so3krates_torch.tools.torch_geometric",
    "so3krates_torch.tools.utils",
)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        runs: timed pairs.
        warmup: untimed pairs before them; eager models need about eight calls.
        calls: evaluations in each memory child.
        preload: a caching allocator's shared library, or None for the system's.
        threads: of both sides; None leaves the choice to torch.
        timeout: seconds for one child.
    """

    runs: int = 20
    warmup: int = 10
    calls: int = 10
    preload: str | None = None
    threads: int | None = None
    timeout: float = 1800.0


def find_allocator(choice: str | None = None) -> str | None:
    """The caching allocator to preload.

    Args:
        choice: a shared library's path or name, ``"none"`` for the system's allocator, or None:
            ``$GAQ_PRELOAD``, else jemalloc where the system has it.

    Raises:
        ConfigError: for a path that does not exist, or a system that cannot preload.
    """
    choice = choice or os.environ.get(PRELOAD_VARIABLE)
    if choice == "none" or (choice is None and not sys.platform.startswith("linux")):
        return None
    if choice is None:
        return find_library("jemalloc")
    if not sys.platform.startswith("linux"):
        raise ConfigError("allocators can be preloaded on Linux only", fix="--preload none")
    if "/" in choice and not Path(choice).is_file():
        raise ConfigError("no such allocator library", where=choice, fix="give its path, or --preload none")
    return choice


def speed_figures(model: str, file: Path, structures: Path, settings: Settings) -> dict[str, Any]:
    """The report's ``speed``: original ``model`` and ``file`` on the first of ``structures``.

    Args:
        model: a pretrained model's name, or a checkpoint.
        file: the ``.gaq`` file made from it.
        structures: anything that ASE reads.
        settings: how to measure.

    Raises:
        VerificationError: if a child fails, or the asked allocator is not in use.
    """
    timing = ["--runs", str(settings.runs), "--warmup", str(settings.warmup)]
    sides = ["--model", model, "--file", str(file), "--structures", str(structures)]
    return _child(["time", *sides, *timing], settings)[1]


def memory_figures(model: str, file: Path, structures: Path, settings: Settings) -> dict[str, Any]:
    """The report's peaks; arguments and errors as :func:`speed_figures`."""
    common = ["--structures", str(structures), "--calls", str(settings.calls)]
    eager_peak, eager = _child(["eager", "--model", model, *common], settings)
    compiled_peak, ours = _child(["compiled", "--file", str(file), *common], settings)
    return {
        "eager_peak_bytes": eager_peak,
        "compiled_peak_bytes": compiled_peak,
        "eager_growth_bytes": eager["growth_bytes"],
        "compiled_growth_bytes": ours["growth_bytes"],
        "eager_imports_bytes": eager["baseline_bytes"],
        "compiled_imports_bytes": ours["baseline_bytes"],
        "peak_is": "whole process",
        "growth_is": f"over the state after imports ({ours['method']})",
        "kernels_were_cached": ours["kernels_were_cached"],
        "allocator": ours["allocator"],
    }


def environment(settings: Settings) -> dict[str, str]:
    """A child's environment variables: the allocator, and the threads of both sides."""
    found = dict(os.environ)
    if settings.preload:
        found["LD_PRELOAD"] = " ".join(filter(None, (settings.preload, found.get("LD_PRELOAD"))))
        if "jemalloc" in settings.preload:
            found.setdefault("MALLOC_CONF", _JEMALLOC_CONF)
    if settings.threads:
        found["OMP_NUM_THREADS"] = found["MKL_NUM_THREADS"] = str(settings.threads)
        found["TVM_NUM_THREADS"] = str(settings.threads)
    return found


def _child(arguments: Sequence[str], settings: Settings) -> tuple[int, dict[str, Any]]:
    """Peak bytes and the answer of one child."""
    argv = [sys.executable, "-m", "gaq_compile.tools.bench", *arguments]
    done = measured_run(argv, env=environment(settings), timeout=settings.timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        raise VerificationError("the measured process gave no answer", where=" ".join(arguments))
    answer = json.loads(lines[-1].removeprefix(_MARK))
    wanted = next((name for name in _ALLOCATORS if settings.preload and name in settings.preload), None)
    if wanted and wanted not in answer["allocator"]:
        raise VerificationError(
            f"the allocator was to be {wanted}, but the process ran with {answer['allocator']}",
            where=settings.preload or "",
            fix="check the library's path, or pass --preload none",
        )
    return done.peak_bytes, answer


# --- in the children ----------------------------------------------------------------------------


def _time(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, alternating."""
    import torch

    atoms = _first(options.structures)
    eager, compiled = _eager_side(options.model, atoms), _compiled_side(options.file, atoms)
    timing = asdict(alternate(eager, compiled, runs=options.runs, warmup=options.warmup))
    return {
        "eager_ms": timing["a_ms"],
        "compiled_ms": timing["b_ms"],
        "ratio": timing["ratio"],
        "ratio_quartiles": [timing["ratio_low"], timing["ratio_high"]],
        "spread": timing["spread"],
        "runs": timing["runs"],
        "warmup": options.warmup,
        "threads": torch.get_num_threads(),
        "allocator": allocator_in_use(),
    }


def _eager(options: argparse.Namespace) -> dict[str, Any]:
    """The original alone."""
    import ase.io  # noqa: F401 - an import, not growth

    import gaq_compile.capture  # noqa: F401 - an import, not growth

    import_original(options.model)
    return _grown(lambda: _eager_side(options.model, _first(options.structures)), options.calls)


def import_original(model: str) -> None:
    """Import what the original imports while it loads and runs, so that it counts as an import."""
    for name in _SO3LR_MODULES if model == "so3lr" else _SEVENNET_MODULES:
        importlib.import_module(name)


def _compiled(options: argparse.Namespace) -> dict[str, Any]:
    """The file alone."""
    import ase.io  # noqa: F401 - an import, not growth

    import gaq_compile.api  # noqa: F401 - an import, not growth

    answer = _grown(lambda: _compiled_side(options.file, _first(options.structures)), options.calls)
    found = [name for name in _MODEL_PACKAGES if name in sys.modules]
    if found:
        raise VerificationError(f"evaluating a saved file imported {', '.join(found)}", where=options.file)
    return answer | {"kernels_were_cached": "tvm" not in sys.modules}


def _grown(prepare: Callable[[], Callable[[], Any]], calls: int) -> dict[str, Any]:
    with memory_growth() as memory:
        run = prepare()
        for _ in range(calls):
            run()
    return {
        "growth_bytes": memory.growth_bytes,
        "baseline_bytes": memory.baseline_bytes,
        "method": memory.method,
        "allocator": allocator_in_use(),
    }


def _first(path: str) -> Atoms:
    from ase.io import read

    atoms = read(path, index=0)
    return atoms[0] if isinstance(atoms, list) else atoms


def _eager_side(model: str, atoms: Atoms) -> Callable[[], Any]:
    from ..capture import find_recipe
    from ..capture.pretrained import load_model

    loaded = load_model(model)
    original = find_recipe(loaded).original(loaded)
    prepared = original.prepare(atoms)
    return lambda: original.run(prepared)


def _compiled_side(file: str, atoms: Atoms) -> Callable[[], Any]:
    from ..api import load
    from ..capture.graphs import collate

    potential = load(file)
    tensors = collate([atoms], potential.form)
    return lambda: potential.evaluate(tensors)


def allocator_in_use() -> str:
    """The allocator in use, as far as the loaded libraries tell."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    found = [name for name in _ALLOCATORS if f"lib{name}" in mapped]
    if not found:
        return "the system's"
    settings = os.environ.get("MALLOC_CONF") if found[0] == "jemalloc" else None
    return found[0] + (f" ({settings})" if settings else "")


def _main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gaq_compile.tools.bench", description=__doc__)
    parser.add_argument("child", choices=("time", "eager", "compiled"))
    for name in ("--model", "--file", "--structures"):
        parser.add_argument(name)
    for name, default in (("--runs", 20), ("--warmup", 10), ("--calls", 10)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args(argv)
    children = {"time": _time, "eager": _eager, "compiled": _compiled}
    print(_MARK + json.dumps(children[options.child](options)), flush=True)


if __name__ == "__main__":
    _main()
