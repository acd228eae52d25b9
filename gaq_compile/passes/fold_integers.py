"""Quantize, decode and multiply become one integer node.

Before::

    x_q = gaq.mddq(x, steps, irreps, 's8 m8d8', 'layer')
    weight = gaq.decode_weight(codes, scale, steps, 8, spec, 'layer')
    y = gaq.irreps_linear(x_q, weight, None, spec, False, 'layer')

After::

    y = gaq.int_irreps_linear(x, steps, codes, scale, None, spec, 's8 m8d8', 8, False, 'layer')

The backward product reads the same integer weights, and divides by the steps that they hold. Its
gradient is rounded to 16-bit integers with a step per row (scheme "g16") where the layer's own
activations are rounded with their directions; where directions are exact or activations float, the
gradient stays float, so that those schemes stay exactly equivariant, and conservative.
"""

from __future__ import annotations

from torch.fx import GraphModule

from ..config import activation_scheme
from .graph_tools import calls, copied, finished, gaq, is_call

NARROW = (4, 8)  # bits of weights that 16-bit integers can be multiplied with in 32


def fold_integers(graph_module: GraphModule) -> GraphModule:
    """Fold every irreps-linear with integer weights; see the module's text."""
    gm = copied(graph_module)
    rounded = _layers_with_rounded_vectors(gm)
    for node in calls(gm, gaq.irreps_linear.default):
        x, weight, bias, spec, transpose, label = node.args
        if not is_call(weight, gaq.decode_weight.default):
            continue
        codes, scale, steps, bits, *_ = weight.args  # type: ignore[union-attr]
        scheme = "f32"
        if is_call(x, gaq.mddq.default) and not transpose:
            x, steps, _, scheme, _ = x.args  # type: ignore[union-attr]
        elif transpose and label in rounded and bits in NARROW:
            scheme = "g16"
        arguments = (x, steps, codes, scale, bias, spec, scheme, bits, transpose, label)
        with gm.graph.inserting_before(node):
            folded = gm.graph.call_function(gaq.int_irreps_linear.default, arguments)
        folded.meta = {k: v for k, v in node.meta.items() if k != "bits"}
        folded.meta["bits"] = f"{scheme} · s{bits}"
        node.replace_all_uses_with(folded)
    return finished(gm)


def _layers_with_rounded_vectors(gm: GraphModule) -> set[object]:
    """Labels of layers whose activation scheme rounds directions or components."""
    nodes = calls(gm, gaq.mddq.default)
    return {n.args[-1] for n in nodes if activation_scheme(str(n.args[3])).vector != "exact"}
