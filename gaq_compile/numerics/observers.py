"""Observers: which step each block of an activation gets, from what calibration batches show.

An observer is a frozen setting; ``start()`` gives it a small state that accumulates over batches.
What is observed is the *feature* that the scheme rounds: ``|x|`` for scalars and for blocks held by
component, the vector's magnitude ``|v|`` for the others. ``scale()`` then gives one step per block
of the simplified irreps; a block that was never seen nonzero gets step 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ActivationScheme
from ..errors import ConfigError, GaqError, IrrepsError
from ..ir.layout import dim
from .activations import activation_blocks
from .codebooks import norm


@dataclass(frozen=True)
class MinMax:
    """``qmax * step = headroom * max``: everything seen is representable.

    Args:
        headroom: >= 1. Beyond the calibrated range a value is clipped without a sign of it, so
            the range is widened by this factor.
    """

    headroom: float = 1.1

    def start(self) -> ObserverState:
        return _MinMaxState(self)


@dataclass(frozen=True)
class Percentile:
    """``qmax * step`` = the given percentile of the nonzero features; larger ones are clipped.

    Args:
        percentile: in (0, 100].
        bins: of the histogram; its resolution is at worst 2/bins of the largest feature.
    """

    percentile: float = 99.99
    bins: int = 4096

    def start(self) -> ObserverState:
        return _PercentileState(self)


@dataclass(frozen=True)
class MeanSquare:
    """The step with the smallest squared rounding and clipping error on a sample of the features.

    Args:
        sample: how many features of each block are kept (uniformly, by reservoir).
        candidates: how many ranges are tried, between ``smallest`` and 1 times the largest feature.
        smallest: the smallest fraction tried.
        seed: of the sampling; the same batches give the same steps.
    """

    sample: int = 16384
    candidates: int = 81
    smallest: float = 0.2
    seed: int = 0

    def start(self) -> ObserverState:
        return _MeanSquareState(self)


Observer = MinMax | Percentile | MeanSquare


def make_observer(name: str, headroom: float = 1.1) -> Observer:
    """The observer that a :class:`~gaq_compile.config.QuantConfig` names.

    Args:
        name: "minmax", "percentile" or "mse".
        headroom: of "minmax"; the others choose to clip and ignore it.

    Raises:
        ConfigError: for another name.
    """
    if name == "minmax":
        return MinMax(headroom)
    if name == "percentile":
        return Percentile()
    if name == "mse":
        return MeanSquare()
    raise ConfigError(f"unknown observer {name!r}", fix="use one of minmax, percentile, mse")


def features(x: Tensor, irreps: str, scheme: ActivationScheme) -> list[Tensor]:
    """Per block of the simplified irreps, the nonnegative numbers that the scheme rounds.

    Args:
        x: (N, dim), component-major.
        irreps: of x.
        scheme: the activation scheme.

    Returns:
        Flat tensors: ``|x|`` (N*mul*(2l+1)) or ``|v|`` (N*mul).

    Raises:
        IrrepsError: if x does not fit the irreps.
    """
    if x.ndim != 2 or x.shape[1] != dim(irreps):
        raise IrrepsError(f"expected a tensor (N, {dim(irreps)}), got {tuple(x.shape)}", where=irreps)
    out = []
    for block in activation_blocks(irreps):
        values = x.narrow(1, block.base, block.components * block.mul)
        if block.l == 0 or scheme.vector == "component":
            out.append(values.abs().flatten())
        else:
            out.append(norm(values.unflatten(1, (block.components, block.mul))).flatten())
    return out


def steps(ranges: Tensor, qmaxes: Tensor) -> Tensor:
    """Steps with ``qmax * step >= range``: (n_blocks,) float32, 1 where the range is zero."""
    step = (ranges.double() / qmaxes.double()).float()
    step = torch.nextafter(step, torch.full_like(step, torch.inf))
    return torch.where(step > torch.finfo(torch.float32).tiny, step, 1.0)


class ObserverState(ABC):
    """What an observer has seen so far of one tensor of the graph."""

    def __init__(self) -> None:
        self._tag: tuple[str, ActivationScheme] | None = None
        self._qmax = torch.zeros(0)
        self._largest = torch.zeros(0, dtype=torch.float64)

    def observe(self, x: Tensor, irreps: str, scheme: ActivationScheme) -> None:
        """Take in one calibration batch.

        Args:
            x: (N, dim), component-major; N may be 0.
            irreps: of x, the same on every call.
            scheme: the activation scheme, the same on every call.

        Raises:
            IrrepsError: if x does not fit the irreps, or irreps or scheme change between calls.
            GaqError: if x holds NaN or infinities.
        """
        seen = features(x.detach(), irreps, scheme)
        if self._tag is None:
            self._tag = (irreps, scheme)
            self._qmax = torch.tensor([scheme.qmax(b.l) for b in activation_blocks(irreps)])
            self._largest = torch.zeros(len(seen), dtype=torch.float64)
            self._begin(len(seen))
        if self._tag != (irreps, scheme):
            raise IrrepsError(
                f"an observer of {self._tag[0]} ({self._tag[1]}) was shown {irreps} ({scheme})",
                fix="start one observer per tensor",
            )
        for b, values in enumerate(seen):
            if values.numel() == 0:
                continue
            largest = float(values.max())
            if not largest < torch.inf:
                raise GaqError(
                    "calibration met NaN or an infinite activation",
                    where=f"block {b} of {irreps}",
                    fix="check the example graphs",
                )
            self._largest[b] = max(largest, float(self._largest[b]))
            self._update(b, values)

    def scale(self) -> Tensor:
        """One step per block of the simplified irreps: (n_blocks,) float32.

        Raises:
            GaqError: if nothing was observed.
        """
        if self._tag is None:
            raise GaqError("an observer was asked for scales before it saw a batch", fix="calibrate first")
        return self._scale()

    @abstractmethod
    def _begin(self, n_blocks: int) -> None: ...

    @abstractmethod
    def _update(self, b: int, values: Tensor) -> None: ...

    @abstractmethod
    def _scale(self) -> Tensor: ...


class _MinMaxState(ObserverState):
    def __init__(self, setting: MinMax) -> None:
        super().__init__()
        if not 1.0 <= setting.headroom < float("inf"):
            raise ConfigError(f"headroom must be >= 1, not {setting.headroom}")
        self._headroom = setting.headroom

    def _begin(self, n_blocks: int) -> None:
        pass

    def _update(self, b: int, values: Tensor) -> None:
        pass

    def _scale(self) -> Tensor:
        return steps(self._largest * self._headroom, self._qmax)


class _PercentileState(ObserverState):
    """Histograms over (0, range]; the range doubles, and bins merge in pairs, as values grow.

    Zeros are not counted: dead channels would make the percentile of the live ones arbitrary.
    """

    def __init__(self, setting: Percentile) -> None:
        super().__init__()
        if not (0.0 < setting.percentile <= 100.0 and setting.bins >= 16 and setting.bins % 2 == 0):
            raise ConfigError(
                "a percentile observer needs 0 < percentile <= 100 and an even number of bins >= 16",
                where=repr(setting),
            )
        self._setting = setting
        self._counts: list[Tensor] = []
        self._range: list[float] = []

    def _begin(self, n_blocks: int) -> None:
        self._counts = [torch.zeros(self._setting.bins, dtype=torch.int64) for _ in range(n_blocks)]
        self._range = [0.0] * n_blocks

    def _update(self, b: int, values: Tensor) -> None:
        largest, bins = float(self._largest[b]), self._setting.bins
        if largest == 0.0:
            return
        self._range[b] = self._range[b] or largest
        while self._range[b] < largest:
            merged = self._counts[b].view(-1, 2).sum(1)
            self._counts[b] = torch.cat([merged, torch.zeros_like(merged)])
            self._range[b] *= 2.0
        live = values[values > 0].double().cpu()
        index = (live / self._range[b] * bins).long().clamp(max=bins - 1)
        self._counts[b] += torch.bincount(index, minlength=bins)

    def _scale(self) -> Tensor:
        bins = self._setting.bins
        ranges = torch.zeros_like(self._largest)
        for b, counts in enumerate(self._counts):
            total = int(counts.sum())
            if total == 0:
                continue
            wanted = self._setting.percentile / 100.0 * total
            edge = int((counts.cumsum(0).double() < wanted).sum()) + 1
            ranges[b] = min(self._range[b] * edge / bins, float(self._largest[b]))
        return steps(ranges, self._qmax)


class _MeanSquareState(ObserverState):
    """A reservoir per block: every feature draws a random key, the largest keys stay."""

    def __init__(self, setting: MeanSquare) -> None:
        super().__init__()
        if not (setting.sample >= 1 and setting.candidates >= 2 and 0.0 < setting.smallest <= 1.0):
            raise ConfigError(
                "a mean-square observer needs sample >= 1, candidates >= 2 and 0 < smallest <= 1",
                where=repr(setting),
            )
        self._setting = setting
        self._random = torch.Generator().manual_seed(setting.seed)
        self._keys: list[Tensor] = []
        self._kept: list[Tensor] = []

    def _begin(self, n_blocks: int) -> None:
        self._keys = [torch.zeros(0, dtype=torch.float64) for _ in range(n_blocks)]
        self._kept = [torch.zeros(0, dtype=torch.float64) for _ in range(n_blocks)]

    def _update(self, b: int, values: Tensor) -> None:
        drawn = torch.rand(values.numel(), generator=self._random, dtype=torch.float64)
        keys = torch.cat([self._keys[b], drawn])
        kept = torch.cat([self._kept[b], values.double().cpu()])
        if keys.numel() > self._setting.sample:
            keys, index = keys.topk(self._setting.sample)
            kept = kept[index]
        self._keys[b], self._kept[b] = keys, kept

    def _scale(self) -> Tensor:
        ranges = torch.zeros_like(self._largest)
        ratios = torch.linspace(self._setting.smallest, 1.0, self._setting.candidates, dtype=torch.float64)
        for b, sample in enumerate(self._kept):
            qmax, largest = int(self._qmax[b]), float(self._largest[b])
            if largest == 0.0:
                continue
            errors = [_squared_error(sample, float(r) * largest / qmax, qmax) for r in ratios]
            ranges[b] = largest * ratios[int(torch.tensor(errors).argmin())]
        return steps(ranges, self._qmax)


def _squared_error(values: Tensor, step: float, qmax: int) -> float:
    return float(((torch.round(values / step).clamp(max=qmax) * step - values) ** 2).sum())
