"""Tuning: the database, the search and its resumption, workers that survive bad candidates, the pick-up."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.fx import Graph, GraphModule

from gaq_compile.backends.tvm import build, database, tune_search
from gaq_compile.backends.tvm.backend import cpu_kernels
from gaq_compile.backends.tvm.build import compile_kernel, host_target
from gaq_compile.backends.tvm.conv import conv_backward, conv_forward
from gaq_compile.backends.tvm.conv_schedule import ConvSchedule
from gaq_compile.backends.tvm.database import KernelKey, bucket, problem_text
from gaq_compile.backends.tvm.gate_kernel import lower_gate
from gaq_compile.backends.tvm.linear import DenseSchedule, LinearProblem, lower_linear
from gaq_compile.backends.tvm.row_kernel import RowSchedule
from gaq_compile.backends.tvm.tune_measure import Built, Timing, Workers
from gaq_compile.backends.tvm.tune_space import FAMILIES, candidate, choices
from gaq_compile.errors import ConfigError
from gaq_compile.ir.layout import channels, dim
from gaq_compile.ir.specs import in_half, tensor_product_spec
from gaq_compile.passes.lower import KernelCall
from gaq_compile.tools import tune

PROBLEM = LinearProblem("16x0e+8x1e -> 32x0e+16x1e", "s8 m8d8", "s8")
GATE = "16x0e ; 8x0e ; 8x1e ; silu ; tanh"
MDDQ = {"irreps": "16x0e+8x1e", "scheme": "s8 m8d8"}
CONV = "16x0e * 1x0e+1x1e -> 16x0e+16x1e | 0.0.0 0.1.1"
PROBLEMS: dict[str, dict[str, Any]] = {
    "linear": asdict(PROBLEM),
    "conv": {"spec": CONV},
    "conv_backward": {"spec": CONV},
    "gate": {"spec": GATE},
    "gate_backward": {"spec": GATE},
    "mddq": MDDQ,
    "mddq_backward": MDDQ,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host_target()  # this machine's facts need not be found again
    monkeypatch.setenv("GAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(database, "packaged", lambda target: ())


def linear_key(rows: int = 64) -> KernelKey:
    return KernelKey("linear", problem_text(asdict(PROBLEM)), rows, host_target())


def store(key: KernelKey, schedule: dict[str, Any], **facts: Any) -> None:
    database.append(key.target, key.record("choice", database.threads(), schedule=schedule, **facts))


def lowered(problem: LinearProblem = PROBLEM) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    spec = problem.linear
    weight = torch.randint(-127, 128, (spec.weight_numel,), generator=g).to(torch.int8)
    scale = torch.rand(spec.scale_numel, generator=g)
    steps = torch.linspace(0.02, 0.007, channels(spec.irreps_in))
    return problem, weight, scale, steps, None, host_target()


def hidden(schedule: dict[str, Any]) -> float:
    return 1.4 - 0.05 * max(schedule["rows"]) + 0.001 * schedule["task_rows"]


def fake_timings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace builds and timings by a rule: bigger register tiles are faster. Returns what was asked."""
    asked: list[str] = []

    def rule(key: KernelKey, default: Any, other: Any, rounds: int, workers: Any) -> Timing:
        asked.append(other[0].code)
        ratio = hidden(other[0].schedule)
        return Timing(ratio, 1.0, float(ratio < 1), ratio)

    class Nobody:
        def build(self, candidates: list[Any], target: str) -> list[Path]:
            return [Path("x.so")] * len(candidates)

    monkeypatch.setattr(tune_search, "_time", rule)
    monkeypatch.setattr(tune_search, "Nobody", Nobody, raising=False)
    return asked


def nobody() -> Any:
    return tune_search.Nobody()  # type: ignore[attr-defined]


def no_workers() -> Workers:
    raise AssertionError("nothing was to be measured")


def quiet(_count: int, _state: str) -> None: ...


# The database -----------------------------------------------------------------------------------


def test_buckets_are_nearest_on_a_logarithmic_scale() -> None:
    assert [bucket(n) for n in (0, 1, 64, 181, 182, 1000, 1759, 1760, 10**7)] == [
        64, 64, 64, 64, 512, 512, 512, 6048, 6048,
    ]  # fmt: skip


def test_a_line_cut_off_is_ignored_with_a_warning_and_nothing_else_is_lost() -> None:
    key = linear_key()
    for code in ("a", "b"):
        database.append(key.target, key.record("trial", 2, schedule={}, code=code, error="no"))
    path = database.database_path(key.target)
    path.write_bytes(path.read_bytes() + b'{"format": 1, "kind": "tri')
    with pytest.warns(UserWarning, match="1 damaged"):
        assert set(database.trials(key, 2)) == {"a", "b"}
    with pytest.warns(UserWarning, match="1 damaged"):
        database.append(key.target, key.record("trial", 2, schedule={}, code="c", error="no"))
        assert set(database.trials(key, 2)) == {"a", "b", "c"}


@pytest.mark.parametrize("line", [b"[]", b"7", b'{"format": 1}', b"\xff\xfe", b'{"format": 1, "kind": "x"}'])
def test_foreign_lines_are_ignored(line: bytes) -> None:
    key = linear_key()
    database.append(key.target, key.record("trial", 2, schedule={}, code="a", error="no"))
    path = database.database_path(key.target)
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        assert set(database.trials(key, 2)) == {"a"}


def test_keys_do_not_mix() -> None:
    key = linear_key()
    store(key, {"x": 1})
    assert database.choice(key) is not None
    others = (
        replace(key, rows=512),
        replace(key, family="conv"),
        replace(key, target=json.dumps({"kind": "llvm", "mcpu": "core2"})),
        replace(key, problem=problem_text(asdict(replace(PROBLEM, weight="s4")))),
    )
    assert all(database.choice(other) is None for other in others)
    assert database.trials(key, database.threads()) == {}


def test_the_package_is_asked_after_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = linear_key()
    store(key, {"of": "package"})
    moved = tmp_path / "packaged.jsonl"
    database.database_path(key.target).rename(moved)
    monkeypatch.setattr(database, "packaged", lambda target: (tmp_path / "nothing.jsonl", moved))
    assert database.choice(key)["schedule"] == {"of": "package"}  # type: ignore[index]
    store(key, {"of": "user"})
    assert database.choice(key)["schedule"] == {"of": "user"}  # type: ignore[index]


# Picking it up ----------------------------------------------------------------------------------


def test_lower_linear_runs_the_stored_schedule_in_its_bucket_only() -> None:
    base = lower_linear(*lowered())
    assert base.tuned == ()
    small = DenseSchedule((4, 3), 16, 0, True)
    store(linear_key(64), asdict(small))
    kernel = lower_linear(*lowered())
    assert [(rows, k.plan.schedule) for rows, k in kernel.tuned] == [(64, small)]
    assert kernel._for(50).plan.schedule == small
    assert kernel._for(600).plan.schedule == base.plan.schedule
    for rows in (3, 64, 600):
        x = torch.randn(rows, 40)
        assert torch.equal(kernel(x), base(x))
    again = replace(small, task_rows=32)
    store(linear_key(64), asdict(again))  # a later choice is seen by the same process
    assert lower_linear(*lowered()).tuned[0][1].plan.schedule == again
    assert lower_linear(*lowered(), DenseSchedule()).tuned == ()  # type: ignore[misc]


def test_a_default_that_was_chosen_costs_nothing_and_packed_weights_are_shared() -> None:
    base = lower_linear(*lowered())
    store(linear_key(64), asdict(base.plan.schedule))
    assert lower_linear(*lowered()).tuned == ()
    store(linear_key(512), asdict(replace(base.plan.schedule, task_rows=96)))
    kernel = lower_linear(*lowered())
    assert kernel.tuned[0][1].constants is kernel.constants
    assert kernel.weight_bytes == base.weight_bytes


@pytest.mark.parametrize("fields", [{}, asdict(DenseSchedule(rows=())), asdict(DenseSchedule(task_rows=0))])
def test_an_unusable_stored_schedule_leaves_the_default(fields: dict[str, Any]) -> None:
    store(linear_key(64), fields)
    with pytest.warns(UserWarning, match="not usable"):
        assert lower_linear(*lowered()).tuned == ()


def test_convolutions_run_the_stored_schedule() -> None:
    edges, nodes = [torch.tensor(v, dtype=torch.int32) for v in ([1, 0], [0, 1], [0, 1, 2], [0, 1])], 2
    x, sh, weight = torch.randn(nodes, 16), torch.randn(2, 4), torch.randn(2, 32)
    before = conv_forward(CONV, host_target())(x, sh, weight, edges)
    key = KernelKey("conv", problem_text({"spec": CONV}), 64, host_target())
    store(key, asdict(ConvSchedule(32, 8, 0)))
    assert torch.allclose(conv_forward(CONV, host_target())(x, sh, weight, edges), before, atol=1e-6)
    store(key, asdict(ConvSchedule(7, 8, 0)))
    with pytest.warns(UserWarning, match="not usable"):
        conv_forward(CONV, host_target())


def test_small_kernels_run_the_stored_schedule_in_its_bucket_only() -> None:
    x = torch.randn(64, 48)
    before = lower_gate(GATE, host_target())
    assert json.loads(before.tuning[1]) == {"spec": GATE}
    key = KernelKey("gate", problem_text({"spec": GATE}), 64, host_target())
    store(key, asdict(RowSchedule(8, 1 << 30, 4096)))
    after = lower_gate(GATE, host_target())
    assert torch.equal(after(x), before(x))
    assert after.choose(64).function is not after.choose(600).function
    assert after.choose(600).function is before.choose(600).function
    assert after.choose(64) is after.choose(63)
    store(key, asdict(RowSchedule()) | {"lanes": 7})
    with pytest.warns(UserWarning, match="not usable"):
        assert lower_gate(GATE, host_target()).choose(64).function is before.choose(64).function


def test_no_number_of_rows_compiles_anything_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bucket's schedule, with threads and without."""
    here = cpu_kernels(host_target())
    store(linear_key(64), asdict(DenseSchedule((4, 3), 16, 0, True)))
    store(linear_key(6048), asdict(DenseSchedule((4, 3), 32)))
    store(KernelKey("gate", problem_text({"spec": GATE}), 512, host_target()), asdict(RowSchedule(8)))
    store(KernelKey("conv", problem_text({"spec": CONV}), 512, host_target()), asdict(ConvSchedule(32, 8, 0)))
    made = here.linear(*lowered()), here.gate(GATE, host_target()), here.conv(CONV, host_target())

    def refused(*_: Any) -> None:
        raise AssertionError("something is compiled")

    monkeypatch.setattr(build, "build_executable", refused)
    database.database_path(host_target()).unlink()
    functions: list[set[int]] = []
    for kernel in made:
        some = (1, 64, 200, 512, 1500, 4000, 100_000)
        functions.append({id(kernel.launch.choose(rows).function) for rows in some})
    assert [len(found) for found in functions] == [4, 2, 2]
    with pytest.raises(AssertionError, match="is compiled"):  # which this would have seen
        lower_linear(*lowered(LinearProblem("16x0e+8x1e -> 32x0e+8x1e", "s8 m8d8", "s8")))(torch.randn(3, 40))


@pytest.mark.parametrize("family", ["gate", "gate_backward", "mddq", "mddq_backward"])
def test_schedules_of_small_kernels_change_no_result(family: str) -> None:
    key = KernelKey(family, problem_text(PROBLEMS[family]), 64, host_target())
    results = []
    for choice in choices(key, 2)[::5]:
        fields = FAMILIES[family].schedule(key, choice)
        source, _ = FAMILIES[family].text(key, fields, 2)
        call = FAMILIES[family].example(key, fields, 2, compile_kernel(source, key.target))
        results.append(call()[0].clone())
    assert len(results) > 3 and all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("family", ["gate", "mddq_backward"])
@pytest.mark.parametrize("rows", [64, 6048])
def test_a_choice_between_serial_and_parallel_is_what_runs(family: str, rows: int) -> None:
    key = KernelKey(family, problem_text(PROBLEMS[family]), rows, host_target())
    work = rows * FAMILIES[family].work(key.problem)
    for serial in (False, True):
        made = FAMILIES[family].schedule(key, {"lanes": 16, "serial": serial, "block_work": 4096})
        assert (work <= made["serial_work"]) == serial
    on_one_thread = [FAMILIES[family].schedule(key, c) for c in choices(key, 1)]
    assert all(asdict(RowSchedule()) == made | {"lanes": 16} for made in on_one_thread)


# The search -------------------------------------------------------------------------------------


def test_the_search_finds_what_a_rule_hides_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_timings(monkeypatch)
    key = linear_key(512)
    first = tune_search.search(key, 20, 2, nobody, quiet)
    assert (first.tried, first.fresh, first.failed) == (20, 20, 0)
    assert len(set(asked[:20])) == 20
    every = sorted(hidden(FAMILIES["linear"].schedule(key, c)) for c in choices(key, 2))
    assert first.changed and first.seconds <= every[len(every) // 10]
    again = tune_search.search(key, 20, 2, no_workers, quiet)
    assert again == replace(first, fresh=0)
    more = tune_search.search(key, 29, 2, nobody, quiet)
    assert (more.tried, more.fresh) == (29, 9)
    assert tune_search.search(key, 29, 2, no_workers, quiet).fresh == 0


def test_a_search_killed_midway_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_timings(monkeypatch)
    rule = tune_search._time

    def killed(*args: Any) -> Timing:
        if len(asked) == 11:
            raise KeyboardInterrupt
        return rule(*args)

    monkeypatch.setattr(tune_search, "_time", killed)
    with pytest.raises(KeyboardInterrupt):
        tune_search.search(linear_key(512), 20, 2, nobody, quiet)
    monkeypatch.setattr(tune_search, "_time", rule)
    assert tune_search.search(linear_key(512), 20, 2, nobody, quiet).fresh == 9


def test_a_default_is_kept_unless_it_is_beaten_by_more_than_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_timings(monkeypatch)
    monkeypatch.setattr(tune_search, "_time", lambda *_: Timing(0.98, 1.0, 1.0, 0.98))
    outcome = tune_search.search(linear_key(), 8, 2, nobody, quiet)
    assert not outcome.changed and outcome.speedup == 1.0
    assert lower_linear(*lowered()).tuned == ()


def test_failures_are_stored_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_timings(monkeypatch)
    monkeypatch.setattr(tune_search, "_time", lambda *_: Timing(error="took its process down"))
    outcome = tune_search.search(linear_key(), 8, 2, nobody, quiet)
    assert (outcome.failed, outcome.changed) == (8, False)
    assert outcome.seconds == outcome.default_seconds == 0.0  # no time is made up
    task = tune.KernelTask(linear_key(), "a linear", 1, 1.0)
    cells = [list(column.cells) for column in tune.outcome_table([task], [outcome]).columns]
    assert cells[2:5] == [["–"], ["–"], ["–"]]
    assert tune_search.search(linear_key(), 8, 2, no_workers, quiet).failed == 8


def test_a_budget_is_granted_from_the_top() -> None:
    assert tune.grants(3, 40) == [16, 16, 8]
    assert tune.grants(2, 40) == [24, 16]
    assert tune.grants(5, 3) == [3]
    assert tune.grants(0, 3) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_makes_a_schedule_that_the_database_can_hold(family: str) -> None:
    key = KernelKey(family, problem_text(PROBLEMS[family]), 512, host_target())
    default = candidate(key, FAMILIES[family].default(key), 2)
    for choice in choices(key, 2)[::29]:
        schedule = FAMILIES[family].schedule(key, choice)
        assert json.loads(json.dumps(schedule)) == schedule
        assert candidate(key, schedule, 2).source
    assert candidate(key, json.loads(json.dumps(default.schedule)), 2) == default


# Real workers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(timeout=120) as made:
        yield made


def test_workers_measure_refuse_and_survive(workers: Workers, tmp_path: Path) -> None:
    key = linear_key()
    default = candidate(key, FAMILIES["linear"].default(key), database.threads())
    faster = candidate(key, asdict(DenseSchedule((4,), 16)) | {"rows": [4]}, database.threads())
    wrong = replace(default, source=default.source.replace("nearbyint", "floor"))
    broken = replace(default, source=default.source.replace("T.max(", "T.nothing("))
    assert wrong.source != default.source != broken.source
    libraries = workers.build([default, faster, wrong, broken], key.target)
    assert [isinstance(lib, Path) for lib in libraries] == [True, True, True, False]
    base = Built(default.schedule, str(libraries[0]))
    good = workers.measure(key, base, Built(faster.schedule, str(libraries[1])), 3)
    assert not good.error and good.seconds > 0 and good.default_seconds > 0
    bad = workers.measure(key, base, Built(default.schedule, str(libraries[2])), 3)
    assert "another result" in bad.error and bad.ratio == 4.0
    source, crash = tmp_path / "crash.cc", tmp_path / "crash.so"
    source.write_text("#include <cstdlib>\n__attribute__((constructor)) static void f() { abort(); }\n")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", crash, source], check=True)
    assert "down" in workers.measure(key, base, Built(default.schedule, str(crash)), 3).error
    assert not workers.measure(key, base, base, 3).error  # the next candidate gets a new process


def test_tuning_end_to_end_and_a_second_run_measures_nothing(workers: Workers) -> None:
    key = linear_key()
    task = tune.KernelTask(key, "layer", 1, 1.0)
    console = Console(record=True, width=150)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tune.measured_on(None) as here:
            (first,) = tune.tune_tasks([task], 2, console, *here)
            (second,) = tune.tune_tasks([task], 2, console, *here)
    assert (first.fresh, second.fresh) == (2, 0)
    assert second == replace(first, fresh=0)
    assert "nothing was measured anew: all 2" in console.export_text()
    assert database.choice(key, database.threads()) is not None


def test_convolutions_are_known_as_they_run_and_counted_by_edges() -> None:
    """Here with weights in half precision, which a pass after all others decides."""
    spec, names = in_half(CONV), ("grad", "x", "sh", "weight", "edges")
    known = tensor_product_spec(spec)
    x, grad = torch.randn(4, dim(known.irreps_x)), torch.randn(4, dim(known.irreps_out))
    sh, weight = torch.randn(2, dim(known.irreps_sh)), torch.randn(2, known.weight_numel).half()
    edges = [torch.tensor(v, dtype=torch.int32) for v in ([1, 0], [0, 1], [0, 1, 2, 2, 2], [0, 1])]
    graph = Graph()
    given = [graph.placeholder(name) for name in names]
    graph.output([graph.call_module("there", tuple(given[1:])), graph.call_module("back", tuple(given))])
    calls = {"there": conv_forward(spec, host_target()), "back": conv_backward(spec, host_target())}
    noted = tune._Rows(GraphModule({k: KernelCall(v, k) for k, v in calls.items()}, graph))
    noted.run(grad, x, sh, weight, [*edges, *edges[2:]])
    problem = problem_text({"spec": spec})
    assert noted.found == [("conv", problem, 2, "there"), ("conv_backward", problem, 2, "back")]


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown kernels magic"):
        tune.tune_potential(None, families=("magic",))  # type: ignore[arg-type]
