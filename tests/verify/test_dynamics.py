from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet

from gaq_compile.errors import ConfigError, FileFormatError, StructureError
from gaq_compile.verify.checkpoints import Checkpoint
from gaq_compile.verify.dynamics import Settings, energy_drift, nve, recorded


class Counted(EMT):
    """EMT that stops, as a killed process would, before evaluation number ``last``."""

    def __init__(self, last: int = 10**9) -> None:
        super().__init__()
        self.count, self.last = 0, last

    def calculate(self, *arguments, **names):
        if self.count == self.last:
            raise KeyboardInterrupt
        self.count += 1
        super().calculate(*arguments, **names)


class Springs(Calculator):
    """Every atom on a spring to the origin; above ``limit`` Å the answer is ``beyond``."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, factor: float = 1.0, limit: float = np.inf, beyond: float = 0.0) -> None:
        super().__init__()
        self.factor, self.limit, self.beyond = factor, limit, beyond

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        x = self.atoms.positions
        if np.abs(x).max() > self.limit:
            if self.beyond == 0.0:
                raise StructureError("too far")
            x = x * self.beyond
        self.results = {"energy": float((x**2).sum()), "forces": -2.0 * self.factor * x}


SERIES = ("state.npz.energies", "state.npz.frames")


def ethanol() -> Atoms:
    return molecule("CH3CH2OH")


def test_a_true_potential_conserves_its_energy():
    found = nve(EMT(), ethanol(), 400)
    assert found.diverged is None and found.steps == 400
    assert abs(found.drift.slope) < 3 * found.drift.error + 1e-3
    assert found.drift.fluctuation < 0.05 * found.kinetic_fluctuation
    assert found.frames.shape == (5, 9, 3) and found.frame_steps.tolist() == [0, 100, 200, 300, 400]
    np.testing.assert_allclose(found.time_ps[[0, -1]], [0.0, 0.2])
    np.testing.assert_allclose(found.total, found.potential + found.kinetic)


def test_the_start_is_thermal_and_neither_moves_nor_turns():
    atoms = bulk("Cu", cubic=True) * (4, 4, 4)
    periodic = nve(EMT(), atoms, 0, Settings(temperature_k=300.0))
    assert periodic.temperature_k == pytest.approx(300.0, rel=0.1)
    assert periodic.steps == 0 and np.isnan(periodic.drift.slope)
    cluster = Atoms("Cu" * 108, atoms.positions[:108])
    turned = nve(Springs(), cluster, 0, Settings(seed=3))
    assert turned.temperature_k == pytest.approx(300.0, rel=0.2)
    assert turned.kinetic[0] != nve(Springs(), cluster, 0, Settings(seed=4)).kinetic[0]


def test_nothing_moves_as_a_whole():
    atoms = ethanol()
    found = nve(EMT(), atoms, 300, Settings(keep_every=300))
    centres = [atoms.get_masses() @ frame / atoms.get_masses().sum() for frame in found.frames]
    np.testing.assert_allclose(centres[0], centres[1], atol=1e-9)


def test_constraints_are_ignored_and_the_argument_is_left_alone():
    atoms = ethanol()
    atoms.set_constraint(FixAtoms([0]))
    before = atoms.positions.copy()
    found = nve(EMT(), atoms, 10, Settings(keep_every=10))
    assert np.abs(found.frames[-1][0] - found.frames[0][0]).max() > 0.0
    assert (atoms.positions == before).all() and atoms.calc is None


@pytest.mark.parametrize("killed", [1, 37, 60])
def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, killed):
    settings = Settings(keep_every=10, save_every=7)
    whole = nve(EMT(), ethanol(), 60, settings)
    file = tmp_path / "run" / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        nve(Counted(killed), ethanol(), 60, settings, checkpoint=file)
    rest = Counted()
    found = nve(rest, ethanol(), 60, settings, checkpoint=file)
    assert (found.total == whole.total).all() and (found.frames == whole.frames).all()
    assert found.drift == whole.drift
    if killed > 7:
        assert rest.count == 60 - 7 * ((killed - 1) // 7)  # no step again, no force again
    assert {p.name for p in file.parent.iterdir()} == {"state.npz", *SERIES}


def test_a_finished_run_is_not_run_again_and_can_be_prolonged(tmp_path):
    file = tmp_path / "state.npz"
    nve(EMT(), ethanol(), 40, checkpoint=file)
    calculator = Counted()
    again = nve(calculator, ethanol(), 40, checkpoint=file)
    shorter = nve(calculator, ethanol(), 25, checkpoint=file)
    assert calculator.count == 0 and again.steps == 40 and shorter.steps == 25
    longer = nve(calculator, ethanol(), 50, checkpoint=file)
    assert calculator.count == 10
    assert (longer.total == nve(EMT(), ethanol(), 50).total).all()


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path):
    file = tmp_path / "state.npz"
    nve(EMT(), ethanol(), 5, checkpoint=file)
    for atoms, settings in ((ethanol(), Settings(seed=1)), (molecule("C6H6"), Settings())):
        with pytest.raises(FileFormatError, match="another run"):
            nve(EMT(), atoms, 10, settings, checkpoint=file)
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        file.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="cannot be read"):
            nve(EMT(), ethanol(), 10, checkpoint=file)
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(FileFormatError, match="cannot be read"):
        nve(EMT(), ethanol(), 10, checkpoint=file)


@pytest.mark.parametrize("name", SERIES)
def test_series_that_lack_what_the_state_counts_or_hold_something_else_are_refused(tmp_path, name):
    state, series = tmp_path / "state.npz", tmp_path / name
    nve(EMT(), ethanol(), 20, Settings(keep_every=5), checkpoint=state)
    content = series.read_bytes()
    for damaged in (content[:-1], b"", content[:40] + bytes([content[40] ^ 1]) + content[41:]):
        series.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="cannot be read") as error:
            nve(EMT(), ethanol(), 30, Settings(keep_every=5), checkpoint=state)
        assert str(series) in str(error.value) and f"delete {state}" in str(error.value)
    series.unlink()
    with pytest.raises(FileFormatError, match="cannot be read"):
        nve(EMT(), ethanol(), 30, Settings(keep_every=5), checkpoint=state)
    state.unlink()  # as the message says: everything is made anew, whatever lies there
    again = nve(EMT(), ethanol(), 30, Settings(keep_every=5), checkpoint=state)
    assert again.steps == 30 and series.stat().st_size > len(content)


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_while_it_saves_loses_nothing_that_was_saved(tmp_path, monkeypatch, moment):
    """Between two files, and between the last of them and the state."""
    file, settings = tmp_path / "state.npz", Settings(keep_every=3, save_every=10)
    events = iter(range(100))

    def until(true):  # what a save does are three events: two series, then the state's replacement
        def event(*arguments):
            if next(events) == 3 * 2 + moment:
                raise KeyboardInterrupt
            return true(*arguments)

        return event

    monkeypatch.setattr(Checkpoint, "_append", until(Checkpoint._append))
    monkeypatch.setattr(Path, "replace", until(Path.replace))
    with pytest.raises(KeyboardInterrupt):
        nve(EMT(), ethanol(), 60, settings, checkpoint=file)
    monkeypatch.undo()
    rest = Counted()
    found = nve(rest, ethanol(), 60, settings, checkpoint=file)
    whole = nve(EMT(), ethanol(), 60, settings)
    assert (found.total == whole.total).all() and (found.frames == whole.frames).all()
    assert rest.count == 40
    again = nve(Counted(0), ethanol(), 60, settings, checkpoint=file)
    assert (again.total == whole.total).all() and (again.frames == whole.frames).all()


def test_a_save_writes_what_is_new(tmp_path, monkeypatch):
    written = []
    append = Checkpoint._append

    def counted(self, name, rows):
        before = self._file(name).stat().st_size if self._file(name).exists() else 0
        append(self, name, rows)
        written.append((name, self._file(name).stat().st_size - before))

    monkeypatch.setattr(Checkpoint, "_append", counted)
    nve(EMT(), ethanol(), 40, Settings(keep_every=10, save_every=10), checkpoint=tmp_path / "state.npz")
    assert [size for name, size in written if name == "energies"] == [11 * 16, *[10 * 16] * 3]
    assert [size for name, size in written if name == "frames"] == [2 * 9 * 24, *[9 * 24] * 3]


def test_two_processes_cannot_write_one_run(tmp_path):
    file, settings = tmp_path / "state.npz", Settings(save_every=10)

    def meddle(step):
        if step == 15:
            nve(EMT(), ethanol(), 20, settings, checkpoint=file)

    with pytest.raises(FileFormatError, match="something else"):
        nve(EMT(), ethanol(), 40, settings, checkpoint=file, progress=meddle)
    assert nve(Counted(), ethanol(), 40, settings, checkpoint=file).steps == 40


def test_what_was_saved_can_be_read_while_it_runs(tmp_path):
    file, settings = tmp_path / "run" / "state.npz", Settings(keep_every=10, save_every=20)
    seen = {}

    def look(step):
        if step in (5, 35, 40, 45):
            seen[step] = recorded(ethanol(), 60, settings, file)

    whole = nve(EMT(), ethanol(), 60, settings, checkpoint=file, progress=look)
    assert seen[5] is None and [seen[step].steps for step in (35, 40, 45)] == [20, 20, 40]
    assert (seen[45].total == whole.total[:41]).all() and (seen[45].frames == whole.frames[:5]).all()
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in file.parent.iterdir()}
    assert recorded(ethanol(), 60, settings, file).drift == whole.drift
    assert recorded(ethanol(), 30, settings, file).steps == 30
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in file.parent.iterdir()} == before
    with pytest.raises(FileFormatError, match="another run"):
        recorded(ethanol(), 60, Settings(seed=1), file)


def test_steps_are_those_of_ase():
    """To the last bit."""
    found = nve(EMT(), ethanol(), 30, Settings(keep_every=1))
    moving = ethanol()
    moving.calc = EMT()
    MaxwellBoltzmannDistribution(moving, temperature_K=300.0, rng=np.random.default_rng(0))
    Stationary(moving, preserve_temperature=False)
    ZeroRotation(moving, preserve_temperature=False)
    dynamics = VelocityVerlet(moving, timestep=0.5 * units.fs)
    for step in range(1, 31):
        dynamics.run(1)
        assert (moving.positions == found.frames[step]).all()
        assert moving.get_potential_energy() == found.potential[step]
        assert moving.get_kinetic_energy() == found.kinetic[step]


@pytest.mark.parametrize(
    ("limit", "beyond", "message"),
    [
        (np.inf, 0.0, r"^\d+ K after step \d+$"),
        (3.0, np.nan, r"^energy or forces are not finite after step \d+$"),
        (3.0, 0.0, r"^the calculator gave up after step \d+: too far"),
    ],
)
def test_divergence_is_a_result(tmp_path, limit, beyond, message):
    atoms = Atoms("H2", [[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]])
    settings = Settings(hottest_k=1e6)
    calculator = Springs(factor=-1.0, limit=limit, beyond=beyond)  # away from the origin, ever faster
    file = tmp_path / "state.npz"
    found = nve(calculator, atoms, 5000, settings, checkpoint=file)
    assert found.diverged is not None and re.search(message, found.diverged)
    assert 0 < found.steps < 5000 and np.isfinite(found.total).all()
    again = nve(calculator, atoms, 5000, settings, checkpoint=file)
    assert again.diverged == found.diverged and again.steps == found.steps


def test_a_start_that_cannot_be_evaluated_is_an_error():
    with pytest.raises(StructureError, match="too far"):
        nve(Springs(limit=0.1), Atoms("H2", [[0, 0, 0], [0, 0, 1]]), 5)
    with pytest.raises(StructureError, match="not finite"):
        nve(Springs(limit=0.1, beyond=np.nan), Atoms("H2", [[0, 0, 0], [0, 0, 1]]), 5)
    with pytest.raises(ConfigError):
        nve(Springs(), ethanol(), -1)
    with pytest.raises(ConfigError, match="positive"):
        Settings(timestep_fs=0.0)


def test_a_force_along_the_velocity_shows_as_drift():
    class Pushed(LennardJones):
        rate = 2e-4

        def calculate(self, atoms=None, properties=None, system_changes=all_changes):
            super().calculate(atoms, properties, system_changes)
            self.results["forces"] = self.results["forces"] + self.rate * self.atoms.get_momenta()

    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    calculator = Pushed(sigma=2.3, epsilon=0.3, rc=4.5, smooth=True)
    found = nve(calculator, atoms, 300, Settings(timestep_fs=2.0))
    kinetic = 1e3 * found.kinetic.mean() / len(atoms)
    gained = 2 * Pushed.rate * kinetic / (1e-3 / units.fs)  # dE/dt = 2 rate K, per ps
    assert found.drift.slope == pytest.approx(gained, rel=0.25)
    assert found.drift.slope > 5 * found.drift.error


# --- the drift's uncertainty --------------------------------------------------------------------

TIME = np.arange(2000) * 5e-4


def walk(rng):
    return np.cumsum(rng.normal(size=len(TIME)))


def white(rng):
    return rng.normal(size=len(TIME))


def vibrating(rng):
    return np.sin(2 * np.pi * TIME / 0.0137 + rng.uniform(0, 6)) + 0.3 * rng.normal(size=len(TIME))


def test_a_line_is_found():
    found = energy_drift(TIME, 3.0 * TIME + 7.0)
    assert found.slope == pytest.approx(3.0)
    assert found.error < 1e-9 and found.fluctuation < 1e-9
    assert np.isnan(energy_drift(TIME[:10], TIME[:10]).error)
    with pytest.raises(ConfigError):
        energy_drift(TIME[:1], TIME[:1])


@pytest.mark.parametrize(("noise", "least"), [(white, 0.85), (vibrating, 0.85), (walk, 0.65)])
def test_the_uncertainty_covers_what_noise_does(noise, least):
    rng = np.random.default_rng(5)
    drifts = [energy_drift(TIME, 2.0 * TIME + noise(rng)) for _ in range(100)]
    covered = np.mean([abs(d.slope - 2.0) < 2 * d.error for d in drifts])
    spread = np.std([d.slope for d in drifts])
    assert covered >= least
    assert np.median([d.error for d in drifts]) < 6 * spread  # and is of use
