"""What is compiled: a model, and the structures that it is calibrated and tested on."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.fx import GraphModule

from .cache import Stages, fetch, key_of, store
from .capture import find_recipe
from .capture.base import EnergyModel, Original
from .capture.export import export_energy
from .capture.fingerprint import fingerprint
from .capture.generic import TensorModel
from .capture.graphs import GraphFormat, Tensors, collate
from .capture.limits import Limits
from .capture.pretrained import load_model
from .config import QuantConfig
from .datasets import evenly_spaced
from .errors import NoEdgesError
from .passes.center_inputs import center_inputs
from .passes.observe import Observed, observe
from .passes.pipeline import PREPARED, prepare
from .potential import Potential
from .verify.checks import Sides
from .verify.energy_graphs import Comparison
from .verify.structures import rattled
from .verify.types import Evaluate, Prediction, full_stress

RATTLES = (0.03, 0.06, 0.1)  # Å, of the copies that calibration sees
ENOUGH_ATOMS = 256
FRAMES, MOVING = 32, 0.01  # so many structures are a trajectory if nearest distances vary so much (Å)
ROOM = 1.2  # beyond what a trajectory's frames show: another one of its length goes a little further
MOST_ROUNDS = 30
BATCH_ATOMS = 64
ENOUGH_TO_CHOOSE = 128  # atoms
MOST_TRIALS = 16  # structures
TRACED_ATOMS = (8, 5)  # 13 atoms with 40 edges, 20 of either direction


@dataclass(frozen=True)
class Subject:
    """What is compiled: a model, its original form, and structures to calibrate and test on.

    ``trajectory``: whether the structures are frames that show by themselves how far the atoms move.
    ``key`` is that of the captured graph in :mod:`.cache`; None where it is not known what it follows from.
    """

    name: str
    energy_model: EnergyModel
    original: Original
    structures: list[Atoms]
    collate: Callable[[Sequence[Atoms]], Tensors]
    example: list[Tensor]
    calibration: list[Atoms]
    rotates: bool = True
    trajectory: bool = False
    key: str | None = None

    @property
    def form(self) -> GraphFormat:
        """The energy graph's inputs."""
        return self.energy_model.form

    @property
    def tests(self) -> list[Atoms]:
        """Perturbed structures that calibration has not seen; frames of a trajectory are moved less."""
        far = (0.02, 0.02) if self.trajectory else (0.05, 0.04)
        ends = self.structures[0], self.structures[-1]
        return [_moved(atoms, d, 101 + k) for k, (atoms, d) in enumerate(zip(ends, far, strict=True))]

    @property
    def trials(self) -> list[Atoms]:
        """Others of these, for choices that are made by measuring: of every structure, if not too many."""
        some = evenly_spaced(self.structures, MOST_TRIALS)
        found: list[Atoms] = []
        for k, atoms in enumerate(itertools.islice(itertools.cycle(some), MOST_TRIALS)):
            if k >= max(2, len(some)) and sum(map(len, found)) >= ENOUGH_TO_CHOOSE:
                break
            found.append(_moved(atoms, 0.05, 201 + k))
        return found

    def limited(self, limits: Limits) -> Subject:
        """The same, with what export assumed about the inputs."""
        model = self.energy_model
        return replace(self, energy_model=replace(model, form=replace(model.form, limits=limits)))

    def inputs(self, structures: Sequence[Atoms]) -> list[Tensor]:
        """Structures as one batch, in the order of the energy graph's inputs."""
        tensors = self.collate(structures)
        return [tensors[name] for name in self.form.inputs]

    def batches(self, structures: Sequence[Atoms]) -> list[list[Tensor]]:
        """Inputs of all structures, small ones together, which is several times faster."""
        if self.form.positions is not None:  # a model of its own tensors takes one at a time
            return self.batches_alone(structures)
        groups: list[list[Atoms]] = []
        room = 0
        for atoms in structures:
            if len(atoms) > room:
                groups.append([])
                room = BATCH_ATOMS
            groups[-1].append(atoms)
            room -= len(atoms)
        return [self.inputs(group) for group in groups]

    def batches_alone(self, structures: Sequence[Atoms]) -> list[list[Tensor]]:
        """Inputs of every structure alone, whose energies are wanted one by one."""
        return [self.inputs([atoms]) for atoms in structures]

    @cached_property
    def calibration_batches(self) -> list[list[Tensor]]:
        """Inputs of the calibration structures; neighbours are looked for once."""
        return self.batches(self.calibration)

    def centered(self, prepared: GraphModule, config: QuantConfig) -> GraphModule:
        """The float energy graph with scalars about the middle of their range, if the scheme says so."""
        return center_inputs(prepared, config, self.calibration_batches)

    def observe(self, prepared: GraphModule, config: QuantConfig, progress: bool = False) -> Observed:
        """What calibration shows of the float energy graph (:func:`.passes.observe.observe`)."""
        room = ROOM if self.trajectory else 1.0
        config = replace(config, headroom=config.headroom * room)
        return observe(prepared, config, self.form, self.calibration_batches, progress)

    def comparison(self, prepared: GraphModule, structures: Sequence[Atoms]) -> Comparison:
        """Measures energy graphs against the float one on each of the structures."""
        return Comparison(prepared, self.form, self.batches_alone(structures))

    def sides(self, potential: Potential) -> Sides:
        """The original model and a potential made from it, as evaluators of structures."""
        return Sides(evaluator(self.original), lambda structures: self.predict(potential, structures))

    def predict(self, potential: Potential, structures: list[Atoms]) -> list[Prediction]:
        """What a potential made from this says; tensors of a model's own one structure at a time."""
        if self.form.positions is None:
            return potential.predict(structures)
        found = [potential.evaluate(self.collate([atoms])) for atoms in structures]
        return [Prediction(float(out["energy"].sum()), out["forces"].numpy()) for out in found]


def evaluator(original: Original) -> Evaluate:
    """The user's own model as an instrument sees it."""
    return lambda structures: [_prediction(original, atoms) for atoms in structures]


def _prediction(original: Original, atoms: Atoms) -> Prediction:
    raw = original.predict(atoms)
    stress = None if raw.stress is None else full_stress(raw.stress)
    return Prediction(raw.energy, raw.forces, stress, raw.energies)


def trace(model: nn.Module | str, example_graph: Any) -> tuple[Subject, Stages]:
    """What is compiled, and its float energy graph by stage; arguments as for :func:`.api.quantize`.

    A model that has been captured before, with nothing changed since, is not captured again.

    Raises:
        StructureError, NoEdgesError, UnknownElementError: for structures that cannot be used.
        CaptureError: if the model cannot be captured; names the operator and the source line.
    """
    subject = _subject(model, example_graph)
    subject = replace(subject, key=_key(subject))
    entry = fetch(subject.key, needed=[PREPARED])
    if entry is not None:
        return subject.limited(Limits.from_dict(entry.facts["limits"])), entry.graphs
    exported = export_energy(subject.energy_model, subject.example)
    stages = prepare(exported.graph)
    store(subject.key, stages, {"limits": exported.limits.to_dict()})
    return subject.limited(exported.limits), Stages(stages)


def _key(subject: Subject) -> str | None:
    """The key of everything that the captured graph follows from, or None if some of it has no hash."""
    model = subject.energy_model
    found = fingerprint(model.module, dict(zip(model.form.inputs, subject.example, strict=True)))
    if found is None:
        return None
    return key_of("capture", found, json.dumps(model.form.to_dict()), str(tuple(model.export_modes)))


def _subject(model: nn.Module | str, example_graph: Any) -> Subject:
    ours = isinstance(model, str)
    name, model = (model, load_model(model)) if isinstance(model, str) else (type(model).__name__, model)
    if _are_structures(example_graph):
        structures = [example_graph] if isinstance(example_graph, Atoms) else list(example_graph)
        return _structure_subject(name, model, structures, ours)
    captured = TensorModel(model, example_graph)
    structures = captured.structures()
    example = [captured.tensors[n] for n in captured.form.inputs]
    return Subject(
        name, captured.energy_model(), captured, structures, captured.collate, example,
        _rattled_too(structures), captured.rotates_whole,
    )  # fmt: skip


def _are_structures(example: Any) -> bool:
    if isinstance(example, Atoms):
        return True
    return isinstance(example, list | tuple) and all(isinstance(item, Atoms) for item in example)


def _structure_subject(name: str, model: nn.Module, structures: list[Atoms], ours: bool) -> Subject:
    recipe = find_recipe(model)
    energy_model = recipe.energy_model(model)
    form = energy_model.form
    _check_edges(structures, form)
    frames = _are_frames(structures)
    return Subject(
        name, energy_model, recipe.original(model, ours), structures, lambda s: collate(s, form),
        traced_example(structures[0], form), structures if frames else _rattled_too(structures),
        trajectory=frames,
    )  # fmt: skip


def _check_edges(structures: Sequence[Atoms], form: GraphFormat) -> None:
    tensors = collate(structures, form)
    if tensors["edge_vec"].shape[0] == 0:
        raise NoEdgesError(
            f"the example has no edges within the cutoff of {form.cutoff} Å",
            fix="pass a structure whose atoms have neighbours; single atoms can be evaluated afterwards",
        )


def traced_example(structure: Atoms, form: GraphFormat) -> list[Tensor]:
    """The inputs that a graph is traced on, whatever it is made for: they follow from the model alone.

    Two chains of different length, since sizes of 0 and 1, and equal sizes, would be baked in. Atoms are
    neighbours of the next two on either side within the cutoff, and of more within a longer one.
    """
    symbol = chemical_symbols[form.elements[0]] if form.elements else structure.get_chemical_symbols()[0]
    step = 0.45 * form.cutoff
    chains = [Atoms([symbol] * n, positions=[[step * k, 0.0, 0.0] for k in range(n)]) for n in TRACED_ATOMS]
    tensors = collate(chains, form)
    return [tensors[name] for name in form.inputs]


def _are_frames(structures: Sequence[Atoms]) -> bool:
    """Whether these are frames of one trajectory, which show by themselves how far the atoms move.

    Rattled copies of them would be hotter than what the potential was made for, and one made for a single
    molecule is beyond its training there: its curvatures, which choose roundings and bits, are then anything.
    """
    numbers = structures[0].numbers
    if len(structures) < FRAMES or any(not np.array_equal(s.numbers, numbers) for s in structures):
        return False
    some = evenly_spaced(structures, FRAMES)
    nearest = [np.sort(s.get_all_distances(mic=bool(s.pbc.any())), axis=1)[:, 1:2] for s in some]
    return bool(np.std(nearest, axis=0).mean() >= MOVING)


def _rattled_too(structures: Sequence[Atoms]) -> list[Atoms]:
    """The user's structures and rattled copies: more of the range than one geometry shows.

    So many copies that there are ``ENOUGH_ATOMS``: each channel has a range of its own, and what
    lies beyond it is clipped.
    """
    sets = math.ceil(ENOUGH_ATOMS / sum(map(len, structures)))
    rounds = max(1, math.ceil((sets - 1) / len(RATTLES)))
    moved = [
        _moved(s, stdev, k + len(RATTLES) * turn)
        for turn in range(min(rounds, MOST_ROUNDS))
        for k, stdev in enumerate(RATTLES)
        for s in structures
    ]
    return [*structures, *moved]


def _moved(atoms: Atoms, stdev: float, seed: int) -> Atoms:
    moved = rattled(atoms, stdev, seed)
    moved.info.update({k: v for k, v in atoms.info.items() if k in ("charge", "spin")})
    return moved
