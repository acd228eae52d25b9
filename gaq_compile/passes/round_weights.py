"""Choose every irreps-linear's integer weights, and which layers need more bits than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import QuantConfig
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
TABLE = 16  # bits of species embeddings: rows are looked up, not summed, so nothing makes up for rounding


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
    steps = {label: site.steps for label, site in (activations or {}).items()}
    layers = _layers(graph_module, config)
    if config.rounding == "nearest":
        costs = ChannelCosts()
    found = {
        k: _rounded(k, layer.weight, layer.spec, costs, steps.get(k), layer.bits[0])
        for k, layer in layers.items()
    }
    if config.max_weight_share is not None:
        left = config.max_weight_share * sum(weight_bytes(layer.spec, None) for layer in layers.values())
        left -= sum(weight_bytes(layer.spec, layer.bits[0]) for layer in layers.values())
        while (label := _dearest(found, layers, left)) is not None:
            spec, bits = layers[label].spec, _wider(found[label], layers[label])
            left -= weight_bytes(spec, bits) - weight_bytes(spec, found[label].bits)
            found[label] = _rounded(label, layers[label].weight, spec, costs, steps.get(label), bits)
    return found


@dataclass(frozen=True)
class _Layer:
    """A layer to be rounded, and the bits that its weights may have: the first, or wider ones."""

    weight: Tensor
    spec: LinearSpec
    bits: tuple[int, ...]


def _layers(graph_module: GraphModule, config: QuantConfig) -> dict[str, _Layer]:
    found = {}
    for node in calls(graph_module, gaq.irreps_linear.default):
        label, source = str(node.args[-1]), node.args[1]
        bits = config.for_layer(label).weight_bits
        if bits is None or not isinstance(source, Node) or source.op != "get_attr":
            continue  # weights computed at run time stay as they are
        widest = TABLE if is_one_hot(node.args[0]) else WIDER
        choice = tuple(b for b in (4, 8, 16) if bits <= b <= max(bits, widest))
        weight = attribute(graph_module, source).detach()
        found[label] = _Layer(weight, linear_spec(str(node.args[3])), choice)
    return found


def _dearest(found: Mapping[str, RoundedWeight], layers: Mapping[str, _Layer], left: float) -> str | None:
    """The layer that costs most per byte that more bits would take, of those that fit."""
    best, worth = None, 0.0
    for label, rounded in found.items():
        spec, bits = layers[label].spec, _wider(rounded, layers[label])
        growth = weight_bytes(spec, bits) - weight_bytes(spec, rounded.bits)
        if 0 < growth <= left and rounded.error / growth > worth:
            best, worth = label, rounded.error / growth
    return best


def _wider(rounded: RoundedWeight, layer: _Layer) -> int:
    return next((bits for bits in layer.bits if bits > rounded.bits), rounded.bits)


def _rounded(
    label: str, weight: Tensor, spec: LinearSpec, costs: ChannelCosts, steps: Tensor | None, bits: int
) -> RoundedWeight:
    hessians, mean = costs.hessians.get(label), costs.means.get(label)
    held = steps if bits == WIDER else None
    meant = weight if held is None else with_steps(weight, spec, held)
    if hessians is None or bits == TABLE:
        return RoundedWeight(*quantize_weight(meant, spec, bits), bits, 0.0, held is not None)
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
