"""The tuning database: measured schedules of kernels, one JSON object a line, appended as they come.

The user's file is ``$GAQ_CACHE_DIR/tuning/<target>.jsonl``; where it has no answer, those that the package
ships in ``data/tuning`` for the target's family (:mod:`.target_family`) are asked; where they have none
either, a kernel runs with its default schedule. Two kinds of lines, of which shipped files have the second:

``trial``   one candidate measured against the default, in alternation: schedule, seconds of both;
``choice``  the schedule that a kernel shall run with, and what decided it.

Lines belong to a :class:`KernelKey`: kernel family, problem, bucket of rows and TVM version; the target
is the file's, whose name says it.
A line that cannot be read (a process killed while writing) is skipped with a warning.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch

from .build import _load_runtime, cache_dir, tvm_version
from .target_family import target_families

FORMAT = 1
BUCKETS = (64, 512, 6048)
"""Rows (atoms, or edges) at which kernels are tuned: a small, a middle and a large structure."""

_APPENDING = threading.Lock()  # several machines' measurements may arrive at once
_FIGURES = ("seconds", "default_seconds", "wins", "floor")

Record = dict[str, Any]
Schedule = TypeVar("Schedule")
Made = TypeVar("Made")


def bucket(rows: int) -> int:
    """The bucket nearest to ``rows`` on a logarithmic scale."""
    return min(BUCKETS, key=lambda b: abs(math.log(b / max(rows, 1))))


def by_bucket(
    stored: Mapping[int, Schedule], default: Schedule, make: Callable[[Schedule], Made]
) -> Callable[[int], Made]:
    """``rows -> kernel``, each made once and now: what is stored for so many rows, or the default."""
    schedules = {size: stored.get(size, default) for size in BUCKETS}
    made = {schedule: make(schedule) for schedule in set(schedules.values())}
    return lambda rows: made[schedules[bucket(rows)]]


def threads() -> int:
    """The threads of TVM's pool: torch's number when its runtime was loaded, unless told otherwise."""
    _load_runtime()  # now, not under a caller who has set torch to one thread for a while
    return int(os.environ.get("TVM_NUM_THREADS") or torch.get_num_threads())


@dataclass(frozen=True)
class KernelKey:
    """What a stored schedule is for.

    Attributes:
        family: ``"linear"``, ``"conv"`` or ``"conv_backward"``.
        problem: the problem as JSON with sorted keys (:func:`problem_text`).
        rows: the bucket, one of ``BUCKETS``.
        target: a TVM target in JSON.
    """

    family: str
    problem: str
    rows: int
    target: str

    @property
    def identity(self) -> tuple[str, ...]:
        """The key with TVM's version."""
        target = problem_text(json.loads(self.target))
        return (self.family, self.problem, str(self.rows), target, tvm_version())

    @property
    def entry(self) -> tuple[str, ...]:
        """The key's place in a file, comparable with :func:`_entry` of a line."""
        return (self.family, self.problem, str(self.rows), tvm_version())

    def record(self, kind: str, threads: int, **facts: Any) -> Record:
        """A line for this key."""
        return {
            "format": FORMAT,
            "kind": kind,
            "family": self.family,
            "problem": json.loads(self.problem),
            "rows": self.rows,
            "target": json.loads(self.target),
            "tvm": tvm_version(),
            "threads": threads,
            **facts,
        }


def problem_text(problem: Mapping[str, Any]) -> str:
    """A problem's fields as JSON with sorted keys."""
    return json.dumps(dict(problem), sort_keys=True)


def database_path(target: str) -> Path:
    """The user's database for a target (made when something is first appended)."""
    return cache_dir().parent / "tuning" / _file_name(target)


def append(target: str, record: Record) -> None:
    """Add one line; it is on disk when this returns."""
    path = database_path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, sort_keys=True) + "\n"
    with _APPENDING, path.open("ab+") as file:
        if file.tell():  # a line that was cut off must not swallow this one
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def trials(key: KernelKey, threads: int) -> dict[str, Record]:
    """The candidates already measured for a key on so many threads, by the hash of their code."""
    found = _lines(database_path(key.target)).get(key.entry, ())
    mine = (r for r in found if r["kind"] == "trial" and r.get("threads") == threads)
    return {r["code"]: r for r in mine if "code" in r}


def choice(key: KernelKey, threads: int | None = None) -> Record | None:
    """The latest choice for a key: the user's before the package's, the same ``threads`` before others."""
    for path in (database_path(key.target), *packaged(key.target)):
        found = [r for r in _lines(path).get(key.entry, ()) if r["kind"] == "choice"]
        same = [r for r in found if r.get("threads") == threads]
        if same or found:
            return (same or found)[-1]
    return None


def tuned(
    family: str, problem: Mapping[str, Any], target: str, threads: int, read: Callable[[Record], Schedule]
) -> dict[int, Schedule]:
    """The chosen schedules of a problem, by bucket.

    Args:
        family: the kernel family (:class:`KernelKey`).
        problem: the problem's fields.
        target: a TVM target in JSON.
        threads: choices made on as many threads are preferred.
        read: a schedule from its stored fields; it may raise ``ValueError``, ``TypeError`` or
            ``KeyError``, and then the default schedule is used, with a warning.
    """
    chosen: dict[int, Schedule] = {}
    for rows in BUCKETS:
        record = choice(KernelKey(family, problem_text(problem), rows, target), threads)
        if record is None:
            continue
        try:
            chosen[rows] = read(record["schedule"])
        except (ValueError, TypeError, KeyError) as error:
            warnings.warn(
                f"a stored schedule is not usable ({error}): the default is used instead", stacklevel=2
            )
    return chosen


def _file_name(target: str) -> str:
    described = json.loads(target)
    short = hashlib.sha256(problem_text(described).encode()).hexdigest()[:8]
    return f"{described.get('kind', 'target')}-{described.get('mcpu', 'generic')}-{short}.jsonl"


def packaged(target: str) -> tuple[Path, ...]:
    """The shipped files that may answer for a target, the nearest first; they need not exist."""
    folder = Path(str(resources.files("gaq_compile"))) / "data" / "tuning"
    return tuple(folder / f"{name}.jsonl" for name in target_families(target))


def _lines(path: Path) -> dict[tuple[str, ...], list[Record]]:
    """A file's lines by key; read again whenever the file has changed."""
    try:
        facts = path.stat()
    except OSError:
        return {}
    return _read(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=16)
def _read(path: Path, _modified: int, _size: int) -> dict[tuple[str, ...], list[Record]]:
    found: dict[tuple[str, ...], list[Record]] = {}
    skipped = 0
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record["format"] == FORMAT:
                _checked(record)
                found.setdefault(_entry(record), []).append(record)
        except (ValueError, KeyError, TypeError):
            skipped += 1
    if skipped:
        warnings.warn(f"{path}: {skipped} damaged line(s) ignored", stacklevel=3)
    return found


def _checked(record: Record) -> None:
    if record["kind"] not in ("trial", "choice") or not isinstance(record["schedule"], dict):
        raise ValueError("not a line of this database")
    if record["kind"] == "trial" and not record.get("error"):
        for name in _FIGURES:
            if not float(record[name]) >= 0.0:
                raise ValueError(f"{name} is no time")


def _entry(record: Record) -> tuple[str, ...]:
    problem = problem_text(record["problem"])
    return (str(record["family"]), problem, str(record["rows"]), str(record["tvm"]))
