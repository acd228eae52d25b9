"""What every potential promises, as tests that a user's own test class inherits.

    class TestMyPotential(PotentialContract):
        cutoffs = (4.5, 12.0)

        def calculator(self):
            return GAQCalculator("azobenzene.gaq")

        def structures(self):
            return example_structures("azobenzene")[5:7]

        def original(self):
            return "so3lr"

Any ASE calculator will do. The figures come from the instruments of :mod:`gaq_compile.verify`; here
are only thresholds, names, and what a failure would mean. A check that a potential does not stand up
to by design is declared so, with the reason, and is skipped::

        tolerances = Tolerances(gradient=NotClaimed("rounded activations: the energy is a staircase"))

pytest is not imported: :func:`failures` runs the same checks anywhere.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .errors import ConfigError, StructureError, VerificationError
from .potential import Potential
from .verify.balance import balance
from .verify.batching import batching
from .verify.checks import FP32_ENERGY, FP32_FORCE, FP32_STRESS
from .verify.conservativity import Conservativity, conservativity, stress_consistency
from .verify.difference import Difference
from .verify.dynamics import Settings, nve
from .verify.equivariance import equivariance
from .verify.extensivity import FAR, extensivity
from .verify.parity import Parity, parity
from .verify.smoothness import WINDOW, crossing, smoothness
from .verify.structures import rattled
from .verify.symmetry import permutation, translation
from .verify.types import Evaluate, Prediction, evaluated, from_calculator

if TYPE_CHECKING:
    from ase import Atoms

FORCES_VANISH = 0.02  # eV/Å, RMS of an atom's force; below it there is nothing to compare
ROUNDINGS = 10.0  # times what rounding of the energies alone explains is never a failure


class ContractError(VerificationError, AssertionError):
    """A potential does not keep a promise: which one, by how much, on what, and what it means."""


@dataclass(frozen=True)
class NotClaimed:
    """Instead of a tolerance: the potential does not promise this, and why."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ConfigError("a check can be left out only with a reason")


@dataclass(frozen=True)
class Limits:
    """How far answers that ought to be the same may be apart.

    Attributes:
        energy: meV/atom, largest.
        force: meV/Å, largest vector norm of an atom.
        stress: meV/Å^3, mean of the components.
    """

    energy: float = FP32_ENERGY
    force: float = 0.1
    stress: float = FP32_STRESS


@dataclass(frozen=True)
class Tolerances:
    """One per check; the defaults are what float32 rounding of a whole network needs, and little more.

    A tolerance of forces is never less than ``relative`` of the structure's RMS force.

    Attributes:
        energy: against the original, meV/atom.
        forces: against the original, meV/Å, mean over components; the largest may be 20 times that.
        stress: against the original, meV/Å^3, mean over components.
        rotation, reflection, translation, permutation: see :class:`Limits`.
        gradient: F = -dE/dx, relative error of the best of several steps.
        stress_gradient: the same for the stress and strains.
        net_force: ``|sum F| / sum |F|``.
        net_torque: ``|sum r x F| / sum |r||F|``.
        cutoff: jumps at the cutoff; ``energy`` is meV of the whole system here.
        extensivity, batching: see :class:`Limits`.
        dynamics: drift of the total energy, meV/atom/ps, beyond three of its standard errors.
        dynamics_noise: RMS of the total energy about its trend over that of the kinetic energy.
        relative: of forces.
    """

    energy: float | NotClaimed = FP32_ENERGY
    forces: float | NotClaimed = FP32_FORCE
    stress: float | NotClaimed = FP32_STRESS
    rotation: Limits | NotClaimed = field(default_factory=Limits)
    reflection: Limits | NotClaimed = field(default_factory=Limits)
    translation: Limits | NotClaimed = field(default_factory=Limits)
    permutation: Limits | NotClaimed = field(default_factory=Limits)
    gradient: float | NotClaimed = 5e-4
    stress_gradient: float | NotClaimed = 2e-3
    net_force: float | NotClaimed = 1e-4
    net_torque: float | NotClaimed = 1e-4
    cutoff: Limits | NotClaimed = field(default_factory=lambda: Limits(energy=0.1, force=1.0))
    extensivity: Limits | NotClaimed = field(default_factory=Limits)
    batching: Limits | NotClaimed = field(default_factory=Limits)
    dynamics: float | NotClaimed = 1.0
    dynamics_noise: float = 0.05
    relative: float = 1e-4


@dataclass(frozen=True)
class Figure:
    """One measured number and what it may be; NaN is never within a tolerance."""

    what: str
    value: float
    tolerance: float
    unit: str
    where: str

    @property
    def kept(self) -> bool:
        return bool(self.value <= self.tolerance)

    def __str__(self) -> str:
        return f"{self.what} is {self.value:.4g}, allowed is {self.tolerance:.4g} {self.unit}".rstrip()


class PotentialContract:
    """Inherit from it in a class called ``Test...``; give :meth:`calculator` and :meth:`structures`.

    What is made is made once for the class. Set as class attributes:

    Attributes:
        tolerances: what the potential promises.
        rattle: standard deviation (Å) by which the given structures are rattled first, so that
            forces do not vanish; 0 takes them as they are. Structures without forces are refused.
        cutoffs: distances (Å) at which energy and forces must be smooth. Without them the
            range ``scan`` is searched, which sees coarse jumps only.
        scan: (low, high), Å.
        far: a distance (Å) beyond which atoms do not feel each other, long-range terms included.
        steps: of dynamics, which start from the first structure.
        dynamics_settings: time step, temperature, seed.
    """

    tolerances: Tolerances = Tolerances()
    rattle: float = 0.05
    cutoffs: tuple[float, ...] = ()
    scan: tuple[float, float] = (2.0, 7.0)
    far: float = FAR
    steps: int = 200
    dynamics_settings: Settings = Settings()

    def calculator(self) -> Any:
        """The potential: an ASE calculator, or a compiled :class:`Potential`."""
        raise NotImplementedError("give the calculator to test: def calculator(self): return ...")

    def structures(self) -> list[Atoms]:
        """A few structures like those that the potential is for."""
        raise NotImplementedError("give structures to test on: def structures(self): return [...]")

    def original(self) -> Any:
        """What the potential must reproduce: an ASE calculator, a pretrained model or its name,
        a function from structures to predictions; or None."""
        return None

    def batch(self) -> Evaluate | None:
        """A function that evaluates a list of structures as one batch, where the potential has
        one; by default a compiled potential's own."""
        return _predict(self.subject.calculator)

    @property
    def subject(self) -> Subject:
        """What is measured, made once for the class."""
        kind = type(self)
        if "_subject" not in vars(kind):
            kind._subject = Subject(self)  # type: ignore[attr-defined]
        return kind._subject  # type: ignore[attr-defined, no-any-return]

    def check(self, name: str) -> tuple[Figure, ...]:
        """Run one check of :data:`CHECKS`.

        Returns:
            Everything that was measured.

        Raises:
            ContractError: if the promise is not kept.
            unittest.SkipTest: if it is not made, or there is nothing to measure it on.
        """
        tolerance = getattr(self.tolerances, name)
        if isinstance(tolerance, NotClaimed):
            raise unittest.SkipTest(f"{name} is not claimed: {tolerance.reason}")
        try:
            figures = tuple(CHECKS[name].measure(self.subject, tolerance))
        except ContractError:
            raise
        except VerificationError as error:  # NaN, wrong shapes: no instrument can judge these
            raise ContractError(f"{name}: {error.what}", where=error.where, fix=error.fix) from error
        broken = [figure for figure in figures if not figure.kept]
        if broken:
            raise ContractError(
                f"{name}: " + "; ".join(str(figure) for figure in broken),
                where=", ".join(dict.fromkeys(figure.where for figure in broken)),
                fix=CHECKS[name].meaning,
            )
        return figures

    def test_energy(self) -> None:
        """The energy is the original's."""
        self.check("energy")

    def test_forces(self) -> None:
        """The forces are the original's."""
        self.check("forces")

    def test_stress(self) -> None:
        """The stress is the original's."""
        self.check("stress")

    def test_rotation(self) -> None:
        """E(Rx) = E(x), F(Rx) = R F(x)."""
        self.check("rotation")

    def test_reflection(self) -> None:
        """The same for improper rotations."""
        self.check("reflection")

    def test_translation(self) -> None:
        """Where a structure stands changes nothing, nor which periodic image of an atom is given."""
        self.check("translation")

    def test_permutation(self) -> None:
        """The order of the atoms changes nothing but the order of their forces."""
        self.check("permutation")

    def test_gradient(self) -> None:
        """F = -dE/dx."""
        self.check("gradient")

    def test_stress_gradient(self) -> None:
        """stress = (1/V) dE/dstrain."""
        self.check("stress_gradient")

    def test_net_force(self) -> None:
        """Forces add up to nothing."""
        self.check("net_force")

    def test_net_torque(self) -> None:
        """Torques of an isolated system add up to nothing."""
        self.check("net_torque")

    def test_cutoff(self) -> None:
        """Energy and forces are continuous where a distance crosses the cutoff."""
        self.check("cutoff")

    def test_extensivity(self) -> None:
        """Two copies far apart have twice the energy and the same forces."""
        self.check("extensivity")

    def test_batching(self) -> None:
        """A structure's answer does not depend on what else is in its batch."""
        self.check("batching")

    def test_dynamics(self) -> None:
        """The total energy stays constant while atoms move."""
        self.check("dynamics")


def failures(contract: PotentialContract, names: tuple[str, ...] = ()) -> dict[str, ContractError]:
    """The promises that are not kept, by check; skipped checks do not count.

    Args:
        contract: an instance of the user's class.
        names: the checks to run; all of them by default.
    """
    found = {}
    for name in names or tuple(CHECKS):
        try:
            contract.check(name)
        except unittest.SkipTest:
            continue
        except ContractError as violation:
            found[name] = violation
    return found


class Subject:
    """A potential, its original and the structures, each made when first needed."""

    def __init__(self, contract: PotentialContract) -> None:
        self.contract = contract

    @cached_property
    def calculator(self) -> Any:
        given = self.contract.calculator()
        if isinstance(given, Potential):
            from .integrations.ase import GAQCalculator

            return GAQCalculator(given)
        return given

    @cached_property
    def evaluate(self) -> Evaluate:
        return from_calculator(self.calculator)

    @cached_property
    def original(self) -> Evaluate | None:
        return _evaluator(self.contract.original())

    @cached_property
    def frames(self) -> list[Atoms]:
        """The rattled structures.

        Raises:
            StructureError: if none was given.
            ContractError: if forces vanish on one of them.
        """
        given = self.contract.structures()
        stdev = self.contract.rattle
        frames = [rattled(atoms, stdev, seed) if stdev else atoms.copy() for seed, atoms in enumerate(given)]
        by_whom = "the original's" if self.original else "its own"
        for index, forces in enumerate(_forces(self.original or self.evaluate, frames)):
            if not _rms(forces) > FORCES_VANISH:
                raise ContractError(
                    f"forces vanish: {by_whom} RMS force is {1e3 * _rms(forces):.3g} meV/Å, at least "
                    f"{1e3 * FORCES_VANISH:.3g} are needed to see anything",
                    where=_name(index, frames[index]),
                    fix="rattle the structures (rattle = 0.05); if they are, the forces are zeroed",
                )
        return frames

    @cached_property
    def scales(self) -> list[float]:
        """RMS force of an atom of each frame, meV/Å, the original's where there is one."""
        return [1e3 * _rms(forces) for forces in _forces(self.original or self.evaluate, self.frames)]

    @cached_property
    def parities(self) -> list[Parity] | None:
        """Each frame beside the original, where there is one."""
        if self.original is None:
            return None
        return [parity(self.original, self.evaluate, [atoms]) for atoms in self.frames]

    def force_tolerance(self, index: int, stated: float) -> float:
        """meV/Å."""
        return max(stated, self.contract.tolerances.relative * self.scales[index])

    def each(self) -> Iterator[tuple[int, Atoms, str]]:
        """Index, structure, and what to call it."""
        for index, atoms in enumerate(self.frames):
            yield index, atoms, _name(index, atoms)


def _name(index: int, atoms: Atoms) -> str:
    kind = "periodic" if atoms.pbc.any() else "not periodic"
    return f"structure {index} ({atoms.get_chemical_formula()}, {len(atoms)} atoms, {kind})"


def _forces(evaluate: Evaluate, frames: list[Atoms]) -> list[np.ndarray]:
    return [np.asarray(p.forces, dtype=np.float64) for p in evaluated(evaluate, frames)]


def _rms(forces: np.ndarray) -> float:
    """RMS of the vector norms."""
    return float(np.sqrt(np.mean(np.sum(forces**2, axis=1))))


def _predict(thing: Any) -> Evaluate | None:
    """A compiled potential's batch evaluation, of the calculator around it."""
    found: Evaluate | None = getattr(getattr(thing, "potential", None), "predict", None)
    return found


def _evaluator(thing: Any) -> Evaluate | None:
    if thing is None:
        return None
    if isinstance(thing, str | nn.Module):
        from .capture import find_recipe
        from .capture.pretrained import load_model
        from .subject import evaluator

        model = load_model(thing) if isinstance(thing, str) else thing
        return evaluator(find_recipe(model).original(model))
    if hasattr(thing, "get_property"):
        return from_calculator(thing)
    if callable(thing):
        given: Callable[[list[Atoms]], list[Prediction]] = thing
        return given
    raise ConfigError(f"cannot evaluate structures with a {type(thing).__name__}")


# --- the checks ---------------------------------------------------------------------------------

Figures = Iterator[Figure]


def _parity(subject: Subject) -> Iterator[tuple[int, Parity, str]]:
    if subject.parities is None:
        raise unittest.SkipTest("no original to compare with was given")
    for (index, _, name), found in zip(subject.each(), subject.parities, strict=True):
        yield index, found, name


def _energy(subject: Subject, tolerance: float) -> Figures:
    for _, found, name in _parity(subject):
        yield Figure("|E - E_original|", found.energy_max_mev_per_atom, tolerance, "meV/atom", name)


def _forces_parity(subject: Subject, tolerance: float) -> Figures:
    for index, found, name in _parity(subject):
        allowed = subject.force_tolerance(index, tolerance)
        yield Figure("mean |F - F_original|", found.force_mae_mev_per_a, allowed, "meV/Å", name)
        yield Figure("largest |F - F_original|", found.force_max_mev_per_a, 20 * allowed, "meV/Å", name)


def _stress_parity(subject: Subject, tolerance: float) -> Figures:
    compared = 0
    for _, found, name in _parity(subject):
        if found.stress_mae is not None:
            compared += 1
            yield Figure("mean |stress - stress_original|", found.stress_mae, tolerance, "meV/Å^3", name)
    if not compared:
        raise unittest.SkipTest("no structure has a stress on both sides")


def _turned(subject: Subject, limits: Limits, reflections: bool) -> Figures:
    matrix = "Q" if reflections else "R"
    for index, atoms, name in subject.each():
        found = equivariance(subject.evaluate, [atoms], rotations=4, reflections=reflections)
        allowed = subject.force_tolerance(index, limits.force)
        energy, force = found.energy_max_mev_per_atom, found.force_max_mev_per_a
        yield Figure(f"largest |E({matrix}x) - E(x)|", energy, limits.energy, "meV/atom", name)
        yield Figure(f"largest |F({matrix}x) - {matrix} F(x)|", force, allowed, "meV/Å", name)
        if found.stress_mae is not None:
            yield Figure("mean |stress - turned stress|", found.stress_mae, limits.stress, "meV/Å^3", name)


def _rotation(subject: Subject, limits: Limits) -> Figures:
    yield from _turned(subject, limits, reflections=False)


def _reflection(subject: Subject, limits: Limits) -> Figures:
    yield from _turned(subject, limits, reflections=True)


def _different(subject: Subject, index: int, found: Difference, limits: Limits, name: str) -> Figures:
    allowed = subject.force_tolerance(index, limits.force)
    yield Figure("largest change of energy", found.energy_mev_per_atom, limits.energy, "meV/atom", name)
    yield Figure("largest change of a force", found.force_mev_per_a, allowed, "meV/Å", name)
    if found.stress_mae is not None:
        yield Figure("mean change of stress", found.stress_mae, limits.stress, "meV/Å^3", name)


def _translation(subject: Subject, limits: Limits) -> Figures:
    for index, atoms, name in subject.each():
        yield from _different(subject, index, translation(subject.evaluate, [atoms]), limits, name)


def _permutation(subject: Subject, limits: Limits) -> Figures:
    for index, atoms, name in subject.each():
        yield from _different(subject, index, permutation(subject.evaluate, [atoms]), limits, name)


def _consistent(found: Conservativity, tolerance: float, what: str, name: str) -> Figure:
    allowed = max(tolerance, ROUNDINGS * found.resolution)
    return Figure(f"relative error of {what}", found.error, allowed, "", name)


def _gradient(subject: Subject, tolerance: float) -> Figures:
    for _, atoms, name in subject.each():
        yield _consistent(conservativity(subject.evaluate, [atoms]), tolerance, "F = -dE/dx", name)


def _stress_gradient(subject: Subject, tolerance: float) -> Figures:
    for _, atoms, name in subject.each():
        if evaluated(subject.evaluate, [atoms])[0].stress is not None:
            found = stress_consistency(subject.evaluate, [atoms])
            yield _consistent(found, tolerance, "stress = (1/V) dE/dstrain", name)
            return  # 36 evaluations: one structure is enough
    raise unittest.SkipTest("no structure has a stress")


def _net_force(subject: Subject, tolerance: float) -> Figures:
    for _, atoms, name in subject.each():
        found = balance(subject.evaluate, [atoms])
        yield Figure("|sum F| / sum |F|", found.force, tolerance, "", name)


def _net_torque(subject: Subject, tolerance: float) -> Figures:
    isolated = [(atoms, name) for _, atoms, name in subject.each() if not atoms.pbc.any()]
    if not isolated:
        raise unittest.SkipTest("every structure is periodic: torques need not add up")
    for atoms, name in isolated:
        found = balance(subject.evaluate, [atoms])
        yield Figure("|sum r x F| / sum |r||F|", found.torque or 0.0, tolerance, "", name)


def _cutoff(subject: Subject, limits: Limits) -> Figures:
    atoms, name = subject.frames[0], _name(0, subject.frames[0])
    cutoffs = subject.contract.cutoffs
    ranges = [(cutoff, cutoff - WINDOW, cutoff + WINDOW, 21) for cutoff in cutoffs]
    if not ranges:
        low, high = subject.contract.scan
        ranges = [(0.5 * (low + high), low, high, 1 + int(np.ceil((high - low) / 0.05)))]
        atoms = atoms[: min(1, len(atoms))]  # a pair: nothing else is in the way of a long path
        atoms.pbc = False
        name = f"a pair of {atoms.get_chemical_formula()}"
    for cutoff, low, high, points in ranges:
        found = smoothness(subject.evaluate, crossing(atoms, cutoff), low, high, points=points)
        energy, force = found.energy_mev, found.force_mev_per_a
        where = f"{name}, a distance of %.4f Å"
        allowed = subject.force_tolerance(0, limits.force)
        yield Figure("jump of the energy", energy, limits.energy, "meV", where % found.energy_at)
        yield Figure("jump of a force", force, allowed, "meV/Å", where % found.force_at)


def _extensivity(subject: Subject, limits: Limits) -> Figures:
    for index, atoms, name in subject.each():
        found = extensivity(subject.evaluate, [atoms], far=subject.contract.far)
        yield from _different(subject, index, found, limits, f"twice {name}")


def _batching(subject: Subject, limits: Limits) -> Figures:
    evaluate = subject.contract.batch()
    if evaluate is None:
        raise unittest.SkipTest("the calculator evaluates one structure at a time, and no batch() was given")
    frames = [*subject.frames, subject.frames[0][:-1]]  # of another size
    if len(frames[-1]) == 0:
        raise StructureError("a batch needs a structure of more than one atom")
    found = batching(evaluate, frames)
    yield from _different(subject, 0, found, limits, f"a batch of {len(frames)} structures")


def _dynamics(subject: Subject, tolerance: float) -> Figures:
    contract, atoms, name = subject.contract, subject.frames[0], _name(0, subject.frames[0])
    found = nve(subject.calculator, atoms, contract.steps, contract.dynamics_settings)
    where = f"{name}, {found.steps} steps of {contract.dynamics_settings.timestep_fs} fs"
    if found.diverged:
        raise ContractError(f"dynamics: {found.diverged}", where=where, fix=CHECKS["dynamics"].meaning)
    beyond = max(0.0, abs(found.drift.slope) - 3 * found.drift.error)
    what = f"drift beyond 3 standard errors ({found.drift.slope:.3g} ± {found.drift.error:.2g})"
    yield Figure(what, beyond, tolerance, "meV/atom/ps", where)
    noise = found.drift.fluctuation / max(found.kinetic_fluctuation, 1e-12)
    allowed = contract.tolerances.dynamics_noise
    yield Figure("fluctuation of the total over that of the kinetic energy", noise, allowed, "", where)


@dataclass(frozen=True)
class Check:
    """How a check measures, and what its failure would mean."""

    measure: Callable[[Subject, Any], Figures]
    meaning: str


CHECKS: dict[str, Check] = {
    "energy": Check(
        _energy,
        "the compiled potential is another function than its original: a wrong weight, scale or shift; "
        "if only forces agree, a constant per element",
    ),
    "forces": Check(
        _forces_parity,
        "dynamics would follow another potential; if the gradient check passes, the energy is as wrong "
        "as the forces, else a backward pass is",
    ),
    "stress": Check(_stress_parity, "cells would relax to other sizes; compare the stress_gradient check"),
    "rotation": Check(
        _rotation,
        "the answer depends on how the structure lies in space: components of a block with l > 0 are "
        "mixed up, permuted, or rounded one by one",
    ),
    "reflection": Check(
        _reflection, "the potential tells left from right: a parity is wrong somewhere (e mistaken for o)"
    ),
    "translation": Check(
        _translation,
        "absolute positions enter, or a neighbour across a cell's border is lost when its atom is wrapped",
    ),
    "permutation": Check(
        _permutation, "atoms are told apart by their place in the list: an index is off or misses"
    ),
    "gradient": Check(
        _gradient,
        "forces are not the derivative of the energy: a term of the backward pass is missing, scaled "
        "or of the wrong sign, or the energy is a staircase",
    ),
    "stress_gradient": Check(
        _stress_gradient, "the stress is not the derivative of the energy: pressure would be wrong"
    ),
    "net_force": Check(
        _net_force, "an isolated system would accelerate itself: pair forces lack their reaction"
    ),
    "net_torque": Check(
        _net_torque,
        "an isolated molecule would start to spin: forces belong to an energy that is not invariant",
    ),
    "cutoff": Check(
        _cutoff,
        "atoms that cross the cutoff get kicked: the envelope does not go to zero, or neighbours are cut "
        "off at another distance than the envelope ends",
    ),
    "extensivity": Check(
        _extensivity,
        "parts that cannot feel each other do, or a normalisation depends on the number of atoms; for "
        "long-range terms `far` may be too near",
    ),
    "batching": Check(
        _batching, "structures of one batch leak into each other: an offset or a per-graph sum is wrong"
    ),
    "dynamics": Check(
        _dynamics,
        "energy is gained or lost in a closed system: forces are not the energy's derivative, the "
        "energy jumps, or the time step is too long",
    ),
}

__all__ = [
    "CHECKS",
    "Check",
    "ContractError",
    "Figure",
    "Limits",
    "NotClaimed",
    "PotentialContract",
    "Tolerances",
    "failures",
]
