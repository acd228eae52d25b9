"""benchmarks/nve.py from end to end with a bundled model, and what its page makes of long runs."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

import gaq_compile
import nve
import nve_page
from gaq_compile.datasets import EXAMPLES, example_structures
from gaq_compile.integrations.ase import GAQCalculator
from gaq_compile.verify.dynamics import Dynamics, energy_drift
from nve_watch import BLOCK, Stopwatch, watched


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A compiled potential of ethanol."""
    frames = example_structures("ethanol")[:1]
    made = gaq_compile.quantize("rmd17-ethanol", frames, "fp32", measure=False, progress=False)
    return made.save(tmp_path_factory.mktemp("potentials") / "fp32-0.gaq")


@pytest.fixture
def counted(monkeypatch):
    """Evaluations by dynamics; above ``["most"]`` the process is killed."""
    count = {"calls": 0, "most": 10**9}
    true = GAQCalculator.calculate

    def calculate(self, *arguments, **names):
        if count["calls"] == count["most"]:
            raise KeyboardInterrupt
        count["calls"] += 1
        true(self, *arguments, **names)

    monkeypatch.setattr(GAQCalculator, "calculate", calculate)
    monkeypatch.setattr(nve, "SAVED_FS", 50.0)
    return count


def test_killed_continued_and_gathered(tmp_path, file, counted, capsys):
    common = ["--molecule", "ethanol", "--ps", "0.1", "--potentials", f"fp32={file}", f"mine={file}"]

    def called(work, *more):
        counted["calls"] = 0
        nve.main([*common, "--work", str(tmp_path / work), "--json", str(tmp_path / f"{work}.json"), *more])
        result = json.loads((tmp_path / f"{work}.json").read_text())
        return {r["scheme"]: r for r in result["runs"]}

    whole = called("whole")
    assert counted["calls"] == 2 * 201
    counted["most"] = 120
    with pytest.raises(KeyboardInterrupt):
        called("cut", "--schemes", "mine")
    partly = called("cut", "--gather")
    assert counted["calls"] == 0 and partly["mine"]["steps"] == 100 and partly["mine"]["ps"] == 0.05
    assert set(partly) == {"mine"} and json.loads((tmp_path / "cut.json").read_text())["not_begun"] == [
        "fp32"
    ]
    page = (tmp_path / "cut.md").read_text()
    assert "| unfinished, 50 % |" in page and page.endswith("\nNot begun: fp32.\n")
    counted["most"] = 10**9
    assert set(called("cut", "--schemes", "mine")) == {"mine"}
    assert counted["calls"] == 100  # from step 100, which was saved
    alone = called("cut", "--schemes", "fp32")
    assert counted["calls"] == 201
    capsys.readouterr()
    gathered = called("cut")
    assert counted["calls"] == 0 and gathered["fp32"]["ms_per_step"] == alone["fp32"]["ms_per_step"] > 0
    for scheme, run in whole.items():
        assert {**run, "ms_per_step": 0} == {**gathered[scheme], "ms_per_step": 0}
        assert run["steps"] == 200 and run["ps"] == 0.1 and run["dihedral_deg"] is None
    written, rows = capsys.readouterr(), (tmp_path / "cut.md").read_text().splitlines()[-2:]
    assert all(row in written.out and row.count("|") == 10 for row in rows)
    assert (tmp_path / "cut.png").stat().st_size > 0
    assert "unfinished" not in "".join(rows) and rows[0].startswith("| `fp32` | 0.1 |")
    assert called("cut", "--gather") == gathered and counted["calls"] == 0


def test_nothing_to_gather(tmp_path):
    """And nothing is compiled to find that out."""
    with pytest.raises(SystemExit, match="nothing to gather"):
        nve.main(["--gather", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "nve.json")])
    assert list(tmp_path.iterdir()) == []


def test_another_potential_under_the_same_label_is_another_run(tmp_path, file, counted):
    potential = gaq_compile.load(file)
    potential.report.versions["trained"] = "for longer"
    other = potential.save(tmp_path / file.name)
    options = ["--molecule", "ethanol", "--ps", "0.01", "--json", str(tmp_path / "nve.json")]
    for given, steps in ((file, 21), (other, 21), (file, 0)):
        counted["calls"] = 0
        nve.main([*options, "--work", str(tmp_path / "work"), "--potentials", f"fp32={given}"])
        assert counted["calls"] == steps


def test_reference_energies_are_of_the_positions_at_hand(tmp_path, file):
    start = example_structures("ethanol")[nve.START].positions
    positions = np.array([start, 0.999 * start, 1.001 * start])
    options, kept = nve.parsed(["--molecule", "ethanol"]), tmp_path / "kept.npz"
    first = nve.reference_energies(options, file, positions[:2], kept)
    more = nve.reference_energies(options, file, positions, kept)
    assert (more[:2] == first).all() and more[2] != pytest.approx(first[0], abs=1e-4)
    with np.load(kept) as content:
        np.savez(kept, energies=content["energies"] + 1.0, at=content["at"])  # shows what comes from the file
    assert (nve.reference_energies(options, file, positions[:2], kept) == first + 1.0).all()
    anew = nve.reference_energies(options, file, 1.001 * start[None], kept)
    assert anew == pytest.approx(more[2:], abs=1e-4)


def test_progress_goes_to_the_log_where_there_is_no_terminal(tmp_path, capsys):
    timer = Stopwatch(tmp_path / "run.ms")
    with watched("w8", 100 * BLOCK, timer, Console(file=io.StringIO())) as tell:
        for step in range(1, 100 * BLOCK + 1):
            tell(step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"w8: {part} %" for part in range(2, 99, 2)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--potentials", "w8=missing.gaq"], "not SCHEME=FILE"),
        (["--potentials", f"a/b={__file__}"], "not SCHEME=FILE"),
        (["--potentials", f"w8={__file__}"], "needs fp32=FILE"),
        (["--potentials", f"fp32={__file__}", "--schemes", "w8"], "of fp32"),
    ],
)
def test_options_that_make_no_sense(more, message, capsys):
    with pytest.raises(SystemExit):
        nve.parsed(more)
    assert message in capsys.readouterr().err


def test_a_model_is_called_by_its_name_or_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "trained.for-long.pt"
    checkpoint.write_bytes(b"weights")
    for given, name in (
        (str(checkpoint), "trained.for-long"),
        ("rmd17-ethanol", "rmd17-ethanol"),
        ("a-0.1", "a-0.1"),
    ):
        options = nve.parsed(["--model", given])
        assert nve.title(options) == name
        assert nve.potential_file(options, "w8").name.startswith(f"{name}-")
    first = nve.potential_file(nve.parsed(["--model", str(checkpoint)]), "w8")
    checkpoint.write_bytes(b"other weights")
    assert nve.potential_file(nve.parsed(["--model", str(checkpoint)]), "w8") != first


def test_times_of_earlier_processes_count(tmp_path):
    file = tmp_path / "run.ms"
    file.write_text("4.0\n5.0\n6.")  # torn as it was written
    timer = Stopwatch(file)
    assert timer.median_ms == 5.0
    for step in range(1, 2 * BLOCK):
        timer.lap(step)
    assert len(file.read_text().splitlines()) == 3  # one block more, on the torn line
    assert Stopwatch(tmp_path / "none.ms").median_ms is None


# --- the page -------------------------------------------------------------------------------------


def made_up(steps: int, keep_every: int = 100) -> nve_page.Run:
    """Azobenzene that turns by five degrees around trans, in a long run."""
    rng = np.random.default_rng(0)
    time = np.arange(steps + 1) * 5e-4
    at = np.arange(0, steps + 1, keep_every)
    kinetic = 1.0 + 0.1 * rng.normal(size=steps + 1)
    potential = 2.4e-5 * time - kinetic
    turned = example_structures("azobenzene")[0]
    first = 180.0 - turned.get_dihedral(8, 0, 1, 2)
    frames = []
    for k in range(40):
        atoms = turned.copy()
        atoms.rotate_dihedral(8, 0, 1, 2, first + 5.0 * (-1) ** k, indices=[2])
        frames.append(atoms.positions)
    dynamics = Dynamics(
        energy_drift(time, 1e3 * (potential + kinetic) / 24), 1.0, 300.0, None, time, potential, kinetic,
        np.array(frames)[np.arange(len(at)) % 40], at,
    )  # fmt: skip
    return nve_page.Run("w8", dynamics, potential[at], 5.0, {})


def test_a_long_run_stays_small(tmp_path):
    run, atoms = made_up(450_000), example_structures("azobenzene")[0]
    found = nve_page.figures(run, atoms)
    series = {key: value for key, value in found.items() if isinstance(value, list)}
    assert {len(value) for value in series.values()} == {1501} and len(series) == 4
    assert found["drift_mev_per_atom_ps"] == pytest.approx(1e-3)
    assert found["reference"]["drift_mev_per_atom_ps"] == pytest.approx(1e-3, rel=1e-3)
    assert found["dihedral_deg"]["mean"] == pytest.approx(180.0, abs=0.1)
    assert found["dihedral_deg"]["std"] == pytest.approx(5.0, abs=0.1)
    text = nve.compact(json.dumps(found, indent=1))
    assert json.loads(text) == found and text.count("\n") < 40
    nve_page.plot(tmp_path / "long.png", [run], atoms, "made up")
    assert (tmp_path / "long.png").stat().st_size < 300_000


def test_angles_do_not_jump_where_they_are_counted_from():
    for centre in (180.0, 0.0, 120.0):
        raw = centre + np.array([-8.0, -3.0, 0.0, 4.0, 7.0])
        around = nve_page.around_mean((raw + 180.0) % 360.0 - 180.0)
        np.testing.assert_allclose(around, raw, atol=1e-9)


def test_dihedrals_are_those_of_ase():
    frames = example_structures("azobenzene")
    found = nve_page.dihedral(np.array([f.positions for f in frames]), frames[0])
    np.testing.assert_allclose(found % 360.0, [f.get_dihedral(8, 0, 1, 2) for f in frames], atol=1e-6)


def test_the_bridge_is_found_in_the_structure():
    others = {name: nve_page.azo_bridge(example_structures(name)[0]) for name in EXAMPLES}
    assert others.pop("azobenzene") == (8, 0, 1, 2) and set(others.values()) == {None}
    backwards = example_structures("azobenzene")[3][::-1]
    assert nve_page.azo_bridge(backwards) == (21, 22, 23, 15)


def test_an_envelope_keeps_extremes():
    values = np.zeros(10_007)
    values[1234], values[9000] = 5.0, -3.0
    time, mean, low, high = nve_page.envelope(np.arange(10_007.0), values, 100)
    assert len(time) == len(mean) == 100 and high.max() == 5.0 and low.min() == -3.0
    assert (np.diff(time) > 0).all() and (low <= mean).all() and (mean <= high).all()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0345, "+1.235 ± 0.035"),
        (-2e-5, 3.1e-6, "-0.0000200 ± 0.0000031"),
        (123.4, 56.0, "+123 ± 56"),
    ],
)
def test_drifts_have_the_digits_that_their_errors_leave(value, error, text):
    assert nve_page._with_error(value, error) == text
    assert nve_page._with_error(value, None).endswith("± –")
