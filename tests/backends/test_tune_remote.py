"""Tuning on other machines: a tracker and servers on loopback, what they measure, and how they are lost."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gaq_compile.backends.tvm import database, tune_remote, tune_search
from gaq_compile.backends.tvm.build import host_target
from gaq_compile.backends.tvm.database import KernelKey, problem_text
from gaq_compile.backends.tvm.linear import LinearProblem
from gaq_compile.backends.tvm.tune_measure import Built
from gaq_compile.backends.tvm.tune_remote import RemoteWorkers, Tracker, recorded, tracker_at
from gaq_compile.backends.tvm.tune_space import FAMILIES, candidate
from gaq_compile.errors import ConfigError, RemoteError
from gaq_compile.tools import tune

HOST, KEY = "127.0.0.1", "loopback"
PROBLEM = problem_text(asdict(LinearProblem("16x0e+8x1e -> 32x0e+16x1e", "s8 m8d8", "s8")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host_target()  # this machine's facts need not be found again
    monkeypatch.setenv("GAQ_CACHE_DIR", str(tmp_path))


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def tracker() -> Iterator[Tracker]:
    from tvm.rpc.tracker import Tracker as Started

    port = free_port()
    started = Started(host=HOST, port=port, port_end=port + 50, silent=True)
    try:
        yield Tracker(HOST, started.port, KEY)
    finally:
        started.terminate()


def start_server(tracker: Tracker) -> Any:
    """A server that the tracker knows when this returns."""
    from tvm.rpc.server import Server

    port = free_port()
    address = (tracker.host, tracker.port)
    server = Server(HOST, port, port + 50, tracker_addr=address, key=tracker.key, silent=True)
    until = time.monotonic() + 30
    while not tune_remote._servers(tracker)[1]:
        assert time.monotonic() < until, "the server does not report"
        time.sleep(0.05)
    return server


@pytest.fixture(scope="module")
def served(tracker: Tracker) -> Iterator[Tracker]:
    server = start_server(tracker)
    try:
        yield tracker
    finally:
        server.terminate()


def task(target: str, rows: int = 64) -> tune.KernelTask:
    return tune.KernelTask(KernelKey("linear", PROBLEM, rows, target), "layer", 1, 1.0)


def console() -> Console:
    return Console(record=True, width=150)


# Addresses and trackers -------------------------------------------------------------------------


def test_an_address_is_host_and_port() -> None:
    assert tracker_at("10.0.0.1:9190", "nodes") == Tracker("10.0.0.1", 9190, "nodes")


@pytest.mark.parametrize("address", ["", "host", ":9190", "host:", "host:x", "host:0", "host:65536"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        tracker_at(address, KEY)


def test_a_tracker_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="--key"):
        tracker_at("host:9190", "")


def test_an_unreachable_tracker_is_named_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"cannot reach the tracker(.|\n)*rpc_tracker"):
        tune_remote._servers(Tracker(HOST, free_port(), KEY))
    assert time.monotonic() - started < 5


def test_what_is_no_tracker_is_refused() -> None:
    with socket.create_server((HOST, 0)) as other, pytest.raises(RemoteError, match="cannot reach"):
        other.settimeout(5)
        tracker = Tracker(HOST, other.getsockname()[1], KEY)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune_remote, "PATIENCE", 0.2)  # it says nothing
            tune_remote._servers(tracker)


def test_a_name_without_machines_is_refused_with_those_that_there_are(served: Tracker) -> None:
    wrong = replace(served, key="nobody")
    with pytest.raises(RemoteError, match=rf"no machine of this name \(all it has: {KEY}\)"):
        tune_remote._session(wrong)


# Measuring --------------------------------------------------------------------------------------


def test_the_arguments_of_a_call_are_what_the_machine_is_sent() -> None:
    x, y = torch.ones(3), torch.zeros(3)

    def example(kernel: Any) -> Any:
        def call() -> tuple[torch.Tensor, ...]:
            kernel(x, y, 7)
            return (y,)

        return call

    arguments, made = recorded(example)
    assert arguments[0] is x and arguments[1] is y and arguments[2] == 7 and made == [1]


def test_a_machine_measures_and_refuses(served: Tracker) -> None:
    with RemoteWorkers(served) as workers:
        machines = workers.survey()
        assert json.loads(machines.target) == json.loads(host_target())
        assert machines.number == 1 and machines.threads >= 1
        key = task(machines.target).key
        default = candidate(key, FAMILIES["linear"].default(key), machines.threads)
        other = candidate(key, default.schedule | {"rows": [4], "task_rows": 16}, machines.threads)
        wrong = replace(default, source=default.source.replace("nearbyint", "floor"))
        assert len({default.source, other.source, wrong.source}) == 3
        libraries = [str(library) for library in workers.build([default, other, wrong], key.target)]
        built = [Built(c.schedule, path) for c, path in zip((default, other, wrong), libraries, strict=True)]
        good = workers.measure(key, built[0], built[1], 3)
        assert not good.error and 0 < good.seconds < 1 and 0 < good.default_seconds < 1
        assert "another result" in workers.measure(key, built[0], built[2], 3).error
        assert not workers.measure(key, built[0], built[0], 3).error  # a library may come twice


def test_what_machines_find_is_stored_for_them_and_not_measured_twice(served: Tracker) -> None:
    shown = console()
    with tune.measured_on(served) as (machines, workers):
        (first,) = tune.tune_tasks([task(machines.target)], 2, shown, machines, workers)
        (second,) = tune.tune_tasks([task(machines.target)], 2, shown, machines, workers)
    assert (first.fresh, first.failed, second.fresh) == (2, 0, 0)
    assert database.choice(first.key, machines.threads) is not None
    assert "nothing was measured anew: all 2" in shown.export_text()


def test_what_was_measured_before_a_server_died_is_kept(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = replace(tracker, key="mortal")
    server = start_server(mortal)
    measured: list[int] = []
    rule = tune_search._time

    def dying(*arguments: Any) -> Any:
        measured.append(1)
        if len(measured) == 3:
            server.terminate()
        return rule(*arguments)

    monkeypatch.setattr(tune_search, "_time", dying)
    try:
        with tune.measured_on(mortal) as (machines, workers):
            one = task(machines.target)
            with pytest.raises(RemoteError):
                tune.tune_tasks([one], 4, console(), machines, workers)
            kept = database.trials(one.key, machines.threads)
            assert len(kept) == 2 and not any(record.get("error") for record in kept.values())
            server = start_server(mortal)
            (outcome,) = tune.tune_tasks([one], 4, console(), machines, workers)
        assert (outcome.tried, outcome.fresh, outcome.failed) == (4, 2, 0)
    finally:
        server.terminate()


# Several machines -------------------------------------------------------------------------------


def run_or_lose(k: int, where: Any, lost: Any, done: dict[int, Any]) -> Any:
    time.sleep(0.01)
    if lost(where, k):
        raise RemoteError("lost")
    done[k] = where
    return k


def test_tasks_are_shared_out_and_a_lost_machine_leaves_its_own_to_the_others() -> None:
    done: dict[int, Any] = {}
    run = partial(run_or_lose, lost=lambda where, k: where == "b" and k > 0, done=done)
    found, lost = tune._shared_out(9, ["a", "b", "c"], run)  # type: ignore[list-item]
    assert found == {k: k for k in range(9)} and len(lost) == 1
    assert {"a", "c"} <= set(done.values())


def test_the_last_task_is_not_lost_with_its_machine() -> None:
    done: dict[int, Any] = {}

    def run(k: int, where: Any) -> Any:
        if where == "a":
            time.sleep(0.1)  # when "b" has nothing left to do
        return run_or_lose(k, where, lambda w, _: w == "a", done)

    found, lost = tune._shared_out(2, ["a", "b"], run)  # type: ignore[list-item]
    assert sorted(found) == [0, 1] and set(done.values()) == {"b"} and len(lost) == 1


def test_with_every_machine_lost_the_rest_is_left() -> None:
    done: dict[int, Any] = {}
    run = partial(run_or_lose, lost=lambda where, k: k >= 2, done=done)
    found, lost = tune._shared_out(6, ["a", "b"], run)  # type: ignore[list-item]
    assert found == {0: 0, 1: 1} and len(lost) == 2
