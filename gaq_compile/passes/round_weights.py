"""Choose every irreps-linear's integer weights, and which layers need more bits than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import WEIGHT_BITS, QuantConfig
from ..ir.specs import LinearSpec, linear_spec
from ..numerics.second_order import (
    bias_correction,
    output_error,
    over_steps,
    round_second_order,
    without_mean,
)
from ..numerics.weights import dequantize_weight, quantize_weight, weight_bytes, with_steps
from .calibrate import is_one_hot
from .graph_tools import attribute, calls, gaq
from .weigh_channels import ChannelCosts
from .widen_activations import RoundedSite

WIDER = 8  # bits of a layer that suffers most from fewer
WIDEST = 16  # where activations stay in float; species embeddings (their input is one-hot) need it most


@dataclass(frozen=True)
class RoundedWeight:
    """One layer's integers.

    Attributes:
        codes: (weight_numel,) int8, or int16 for 16 bits.
        scale: (scale_numel,) float32, of values that bfloat16 holds.
        bits: 16, 8 or 4.
        error: what the rounding costs, ``tr(E^T H E)``; 0 where no H is known.
        holds_steps: whether the integers stand for ``steps[u] W[u, w]``, with the steps of the
            layer's input, whose integers then meet them in plain sums.
        bias: what to add to the layer's bias, to make up for the mean of the weights' errors. A layer
            without a bias gets none: it maps zero to zero, as a radial network must at the cutoff.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    error: float
    holds_steps: bool = False
    bias: Tensor | None = None


def round_weights(
    graph_module: GraphModule,
    config: QuantConfig,
    costs: ChannelCosts,
    activations: Mapping[str, RoundedSite] | None = None,
) -> dict[str, RoundedWeight]:
    """Integer weights by the layer's label.

    Args:
        graph_module: the float energy graph.
        config: bits per layer, the kind of rounding, and the share of bytes that may be used.
        costs: from :func:`.weigh_channels.weigh_channels`; a layer that is not among them is rounded
            to nearest. Not looked at where ``config.rounding`` is "nearest".
        activations: the layers' quantized inputs (:func:`.widen_activations.widen_activations`).
            Weights of 8 bits hold their steps; in 15 levels, rows that steps make unequal would not fit.
    """
    return Rounder(graph_module, config, costs, activations).within(config.max_weight_share)


class Rounder:
    """Rounds weights on demand, every layer at every width once; arguments as :func:`round_weights`."""

    def __init__(
        self,
        graph_module: GraphModule,
        config: QuantConfig,
        costs: ChannelCosts,
        activations: Mapping[str, RoundedSite] | None = None,
    ) -> None:
        self._whole = config.granularity == "tensor"
        self._costs = ChannelCosts() if config.rounding == "nearest" else costs
        self._steps = {label: site.steps for label, site in (activations or {}).items()}
        self._layers = _layers(graph_module, config, activations)
        self._known: dict[tuple[str, int], RoundedWeight] = {}

    def within(self, max_share: float | None) -> dict[str, RoundedWeight]:
        """Integer weights by label: of the first widths, then wider where it helps most per byte.

        Args:
            max_share: of their float32 bytes, what all weights may take; None widens nothing.
        """
        found = {label: self._rounded(label, layer.bits[0]) for label, layer in self._layers.items()}
        if max_share is None:
            return found
        left = max_share * self.float_bytes - self.bytes_of(found)
        while (label := self._dearest(found, left)) is not None:
            before = found[label]
            found[label] = self._rounded(label, self._wider(label, before))
            left -= self._bytes(label, found[label].bits) - self._bytes(label, before.bits)
        return found

    def shares(self) -> list[float]:
        """Shares of :meth:`within`, ascending: each gives one more layer than the one before more bits."""
        found, left = self.within(None), float("inf")
        shares = [self.bytes_of(found) / self.float_bytes] if found else []
        while (label := self._dearest(found, left)) is not None:
            found[label] = self._rounded(label, self._wider(label, found[label]))
            shares.append(self.bytes_of(found) / self.float_bytes)
        # half a byte more, lest the last layer be lost to float rounding
        return [share + 0.5 / self.float_bytes for share in shares]

    def bytes_of(self, weights: Mapping[str, RoundedWeight]) -> int:
        """What integer weights take in a file."""
        return sum(self._bytes(label, weight.bits) for label, weight in weights.items())

    @property
    def float_bytes(self) -> int:
        """What the same weights take in float32."""
        return sum(weight_bytes(layer.spec, None) for layer in self._layers.values())

    def _bytes(self, label: str, bits: int) -> int:
        return weight_bytes(self._layers[label].spec, bits)

    def _dearest(self, found: Mapping[str, RoundedWeight], left: float) -> str | None:
        """The layer that costs most per byte that more bits would take, of those that fit."""
        best, worth = None, 0.0
        for label, rounded in found.items():
            growth = self._bytes(label, self._wider(label, rounded)) - self._bytes(label, rounded.bits)
            if 0 < growth <= left and rounded.error / growth > worth:
                best, worth = label, rounded.error / growth
        return best

    def _wider(self, label: str, rounded: RoundedWeight) -> int:
        return next((bits for bits in self._layers[label].bits if bits > rounded.bits), rounded.bits)

    def _rounded(self, label: str, bits: int) -> RoundedWeight:
        if (label, bits) not in self._known:
            layer = self._layers[label]
            self._known[label, bits] = _rounded(
                label, layer.weight, layer.spec, self._costs, self._steps.get(label), bits, self._whole
            )
        return self._known[label, bits]


@dataclass(frozen=True)
class _Layer:
    """A layer to be rounded, and the bits that its weights may have: the first, or wider ones."""

    weight: Tensor
    spec: LinearSpec
    bits: tuple[int, ...]


def _layers(
    graph_module: GraphModule, config: QuantConfig, activations: Mapping[str, RoundedSite] | None
) -> dict[str, _Layer]:
    found = {}
    for node in calls(graph_module, gaq.irreps_linear.default):
        label, source = str(node.args[-1]), node.args[1]
        bits, activation = config.for_layer(label).weight_bits, config.for_layer(label).activation
        if bits is None or not isinstance(source, Node) or source.op != "get_attr":
            continue  # weights computed at run time stay as they are
        rounded = activation is not None if activations is None else label in activations
        floats = not rounded or is_one_hot(node.args[0])  # what the weights are multiplied with
        widest = max(bits, WIDEST if floats else WIDER)
        choice = tuple(b for b in WEIGHT_BITS if bits <= b <= widest)
        weight = attribute(graph_module, source).detach()
        found[label] = _Layer(weight, linear_spec(str(node.args[3])), choice)
    return found


def _rounded(
    label: str,
    weight: Tensor,
    spec: LinearSpec,
    costs: ChannelCosts,
    steps: Tensor | None,
    bits: int,
    whole: bool,
) -> RoundedWeight:
    hessians, mean = costs.hessians.get(label), costs.means.get(label)
    held = steps if bits == WIDER else None
    meant = weight if held is None else with_steps(weight, spec, held)
    if hessians is None or bits == WIDEST:
        codes, scale = quantize_weight(meant, spec, bits, whole=whole)
        return RoundedWeight(codes, scale, bits, 0.0, held is not None)
    if mean is not None:
        hessians = without_mean(hessians, mean)
    if held is not None:
        hessians = over_steps(hessians, spec, held)
    codes, scale = round_second_order(meant, spec, hessians, bits)
    error = output_error(meant, codes, scale, spec, hessians)
    bias = None
    if mean is not None:
        bias = bias_correction(dequantize_weight(codes, scale, spec, held) - weight, spec, mean).float()
    return RoundedWeight(codes, scale, bits, error, held is not None, bias)
