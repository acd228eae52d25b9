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
from .graph_tools import attribute, calls, gaq
from .weigh_channels import ChannelCosts
from .widen_activations import RoundedSite

WIDER = 8  # bits of a layer that suffers most from fewer


@dataclass(frozen=True)
class RoundedWeight:
    """One layer's integers.

    Attributes:
        codes: (weight_numel,) int8.
        scale: (scale_numel,) float32.
        bits: 8 or 4.
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
            to nearest.
        activations: the layers' quantized inputs (:func:`.widen_activations.widen_activations`).
            Weights of 8 bits hold their steps; in 15 levels, rows that steps make unequal would not fit.
    """
    steps = {label: site.steps for label, site in (activations or {}).items()}
    found: dict[str, RoundedWeight] = {}
    layers: dict[str, tuple[Tensor, LinearSpec]] = {}
    for node in calls(graph_module, gaq.irreps_linear.default):
        label, source = str(node.args[-1]), node.args[1]
        bits = config.for_layer(label).weight_bits
        if bits is None or not isinstance(source, Node) or source.op != "get_attr":
            continue  # weights computed at run time stay as they are
        layers[label] = attribute(graph_module, source).detach(), linear_spec(str(node.args[3]))
        found[label] = _rounded(label, *layers[label], costs, steps.get(label), bits)
    for label in _promoted(found, layers, config.max_weight_share):
        found[label] = _rounded(label, *layers[label], costs, steps.get(label), WIDER)
    return found


def _rounded(
    label: str, weight: Tensor, spec: LinearSpec, costs: ChannelCosts, steps: Tensor | None, bits: int
) -> RoundedWeight:
    hessians, mean = costs.hessians.get(label), costs.means.get(label)
    held = steps if bits == WIDER else None
    meant = weight if held is None else with_steps(weight, spec, held)
    if hessians is None:
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


def _promoted(
    found: Mapping[str, RoundedWeight],
    layers: Mapping[str, tuple[Tensor, LinearSpec]],
    max_share: float | None,
) -> list[str]:
    """The layers to widen: those that cost most per byte gained, as far as the bytes allow."""
    if max_share is None:
        return []
    specs = {label: spec for label, (_, spec) in layers.items()}
    left = max_share * sum(weight_bytes(spec, None) for spec in specs.values())
    left -= sum(weight_bytes(specs[label], rounded.bits) for label, rounded in found.items())
    growth = {k: weight_bytes(specs[k], WIDER) - weight_bytes(specs[k], r.bits) for k, r in found.items()}
    chosen = []
    for label in sorted(found, key=lambda k: -found[k].error / max(1, growth[k])):
        if 0 < growth[label] <= left and found[label].error > 0:
            chosen.append(label)
            left -= growth[label]
    return chosen
