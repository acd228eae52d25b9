"""Choose every irreps-linear's integer weights, and which layers need more bits than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import QuantConfig
from ..ir.specs import LinearSpec, linear_spec
from ..numerics.second_order import Irrep, output_error, round_second_order
from ..numerics.weights import quantize_weight, weight_bytes
from .graph_tools import attribute, calls, gaq

WIDER = 8  # bits of a layer that suffers most from fewer


@dataclass(frozen=True)
class RoundedWeight:
    """One layer's integers.

    Attributes:
        codes: (weight_numel,) int8.
        scale: (scale_numel,) float32.
        bits: 8 or 4.
        error: what the rounding costs, ``tr(E^T H E)``; 0 where no H is known.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    error: float


def round_weights(
    graph_module: GraphModule, config: QuantConfig, hessians: Mapping[str, Mapping[Irrep, Tensor]]
) -> dict[str, RoundedWeight]:
    """Integer weights by the layer's label.

    Args:
        graph_module: the float energy graph.
        config: bits per layer, the kind of rounding, and the share of bytes that may be used.
        hessians: from :func:`.weigh_channels.weigh_channels`; a layer that is not among them is
            rounded to nearest.
    """
    found: dict[str, RoundedWeight] = {}
    layers: dict[str, tuple[Tensor, LinearSpec]] = {}
    for node in calls(graph_module, gaq.irreps_linear.default):
        label, source = str(node.args[-1]), node.args[1]
        bits = config.for_layer(label).weight_bits
        if bits is None or not isinstance(source, Node) or source.op != "get_attr":
            continue  # weights computed at run time stay as they are
        layers[label] = attribute(graph_module, source).detach(), linear_spec(str(node.args[3]))
        found[label] = _rounded(*layers[label], hessians.get(label), bits)
    for label in _promoted(found, layers, config.max_weight_share):
        found[label] = _rounded(*layers[label], hessians.get(label), WIDER)
    return found


def _rounded(
    weight: Tensor, spec: LinearSpec, hessians: Mapping[Irrep, Tensor] | None, bits: int
) -> RoundedWeight:
    if hessians is None:
        return RoundedWeight(*quantize_weight(weight, spec, bits), bits, 0.0)
    codes, scale = round_second_order(weight, spec, hessians, bits)
    return RoundedWeight(codes, scale, bits, output_error(weight, codes, scale, spec, hessians))


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
