"""Graphs on disk, beside the kernels: what was captured or derived once is read the next time.

An entry is a safetensors file with JSON graphs (:mod:`.ir.serial`: no pickle, no code) in
``$GAQ_CACHE_DIR/graphs``, named by a hash of everything that its graphs follow from. A file that cannot be
read, or that is not what its name says, is ignored with a :class:`.errors.CacheWarning` and written again.
Nothing that comes from here is trusted more than what has just been computed: the checks of
:mod:`.verify.checks` follow either way.
``GAQ_CACHE_GRAPHS=0`` turns it off.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .backends.tvm.build import cache_dir
from .capture.fingerprint import combined, surroundings, tensor_bytes
from .capture.graphs import GraphFormat
from .errors import CacheWarning, FileFormatError, GaqError
from .ir.serial import (
    check_name,
    checked,
    checksum,
    graph_from_json,
    node_to_json,
    read_file,
    write_file,
)
from .ir.unwritten import module_of
from .operators import registration as _registration  # noqa: F401 - registers the operators that graphs name
from .passes.graph_tools import attribute
from .passes.pipeline import forces_of
from .passes.row_groups import FusedRows
from .passes.row_shapes import RowShape

MAGIC = "gaq_compile graphs"
VERSION = 1
MOST_BYTES = 1 << 30  # of all entries together; beyond, those that were not read for longest are deleted
SWITCH = "GAQ_CACHE_GRAPHS"

_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OSError)


_Lazy = GraphModule | Callable[[], GraphModule]


class Stages(Mapping[str, GraphModule]):
    """Graphs by the name of their pass; those of a file are made when they are asked for.

    Args:
        graphs: graphs, or functions that make them.
    """

    def __init__(self, graphs: Mapping[str, GraphModule] | Mapping[str, _Lazy]) -> None:
        self._graphs: dict[str, _Lazy] = {**(graphs._graphs if isinstance(graphs, Stages) else graphs)}

    def __getitem__(self, name: str) -> GraphModule:
        found = self._graphs[name]
        if not isinstance(found, GraphModule):
            found = self._graphs[name] = found()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def __or__(self, other: Mapping[str, GraphModule]) -> Stages:
        """Both, without making any that is not made yet."""
        return Stages({**self._graphs, **Stages(other)._graphs})


@dataclass(frozen=True)
class Entry:
    """What a file holds: graphs, and facts about them that JSON can state."""

    graphs: Stages
    facts: dict[str, Any]


def is_on() -> bool:
    """Whether graphs are kept: not if ``GAQ_CACHE_GRAPHS`` is 0."""
    return os.environ.get(SWITCH, "1") != "0"


def fetch(key: str | None, needed: Sequence[str] = ()) -> Entry | None:
    """The entry of this key, or None if there is none that can be used.

    Args:
        key: from :func:`key_of`; None is in no cache.
        needed: the graphs that will be asked for in any case, so that one that makes no sense is found now.
    """
    if key is None or not is_on():
        return None
    try:
        path = _path(key)
        if not path.exists():
            return None
        header, tensors = read_file(path, MAGIC)
        if (header["format"], header["key"]) != (VERSION, key):
            raise FileFormatError("it is of another version, or not what its name says")
        if header["checksum"] != checksum(tensors, header):
            raise FileFormatError("its content does not match its checksum")
        graphs = Stages({n: _reader(stage, tensors) for n, stage in header["graphs"].items()})
        for name in needed:
            graphs[name]
        with suppress(OSError):  # somebody else's folder
            path.touch()
        return Entry(graphs, dict(header["facts"]))
    except (GaqError, *_DAMAGED) as error:
        what = error.what if isinstance(error, GaqError) else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the cached graph {key} is not used and made again: {what}", CacheWarning, stacklevel=3
        )
        return None


def store(key: str | None, graphs: Mapping[str, GraphModule], facts: Mapping[str, Any]) -> None:
    """Write an entry; graphs that files cannot hold are not kept, and a full disk is only a warning."""
    if key is None or not is_on():
        return
    shared = _Shared()
    try:
        stages = {name: _stage_to_json(graph, shared) for name, graph in graphs.items()}
        header = {"format": VERSION, "key": key, "graphs": stages, "facts": dict(facts)}
        json.dumps(header)
    except (FileFormatError, TypeError, ValueError):  # an operator or argument that no file may hold
        return
    try:
        path = _path(key)
        write_file(path, MAGIC, header, shared.tensors)
        _forget(path.parent)
    except (SafetensorError, *_DAMAGED) as error:
        warnings.warn(f"graphs cannot be kept for the next time: {error}", CacheWarning, stacklevel=3)


def key_of(*parts: str | bytes) -> str:
    """The key of what follows from these parts, this package and its surroundings."""
    return combined(*parts, *surroundings())


def arithmetic() -> tuple[str, ...]:
    """What last bits of torch's results depend on; a cached number is the one that would be computed."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (str(torch.get_num_threads()), torch.get_float32_matmul_precision(), capability)


def cached_forces(quantized: GraphModule, form: GraphFormat, example: Sequence[Tensor]) -> GraphModule:
    """:func:`.passes.pipeline.forces_of`, traced once for each structure of a graph.

    Tracing sees the types and shapes of the graph's weights, never their values, so these are no part of
    the key and are put in afterwards. Any tensor that is no parameter and no buffer would be seen, and is.
    """
    state = {**dict(quantized.named_parameters()), **dict(quantized.named_buffers())}
    key = _forces_key(quantized, state, form, example) if is_on() else None
    entry = fetch(key)
    try:
        if entry is not None:
            return _with_state(entry, state)
    except (GaqError, *_DAMAGED) as error:
        warnings.warn(f"a cached gradient is not used and made again: {error}", CacheWarning, stacklevel=3)
    graph = forces_of(quantized, form, example)
    store(key, *_without_state(graph, state))
    return graph


# --- keys and weights of gradients --------------------------------------------------------------


def _forces_key(
    quantized: GraphModule, state: Mapping[str, Tensor], form: GraphFormat, example: Sequence[Tensor]
) -> str | None:
    try:
        nodes = json.dumps([node_to_json(node, traced=True) for node in quantized.graph.nodes])
    except FileFormatError:
        return None
    parts: list[str | bytes] = ["forces", nodes, json.dumps(form.to_dict())]
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():  # in order, and which of them are one tensor
        same = first.setdefault(_identity(value), name)
        parts += [name, same, f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.requires_grad}"]
    for node in quantized.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in state:
            parts += ["constant", str(node.target), tensor_bytes(attribute(quantized, node))]
    parts += [f"{value.dtype} {tuple(value.shape)} {value.stride()}" for value in example]
    return key_of(*parts)


def _identity(value: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor share; of two without elements, nothing."""
    if not value.numel():
        return (id(value),)
    return (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)


def _without_state(
    graph: GraphModule, state: Mapping[str, Tensor]
) -> tuple[dict[str, GraphModule], dict[str, Any]]:
    """The graph with empty tensors in place of the weights that it was given, and whose places they are."""
    known = {_identity(value): name for name, value in state.items() if value.numel()}
    places = {}
    root = nn.Module()
    for name, value in _attributes(graph).items():
        origin = known.get(_identity(value))
        if origin is not None:
            places[name] = origin
        _set(root, name, torch.empty(0) if origin is not None else value, False)
    hollow, values = Graph(), dict[Node, Node]()
    hollow.output(hollow.graph_copy(graph.graph, values))
    for old, new in values.items():
        new.meta = dict(old.meta)
    return {"forces": module_of(root, hollow)}, {"places": places}


def _with_state(entry: Entry, state: Mapping[str, Tensor]) -> GraphModule:
    graph = entry.graphs["forces"]
    for name, origin in entry.facts["places"].items():
        setattr(graph, name, state[origin].detach())
    return graph


# --- graphs <-> JSON ----------------------------------------------------------------------------


class _Shared:
    """The tensors of a file, each once, however many graphs have it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def name(self, value: Tensor) -> str:
        known = self._names.setdefault(_identity(value), f"t{len(self._names)}")
        if known not in self.tensors:
            self.tensors[known] = value.detach().clone().contiguous()
        return known


def _attributes(graph: GraphModule) -> dict[str, Tensor]:
    """The tensors that nodes get, in the order of these."""
    return {str(n.target): attribute(graph, n) for n in graph.graph.nodes if n.op == "get_attr"}


def _stage_to_json(graph: GraphModule, shared: _Shared) -> dict[str, Any]:
    parameters = {id(value) for value in graph.parameters()}
    groups = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            if not isinstance(module, FusedRows):
                raise FileFormatError(f"a module {type(module).__name__} cannot be kept")
            groups[str(node.target)] = _group_to_json(module, shared)
    return {
        "nodes": [node_to_json(node, traced=True) for node in graph.graph.nodes],
        "tensors": [[n, shared.name(v), id(v) in parameters] for n, v in _attributes(graph).items()],
        "groups": groups,
    }


def _group_to_json(group: FusedRows, shared: _Shared) -> dict[str, Any]:
    shapes = {
        node.name: [s.rows, list(s.row), str(s.dtype).removeprefix("torch.")]
        for node, s in group.shapes.items()
    }
    return {
        "nodes": [node_to_json(node) for node in group.graph.nodes],
        "tensors": [
            [name, shared.name(value), False] for name, value in group.named_buffers(remove_duplicate=False)
        ],
        "rows": group.rows,
        "shapes": shapes,
    }


def _reader(stage: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Callable[[], GraphModule]:
    return lambda: _stage_from_json(stage, tensors)


def _stage_from_json(stage: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GraphModule:
    root = _root(stage, tensors)
    for name, group in stage["groups"].items():
        check_name(name)
        root.add_module(name, _group_from_json(group, tensors))
    names = {name for name, *_ in stage["tensors"]}
    return checked(module_of(root, graph_from_json(stage["nodes"], names, stage["groups"])))


def _group_from_json(group: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FusedRows:
    graph = graph_from_json(group["nodes"], {name for name, *_ in group["tensors"]})
    shapes = {}
    for node in graph.nodes:
        if node.name in group["shapes"]:
            rows, row, dtype = group["shapes"][node.name]
            shapes[node] = RowShape(rows, tuple(row), getattr(torch, dtype))
    return FusedRows(_root(group, tensors), graph, group["rows"], shapes)


def _root(stage: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name, tensor, is_parameter in stage["tensors"]:
        _set(root, name, tensors[tensor].detach(), is_parameter)  # an object of its own for every name
    return root


def _set(root: nn.Module, name: str, value: Tensor, is_parameter: bool) -> None:
    """Register a tensor under a name that may have dots in it."""
    *path, last = name.split(".")
    for part in (*path, last):
        if not (
            part.isascii() and part.replace("_", "x").isalnum()
        ):  # "0_convolution", but nothing like code
            raise FileFormatError(f"{part!r} is no plain name")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if is_parameter:
        root.register_parameter(last, nn.Parameter(value, requires_grad=False))
    else:
        root.register_buffer(last, value)


# --- files --------------------------------------------------------------------------------------


def _path(key: str) -> Path:
    folder = cache_dir().parent / "graphs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key[:40]}.safetensors"


def _forget(folder: Path) -> None:
    """Delete the entries that were not read for longest, until the rest is small enough."""
    found = []
    for path in folder.glob("*.safetensors"):
        try:
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        except OSError:  # another process was faster
            continue
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found)[:-1]:
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size
