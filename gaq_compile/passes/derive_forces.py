"""Energy -> energy, forces and virial as one graph.

The energy graph is a function of edge vectors ``r_ij = r_j - r_i``. With ``g = dE/dr_ij``::

    F_i = sum_(edges received by i) g - sum_(edges sent by i) g        (eV/Å)
    W   = sum_edges r_ij (x) g                                         (eV; stress = W / V)

Both follow from the chain rule, so one derivative serves forces and stress. A model captured from
tensors of its own is differentiated by its positions instead. The graph is traced through
autograd once, here; nothing differentiates at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.func import functional_call, functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..capture.graphs import EDGE_VECTORS, GraphFormat
from ..capture.limits import fixed_size
from ..errors import CaptureError
from ..ir.unwritten import module_of
from .graph_tools import add_buffer, aten, finished

# What gradient formulas do in place, and the same without, which keeps the type of what it is given.
_PURE = {
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.logical_and_.default: aten.logical_and.default,  # of truth values
}


def outputs(form: GraphFormat) -> tuple[str, ...]:
    """The names of what the derived graph returns."""
    return ("energy", "forces") if form.positions else ("energy", "atomic_energies", "forces", "virial")


def derive_forces(graph_module: GraphModule, form: GraphFormat, example: Sequence[Tensor]) -> GraphModule:
    """Differentiate the energy graph and trace the result.

    Args:
        graph_module: inputs ``form.inputs`` -> (N,) atomic energies, eV.
        form: the inputs' names; "batch" and "ptr" among them unless there are positions.
        example: inputs of a batch of at least two graphs.

    Returns:
        A graph with the same inputs that returns what :func:`outputs` names: energy (G,) float64,
        atomic energies (N,), forces (N, 3), virial (G, 3, 3); or energy and forces.

    Raises:
        CaptureError: if tracing the gradient fixes a size that the energy leaves free.
    """
    state = {
        **{k: v.detach() for k, v in graph_module.named_parameters()},
        **{k: v.detach() for k, v in graph_module.named_buffers()},
    }
    keys = list(state)
    names = form.inputs
    vectors = form.vectors

    def energy_and_forces(weights: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        named = dict(zip(names, inputs, strict=True))
        for name in vectors:
            named[name] = named[name].detach().requires_grad_(True)
        with torch.enable_grad():
            values = tuple(named[name] for name in names)
            atomic = functional_call(graph_module, dict(zip(keys, weights, strict=True)), values)
            gradients = torch.autograd.grad(atomic.sum(), [named[name] for name in vectors])
        if form.positions:
            return atomic.detach(), -gradients[0]
        return (
            *_per_graph(atomic, named),
            *forces_and_virial(named, dict(zip(vectors, gradients, strict=True))),
        )

    with fx_config.patch(use_duck_shape=False):
        arguments = (list(state.values()), list(example))
        traced = make_fx(energy_and_forces, tracing_mode="symbolic")(*arguments)
        # Gradient formulas work in place here and there; passes may only see pure operators.
        if not _without_mutations(traced):
            traced = make_fx(functionalize(traced, remove="mutations"), tracing_mode="symbolic")(*arguments)
    _check_sizes(graph_module, traced, names)
    return finished(_with_attributes(traced, keys, state, names))


def _without_mutations(traced: GraphModule) -> bool:
    """Make in-place operators pure where that is plain to see; whether none is left.

    Tracing lets later uses of a tensor read the in-place operator's node, so that only views, which
    share its memory under other names, would miss the change.
    """
    mutations = [n for n in traced.graph.nodes if n.op == "call_function" and _schema_says(n, "is_mutable")]
    if not all(n.target in _PURE and _is_alone(n.args[0]) and _keeps_type(n) for n in mutations):
        return False
    for node in mutations:
        node.target = _PURE[node.target]
    return True


def _is_alone(tensor: Node) -> bool:
    """Whether no other tensor of the graph shares a tensor's memory: it is no view and has none."""
    own = tensor.op == "call_function" and not _is_view(tensor)
    return own and not any(_is_view(user) for user in tensor.users)


def _is_view(node: Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(r.alias_info is not None for r in returns) and not _schema_says(node, "is_mutable")


def _schema_says(node: Node, what: str) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), what, False))


def _keeps_type(node: Node) -> bool:
    before = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return node.target is not aten.logical_and_.default or before is torch.bool


def _check_sizes(before: GraphModule, traced: GraphModule, names: Sequence[str]) -> None:
    """Sizes that the energy leaves free must stay free in its gradient.

    Raises:
        CaptureError: if tracing the gradient has fixed one, which no later check would notice.
    """
    inputs = [n for n in before.graph.nodes if n.op == "placeholder"]
    after = [n for n in traced.graph.nodes if n.op == "placeholder"][-len(names) :]
    for name, old, new in zip(names, inputs, after, strict=True):
        if "val" not in old.meta:
            continue
        sizes = zip(old.meta["val"].shape, new.meta["val"].shape, strict=True)
        fixed = [axis for axis, (a, b) in enumerate(sizes) if fixed_size(a) is None and fixed_size(b)]
        if fixed:
            raise CaptureError(
                f"the gradient fixes axis {fixed[0]} of {name} at {new.meta['val'].shape[fixed[0]]}",
                fix="use an example of more than one atom and edge; else rewrite what depends on that size",
            )


def _per_graph(atomic: Tensor, named: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    graphs = named["ptr"].shape[0] - 1
    total = torch.zeros(graphs, dtype=torch.float64).index_add(0, named["batch"], atomic.detach().double())
    return total, atomic.detach()


def forces_and_virial(named: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Forces (n, 3) and virials (graphs, 3, 3) of an energy that is a function of edge vectors.

    Args:
        named: the graph's inputs by name.
        gradients: ``dE/dr`` of each kind of edge vectors by its input's name.
    """
    atoms, graphs = named["batch"].shape[0], named["ptr"].shape[0] - 1
    forces = named["edge_vec"].new_zeros(atoms, 3)
    virial = named["edge_vec"].new_zeros(graphs, 3, 3)
    for name, gradient in gradients.items():
        receivers, senders = (named[part] for part in EDGE_VECTORS[name])
        forces = forces.index_add(0, receivers, gradient).index_add(0, senders, -gradient)
        outer = named[name].detach()[:, :, None] * gradient[:, None, :]
        virial = virial.index_add(0, named["batch"][receivers], outer)
    return forces, virial


def _with_attributes(
    traced: GraphModule, keys: list[str], state: dict[str, Tensor], names: Sequence[str]
) -> GraphModule:
    """Turn the traced weight placeholders back into named attributes."""
    graph = Graph()
    values: dict[Node, Node] = {}
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    root = torch.nn.Module()
    for node, name in zip(placeholders[len(keys) :], names, strict=True):
        values[node] = graph.placeholder(name)
        values[node].meta["val"] = node.meta.get("val")
    for node, key in zip(placeholders, keys, strict=False):
        if node.users:
            attribute = add_buffer(root, key, state[key])
            values[node] = graph.get_attr(attribute)
            values[node].meta["val"] = node.meta.get("val")
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            root.register_buffer(str(node.target), getattr(traced, str(node.target)).detach())
        if node.op == "output":
            results = node.args[0]
            graph.output(tuple(values[r] for r in results))  # type: ignore[union-attr]
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n])
    return module_of(root, graph)
