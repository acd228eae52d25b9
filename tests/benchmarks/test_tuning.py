"""What tuning.py counts, says and ships, from results that are made up here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tuning
from gaq_compile.backends.tvm.build import tvm_version
from gaq_compile.backends.tvm.database import KernelKey, problem_text
from gaq_compile.backends.tvm.tune_measure import Timing
from gaq_compile.backends.tvm.tune_search import Outcome
from gaq_compile.tools.machine import Machine
from gaq_compile.tools.tune import KernelTask

TARGET = json.dumps({"kind": "llvm", "mcpu": "znver5"})


def kernel(ratio: float, rows: int = 64, confirmed: bool = True, **more: Any) -> dict[str, Any]:
    found = {"family": "linear", "problem": {"spec": "x"}, "rows": rows, "ratio": ratio, "limit_share": 0.5}
    return found | {"confirmed": confirmed, "schedule": {"rows": [8]}} | more


def result(*kernels: dict[str, Any]) -> dict[str, Any]:
    families = tuning.summaries(list(kernels))
    where = {"processor": "a CPU", "threads": 1, "target": {}, "command": "python it"}
    return {"families": families, "kernels": list(kernels), **where}


def test_means_are_geometric_by_family_and_rows() -> None:
    few, many, every = tuning.summaries([kernel(2.0), kernel(0.5, 512), kernel(4.0, 512, limit_share=0.95)])
    assert (few["rows"], few["kernels"], few["geometric_mean"]) == (64, 1, 2.0)
    assert (many["best"], many["near_limit"]) == (4.0, 1)
    assert every["rows"] is None and math.isclose(every["geometric_mean"], 4.0 ** (1 / 3))


def test_the_table_says_what_was_won_and_how() -> None:
    text = tuning.table(result(kernel(1.25)))
    assert "| linear | 64 | 1 | 1 | 1.25 | 1.25 | 50 % | 0 of 1 |" in text
    assert "a CPU, 1 thread: `python it`" in text


def test_results_add_up_on_one_machine(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    first = result(kernel(1.5), kernel(1.2, 512))
    assert tuning.joined(first, path) == first
    path.write_text(json.dumps(first))
    second = result(kernel(1.1, 512)) | {"command": "python again"}
    both = tuning.joined(second, path)
    assert both == result(kernel(1.5), kernel(1.1, 512)) | {"command": "python it ; python again"}
    path.write_text(json.dumps(both))
    assert tuning.joined(second, path) == both
    elsewhere = second | {"threads": 2}
    assert tuning.joined(elsewhere, path) == elsewhere


def test_the_default_of_a_kernel_with_one_schedule_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search has nothing to compare there, and gives no time that a limit could be set beside."""
    asked = []

    def compare(key: KernelKey, schedule: dict[str, Any], *_: Any) -> Timing:
        asked.append(schedule)
        return Timing(2e-3, 3e-3, 1.0, 0.7)

    monkeypatch.setattr(tuning, "compare", compare)
    key = KernelKey("mddq", problem_text({"spec": "8x0e"}), 64, TARGET)
    default = tuning.FAMILIES["mddq"].default(key)
    outcome = Outcome(key, default, False, seconds=0.0, default_seconds=0.0, tried=0, fresh=0, failed=0)
    found = tuning.facts(KernelTask(key, "a norm", 1, 1.0), outcome, 1, lambda: None)
    assert asked == [default] and (found["default_ms"], found["tuned_ms"], found["ratio"]) == (3.0, 3.0, 1.0)


def test_limits_that_kernels_beat_are_not_shown() -> None:
    text = tuning.table(result(kernel(1.25), kernel(1.0, 512, limit_share=1.4)))
    assert "%" not in text and "too busy" in text


def test_peaks_are_the_best_of_several_measurements() -> None:
    one = Machine(1, {"f32": 1.0, "s8": 5.0}, {64: 2.0}, {64: 3.0})
    two = Machine(1, {"f32": 2.0, "s8": 4.0}, {64: 1.0}, {64: 4.0})
    assert tuning.best_of([one, two]) == Machine(1, {"f32": 2.0, "s8": 5.0}, {64: 2.0}, {64: 4.0})


def test_only_the_part_between_the_marks_of_a_page_is_made_anew() -> None:
    page = "before\n<!-- tuning -->\nold\n<!-- end -->\nafter\n<!-- other -->\nkept\n<!-- end -->\n"
    made = tuning.filled(page, result(kernel(1.25)))
    assert made.startswith("before\n<!-- tuning -->\n|") and "old" not in made
    assert made.endswith("<!-- end -->\nafter\n<!-- other -->\nkept\n<!-- end -->\n")


def test_what_is_shipped_is_confirmed_and_replaces_only_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "znver5.jsonl"
    assert tuning.ship([kernel(1.2), kernel(1.2, 512), kernel(1.0, 6048, False)], 1, TARGET, path) == 2
    assert tuning.ship([kernel(1.0, 64, False)], 1, TARGET, path) == 1
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["kind"], line["rows"], line["threads"], line["tvm"]) == ("choice", 512, 1, tvm_version())
    assert line["changed"] and line["schedule"] == {"rows": [8]}


@pytest.mark.parametrize(
    ("family", "problem", "operations", "read", "written"),
    [
        ("linear", {"spec": "4x0e -> 8x0e", "activation": "f32", "weight": "f32"}, 2 * 32, 4 * 32, 0),
        ("gate", {"spec": "4x0e ; 4x0e ; 4x1o ; silu ; tanh"}, 20, 0, 0),
    ],
)
def test_limits_count_operations_and_bytes_once(
    family: str, problem: dict[str, Any], operations: int, read: int, written: int
) -> None:
    key = KernelKey(family, problem_text(problem), 10, TARGET)
    counted, bytes_read, bytes_written = tuning.work(key)
    width_in, width_out = (4, 8) if family == "linear" else (20, 16)  # a gate gives 4 + 4 * 3
    assert sum(counted.values()) == 10 * operations
    assert bytes_read == read + 4 * 10 * width_in and bytes_written == written + 4 * 10 * width_out
