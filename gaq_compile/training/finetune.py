"""``finetune``: train a quantized potential's integers, with labels or with its float form as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ase import Atoms
from torch.fx import GraphModule

from ..backends.base import Backend, make_backend
from ..config import is_conservative
from ..errors import ConfigError
from ..passes.fold_integers import fold_integers
from ..passes.lower import lower
from ..passes.pipeline import PREPARED, forces_of, group_rows
from ..passes.tag_irreps import tag_irreps
from ..potential import Potential
from ..subject import traced_example
from ..verify import checks
from ..verify.checks import Sides
from ..verify.types import Evaluate, Prediction
from .distill import shaken, taught
from .fake_quant import FakeQuantized
from .fit import FitSettings, fit, missing_energies
from .frames import Frames

SETTINGS = FitSettings(epochs=20, batch=4, learning_rate=3e-4, warmup=50, ema=0.99)
STRUCTURES = 128  # that a teacher labels
_HELD_OUT = 10  # one of so many frames is watched, not learned


def finetune(
    potential: Potential,
    frames: Sequence[Atoms],
    *,
    teacher: Evaluate | None = None,
    structures: int = STRUCTURES,
    settings: FitSettings = SETTINGS,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Potential:
    """Train a quantized potential, and compile what it has become.

    Weights, their scales, and the steps of activations are trained by fake quantization on the very graph
    that inference runs (:class:`.fake_quant.FakeQuantized`). What energies then lack on average is added per
    element. The potential itself is not changed.

    Args:
        potential: from :func:`gaq_compile.quantize`, not from a file, which lacks the float weights.
        frames: structures with energies (eV) and forces (eV/Å); with a teacher, examples without labels.
        teacher: labels so many ``structures`` that are made from ``frames`` by displacing atoms: a compiled
            potential in ``fp32``, or anything that gives predictions for a list of structures.
        structures: how many.
        settings: of the training.
        folder: where its state is kept; a run that was cut off goes on from there.
        progress: show a progress bar.

    Returns:
        The trained potential, for this machine's CPU. Its report has no figures of accuracy: what it was
        trained for, labels or a teacher, is what it must be measured against.

    Raises:
        ConfigError: for a potential without float weights, or one that is not quantized.
        StructureError, UnknownElementError: for frames without labels, or that cannot be used.
        FileFormatError: for a folder with a training of other settings.
        VerificationError: if the compiled kernels do not give what training saw.
    """
    stages = potential.graphs
    if PREPARED not in stages or "insert_mddq" not in stages:
        raise ConfigError(
            "a potential without its float weights cannot be trained",
            fix="pass what gaq_compile.quantize returned, not a file that was loaded",
        )
    if teacher is not None:
        frames = taught(shaken(frames, structures, settings.seed), teacher)
    valid = list(frames)[::_HELD_OUT]
    train = [atoms for k, atoms in enumerate(frames) if k % _HELD_OUT] or valid
    model = FakeQuantized(stages[PREPARED], stages["insert_mddq"], potential.form)
    learned = Frames(train, potential.form)
    fit(model, learned, Frames(valid, potential.form), settings, folder, progress)
    model.shift_energies(missing_energies(model, learned))
    return compiled(potential, model, valid[0])


def compiled(potential: Potential, model: FakeQuantized, example: Atoms) -> Potential:
    """The integers that training has come to, as kernels for this machine's CPU.

    Args:
        potential: what the model was made from.
        model: trained.
        example: a structure, on which kernels are compared with the same graph in torch.

    Raises:
        VerificationError: if they differ.
    """
    form, config = potential.form, potential.config
    quantized = tag_irreps(model.integer_graph())
    forces = forces_of(quantized, form, traced_example(example, form))
    folded = tag_irreps(fold_integers(forces))
    backends = [make_backend("tvm", None), make_backend("reference")]
    graphs = {
        **{name: potential.graphs[name] for name in potential.graphs if name == PREPARED},
        "insert_mddq": quantized,
        "derive_forces": forces,
        "fold_integers": folded,
        "group_rows": group_rows(folded, form, backends[0]),
    }
    made, in_torch = (_lowered(potential, graphs, some) for some in (backends, backends[1:]))
    smooth = is_conservative(config)
    labels = Sides(_labels, in_torch.predict)
    checks.check_kernels(labels, made.predict, [example], smooth, potential.report.model)
    report = replace(
        made.report,
        equivariance=checks.equivariance_figures(made.predict, [example]),
        conservativity=checks.conservativity_figures(made.predict, [example], smooth),
    )
    return Potential(made.graphs, form, config, report, potential.calibrated)


def _lowered(
    potential: Potential, graphs: Mapping[str, GraphModule], backends: Sequence[Backend]
) -> Potential:
    """The potential of grouped graphs, whose report has no figures yet."""
    lowered, placements = lower(graphs["group_rows"], backends)
    report = replace(
        potential.report, backend=backends[0].name, target=backends[0].target, placements=placements,
        accuracy={}, conservativity={}, equivariance={}, speed={},
    )  # fmt: skip
    return Potential(
        {**graphs, "lower": lowered}, potential.form, potential.config, report, potential.calibrated
    )


def _labels(structures: Sequence[Atoms]) -> list[Prediction]:
    """The labels of structures as predictions."""
    return [Prediction(a.get_potential_energy(), a.get_forces(), None, None) for a in structures]
