"""Observers: which step each channel of an activation gets, from what calibration batches show.

An observer is a frozen setting; ``start()`` gives it a small state that accumulates over batches.
What is observed is the *feature* that the scheme rounds: ``|x|`` for scalars and for blocks held by
component, the vector's magnitude ``|v|`` for the others. ``scale()`` then gives one step per
channel. With granularity ``"tensor"`` all channels share a range, with ``"block"`` those of a block of the
simplified irreps; with ``"channel"`` each has its own, but none below ``FLOOR`` times the largest of its
block: a channel that was small on a few examples may grow, and beyond its range it is clipped. A block
that was never seen nonzero gets step 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import GRANULARITIES, ActivationScheme
from ..errors import ConfigError, GaqError, IrrepsError
from ..ir.layout import dim, view
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

    def start(self, granularity: str = "channel") -> ObserverState:
        return _MinMaxState(self, granularity)


@dataclass(frozen=True)
class Percentile:
    """``qmax * step`` = the given percentile of the nonzero features; larger ones are clipped.

    Args:
        percentile: in (0, 100].
        bins: of each histogram; its resolution is at worst 2/bins of the largest feature.
    """

    percentile: float = 99.99
    bins: int = 4096

    def start(self, granularity: str = "channel") -> ObserverState:
        return _PercentileState(self, granularity)


@dataclass(frozen=True)
class MeanSquare:
    """The step with the smallest squared rounding and clipping error on a sample of the features.

    Args:
        sample: how many features of each block are kept (uniformly, by reservoir, as many of every
            channel, and at least 256).
        candidates: how many ranges are tried, between ``smallest`` and 1 times the largest feature.
        smallest: the smallest fraction tried.
        seed: of the sampling; the same batches give the same steps.
    """

    sample: int = 16384
    candidates: int = 81
    smallest: float = 0.2
    seed: int = 0

    def start(self, granularity: str = "channel") -> ObserverState:
        return _MeanSquareState(self, granularity)


Observer = MinMax | Percentile | MeanSquare

FLOOR = 0.1  # of the largest range of a block; below that a finer step gains nothing (docs/numerics.md)
LEAST = 256  # features of a channel that a reservoir keeps at least


def make_observer(name: str, headroom: float = 1.1, percentile: float = 99.99) -> Observer:
    """The observer that a :class:`~gaq_compile.config.QuantConfig` names.

    Args:
        name: "minmax", "percentile" or "mse".
        headroom: of "minmax"; the others choose to clip and ignore it.
        percentile: of "percentile".

    Raises:
        ConfigError: for another name.
    """
    if name == "minmax":
        return MinMax(headroom)
    if name == "percentile":
        return Percentile(percentile)
    if name == "mse":
        return MeanSquare()
    raise ConfigError(f"unknown observer {name!r}", fix="use one of minmax, percentile, mse")


def features(x: Tensor, irreps: str, scheme: ActivationScheme) -> list[Tensor]:
    """Per block of the simplified irreps, the nonnegative numbers that the scheme rounds, by channel.

    Args:
        x: (N, dim), component-major.
        irreps: of x.
        scheme: the activation scheme.

    Returns:
        ``|x|`` (N*(2l+1), mul) or ``|v|`` (N, mul).

    Raises:
        IrrepsError: if x does not fit the irreps.
    """
    if x.ndim != 2 or x.shape[1] != dim(irreps):
        raise IrrepsError(f"expected a tensor (N, {dim(irreps)}), got {tuple(x.shape)}", where=irreps)
    out = []
    for block in activation_blocks(irreps):
        values = view(x, block)
        seen = values.abs() if block.l == 0 or scheme.vector == "component" else norm(values)
        out.append(seen.flatten(0, 1))
    return out


def steps(ranges: Tensor, qmax: int) -> Tensor:
    """Steps with ``qmax * step >= range``, float32, 1 where the range is zero."""
    step = (ranges.double() / qmax).float()
    step = torch.nextafter(step, torch.full_like(step, torch.inf))
    return torch.where(step > torch.finfo(torch.float32).tiny, step, 1.0)


class ObserverState(ABC):
    """What an observer has seen so far of one tensor of the graph.

    Every block has *columns*, each with a range of its own: its channels, or all of them as one. For one
    range in all, the whole tensor is one block of one column.
    """

    def __init__(self, granularity: str) -> None:
        if granularity not in GRANULARITIES:
            raise ConfigError(
                f"unknown granularity {granularity!r}", fix=f"use one of {', '.join(GRANULARITIES)}"
            )
        self._granularity = granularity
        self._tag: tuple[str, ActivationScheme] | None = None
        self._largest: list[Tensor] = []

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
        if self._granularity == "block":
            seen = [values.reshape(-1, 1) for values in seen]
        elif self._granularity == "tensor":
            seen = [torch.cat([values.reshape(-1, 1) for values in seen])] if seen else []
        if self._tag is None:
            self._tag = (irreps, scheme)
            self._largest = [torch.zeros(values.shape[1], dtype=torch.float64) for values in seen]
            self._begin([values.shape[1] for values in seen])
        if self._tag != (irreps, scheme):
            raise IrrepsError(
                f"an observer of {self._tag[0]} ({self._tag[1]}) was shown {irreps} ({scheme})",
                fix="start one observer per tensor",
            )
        for b, values in enumerate(seen):
            if values.numel() == 0:
                continue
            largest = values.amax(0).double().cpu()
            if not bool((largest < torch.inf).all()):
                raise GaqError(
                    "calibration met NaN or an infinite activation",
                    where=f"block {b} of {irreps}",
                    fix="check the example graphs",
                )
            self._largest[b] = torch.maximum(largest, self._largest[b])
            self._update(b, values)

    def scale(self) -> Tensor:
        """One step per channel: (n_channels,) float32.

        Raises:
            GaqError: if nothing was observed.
        """
        if self._tag is None:
            raise GaqError("an observer was asked for scales before it saw a batch", fix="calibrate first")
        irreps, scheme = self._tag
        parts = []
        for b, block in enumerate(activation_blocks(irreps)):
            ranges = self._ranges(0 if self._granularity == "tensor" else b, scheme.qmax(block.l))
            ranges = ranges.clamp(min=FLOOR * float(ranges.max()))
            parts.append(steps(ranges, scheme.qmax(block.l)).expand(block.mul))
        return torch.cat(parts) if parts else torch.zeros(0)

    @abstractmethod
    def _begin(self, columns: list[int]) -> None:
        """Make room for blocks with so many columns."""

    @abstractmethod
    def _update(self, b: int, values: Tensor) -> None:
        """Take in a block's features (n, columns)."""

    @abstractmethod
    def _ranges(self, b: int, qmax: int) -> Tensor:
        """What each column of a block should represent: (columns,) float64; 0 where it saw nothing."""


class _MinMaxState(ObserverState):
    def __init__(self, setting: MinMax, granularity: str) -> None:
        super().__init__(granularity)
        if not 1.0 <= setting.headroom < float("inf"):
            raise ConfigError(f"headroom must be >= 1, not {setting.headroom}")
        self._headroom = setting.headroom

    def _begin(self, columns: list[int]) -> None:
        pass

    def _update(self, b: int, values: Tensor) -> None:
        pass

    def _ranges(self, b: int, qmax: int) -> Tensor:
        return self._largest[b] * self._headroom


class _PercentileState(ObserverState):
    """Histograms over (0, range]; the range doubles, and bins merge in pairs, as values grow.

    Zeros are not counted: dead channels would make the percentile of the live ones arbitrary.
    """

    def __init__(self, setting: Percentile, granularity: str) -> None:
        super().__init__(granularity)
        if not (0.0 < setting.percentile <= 100.0 and setting.bins >= 16 and setting.bins % 2 == 0):
            raise ConfigError(
                "a percentile observer needs 0 < percentile <= 100 and an even number of bins >= 16",
                where=repr(setting),
            )
        self._setting = setting
        self._counts: list[Tensor] = []
        self._range: list[Tensor] = []

    def _begin(self, columns: list[int]) -> None:
        self._counts = [torch.zeros(n, self._setting.bins, dtype=torch.int32) for n in columns]
        self._range = [torch.zeros(n, dtype=torch.float64) for n in columns]

    def _update(self, b: int, values: Tensor) -> None:
        counts, bins, largest = self._counts[b], self._setting.bins, self._largest[b]
        reach = self._range[b] = torch.where(self._range[b] > 0, self._range[b], largest)
        while bool((small := reach < largest).any()):
            merged = counts[small].view(-1, bins // 2, 2).sum(2, dtype=torch.int32)
            counts[small] = torch.cat([merged, torch.zeros_like(merged)], 1)
            reach[small] *= 2.0
        values = values.double().cpu()
        row, column = torch.nonzero(values > 0, as_tuple=True)
        index = (values[row, column] / reach[column] * bins).long().clamp(max=bins - 1)
        counts += torch.bincount(column * bins + index, minlength=counts.numel()).view_as(counts).int()

    def _ranges(self, b: int, qmax: int) -> Tensor:
        counts, bins = self._counts[b].cumsum(1).double(), self._setting.bins
        total = counts[:, -1]
        wanted = self._setting.percentile / 100.0 * total
        edge = (counts < wanted[:, None]).sum(1) + 1
        ranges = torch.minimum(self._range[b] * edge / bins, self._largest[b])
        return torch.where(total > 0, ranges, 0.0)


class _MeanSquareState(ObserverState):
    """A reservoir per column: every feature draws a random key, the largest keys stay."""

    def __init__(self, setting: MeanSquare, granularity: str) -> None:
        super().__init__(granularity)
        if not (setting.sample >= 1 and setting.candidates >= 2 and 0.0 < setting.smallest <= 1.0):
            raise ConfigError(
                "a mean-square observer needs sample >= 1, candidates >= 2 and 0 < smallest <= 1",
                where=repr(setting),
            )
        self._setting = setting
        self._random = torch.Generator().manual_seed(setting.seed)
        self._keys: list[Tensor] = []
        self._kept: list[Tensor] = []

    def _begin(self, columns: list[int]) -> None:
        self._keys = [torch.zeros(0, n, dtype=torch.float64) for n in columns]
        self._kept = [torch.zeros(0, n, dtype=torch.float64) for n in columns]

    def _update(self, b: int, values: Tensor) -> None:
        drawn = torch.rand(values.shape, generator=self._random, dtype=torch.float64)
        keys = torch.cat([self._keys[b], drawn])
        kept = torch.cat([self._kept[b], values.double().cpu()])
        room = self._setting.sample
        if values.shape[1] > 1:
            room = min(room, max(LEAST, room // values.shape[1]))
        if len(keys) > room:
            keys, index = keys.topk(room, dim=0)
            kept = kept.gather(0, index)
        self._keys[b], self._kept[b] = keys, kept

    def _ranges(self, b: int, qmax: int) -> Tensor:
        largest = self._largest[b]
        ratios = torch.linspace(self._setting.smallest, 1.0, self._setting.candidates, dtype=torch.float64)
        live = torch.where(largest > 0, largest, 1.0)
        errors = torch.stack([_squared_error(self._kept[b], live * (float(r) / qmax), qmax) for r in ratios])
        return largest * ratios[errors.argmin(0)]


def _squared_error(values: Tensor, step: Tensor, qmax: int) -> Tensor:
    """Of every column (n, columns) at its step: (columns,)."""
    return ((torch.round(values / step).clamp(max=qmax) * step - values) ** 2).sum(0)
