"""Constant-energy dynamics of each scheme: drift, noise, temperature, and what is real in them.

    python benchmarks/nve.py --model so3lr --molecule azobenzene --schemes fp32 w8 w8a8 --ps 20 \\
        --json out/nve.json --work out/nve

Velocity Verlet from 300 K, no total momentum or spin, the same start for every scheme. Beside each
trajectory's own energy stands that of the fp32 potential at positions kept every 50 fs, with the
trajectory's kinetic energy: rounded activations make the *reported* energy a staircase, and only the
difference tells its noise from energy that was really gained. Of molecules with a C-N=N-C dihedral
there is the angle, too. Writes JSON, a Markdown table and a plot of the total energies.

``--model`` is a name or the path of a checkpoint. ``--potentials`` runs potentials that were compiled
before, under the labels given, instead; the one labelled fp32 is the reference:

    python benchmarks/nve.py --ps 1000 --potentials fp32=out/rmd17/azobenzene/fp32-0.gaq \\
        w4a8=out/rmd17/azobenzene/w4a8-0.gaq --json out/nve-1ns.json

``--schemes`` then says which of them to run (by default all). ``--work`` holds the compiled potentials and
the runs, energies of every step included; JSON and plot have a thinned series. A run that was killed goes
on from its last picosecond, a longer ``--ps`` prolongs it, a complete one is not run again. So two
processes can share the work, each with other ``--schemes`` but the same ``--work`` (and ``--json`` files
of their own), and a last call with all of them gathers everything, times included. With ``--gather`` a
call runs nothing and writes about all runs as far as they were saved, also while others are at them. A run
belongs to the very bytes of its potential: another file under the same label starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import gaq_compile
from gaq_compile.datasets import EXAMPLES, example_structures
from gaq_compile.integrations.ase import GAQCalculator
from gaq_compile.potential import Potential
from gaq_compile.tools.machine import processor
from gaq_compile.verify.dynamics import Settings, nve, recorded
from gaq_compile.verify.structures import displaced
from nve_page import Run, figures, plot, table
from nve_watch import Stopwatch, watched

SCHEMES = ("fp32", "w8", "w4", "w8a16", "w4a16", "w8a8", "w4a8", "exact-w8a8", "naive-w8a8")
REFERENCE = "fp32"
CALIBRATION, START = slice(0, 3), 5  # frames of the molecule
KEPT_FS = 50.0  # between positions that are kept for the reference energy
SAVED_FS = 1000.0  # between checkpoints
BATCH = 16  # positions evaluated at once


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    warnings.simplefilter("ignore")  # the model packages' own
    console = Console()
    found = {scheme: run(options, scheme, console) for scheme in options.schemes}
    runs = [r for r in found.values() if r]
    if not runs:
        sys.exit(f"nothing to gather in {options.work}: no run of these options was saved there yet")
    atoms = start(options)
    result = {
        "command": shlex.join(["python", *(sys.argv if arguments is None else ["nve.py", *arguments])]),
        "machine": processor(),
        "versions": runs[0].versions,
        "model": title(options),
        "potentials": {scheme: str(file) for scheme, file in options.potentials.items()},
        "molecule": options.molecule,
        "backend": options.backend,
        "atoms": len(atoms),
        "settings": asdict(settings(options)),
        "steps": steps(options),
        "not_begun": [scheme for scheme, r in found.items() if r is None],
        "runs": [figures(r, atoms) for r in runs],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(compact(json.dumps(result, indent=1, ensure_ascii=False)) + "\n")
    text = table(result)
    options.json.with_suffix(".md").write_text(text)
    plot(
        options.json.with_suffix(".png"),
        runs,
        atoms,
        f"{title(options)}, {options.molecule}, {options.dt:g} fs",
    )
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"wrote {options.json}, and .md and .png beside it")


def compact(text: str) -> str:
    """JSON with the numbers of a list on one line."""
    return re.sub(r"(?<=[\[,\d])\n\s+(?=[-\d\]])", " ", text)


# --- options --------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="name or checkpoint; so3lr unless told; a title, for --potentials")
    parser.add_argument(
        "--potentials", nargs="+", type=labelled, default=[], metavar="SCHEME=FILE", help="compiled before"
    )
    parser.add_argument("--molecule", choices=EXAMPLES, default="azobenzene")
    parser.add_argument("--schemes", nargs="+", help="which to run; all unless told")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--ps", type=float, default=20.0, help="length of each run")
    parser.add_argument("--dt", type=float, default=0.5, help="time step, fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="of the start, K")
    parser.add_argument("--seed", type=int, default=0, help="of the first velocities")
    parser.add_argument("--gather", action="store_true", help="run nothing, write what there is so far")
    parser.add_argument("--json", type=Path, default=Path("out/nve.json"))
    parser.add_argument("--work", type=Path, default=Path("out/nve"), help="checkpoints and potentials")
    options = parser.parse_args(arguments)
    options.potentials = dict(options.potentials)
    known = options.potentials
    options.schemes = options.schemes or list(known or SCHEMES)
    if known and REFERENCE not in known:
        parser.error(f"--potentials needs {REFERENCE}=FILE, the reference")
    if known and not set(options.schemes) <= set(known):
        parser.error(f"--schemes: of {', '.join(known)}, which --potentials gives")
    return options


def labelled(text: str) -> tuple[str, Path]:
    """``w4a8=out/w4a8.gaq``; a label becomes part of file names."""
    label, equals, file = text.partition("=")
    if not re.fullmatch(r"[\w.+-]+", label) or not equals or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not SCHEME=FILE of a file that is there")
    return label, Path(file)


def title(options: argparse.Namespace) -> str:
    """The model's name, or its checkpoint's."""
    name = options.model or ("given potentials" if options.potentials else "so3lr")
    return Path(name).stem if Path(name).is_file() else name


def settings(options: argparse.Namespace) -> Settings:
    return Settings(
        timestep_fs=options.dt,
        temperature_k=options.temperature,
        seed=options.seed,
        keep_every=max(1, round(KEPT_FS / options.dt)),
        save_every=max(1, round(SAVED_FS / options.dt)),
    )


def steps(options: argparse.Namespace) -> int:
    """Of each run, complete."""
    return round(options.ps * 1e3 / options.dt)


def start(options: argparse.Namespace) -> Any:
    """A frame that calibration has not seen."""
    return example_structures(options.molecule)[START]


# --- potentials -----------------------------------------------------------------------------------


def potential_file(options: argparse.Namespace, scheme: str) -> Path:
    """The file that was given, or one in ``--work``."""
    if options.potentials:
        return options.potentials[scheme]
    name = options.model or "so3lr"
    known = f"-{digest(Path(name))}" if Path(name).is_file() else ""
    return options.work / f"{title(options)}{known}-{options.molecule}-{scheme}.gaq"


def compiled_file(options: argparse.Namespace, scheme: str, console: Console) -> Path:
    """The potential's file, made where it is not there yet."""
    file = potential_file(options, scheme)
    if not file.exists():
        name = options.model or "so3lr"
        console.print(f"compiling {name} {scheme}")
        frames = example_structures(options.molecule)[CALIBRATION]
        compiled = gaq_compile.quantize(
            name, frames, scheme, backend=options.backend, measure=False, progress=False
        )
        options.work.mkdir(parents=True, exist_ok=True)
        part = compiled.save(file.with_suffix(f".{os.getpid()}.gaq"))  # whole or not at all, if killed here
        with suppress(FileExistsError):  # of two processes that make it, the first
            file.hardlink_to(part)
        part.unlink()
    return file


def digest(file: Path) -> str:
    """Eight letters that stand for its content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


@cache
def load(file: Path, backend: str) -> Potential:
    """The compiled potential; the reference is asked for once a scheme."""
    return gaq_compile.load(file, backend=backend)


# --- runs -----------------------------------------------------------------------------------------


def run(options: argparse.Namespace, scheme: str, console: Console) -> Run | None:
    """One scheme's dynamics, complete, or with ``--gather`` as they are; None where there are none yet."""
    if options.gather and not potential_file(options, scheme).exists():
        return None
    file = compiled_file(options, scheme, console)
    name = run_name(options, scheme, file)
    timer = Stopwatch(options.work / f"{name}.ms")
    checkpoint = options.work / f"{name}.npz"
    if options.gather:
        dynamics = recorded(start(options), steps(options), settings(options), checkpoint)
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        calculator = GAQCalculator(load(file, options.backend))
        with watched(scheme, steps(options), timer, console) as tell:
            dynamics = nve(
                calculator,
                start(options),
                steps(options),
                settings(options),
                checkpoint=checkpoint,
                progress=tell,
            )
    if dynamics is None:
        return None
    judge = compiled_file(options, REFERENCE, console)
    kept = options.work / f"{name}-by-{digest(judge)}.npz"
    energies = reference_energies(options, judge, dynamics.frames, kept)
    return Run(scheme, dynamics, energies, timer.median_ms, dict(load(file, options.backend).report.versions))


def run_name(options: argparse.Namespace, scheme: str, file: Path) -> str:
    """Of the run's files, by all that decides how it goes but its length."""
    label = f"{options.molecule}-{scheme}" if options.potentials else file.stem
    how = f"{options.dt:g}fs-{options.temperature:g}K-{options.seed}"
    return f"{label}-{digest(file)}-{options.backend}-{how}"


def reference_energies(
    options: argparse.Namespace, judge: Path, positions: np.ndarray, kept: Path
) -> np.ndarray:
    """The fp32 energy (eV) at each kept position; what was evaluated before is in the file ``kept``."""
    at, known = positions[:, 0, 0], np.empty(0)  # one coordinate tells a run that was made anew
    if kept.exists():
        with np.load(kept) as content:
            both = min(len(at), len(content["at"]))
            if (content["at"][:both] == at[:both]).all():
                known = content["energies"][:both]
    if len(known) < len(positions):
        atoms, reference = start(options), load(judge, options.backend)
        frames = [displaced(atoms, p - atoms.positions) for p in positions[len(known) :]]
        batches = [frames[i : i + BATCH] for i in range(0, len(frames), BATCH)]
        new = [answer.energy for batch in batches for answer in reference.predict(batch)]
        known = np.concatenate([known, new])
        part = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, energies=known, at=at)
        part.replace(kept)
    return known


if __name__ == "__main__":
    main()
