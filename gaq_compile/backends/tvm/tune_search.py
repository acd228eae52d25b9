"""The search for one kernel's schedule: batches of choices, a model of what has been measured.

The first batch spreads over every option's values. Later ones are mostly the choices that a model
expects to be fastest: ridge regression of log(candidate / default) on which value each option has, which
assumes that options act independently. Nothing depends on time or on a random state outside: from the
same measurements follow the same proposals, so a search that is started again walks through what the
database holds, measures nothing twice, and goes on from where it was.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from . import database
from .database import KernelKey, Record
from .tune_measure import Built, Timing, Workers
from .tune_space import FAMILIES, Candidate, Choice, candidate, choices

BATCH = 8
EXPLORE = 2  # of a later batch, chosen without the model
ROUNDS, FINAL_ROUNDS = 9, 25
FINALISTS = 3
MARGIN, WINS = 0.97, 0.8
"""A winner replaces the default if its final ratio is below MARGIN and it wins so many of the pairs."""

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one kernel.

    Attributes:
        key: the kernel.
        schedule: what it runs with from now on.
        changed: whether that is another schedule than the default.
        seconds: per call, with the schedule; 0 if no candidate could be measured.
        default_seconds: per call, with the default; 0 likewise.
        tried: candidates known after this search.
        fresh: how many of them were measured now.
        failed: how many of them did not build, crashed, or gave another result.
    """

    key: KernelKey
    schedule: dict[str, object]
    changed: bool
    seconds: float
    default_seconds: float
    tried: int
    fresh: int
    failed: int

    @property
    def speedup(self) -> float:
        return self.default_seconds / self.seconds if self.seconds else 1.0


@dataclass(frozen=True)
class _Tried:
    """One measured candidate."""

    choice: Choice
    candidate: Candidate
    timing: Timing


def search(
    key: KernelKey, trials: int, threads: int, workers: Callable[[], Workers], progress: Progress
) -> Outcome:
    """Find a kernel's schedule with at most ``trials`` candidates, and store what is found.

    Args:
        key: the kernel.
        trials: candidates to measure, counting those that the database holds.
        threads: of the machine that measures.
        workers: gives the processes that build and measure; asked only if there is something to do.
        progress: told after every candidate: how many, and a line on how it stands.
    """
    default = candidate(key, FAMILIES[key.family].default(key), threads)
    tried: list[_Tried] = []
    fresh = 0
    space = choices(key, threads)
    while len(tried) < trials:
        batch = _propose(key, threads, space, tried, default)[: trials - len(tried)]
        if not batch:
            break  # every candidate there is has been measured
        known = database.trials(key, threads)
        unknown = [c for _, c in batch if c.code not in known]
        measured = _measure(key, threads, default, unknown, workers) if unknown else iter(())
        for choice, made in batch:
            if made.code in known:
                timing = _timing(known[made.code])
            else:
                timing, fresh = next(measured), fresh + 1
            tried.append(_Tried(choice, made, timing))
            best = min(t.timing.ratio for t in tried)
            progress(1, f"best {1 / best:.2f}x")
    if trials > len(tried):
        progress(trials - len(tried), "every candidate is measured")
    return _decide(key, threads, default, tried, fresh, workers)


def _propose(
    key: KernelKey, threads: int, space: list[Choice], tried: list[_Tried], default: Candidate
) -> list[tuple[Choice, Candidate]]:
    """The next batch: a function of the key and of what has been measured only."""
    number = len(tried) // BATCH
    digest = hashlib.sha256(f"{key.identity} {number}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    mixed = list(space)
    rng.shuffle(mixed)
    whole = tried[: number * BATCH]  # a batch that was cut off is proposed again, not forgotten
    orders = [iter(_spread(mixed))]
    if whole:
        orders = [iter(mixed), iter(_by_model(key, threads, mixed, whole))]
    seen = {default.code, *(t.candidate.code for t in whole)}
    batch: list[tuple[Choice, Candidate]] = []
    while len(batch) < BATCH:
        order = orders[0] if len(batch) < EXPLORE or len(orders) == 1 else orders[1]
        found = _next(key, threads, order, seen)
        if found is None:
            break
        seen.add(found[1].code)
        batch.append(found)
    return batch[len(tried) - len(whole) :]


def _next(
    key: KernelKey, threads: int, order: Iterator[Choice], seen: set[str]
) -> tuple[Choice, Candidate] | None:
    for choice in order:
        made = candidate(key, FAMILIES[key.family].schedule(key, choice), threads)
        if made.code not in seen:
            return choice, made
    return None


def _spread(mixed: list[Choice]) -> list[Choice]:
    """Choices ordered so that every option's values come up about equally often from the start."""
    counts: dict[tuple[str, str], int] = {}
    rest, order = list(mixed), []
    for _ in range(min(4 * BATCH, len(mixed))):
        pick = min(rest, key=lambda c: sum(counts.get((k, str(v)), 0) for k, v in c.items()))
        rest.remove(pick)
        order.append(pick)
        for k, v in pick.items():
            counts[k, str(v)] = counts.get((k, str(v)), 0) + 1
    return order + rest


def _by_model(key: KernelKey, threads: int, space: list[Choice], tried: list[_Tried]) -> list[Choice]:
    """All choices, the fastest by the model first."""
    options = FAMILIES[key.family].options(key, threads)
    places = {(k, str(v)): i for i, (k, v) in enumerate((k, v) for k, vs in options.items() for v in vs)}

    def rows(items: list[Choice]) -> np.ndarray:
        matrix = np.zeros((len(items), len(places) + 1))
        matrix[:, -1] = 1.0
        for i, choice in enumerate(items):
            for k, v in choice.items():
                matrix[i, places[k, str(v)]] = 1.0
        return matrix

    a = rows([t.choice for t in tried])
    b = np.array([math.log(t.timing.ratio) for t in tried])
    penalty = np.eye(a.shape[1]) * 0.3
    penalty[-1, -1] = 1e-6
    expected = rows(space) @ np.linalg.solve(a.T @ a + penalty, a.T @ b)
    return [space[i] for i in np.argsort(expected, kind="stable")]


def _measure(
    key: KernelKey,
    threads: int,
    default: Candidate,
    batch: list[Candidate],
    workers: Callable[[], Workers],
) -> Iterator[Timing]:
    """Build a batch, then time one candidate after another; each is stored before the next starts."""
    libraries = workers().build([default, *batch], key.target)
    for made, library in zip(batch, libraries[1:], strict=True):
        timing = _time(key, (default, libraries[0]), (made, library), ROUNDS, workers)
        facts = {"schedule": made.schedule, "code": made.code, **_facts(timing)}
        database.append(key.target, key.record("trial", threads, **facts))
        yield timing


def _time(
    key: KernelKey,
    default: tuple[Candidate, object],
    other: tuple[Candidate, object],
    rounds: int,
    workers: Callable[[], Workers],
) -> Timing:
    for _, library in (default, other):
        if isinstance(library, str):
            return Timing(error=library)
    first, second = (Built(made.schedule, str(library)) for made, library in (default, other))
    return workers().measure(key, first, second, rounds)


def _facts(timing: Timing) -> Record:
    if timing.error:
        return {"error": timing.error}
    medians = {"seconds": timing.seconds, "default_seconds": timing.default_seconds}
    return {**medians, "wins": timing.wins, "floor": timing.floor}


def _timing(record: Record) -> Timing:
    if record.get("error"):
        return Timing(error=str(record["error"]))
    seconds, usual = float(record["seconds"]), float(record["default_seconds"])
    return Timing(seconds, usual, float(record["wins"]), float(record["floor"]))


def _decide(
    key: KernelKey,
    threads: int,
    default: Candidate,
    tried: list[_Tried],
    fresh: int,
    workers: Callable[[], Workers],
) -> Outcome:
    """Measure the best candidates against the default once more; store the choice."""
    stored = database.choice(key, threads)
    if (
        stored is not None
        and not fresh
        and (stored.get("default_code"), stored.get("threads")) == (default.code, threads)
        and stored.get("trials", 0) >= len(tried)
    ):
        return _outcome(key, stored, tried, fresh)
    ranked = sorted((t for t in tried if not t.timing.error), key=lambda t: t.timing.ratio)
    finalists = [t.candidate for t in ranked[:FINALISTS] if t.timing.ratio < 1.0]
    best, final = default, None
    if finalists:
        libraries = workers().build([default, *finalists], key.target)
        for made, library in zip(finalists, libraries[1:], strict=True):
            timing = _time(key, (default, libraries[0]), (made, library), FINAL_ROUNDS, workers)
            if timing.ratio < (final.ratio if final else MARGIN) and timing.wins >= WINS:
                best, final = made, timing
    if final is None:
        usual = statistics.median_high(t.timing.default_seconds for t in ranked) if ranked else 0.0
        final = Timing(usual, usual, floor=1.0)
    record = key.record(
        "choice",
        threads,
        schedule=best.schedule,
        default_code=default.code,
        changed=best is not default,
        trials=len(tried),
        **_facts(final),
    )
    database.append(key.target, record)
    return _outcome(key, record, tried, fresh)


def _outcome(key: KernelKey, record: Record, tried: list[_Tried], fresh: int) -> Outcome:
    return Outcome(
        key=key,
        schedule=record["schedule"],
        changed=bool(record.get("changed")),
        seconds=float(record.get("seconds", 0.0)),
        default_seconds=float(record.get("default_seconds", 0.0)),
        tried=len(tried),
        fresh=fresh,
        failed=sum(bool(t.timing.error) for t in tried),
    )
