"""Quantized potentials that are trained on, beside their controls, on revised MD17.

    python benchmarks/rmd17.py azobenzene --data rmd17 --work out/rmd17 --json benchmarks/results/rmd17.json

Every row starts from the same float32 model (``--model``, by default the bundled one of the molecule) and is
trained for the same extra epochs on the same frames with the same settings; the float32 model itself too,
which is what the others are to be compared with. Figures are of the compiled kernels: errors on the test
file, before and after training; LEE, the mean of ``|F(R x) - R F(x)|`` over atoms, rotations and test frames;
drift of the total energy in dynamics from 300 K; and, for all rows in turn, the time of a step.

The files are the published split 01 of revised MD17 (figshare 12672038, CC0); the first 950 frames of the
train file are learned from, the last 50 watched. Without ``--data`` short dynamics of the
float32 model at 500 K give the frames and their labels: that shows the direction in minutes (``--quick``), no
accuracy.

A row that is done is kept in ``--work`` and not made again; a training that was cut off goes on at its last
epoch, dynamics at their last picosecond. ``--rows`` makes some, e.g. in two processes; what is written has
all that ``--work`` holds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from rich.console import Console

import gaq_compile
from gaq_compile.capture.pretrained import load_model
from gaq_compile.capture.transformer import TransformerOriginal, form_of
from gaq_compile.config import QuantConfig, preset
from gaq_compile.datasets import EXAMPLES, example_structures
from gaq_compile.errors import VerificationError
from gaq_compile.integrations.ase import GAQCalculator
from gaq_compile.models import EuclideanTransformer
from gaq_compile.passes.pipeline import PREPARED
from gaq_compile.potential import Potential
from gaq_compile.tools.machine import processor
from gaq_compile.training.convolution import with_fast_convolutions
from gaq_compile.training.distill import taught
from gaq_compile.training.fake_quant import FakeQuantized
from gaq_compile.training.finetune import compiled
from gaq_compile.training.fit import FitSettings, fit, missing_energies
from gaq_compile.training.frames import Frames, read_rmd17
from gaq_compile.verify.dynamics import Settings, nve
from gaq_compile.verify.equivariance import equivariance
from gaq_compile.verify.measure import alternate_all
from gaq_compile.verify.structures import displaced
from rmd17_page import page, plot

TRAINED = 950
CALIBRATION, LEE_FRAMES, ROTATIONS, BATCH = 190, 10, 8, 20
EMA = 0.995
DATA_K, BETWEEN = 500.0, 100  # of frames that are made: K as rMD17's, steps of 0.5 fs between them
LEE_WEIGHT, HELD = 0.1, 1  # where these are on: weight of the LEE loss, epochs in which only scalars learn


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``wide``: of the multiplications, the share whose inputs may have 16 bits; ``bytes``: of float32's, the
    share that weights may take; both where not the scheme's own, as ``activation``. ``lee``, ``held``,
    ``geometric``: whether the LEE loss and the schedule are on, and the gradient of vectors. ``ablation``
    rows are of the second table, which takes one thing away from W4A8, or adds one.
    """

    title: str
    scheme: str
    trained: bool = True
    wide: float | None = None
    bytes: float | None = None
    activation: str | None = None
    lee: bool = False
    held: bool = False
    geometric: bool = True
    ablation: bool = False

    @property
    def config(self) -> QuantConfig:
        """What is quantized, and how."""
        config = preset(self.scheme)
        wide = config.max_wide_share if self.wide is None else self.wide or None
        size, activation = self.bytes or config.max_weight_share, self.activation or config.activation
        return replace(config, max_wide_share=wide, max_weight_share=size, activation=activation)


ROWS: dict[str, Row] = {
    "fp32": Row("FP32", "fp32", trained=False),
    "fp32-again": Row("FP32, the same extra epochs", "fp32"),
    "naive-w8a8": Row("naive INT8", "naive-w8a8"),
    "naive-w4a8": Row("naive W4A8", "naive-w4a8"),
    "degree-w4a8": Row("Degree-Quant W4A8", "degree-w4a8"),
    "svq-w4a8": Row("SVQ-KMeans W4A8", "svq-w4a8"),
    "w8a8": Row("GAQ W8A8", "w8a8"),
    "w4a8": Row("GAQ W4A8", "w4a8"),
    "w4a8-half": Row("GAQ W4A8, half of it at 16 bits", "w4a8", wide=0.5),
    "exact-w4a8": Row("exact W4A8", "exact-w4a8"),
    "exact-w4a8-half": Row("exact W4A8, half of it at 16 bits", "exact-w4a8", wide=0.5),
    "w4a8-more": Row("GAQ W4A8, and a fifth of the bytes", "w4a8", wide=0.5, bytes=0.2),
    "exact-w4a8-more": Row("exact W4A8, and a fifth of the bytes", "exact-w4a8", wide=0.5, bytes=0.2),
    "w4a16": Row("GAQ W4A16", "w4a16"),
    "w4": Row("W4, float activations", "w4"),
    "w4a8-lee": Row("with the LEE loss", "w4a8", lee=True, ablation=True),
    "w4a8-schedule": Row("with vectors held for the first epoch", "w4a8", held=True, ablation=True),
    "w4a8-components": Row(
        "without MDDQ: components of 8 bits", "w4a8", activation="s8 c8", ablation=True
    ),
    "w4a8-plain-gradient": Row("without the geometric gradient", "w4a8", geometric=False, ablation=True),
    "w4a8-narrow": Row("without 16-bit layers", "w4a8", wide=0.0, ablation=True),
}  # fmt: skip
QUICK = ("fp32", "fp32-again", "naive-w4a8", "w4a8")


@dataclass(frozen=True)
class Data:
    """What is learned, watched, and judged by."""

    train: list[Atoms]
    valid: list[Atoms]
    test: list[Atoms]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    warnings.simplefilter("ignore")  # e3nn's own
    console = Console()
    model = load_model(options.model or f"rmd17-{options.molecule}")
    data = given_data(options, model)
    for seed in options.seeds:
        for name in options.rows:
            if not figures_file(options, name, seed).exists():
                console.print(f"{options.molecule}, seed {seed}: {ROWS[name].title}")
                make(options, name, seed, model, data)
    result = gathered(options, sys.argv if arguments is None else ["rmd17.py", *arguments])
    if options.runs:
        result["times"] = times(options, model, data.test[0], result["rows"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    known[options.molecule] = result
    options.json.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    text = page(known)
    (options.page or options.json.with_suffix(".md")).write_text(text)
    plot(known, options.json.with_suffix(".png"))
    console.print(text, markup=False, soft_wrap=True)
    if options.quick:
        check_direction(result["rows"])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("molecule", choices=EXAMPLES)
    parser.add_argument("--data", type=Path, help="folder of the .npz files")
    parser.add_argument("--model", help="a checkpoint of the float32 model")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="which lines; all unless told")
    parser.add_argument("--epochs", type=int, default=4, help="extra epochs of every row")
    parser.add_argument("--frames", type=int, default=TRAINED, help="that are learned from")
    parser.add_argument("--tests", type=int, default=1000, help="test frames")
    parser.add_argument("--rate", type=float, default=3e-5)
    parser.add_argument("--energy-weight", type=float, default=1.0)
    parser.add_argument("--ps", type=float, default=10.0, help="of dynamics")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=int, default=20, help="rounds in which steps are timed; 0: none")
    parser.add_argument("--quick", action="store_true", help="a few frames, and check the direction")
    parser.add_argument("--work", type=Path, default=Path("out/rmd17"))
    parser.add_argument("--json", type=Path, default=Path("out/rmd17.json"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs, options.frames, options.tests, options.ps = 2, 60, 40, 2.0
    options.rows = options.rows or list(QUICK if options.quick else ROWS)
    return options


def given_data(options: argparse.Namespace, model: torch.nn.Module) -> Data:
    """Frames with labels: rMD17's, or, without its files, the float32 model's."""
    if options.data is not None:
        train = read_rmd17(options.data / f"rmd17_{options.molecule}_train_01.npz")
        test = read_rmd17(options.data / f"rmd17_{options.molecule}_test_01.npz")
        step = TRAINED // min(options.frames, TRAINED)
        some = train[:TRAINED:step][: options.frames]
        return Data(some, train[TRAINED:], test[:: max(1, len(test) // options.tests)])
    frames = example_structures(options.molecule)
    teacher = quantized(model, frames, "fp32")
    parts = ((frames[:6], options.frames), (frames[6:7], 10), (frames[7:], options.tests))
    return Data(*(taught(moving(teacher, *part), teacher.predict) for part in parts))


def moving(potential: Potential, starts: Sequence[Atoms], count: int) -> list[Atoms]:
    """So many frames of short dynamics at the temperature of the data, ``BETWEEN`` steps apart."""
    found: list[Atoms] = []
    each = -(-count // len(starts))
    for k, start in enumerate(starts):
        settings = Settings(timestep_fs=0.5, temperature_k=DATA_K, seed=k, keep_every=BETWEEN)
        positions = nve(GAQCalculator(potential), start, each * BETWEEN, settings).frames[1:]
        found += [displaced(start, at - start.positions) for at in positions]
    return found[:count]


# --- one row --------------------------------------------------------------------------------------


def make(options: argparse.Namespace, name: str, seed: int, model: EuclideanTransformer, data: Data) -> None:
    """Quantize, train, compile, measure, keep."""
    row, file = ROWS[name], figures_file(options, name, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    calibration = data.train[:: max(1, len(data.train) // CALIBRATION)]
    before = quantized(model, calibration, row.config)
    settings = settings_of(options, row, seed)
    history: list[dict[str, float]] = []
    after = before
    if row.trained:
        after, history = trained(row, before, model, data, settings, file.with_suffix(""), calibration)
    saved = after.save(file.with_suffix(".part.gaq")).replace(file.with_suffix(".gaq"))
    found = {
        "before": errors(before, data.test),
        "after": errors(after, data.test),
        "dynamics": dynamics(options, after, seed, file.with_suffix(".npz")),
        "weights_bytes": after.report.memory["weights_bytes"],
        "file_bytes": saved.stat().st_size,
        "settings": asdict(settings) if row.trained else None,
        "seconds": sum(epoch["seconds"] for epoch in history),
        "validation": [epoch["force_mae_mev_per_a"] for epoch in history],
        "versions": dict(after.report.versions),
    }
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(file)


def settings_of(options: argparse.Namespace, row: Row, seed: int) -> FitSettings:
    """The same for all rows but for what a row is about."""
    common = FitSettings(
        options.epochs, 5, options.rate, 20, options.energy_weight, ema=EMA, seed=seed
    )  # fmt: skip
    held = min(HELD, options.epochs - 1) if row.held else 0
    return replace(common, lee_weight=LEE_WEIGHT if row.lee else 0.0, vectors_from=held)


def trained(
    row: Row,
    before: Potential,
    model: EuclideanTransformer,
    data: Data,
    settings: FitSettings,
    folder: Path,
    calibration: list[Atoms],
) -> tuple[Potential, list[dict[str, float]]]:
    """A row's potential after its extra epochs, and what was watched meanwhile."""
    form = form_of(model)
    frames = Frames(data.train, form), Frames(data.valid, form)
    if row.scheme == "fp32":
        again = with_own_weights(model)
        history = fit(with_fast_convolutions(again), *frames, settings, folder)
        for number, energy in missing_energies(again, frames[0]).items():
            again.energy_shift[again.species_of[number]] += energy  # type: ignore[index,operator]
        return quantized(again, calibration, "fp32"), history
    graphs = before.graphs
    learner = FakeQuantized(graphs[PREPARED], graphs["insert_mddq"], before.form, row.geometric)
    history = fit(learner, *frames, settings, folder)
    learner.shift_energies(missing_energies(learner, frames[0]))
    return compiled(before, learner, data.valid[0]), history


def with_own_weights(model: EuclideanTransformer) -> EuclideanTransformer:
    """A copy that can be trained."""
    made = EuclideanTransformer(model.config)
    made.load_state_dict(model.state_dict())
    return made


def quantized(model: torch.nn.Module, calibration: list[Atoms], scheme: str | QuantConfig) -> Potential:
    return gaq_compile.quantize(model, calibration, scheme, measure=False, progress=False)


# --- figures --------------------------------------------------------------------------------------


def errors(potential: Potential, test: list[Atoms]) -> dict[str, float]:
    """Mean absolute errors (meV, meV/Å) and LEE (meV/Å)."""
    answers = [a for k in range(0, len(test), BATCH) for a in potential.predict(test[k : k + BATCH])]
    pairs = list(zip(answers, test, strict=True))
    of_energy = [abs(a.energy - t.get_potential_energy()) for a, t in pairs]
    of_forces = [np.abs(a.forces - t.get_forces()).mean() for a, t in pairs]
    found = equivariance(potential.predict, test[:LEE_FRAMES], rotations=ROTATIONS)
    return {
        "energy_mae_mev": 1e3 * float(np.mean(of_energy)),
        "force_mae_mev_per_a": 1e3 * float(np.mean(of_forces)),
        "lee_mev_per_a": found.force_mev_per_a,
    }


def dynamics(
    options: argparse.Namespace, potential: Potential, seed: int, checkpoint: Path
) -> dict[str, Any]:
    """Drift (meV/atom/ps) of dynamics from 300 K, 0.5 fs."""
    start = example_structures(options.molecule)[5]
    settings = Settings(timestep_fs=0.5, temperature_k=300.0, seed=seed, keep_every=100, save_every=2000)
    steps = round(options.ps * 2000)
    run = nve(GAQCalculator(potential), start, steps, settings, checkpoint=checkpoint)
    return {
        "ps": options.ps,
        "drift_mev_per_atom_ps": run.drift.slope,
        "drift_error": run.drift.error,
        "temperature_k": run.temperature_k,
        "diverged": run.diverged,
    }


def times(
    options: argparse.Namespace, model: EuclideanTransformer, example: Atoms, rows: Mapping[str, Any]
) -> dict[str, Any]:
    """Milliseconds of a step, float32 eager and every row in turn, and how many times faster than eager."""
    eager = TransformerOriginal(model)
    prepared = eager.prepare(example)
    calls: dict[str, Any] = {"eager": lambda: eager.run(prepared)}
    for name in rows:
        seed = next(s for s in options.seeds if figures_file(options, name, s).exists())
        potential = gaq_compile.load(figures_file(options, name, seed).with_suffix(".gaq"))
        calls[name] = lambda p=potential: p.predict([example])
    found = alternate_all(calls, options.runs)
    return {
        name: {
            "ms": statistics.median(series),
            "ratio": statistics.median(a / b for a, b in zip(found["eager"], series, strict=True)),
        }
        for name, series in found.items()
    }


def figures_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(options.work / options.molecule / f"{name}-{seed}.json")


def gathered(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """All rows that ``--work`` has, each with a list of its seeds' figures."""
    rows: dict[str, Any] = {}
    for name, row in ROWS.items():
        files = [figures_file(options, name, seed) for seed in options.seeds]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        if runs:
            rows[name] = {"title": row.title, "ablation": row.ablation, "runs": runs}
    return {
        "command": shlex.join(["python", *command]),
        "machine": processor(),
        "epochs": options.epochs,
        "frames": options.frames,
        "data": "rMD17" if options.data else "short dynamics of the float32 model, with its labels",
        "rows": rows,
    }


def check_direction(rows: Mapping[str, Any]) -> None:
    """What must hold even after a few frames.

    Raises:
        VerificationError: if it does not.
    """
    ours, naive = (rows[name]["runs"][0] for name in ("w4a8", "naive-w4a8"))
    force, lee = itemgetter("force_mae_mev_per_a"), itemgetter("lee_mev_per_a")
    facts = {
        "W4A8's forces are better than naive ones": force(ours["after"]) < force(naive["after"]),
        "training has helped W4A8": force(ours["after"]) < force(ours["before"]),
        "its LEE is less than half of the naive one": lee(ours["after"]) < 0.5 * lee(naive["after"]),
        "its dynamics do not diverge": ours["dynamics"]["diverged"] is None,
    }
    wrong = [fact for fact, true in facts.items() if not true]
    if wrong:
        raise VerificationError("not so: " + "; ".join(wrong), where="rmd17 --quick")


if __name__ == "__main__":
    main()
