"""Integer weights, and quantize/dequantize nodes on activations.

Before::

    y = gaq.irreps_linear(x, weight, None, '64x0e+32x1o -> 64x0e', False, 'layer')

After (w8a8)::

    codes, scale = self.layer_codes, self.layer_scale               # int8, one scale per column
    weight = gaq.decode_weight(codes, scale, 8, spec, 'layer')
    x_q = gaq.mddq(x, self.layer_steps, '64x0e+32x1o', 's8 m8d8', 'layer')
    y = gaq.irreps_linear(x_q, weight, None, spec, False, 'layer')
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from ..config import QuantConfig
from ..ir.specs import linear_spec
from ..numerics.packing import pack_int4
from ..numerics.weights import quantize_weight
from .calibrate import Site, quantization_sites
from .graph_tools import add_buffer, attribute, calls, copied, finished, gaq


def insert_mddq(graph_module: GraphModule, config: QuantConfig, steps: Mapping[str, Tensor]) -> GraphModule:
    """Quantize weights of irreps-linears and the activations of every site, as ``config`` says.

    Args:
        graph_module: the float energy graph.
        config: bits of weights and activations per layer.
        steps: activation steps by site label, from :func:`.calibrate.calibrate`.
    """
    gm = copied(graph_module)
    for site in quantization_sites(gm, config):
        _quantize_activation(gm, site, steps[site.label])
    for node in calls(gm, gaq.irreps_linear.default):
        label = str(node.args[-1])
        bits = config.for_layer(label).weight_bits
        if bits is not None:
            _quantize_weight(gm, node, bits)
    return finished(gm)


def _quantize_weight(gm: GraphModule, node: Node, bits: int) -> None:
    spec, label = str(node.args[3]), str(node.args[-1])
    source = node.args[1]
    if not isinstance(source, Node) or source.op != "get_attr":
        return  # weights computed at run time stay as they are
    codes, scale = quantize_weight(attribute(gm, source).detach(), linear_spec(spec), bits)
    stored = pack_int4(codes) if bits == 4 else codes
    names = [add_buffer(gm, f"{label}_codes", stored), add_buffer(gm, f"{label}_scale", scale)]
    with gm.graph.inserting_before(node):
        parts = [gm.graph.get_attr(name) for name in names]
        decoded = gm.graph.call_function(gaq.decode_weight.default, (*parts, bits, spec, label))
    decoded.meta["bits"] = f"s{bits}"
    node.update_arg(1, decoded)


def _quantize_activation(gm: GraphModule, site: Site, steps: Tensor) -> None:
    name = add_buffer(gm, f"{site.label}_steps", steps)
    with gm.graph.inserting_after(site.source):
        scale = gm.graph.get_attr(name)
    arguments = (site.source, scale, site.irreps, site.scheme, site.label)
    with gm.graph.inserting_after(scale):
        quantized = gm.graph.call_function(gaq.mddq.default, arguments)
    quantized.meta["bits"] = site.scheme
    for consumer in site.consumers:
        consumer.update_arg(0, quantized)
