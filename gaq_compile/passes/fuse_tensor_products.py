"""Gather, tensor product and scatter become one ``gaq::conv``.

Before::

    message = gaq.tensor_product(x[senders], sh, weight, spec)      # one row per edge
    out = zeros.index_add(0, receivers, message)                    # one row per atom

After::

    edges = gaq.sort_edges(senders, receivers, num_nodes)           # once per graph
    out = gaq.conv(x, sh, weight, edges, spec)

so that no edge-sized message tensor exists. The pattern is found with networkx.
"""

from __future__ import annotations

import networkx as nx
from torch.fx import GraphModule, Node

from .graph_tools import SCATTERS, ZEROS, aten, copied, finished, gaq, is_call, rows_index

_GATHERS = (aten.index.Tensor, aten.index_select.default)


def fuse_tensor_products(graph_module: GraphModule) -> GraphModule:
    """Fuse every gather -> tensor product -> scatter chain; see the module's text."""
    gm = copied(graph_module)
    sorted_edges: dict[object, Node] = {}
    for gather, product, scatter in _chains(gm):
        senders, receivers = _gather_index(gather), _scatter_index(gather, scatter)
        if senders is None or receivers is None or _read_elsewhere(product, scatter):
            continue
        _, sh, weight, spec, label = product.args
        key = (senders, receivers, str(gather.args[0].meta["val"].shape[0]))
        if key not in sorted_edges:
            sorted_edges[key] = _sort_edges(gm, gather, scatter, senders, receivers)
        edges = sorted_edges[key]
        with gm.graph.inserting_before(scatter):
            fused = gm.graph.call_function(gaq.conv.default, (gather.args[0], sh, weight, edges, spec, label))
        fused.meta = {k: v for k, v in scatter.meta.items() if k in ("val", "stack_trace", "nn_module_stack")}
        scatter.replace_all_uses_with(fused)
    return finished(gm)


def _sort_edges(gm: GraphModule, gather: Node, scatter: Node, senders: Node, receivers: Node) -> Node:
    """The adjacency order that the convolutions of one graph share."""
    with gm.graph.inserting_before(scatter):
        count = gm.graph.call_function(aten.sym_size.int, (gather.args[0], 0))
        return gm.graph.call_function(gaq.sort_edges.default, (senders, receivers, count))


def _chains(gm: GraphModule) -> list[tuple[Node, Node, Node]]:
    """All (gather, tensor product, scatter) chains, in graph order of the scatter."""
    flow = nx.DiGraph()
    for node in gm.graph.nodes:
        flow.add_node(node, kind=_kind(node))
        flow.add_edges_from((source, node) for source in node.all_input_nodes)
    pattern = nx.DiGraph([("gather", "product"), ("product", "scatter")])
    nx.set_node_attributes(pattern, {name: name for name in pattern}, "kind")
    matcher = nx.isomorphism.DiGraphMatcher(flow, pattern, node_match=lambda a, b: a["kind"] == b["kind"])
    found = []
    for mapping in matcher.subgraph_monomorphisms_iter():
        by_role = {role: node for node, role in mapping.items()}
        if (
            by_role["product"].args[0] is by_role["gather"]
            and by_role["scatter"].args[3] is by_role["product"]
        ):
            found.append((by_role["gather"], by_role["product"], by_role["scatter"]))
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    return sorted(found, key=lambda chain: place[chain[2]])


def _kind(node: Node) -> str:
    if is_call(node, gaq.tensor_product.default):
        return "product"
    if is_call(node, *_GATHERS):
        return "gather"
    return "scatter" if is_call(node, *SCATTERS) else "other"


def _read_elsewhere(product: Node, scatter: Node) -> bool:
    """Whether anything but the sum reads the messages."""
    return not all(user is scatter or _asks_for_type(user) for user in product.users)


def _asks_for_type(node: Node) -> bool:
    """Whether a node leads to ``messages.new_zeros(...)`` alone, which reads no value."""
    if is_call(node, gaq.relayout.default):
        return all(_asks_for_type(user) for user in node.users)
    return is_call(node, aten.new_zeros.default)


def _gather_index(gather: Node) -> Node | None:
    if gather.target is aten.index_select.default:
        return gather.args[2] if gather.args[1] == 0 else None  # type: ignore[return-value]
    indices = gather.args[1]
    return indices[0] if len(indices) == 1 else None  # type: ignore[arg-type, index, return-value]


def _scatter_index(gather: Node, scatter: Node) -> Node | None:
    """The index of a sum of rows into as many zeros as there are atoms, or None."""
    base, axis = scatter.args[:2]
    zeros = is_call(base, *ZEROS)
    reduces = scatter.target is not aten.scatter_reduce.two or scatter.args[4] == "sum"
    if axis != 0 or not zeros or not reduces or _rows(base) != _rows(gather.args[0]):
        return None
    return rows_index(scatter)


def _rows(node: object) -> str:
    return str(node.meta["val"].shape[0]) if isinstance(node, Node) else ""
