"""Timing candidates on other machines, through TVM's RPC tracker.

On each machine runs TVM's own server, on one of them its tracker; this package need not be there::

    python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190
    python -m tvm.exec.rpc_server --tracker HOST:9190 --key NAME

Candidates are compiled here for the machine's target, which the server is asked for, and uploaded. The
machine gets the same seeded example as a local worker; the candidate's outputs come back and are
compared here with the default's, and both are timed there by turns. All conversation is in a process
of its own (as MetaSchedule's ``RPCRunner`` has it), so that a machine that falls silent costs a time
limit and nothing else. MetaSchedule's runner itself is not used: it times one kernel alone and compares
no results.

Anybody who reaches a TVM server can run what he likes on its machine: keep it in a trusted network.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, RemoteError
from .build import import_tvm
from .database import KernelKey
from .tune_measure import OTHER_RESULT, Built, Timing, Workers, agree, alternate
from .tune_space import FAMILIES

PATIENCE = 10.0
"""Seconds until a tracker must answer, and until one of its machines must be free."""
_POLL = 0.2


@dataclass(frozen=True)
class Tracker:
    """Where machines are found.

    Attributes:
        host, port: of TVM's tracker.
        key: the name that the machines' servers were started with; all are of one kind.
    """

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}, key {self.key!r}"


@dataclass(frozen=True)
class Machines:
    """What a tracker has.

    Attributes:
        number: servers with the key, busy ones too.
        target: of the one that was asked, as :func:`.build.host_target` would say there.
        threads: of its pool.
    """

    number: int
    target: str
    threads: int


def tracker_at(address: str, key: str) -> Tracker:
    """A tracker from ``"host:port"``.

    Raises:
        ConfigError: for text of another form, and without a key.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is no address of a tracker", fix="give it as host:port")
    if not key:
        raise ConfigError("a tracker has machines of several names", fix="say which: --key NAME")
    return Tracker(host, int(port), key)


class RemoteWorkers(Workers):
    """Builds here and times on one machine of a tracker; use it as a context.

    Args:
        tracker: where the machine is found.
        timeout: seconds after which a build or a measurement is given up.
    """

    def __init__(self, tracker: Tracker, timeout: float = 120.0) -> None:
        super().__init__(timeout)
        self.tracker = tracker

    def survey(self) -> Machines:
        """What machines there are, and what they are.

        Raises:
            RemoteError: if the tracker cannot be reached, knows no such machine, or the machine cannot
                be compiled for here.
        """
        return self._there(_survey, self.tracker)

    def measure(self, key: KernelKey, default: Built, other: Built, rounds: int) -> Timing:
        """Time a candidate against the default on the machine, ``rounds`` times each.

        A machine may be lost at any time: then the next one that the tracker has takes the measurement.
        Lost twice by the same candidate, it is the candidate's fault.

        Raises:
            RemoteError: if there is no machine any more.
        """
        for _ in range(2):
            try:
                return self._there(_compare, self.tracker, key, default, other, rounds)
            except _LostError:
                continue
        return Timing(error="took its machine down")

    def _there(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            answer = self.pool.submit(_answer, function, *arguments).result()
        except TimeoutError as error:
            raise _LostError("no answer in time", where=str(self.tracker)) from error
        except ChildProcessError as error:
            raise _LostError("the process that talked to a machine ended", where=str(self.tracker)) from error
        if isinstance(answer, RemoteError):
            raise answer
        return answer


class _LostError(RemoteError):
    """A machine that was there a moment ago."""


# In the process that talks to the machine ----------------------------------------------------------


def _answer(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, or our error: the pool would turn what is raised into its traceback."""
    try:
        return function(*arguments)
    except RemoteError as error:
        return error


@lru_cache(maxsize=1)
def _session(tracker: Tracker) -> Any:
    """A connection to a free machine; it is held until :func:`_forget`."""
    started = time.monotonic()
    while True:
        names, free = _servers(tracker)
        if free:
            break
        if tracker.key not in names or time.monotonic() - started > PATIENCE:
            busy = "no free" if tracker.key in names else "no"
            raise RemoteError(
                f"the tracker has {busy} machine of this name (all it has: {', '.join(names) or 'nothing'})",
                where=str(tracker),
                fix=f"python -m tvm.exec.rpc_server --tracker {tracker.host}:{tracker.port}"
                f" --key {tracker.key}",
            )
        time.sleep(_POLL)
    from tvm import rpc

    try:
        return rpc.connect_tracker(tracker.host, tracker.port).request(tracker.key, max_retry=1)
    except (RuntimeError, OSError) as error:
        raise _LostError(f"a machine does not answer: {error}", where=str(tracker)) from error


def _servers(tracker: Tracker) -> tuple[list[str], int]:
    """The key of every server that the tracker has, and how many of ours are free.

    Raises:
        RemoteError: if there is no tracker.
    """
    import_tvm()
    from tvm.rpc import base

    try:
        with socket.create_connection((tracker.host, tracker.port), timeout=PATIENCE) as found:
            found.sendall(base.RPC_TRACKER_MAGIC.to_bytes(4, "little"))
            if int.from_bytes(base.recvall(found, 4), "little") != base.RPC_TRACKER_MAGIC:
                raise OSError("what answers is no tracker")
            base.sendjson(found, [base.TrackerCode.SUMMARY])
            status, facts = base.recvjson(found)
            if status != base.TrackerCode.SUCCESS:
                raise OSError(f"the tracker answers {facts}")
    except (OSError, ValueError) as error:
        raise RemoteError(
            f"cannot reach the tracker: {error}",
            where=str(tracker),
            fix="start it: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port " + str(tracker.port),
        ) from error
    names = [str(server["key"]).removeprefix("server:") for server in facts["server_info"]]
    return sorted(names), int(facts["queue_info"].get(tracker.key, {}).get("free", 0))


def _survey(tracker: Tracker) -> Machines:
    session = _session(tracker)
    names, _ = _servers(tracker)
    with _conversation(tracker):
        cpu = str(session.get_function("target.llvm_get_system_cpu")())
        there = str(session.get_function("target.llvm_get_system_triple")())
        threads = int(session.get_function("runtime.NumThreads")())
    here = str(import_tvm().get_global_func("target.llvm_get_system_triple")())
    if there.split("-")[0] != here.split("-")[0]:
        raise RemoteError(
            f"machines are {there}, and this one links for {here} only",
            where=str(tracker),
            fix="tune from a machine of the same architecture",
        )
    return Machines(
        names.count(tracker.key), json.dumps({"kind": "llvm", "mcpu": cpu}, sort_keys=True), threads
    )


def _compare(tracker: Tracker, key: KernelKey, default: Built, other: Built, rounds: int) -> Timing:
    """Upload both, compare their outputs here, time both there by turns."""
    session = _session(tracker)
    with _conversation(tracker):
        threads = int(session.get_function("runtime.NumThreads")())
    calls = [
        recorded(partial(FAMILIES[key.family].example, key, built.schedule, threads))
        for built in (default, other)
    ]
    with _conversation(tracker):
        first, second = (
            _Uploaded(session, built.library, *call)
            for built, call in zip((default, other), calls, strict=True)
        )
        if not agree(first.outputs(), second.outputs()):
            return Timing(error=OTHER_RESULT)
        return alternate(first.seconds, second.seconds, rounds)


@contextmanager
def _conversation(tracker: Tracker) -> Iterator[None]:
    """Turn what TVM raises when a connection breaks into an error of ours, and connect anew next time.

    Raises:
        RemoteError: of the private kind that says a machine was lost.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        _session.cache_clear()
        lines = str(error).strip().splitlines() or ["no reason"]
        raise _LostError(f"a machine was lost: {lines[-1][:200]}", where=str(tracker)) from error


class _Uploaded:
    """A kernel on another machine, with its example.

    Args:
        session: the connection.
        library: the compiled kernel here.
        arguments: what it is called with, as :func:`recorded` returns them.
        made: the places of the outputs among them.
    """

    def __init__(self, session: Any, library: str, arguments: Sequence[Any], made: Sequence[int]) -> None:
        self._device = session.cpu(0)
        name = f"{uuid.uuid4().hex}.so"  # a library that is loaded must not be written over
        session.upload(library, target=name)
        self._module = session.load_module(name)
        self._arguments = [self._sent(a) if isinstance(a, Tensor) else a for a in arguments]
        self._made = [self._arguments[place] for place in made]

    def _sent(self, tensor: Tensor) -> Any:
        return import_tvm().runtime.tensor(tensor.contiguous().numpy(), device=self._device)

    def outputs(self) -> list[Tensor]:
        """What one call makes."""
        self._module["main"](*self._arguments)
        return [torch.from_numpy(made.numpy()) for made in self._made]

    def seconds(self, times: int) -> float:
        """The mean of so many calls, by the machine's clock (TVM adds one that does not count)."""
        evaluate = self._module.time_evaluator("main", self._device, number=times, repeat=1)
        return float(evaluate(*self._arguments).mean)


def recorded(example: Callable[[Callable[..., None]], Callable[[], Sequence[Tensor]]]) -> Any:
    """What an example would call a kernel with, and which of the arguments are its outputs.

    Args:
        example: makes the call of a kernel (:meth:`.tune_space.Family.example`).

    Returns:
        The arguments, and the places of the outputs among them.
    """
    seen: list[tuple[Any, ...]] = []
    made = example(lambda *arguments: seen.append(arguments))()
    (arguments,) = seen
    return arguments, [next(k for k, a in enumerate(arguments) if a is output) for output in made]
