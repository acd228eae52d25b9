"""What speed.py keeps, and what its tables say, from results that are made up here."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

pytest.importorskip("sevenn")  # the benchmark's sides import the models' packages

import speed
import speed_children
import speed_page
import speed_sides
from gaq_compile.errors import VerificationError
from speed_cases import CASES, ethanol_box

CASE = next(c for c in CASES if (c.model, c.name) == ("so3lr", "ethanol"))


def side(ms: float, ratio: float, **more) -> dict:
    quartiles = {"quartiles_ms": [0.9 * ms, 1.1 * ms], "ratio_quartiles": [0.9 * ratio, 1.1 * ratio]}
    return {"ms": ms, "ratio": ratio, "fastest_ms": 0.8 * ms, **quartiles, **more}


def time_of(case: str, atoms: int, **sides) -> dict:
    return {
        "kind": "time", "model": "so3lr", "case": case, "atoms": atoms, "runs": 7, "reference": "eager",
        "allocator": "jemalloc", "sides": sides,
    }  # fmt: skip


def memory_of(case: str, atoms: int, name: str, mib: float) -> dict:
    found = {"kind": "memory", "model": "so3lr", "case": case, "atoms": atoms, "side": name}
    return found | {"peak_bytes": (mib + 100) * 2**20, "growth_bytes": mib * 2**20}


def kernels_of(case: str, atoms: int, name: str) -> dict:
    kind = {"kernels": 2, "ms": 4.0, "limit_ms": 1.0, "computing_ms": 1.0, "moving_ms": 0.5}
    kernel = {
        "node": "tvm_a", "family": "linear", "arithmetic": "tvm s8·s8→s32", "ms": 3.0,
        "computing_ms": 0.6, "moving_ms": 0.5, "limit_ms": 0.6,
    }  # fmt: skip
    machine = {"threads": 2, "operations": {"f32": 5e9, "s8": 2e10}}
    machine |= {"read": [[1 << 20, 3e9]], "write": [[1 << 20, 2e9]]}
    return {
        "kind": "kernels", "model": "so3lr", "case": case, "atoms": atoms, "side": name, "ms": 8.0,
        "watched_ms": 8.1, "families": {"linear": kind}, "kernels": [kernel], "machine": machine,
    }  # fmt: skip


@pytest.fixture
def result() -> dict:
    modes = {"default": {"ms": 3.0, "compile_seconds": 60.0}, "other": "RuntimeError: no | way"}
    return {
        "commands": ["python speed.py --cases a", "python speed.py --cases b"],
        "machine": "a machine", "threads": 2,
        "versions": {"torch": "2"}, "timestep_fs": {"so3lr": 0.5},
        "rows": [
            time_of("box", 80, eager=side(200.0, 1.0, force_error=0.0), w8=side(40.0, 5.0, force_error=0.2)),
            time_of(
                "ethanol", 10, eager=side(20.0, 1.0, force_error=0.0), w8=side(5.0, 4.0, force_error=0.001),
                compile={"reason": "forces differ | much", "modes": modes},
            ),
            memory_of("ethanol", 10, "eager", 10.0),
            memory_of("box", 80, "eager", 640.0),
            kernels_of("ethanol", 10, "w8a8"),
        ],
    }  # fmt: skip


def test_tables_say_what_was_measured(result):
    text = speed_page.tables(result)
    rows = [line for line in text.splitlines() if line.startswith("| ethanol")]
    assert "| ethanol | 10 | 20.0 | 5.00, **4.00 x** (3.60–4.40) | – |" in rows  # the smallest case first
    assert text.index("| ethanol | 10 |") < text.index("| box | 80 |")
    assert "| `w8` | 80 | 1.00 | – |" in text  # 40 / 5 ms of 80 / 10 atoms
    assert "| `eager` | 80 | 1.11 | 2.00 |" in text
    assert "| `compile` | ethanol | forces differ \\| much |" in text
    assert "| ethanol | `default` | 3.00 ms, compiled in 60 s |" in text and "no \\| way" in text
    assert "| ethanol | 10 | 110 (10) |" in text
    assert "| ethanol | 10 | 0.5 | 2.16 | 8.64 | – |" in text  # 86400 s a day
    assert "| ethanol | `w8a8` | 8.00 | 4.00 | 1.00 | 12 % |" in text
    assert "| f32 operations | 5 G/s |" in text and "| write, 1 MiB again and again | 2.0 GB/s |" in text
    assert "    python speed.py --cases a\n    python speed.py --cases b\n" in text
    assert "| `tvm_a` | linear | s8·s8→s32 | 3.000 | 0.600 | 0.500 | 20 % |" in text


def test_without_results_tables_and_plots_say_so(tmp_path):
    empty = {"rows": []}
    assert speed_page.tables(empty).count(speed_page.NOTHING) == len(speed_page.SECTIONS)
    assert speed_page.plots(empty, tmp_path / "speed") == []


def test_plots_are_drawn(result, tmp_path):
    drawn = speed_page.plots(result, tmp_path / "speed")
    assert [p.name for p in drawn] == ["speed-time.png", "speed-memory.png", "speed-kernels.png"]
    assert all(p.stat().st_size > 5000 for p in drawn)


def test_a_page_is_filled_between_its_marks_again_and_again(result):
    page = "a\n<!-- memory -->\nold\n<!-- end -->\nb\n<!-- time -->\n<!-- end -->\nc\n"
    once = speed_page.fill_page(page, result)
    assert "old" not in once and speed_page.memory_table(result, "so3lr") in once
    assert once.startswith("a\n") and once.endswith("<!-- end -->\nc\n") and "\nb\n" in once
    assert speed_page.fill_page(once, result) == once
    with pytest.raises(KeyError):
        speed_page.fill_page("<!-- no such table -->\n<!-- end -->", result)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_is_of_the_larger_sizes(power):
    points = [(n, 3.0 * n**power) for n in (100, 200, 400)]
    assert speed_page.exponent([(1, 1e6), (2, 1e6), *points]) == pytest.approx(power)
    assert speed_page.exponent(points[:1]) is None and speed_page.exponent([]) is None


def _options(path, **changes) -> argparse.Namespace:
    known = {
        "models": ["so3lr"],
        "cases": ["ethanol"],
        "sides": ["eager", "w8"],
        "fresh": False,
        "threads": 2,
    }
    return argparse.Namespace(json=path, **{**known, **changes})


def test_a_run_continues_and_rows_replace_what_they_repeat(result, tmp_path):
    path = tmp_path / "speed.json"
    speed.keep(result, memory_of("ethanol", 10, "eager", 12.0), path)
    kept = json.loads(path.read_text())["rows"]
    assert len(kept) == 5 and kept[-1]["growth_bytes"] == 12 * 2**20
    again = speed.known(_options(path))
    assert again["rows"] == kept
    assert speed.find(again, "memory", CASE, "eager") == kept[-1]
    assert speed.find(again, "memory", CASE, "w8") is None and speed.find(again, "time", CASE) is not None


def test_fresh_forgets_what_is_asked_for_only(result, tmp_path):
    path = tmp_path / "speed.json"
    speed.keep(
        result, {"kind": "built", "model": "so3lr", "case": "ethanol", "side": "eager", "reason": "no"}, path
    )
    left = speed.known(_options(path, fresh=True))["rows"]
    assert {(r["kind"], r["case"], r.get("side")) for r in left} == {
        ("time", "box", None), ("memory", "box", "eager"), ("kernels", "ethanol", "w8a8"),
    }  # fmt: skip


def test_one_sides_failure_is_its_reason_and_leaves_the_others(result, tmp_path, monkeypatch):
    asked = []

    def child(kind, options, model, sides, case=None):
        asked.append((kind, tuple(sides)))
        if kind == "memory" and sides == ("eager",):
            raise VerificationError("the command failed with exit status -9")
        return 7, {"sides": {s: {"ms": 1.0} for s in sides}} if kind == "time" else {"growth_bytes": 5}

    monkeypatch.setattr(speed, "child", child)
    result["rows"] = []
    options = _options(tmp_path / "speed.json", sides=["eager", "compile", "w8"])
    for _ in range(2):  # the second time everything is there
        speed.measure(result, CASE, options, speed.Console(quiet=True))
    assert asked == [
        ("memory", ("eager",)),
        ("memory", ("w8",)),
        ("time", ("compile", "w8")),
        ("kernels", ("w8",)),
    ]
    times = speed.find(result, "time", CASE)["sides"]
    assert times["eager"] == {"reason": "does not fit into memory"} and times["w8"] == {"ms": 1.0}
    assert speed.find(result, "memory", CASE, "w8")["peak_bytes"] == 7


def test_what_does_not_fit_beside_the_others_is_left_out_of_the_times(result, tmp_path, monkeypatch):
    """The original of a large cell fills the memory: what runs there is timed all the same."""
    asked, grown = [], {"eager": 16, "compile": 8, "w8": 1}

    def child(kind, options, model, sides, case=None):
        if kind == "memory":
            return 7, {"growth_bytes": grown[sides[0]]}
        asked.append(sides)
        if sum(grown[s] for s in sides) > room:
            raise VerificationError("the command failed with exit status -9")
        return 7, {"sides": {s: {"ms": 1.0} for s in sides}}

    monkeypatch.setattr(speed, "child", child)
    sides, options = list(grown), _options(tmp_path / "speed.json")
    result["rows"] = [{"side": s, **speed.tried("memory", CASE, options, s)} for s in grown]
    room = 9
    row = speed.time_row(result, CASE, sides, options)
    assert asked == [("eager", "compile", "w8"), ("compile", "w8")]
    beside = {"reason": "does not fit into memory beside the others"}
    assert row["sides"] == {"eager": beside, "compile": {"ms": 1.0}, "w8": {"ms": 1.0}}
    room = 0
    row = speed.time_row(result, CASE, sides, options)
    assert row["sides"] == {"eager": beside, "compile": beside, "w8": {"reason": "does not fit into memory"}}


def test_wrong_forces_are_objected_to_where_they_should_be_exact():
    truth = torch.tensor([[1.0, -4.0], [0.0, 2.0]])
    assert speed_sides.disagreement(truth, truth) == 0.0
    assert speed_sides.disagreement(truth, truth + 0.04) == pytest.approx(0.01)
    assert "differ by 1 %" in speed_children.objection("aoti", 0.01)
    assert "differ" in speed_children.objection("compile", float("nan"))
    assert speed_children.objection("w8", 0.01) is None and speed_children.objection("fp32", 1e-6) is None


def test_ratios_are_taken_within_a_round():
    found = speed_children.summary([1.0, 2.0, 4.0], [10.0, 20.0, 40.0])
    assert found["ms"] == 2.0 and found["ratio"] == 10.0 and found["ratio_quartiles"] == [10.0, 10.0]
    assert found["quartiles_ms"] == [1.5, 3.0] and "ratio" not in speed_children.summary([1.0, 2.0], None)


def test_slow_cases_have_fewer_rounds():
    slow = {"a": lambda: __import__("time").sleep(0.02)}
    assert speed_children.rounds(slow, runs=30, seconds=1e-3) == (2, speed_children.FEWEST_RUNS)
    assert speed_children.rounds(slow, runs=3, seconds=100.0) == (speed_children.WARMUP, 3)


def test_molecules_in_a_box_do_not_touch():
    box = ethanol_box(2)
    assert len(box) == 8 * 9 and box.pbc.all() and np.allclose(box.cell.lengths(), 12.0)
    distances = box.get_all_distances(mic=True)
    groups = np.arange(72) // 9
    assert distances[groups[:, None] != groups].min() > 1.5


def test_reasons_are_one_line():
    said = "python child.py memory\nTraceback\nValueError: no such thing\nException raised from a.cpp\n"
    failed = VerificationError("the measured command failed with exit status 1", where=said)
    assert speed.reason_of(failed) == "ValueError: no such thing"
    full = VerificationError("it failed with exit status 1", where="x\nRuntimeError: can't allocate memory")
    assert speed.reason_of(full) == "does not fit into memory"
    assert (
        speed.reason_of(VerificationError("no end after 9 s", where="child.py memory")) == "no end after 9 s"
    )
    assert speed_sides.first_line(RuntimeError("\n first \n second")) == "RuntimeError: first"


def test_a_package_is_built_for_each_case_once(result, tmp_path, monkeypatch):
    built = []

    def child(kind, options, model, sides, case=None):
        built.append((kind, case))
        if case != CASE.name:
            raise VerificationError("failed", where="x\nRuntimeError: no code for this")
        speed.aoti_file(tmp_path, model, case).touch()
        speed.form_file(tmp_path, model).touch()
        return 1, {"seconds": 3.0}

    monkeypatch.setattr(speed, "child", child)
    options = _options(tmp_path / "speed.json", work=tmp_path)
    batch = next(c for c in CASES if c.name.startswith("batch"))
    for case, answer in ((CASE, {"seconds": 3.0}), (batch, {"reason": "RuntimeError: no code for this"})):
        for _ in range(2):
            row = speed.build(result, case, options)
            assert answer.items() <= row.items() and (row["kind"], row["case"]) == ("built", case.name)
            speed.keep(result, row, options.json)
    assert built == [("aoti", CASE.name), ("aoti", batch.name)]
    speed.aoti_file(tmp_path, CASE.model, CASE.name).unlink()  # another --work
    assert speed.build(result, CASE, options)["seconds"] == 3.0 and len(built) == 3


@pytest.mark.slow
def test_the_plain_graph_is_the_models_energy_and_forces(tmp_path):
    import gaq_compile
    from gaq_compile.capture.graphs import collate

    structures = CASE.structures()
    potential = gaq_compile.quantize("so3lr", structures, "fp32", measure=False, progress=False)
    plain = speed_sides.plain_graph(potential.graphs["fold_integers"])
    assert not [n for n in plain.graph.nodes if getattr(n.target, "namespace", "") == "gaq"]
    tensors = collate(structures, potential.form)
    ours = potential.evaluate(tensors)
    with torch.no_grad():
        energy, _, forces, _ = plain(*(tensors[name] for name in potential.form.inputs))
    assert torch.allclose(energy, ours["energy"], atol=1e-4)
    assert speed_sides.disagreement(ours["forces"], forces) < speed_sides.TOLERANCE
