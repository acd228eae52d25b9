"""Few bytes that keep a force error, found by measuring.

Layers get wider weights in the order of what their rounding costs per byte (:mod:`.round_weights`),
and activations 16 bits in the order of what theirs costs per multiplication
(:mod:`.widen_activations`). The order comes from a model of the error; how far to go is measured: in
forces, on structures that calibration has not seen, by bisection.

First the activations, with float weights: the smallest share of wide ones that leaves room for the
weights. Then the weights. If these cannot keep the error, more activations get wide, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.progress import Progress
from torch.fx import GraphModule

from ..config import QuantConfig
from ..errors import ConfigError
from .insert_mddq import insert_mddq
from .observe import Observed
from .round_weights import Rounder
from .widen_activations import RoundedSite

WIDE_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
ACTIVATIONS_PART = 0.7  # of the force error; errors of weights add to it in squares, about


@dataclass(frozen=True)
class GraphError:
    """How far one energy graph is from another on some structures.

    Attributes:
        force_mev_per_a: mean over components of ``|dF|``.
        force_rel: that over the mean ``|F|`` of a component.
        energy_mev_per_atom: mean over structures of ``|dE|`` per atom, of these graphs as they are.
    """

    force_mev_per_a: float
    force_rel: float
    energy_mev_per_atom: float


ErrorOf = Callable[[GraphModule], GraphError]  # of an energy graph against the float one


@dataclass(frozen=True)
class Trial:
    """One choice of bits, measured.

    Attributes:
        max_weight_share, max_wide_share: the choice (:class:`~gaq_compile.config.QuantConfig`); None:
            float weights, or no rounded activations.
        bytes: of all weights that are not left in float by choice.
        error: against the float graph; energies as they are before a mean per element is taken back.
    """

    max_weight_share: float | None
    max_wide_share: float | None
    bytes: int
    error: GraphError


@dataclass(frozen=True)
class Choice:
    """What was chosen, and everything that was measured on the way.

    Attributes:
        config: the configuration with its shares.
        chosen: its own trial.
        trials: all, in the order of measuring.
    """

    config: QuantConfig
    chosen: Trial
    trials: tuple[Trial, ...]


def choose_bits(
    prepared: GraphModule,
    config: QuantConfig,
    observed: Observed,
    error_of: ErrorOf,
    progress: bool = False,
) -> Choice:
    """The first configuration, in the order of bytes, whose force error is at most ``max_force_error``.

    Args:
        prepared: the float energy graph.
        config: the fewest bits of each layer, and the force error to keep (meV/Å).
        observed: from :func:`.observe.observe`.
        error_of: measures a graph, on structures that are not among the calibration data.
        progress: show a progress bar.

    Raises:
        ConfigError: if no choice keeps the error; names the smallest that was measured.
    """
    most = config.max_force_error
    if most is None:
        raise ConfigError("no force error to keep", fix="set max_force_error (meV/Å)")
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("choosing bits", total=None)
        variants = Variants(prepared, config, observed, error_of, lambda: bar.advance(task))
        wide_shares = _wide_shares(observed)
        for wide in wide_shares:
            if wide != wide_shares[-1] and not _leaves_room(variants, wide, most):
                continue
            chosen = _fewest_bytes(variants, wide, most)
            if chosen is not None:
                shares = {"max_weight_share": chosen.max_weight_share, "max_wide_share": wide or None}
                return Choice(replace(config, **shares), chosen, tuple(variants.trials))
    choices = [trial for trial in variants.trials if trial.max_weight_share is not None]
    least = min(trial.error.force_mev_per_a for trial in choices)
    raise ConfigError(
        f"no choice of bits keeps the force error at {most:g} meV/Å; the smallest measured is {least:.3g}",
        where=f"scheme {config.scheme!r}",
        fix="allow more, or leave activations in float ('auto')" if observed.sites else "allow more",
    )


def _wide_shares(observed: Observed) -> list[float | None]:
    """Shares of 16-bit multiplications that make a difference, ascending; None: nothing is rounded."""
    if not observed.sites:
        return [None]
    found: list[float | None] = []
    before: dict[str, str] = {}
    for share in WIDE_SHARES:
        schemes = {label: site.scheme for label, site in observed.activations(share).items()}
        if schemes != before:
            found.append(share)
            before = schemes
    return found


class Variants:
    """Energy graphs of one configuration with other shares, built and measured.

    Attributes:
        trials: what was measured so far.
    """

    def __init__(
        self,
        prepared: GraphModule,
        config: QuantConfig,
        observed: Observed,
        error_of: ErrorOf,
        tell: Callable[[], object] = lambda: None,
    ) -> None:
        self.trials: list[Trial] = []
        self._prepared, self._config, self._observed = prepared, config, observed
        self._error_of, self._tell = error_of, tell
        self._sides: dict[float | None, tuple[dict[str, RoundedSite], Rounder]] = {}

    def shares(self, wide: float | None) -> list[float]:
        """All different shares of weight bytes, ascending, with this share of wide activations.

        Raises:
            ConfigError: if no layer has integer weights.
        """
        shares = self._side(wide)[1].shares()
        if not shares:
            raise ConfigError(
                "no layer has integer weights, so there are no bits to choose",
                where=f"scheme {self._config.scheme!r}",
                fix="look at the overrides",
            )
        return shares

    def float_bytes(self, wide: float | None) -> int:
        """What the same weights take in float32."""
        return self._side(wide)[1].float_bytes

    def measure(self, share: float | None, wide: float | None) -> Trial:
        """Weights of this share of their float32 bytes (None: float32), and so many wide activations."""
        activations, rounder = self._side(wide)
        weights = {} if share is None else rounder.within(share)
        graph = insert_mddq(self._prepared, self._config, activations, weights)
        size = rounder.float_bytes if share is None else rounder.bytes_of(weights)
        trial = Trial(share, wide, size, self._error_of(graph))
        self.trials.append(trial)
        self._tell()
        return trial

    def _side(self, wide: float | None) -> tuple[dict[str, RoundedSite], Rounder]:
        if wide not in self._sides:
            activations = self._observed.activations(wide)
            rounder = Rounder(self._prepared, self._config, self._observed.costs, activations)
            self._sides[wide] = activations, rounder
        return self._sides[wide]


def _leaves_room(variants: Variants, wide: float | None, most: float) -> bool:
    return variants.measure(None, wide).error.force_mev_per_a <= ACTIVATIONS_PART * most


def _fewest_bytes(variants: Variants, wide: float | None, most: float) -> Trial | None:
    """The trial of fewest bytes that keeps the error, by bisection; None if the most bytes do not."""
    shares = variants.shares(wide)
    return bisect(shares, lambda share: variants.measure(share, wide), most)


def bisect(shares: Sequence[float], measure: Callable[[float], Trial], most: float) -> Trial | None:
    """The trial at the smallest share that keeps ``most``, if errors fall with growing shares.

    Where they do not quite, it is still one that was measured to keep it.
    """
    best = measure(shares[-1])
    if not best.error.force_mev_per_a <= most:
        return None
    low, high = -1, len(shares) - 1  # errors at low are too large (or unknown), at high small enough
    while high - low > 1:
        middle = (low + high) // 2
        trial = measure(shares[middle])
        if trial.error.force_mev_per_a <= most:
            best, high = trial, middle
        else:
            low = middle
    return best
