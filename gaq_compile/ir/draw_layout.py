"""Where the boxes of a drawn graph stand: layers from top to bottom, few crossings, short wires.

A plain layered layout. Layers by longest path, then nodes sink towards their consumers where that
makes no wire longer; order within a layer by sweeps of barycentres; positions by least squares
under "no two boxes overlap", which for one layer is solved exactly (pool adjacent violators).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

ROUTED_SPAN = 7  # longer wires are drawn straight and faint behind the boxes, without a route
_GAP_X, _GAP_Y = 22.0, 34.0
_SWEEPS = 12
_WIRE_WIDTH = 10.0
_TO_MIDDLE = 0.06

Key = str | tuple[str, str, int]  # a box, or the place where a wire crosses a layer


@dataclass(frozen=True)
class Placed:
    """Centres of boxes, and the points of each wire from its source's bottom to its target's top."""

    centers: dict[str, tuple[float, float]]
    wires: dict[tuple[str, str], list[tuple[float, float]]]
    width: float
    height: float


def place(graph: nx.DiGraph, sizes: dict[str, tuple[float, float]]) -> Placed:
    """Lay out an acyclic graph whose nodes have ``sizes`` (width, height)."""
    layer = _layers(graph)
    grid, links, routes = _with_crossings(graph, layer)
    widths = {key: sizes[key][0] if isinstance(key, str) else _WIRE_WIDTH for row in grid for key in row}
    _order(grid, links)
    x = _positions(grid, links, widths)
    heights = [max((sizes[k][1] for k in row if isinstance(k, str)), default=0.0) for row in grid]
    middle, top = [], 0.0
    for height in heights:
        middle.append(top + height / 2)
        top += height + _GAP_Y
    left = min((x[k] - widths[k] / 2 for k in x), default=0.0)
    centers = {k: (x[k] - left, middle[layer[k]]) for k in graph.nodes}
    wires = {}
    for (a, b), route in routes.items():
        start = (centers[a][0], centers[a][1] + sizes[a][1] / 2)
        end = (centers[b][0], centers[b][1] - sizes[b][1] / 2)
        wires[a, b] = [start, *((x[key] - left, middle[key[2]]) for key in route), end]
    right = max((x[k] - left + widths[k] / 2 for k in x), default=0.0)
    return Placed(centers, wires, right, max(top - _GAP_Y, 0.0))


def _layers(graph: nx.DiGraph) -> dict[str, int]:
    order = list(nx.topological_sort(graph))
    layer: dict[str, int] = {}
    for node in order:
        layer[node] = max((layer[p] + 1 for p in graph.predecessors(node)), default=0)
    for _ in range(3):
        for node in reversed(order):
            after = [layer[s] for s in graph.successors(node)]
            # sinking shortens the wires out and lengthens those in
            if after and graph.in_degree(node) <= len(after):
                layer[node] = min(after) - 1
    used = sorted({layer[n] for n in order})
    dense = {old: new for new, old in enumerate(used)}
    return {n: dense[layer[n]] for n in order}


def _with_crossings(
    graph: nx.DiGraph, layer: dict[str, int]
) -> tuple[list[list[Key]], dict[Key, list[Key]], dict[tuple[str, str], list[tuple[str, str, int]]]]:
    """Rows of keys, neighbours of each key, and each wire's places in the layers it crosses."""
    rows: list[list[Key]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for node in nx.topological_sort(graph):
        rows[layer[node]].append(node)
    links: dict[Key, list[Key]] = defaultdict(list)
    routes: dict[tuple[str, str], list[tuple[str, str, int]]] = {}
    for a, b in graph.edges:
        crossed = range(layer[a] + 1, layer[b])
        route = [(a, b, i) for i in crossed] if len(crossed) < ROUTED_SPAN else []
        routes[a, b] = route
        for key in route:
            rows[key[2]].append(key)
        if route or len(crossed) == 0:
            chain: list[Key] = [a, *route, b]
            for upper, lower in pairwise(chain):
                links[upper].append(lower)
                links[lower].append(upper)
    return rows, links, routes


def _order(rows: list[list[Key]], links: dict[Key, list[Key]]) -> None:
    """Reorder each row in place so that neighbours in adjacent rows stand near each other."""
    rank = {key: i / max(len(row), 1) for row in rows for i, key in enumerate(row)}
    where = {key: i for i, row in enumerate(rows) for key in row}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        indices = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for i in indices:
            beside = i - 1 if down else i + 1

            def barycentre(key: Key, beside: int = beside) -> float:
                near = [rank[n] for n in links[key] if where[n] == beside]
                return sum(near) / len(near) if near else rank[key]

            rows[i].sort(key=barycentre)
            for position, key in enumerate(rows[i]):
                rank[key] = (position + 0.5) / len(rows[i])


def _positions(
    rows: list[list[Key]], links: dict[Key, list[Key]], widths: dict[Key, float]
) -> dict[Key, float]:
    x: dict[Key, float] = {}
    for row in rows:
        place_at = 0.0
        for key in row:
            x[key] = place_at + widths[key] / 2
            place_at += widths[key] + _GAP_X
        for key in row:
            x[key] -= place_at / 2
    where = {key: i for i, row in enumerate(rows) for key in row}
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        for i in range(len(rows)) if down else range(len(rows) - 1, -1, -1):
            row = rows[i]
            wanted, weights = [], []
            for key in row:
                # the last sweeps look both ways, so that wires run straight
                near = [n for n in links[key] if sweep >= _SWEEPS or (where[n] < i) == down]
                pull = [4.0 if not isinstance(key, str) and not isinstance(n, str) else 1.0 for n in near]
                total = sum(pull)
                # a weak pull to the middle keeps long graphs from drifting sideways
                middle = total / (total + _TO_MIDDLE) if near else 1.0
                at = sum(p * x[n] for p, n in zip(pull, near, strict=True)) / total if near else x[key]
                wanted.append(at * middle)
                weights.append(max(total, 0.1))
            for key, value in zip(row, _separated(wanted, weights, [widths[k] for k in row]), strict=True):
                x[key] = value
    return x


def _separated(wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The nearest positions to ``wanted`` (weighted least squares) that keep boxes apart, in order."""
    if not wanted:
        return []
    offsets = [0.0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2 + _GAP_X)
    pools: list[tuple[float, float, int]] = []  # (mean, weight, members)
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, count = want - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, w, n = pools.pop()
            mean, total, count = (mean * total + other * w) / (total + w), total + w, count + n
        pools.append((mean, total, count))
    flat = [mean for mean, _, count in pools for _ in range(count)]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]
