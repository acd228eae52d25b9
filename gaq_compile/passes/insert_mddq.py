"""Integer weights, and quantize/dequantize nodes on activations.

Before::

    y = gaq.irreps_linear(x, weight, None, '64x0e+32x1o -> 64x0e', False, 'layer')

After (w8a8)::

    codes, scale = self.layer_codes, self.layer_scale               # int8, one scale per column
    weight = gaq.decode_weight(codes, scale, self.layer_steps, 8, spec, 'layer')
    x_q = gaq.mddq(x, self.layer_steps, '64x0e+32x1o', 's8 m8d8', 'layer')
    y = gaq.irreps_linear(x_q, weight, None, spec, False, 'layer')

The codes hold the steps of the channels that they meet. Weights of 4 bits do not: there the
activations come on a grid that all channels of a block have in common (scheme 's8 m8d8 common').

What a radial network gives a convolution is rounded to half precision: ``gaq.round_half(y, 0)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from ..config import QuantConfig, activation_scheme
from ..errors import ConfigError
from ..numerics.packing import pack_int4
from .calibrate import FEW_BITS, Site, quantization_sites
from .graph_tools import add_buffer, attribute, calls, copied, finished, gaq, is_call
from .round_weights import RoundedWeight, round_weights
from .weigh_channels import ChannelCosts
from .widen_activations import RoundedSite


def insert_mddq(
    graph_module: GraphModule,
    config: QuantConfig,
    activations: Mapping[str, RoundedSite],
    weights: Mapping[str, RoundedWeight] | None = None,
) -> GraphModule:
    """Put the integers in place: weights of irreps-linears, activations of every site.

    Args:
        graph_module: the float energy graph.
        config: says which activations.
        activations: scheme and steps by site label, from :func:`.widen_activations.widen_activations`;
            others stay in float.
        weights: integer weights by layer label, from :func:`.round_weights.round_weights`; by
            default each is rounded to nearest.
    """
    gm = copied(graph_module)
    if weights is None:
        weights = round_weights(graph_module, config, ChannelCosts(), activations)
    for site in quantization_sites(gm, config):
        if site.label not in activations:
            continue
        weight = weights.get(site.label)
        common = weight is not None and not weight.holds_steps
        _quantize_activation(gm, site, activations[site.label], common)
    for node in calls(gm, gaq.irreps_linear.default):
        if str(node.args[-1]) in weights:
            _store_weight(gm, node, weights[str(node.args[-1])])
    _halve_radial_weights(gm, config)
    return finished(gm)


def _halve_radial_weights(gm: GraphModule, config: QuantConfig) -> None:
    """Weights that a network gives a convolution for each edge, where activations have few bits.

    They are the largest tensors of all, and half precision is 16 times finer than 8 bits.
    """
    for node in calls(gm, gaq.conv.default):
        weight, label = node.args[2], str(node.args[-1])
        scheme = config.for_layer(label).activation
        if scheme is None or activation_scheme(scheme).scalar_bits > FEW_BITS:
            continue
        if is_call(weight, gaq.irreps_linear.default):
            with gm.graph.inserting_before(node):
                rounded = gm.graph.call_function(gaq.round_half.default, (weight, 0, label))
            rounded.meta["bits"] = "f16"
            node.update_arg(2, rounded)


def _store_weight(gm: GraphModule, node: Node, weight: RoundedWeight) -> None:
    spec, label, bits = str(node.args[3]), str(node.args[-1]), weight.bits
    stored = pack_int4(weight.codes) if bits == 4 else weight.codes
    scale = weight.scale.to(torch.bfloat16)
    names = [add_buffer(gm, f"{label}_codes", stored), add_buffer(gm, f"{label}_scale", scale)]
    steps = None
    if weight.holds_steps:
        if not is_call(node.args[0], gaq.mddq.default):
            raise ConfigError("weights that hold the steps of an input that is not rounded", where=label)
        steps = node.args[0].args[1]  # type: ignore[union-attr]
    with gm.graph.inserting_before(node):
        parts = [gm.graph.get_attr(name) for name in names]
        decoded = gm.graph.call_function(gaq.decode_weight.default, (*parts, steps, bits, spec, label))
        bias = node.args[2]
        if weight.bias is not None and isinstance(bias, Node):
            bias = gm.graph.get_attr(add_buffer(gm, f"{label}_bias", attribute(gm, bias) + weight.bias))
    decoded.meta["bits"] = f"s{bits}"
    node.update_arg(1, decoded)
    node.update_arg(2, bias)


def _quantize_activation(gm: GraphModule, site: Site, rounded: RoundedSite, common: bool) -> None:
    scheme = str(replace(activation_scheme(rounded.scheme), common=common))
    name = add_buffer(gm, f"{site.label}_steps", rounded.steps)
    with gm.graph.inserting_after(site.source):
        scale = gm.graph.get_attr(name)
    arguments = (site.source, scale, site.irreps, scheme, site.label)
    with gm.graph.inserting_after(scale):
        quantized = gm.graph.call_function(gaq.mddq.default, arguments)
    quantized.meta["bits"] = scheme
    for consumer in site.consumers:
        consumer.update_arg(0, quantized)
