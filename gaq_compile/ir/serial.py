"""Graphs and tensors in files without code: safetensors whose header is JSON.

The header holds graphs as operator names and arguments. Reading resolves the names against a closed list
(pure ``aten`` operators that take a tensor, ``gaq`` operators, integer arithmetic), so a foreign file can be
wrong but cannot run anything. A checksum covers the header and the tensors.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
import operator
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..errors import FileFormatError
from .traced import traced_from_json, traced_to_json
from .unwritten import module_of

_INTEGER_ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
# Factories have no tensor argument; any other operator without one is refused.
_FACTORIES = {"zeros", "ones", "full", "arange", "scalar_tensor", "empty"}
_META = ("irreps", "bits", "label")


# --- files --------------------------------------------------------------------------------------


def write_file(path: Path, magic: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file whole or not at all; the header gets its checksum here.

    Raises:
        FileFormatError: if its folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileFormatError("no such folder", where=str(path.parent), fix="create it before saving")
    sealed = {**header, "checksum": checksum(tensors, header)}
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as scratch:
        pass
    try:
        save_file(dict(tensors), scratch.name, metadata={magic: json.dumps(sealed)})
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch.name, 0o666 & ~mask)  # temporary files are private, this one is the user's
        os.replace(scratch.name, path)
    finally:
        Path(scratch.name).unlink(missing_ok=True)


def read_file(path: Path, magic: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file; its checksum is not looked at.

    Raises:
        FileFormatError: if it does not exist, is truncated or foreign, or its header is no JSON object.
    """
    if not path.is_file():
        raise FileFormatError("no such file", where=str(path), fix="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if magic not in metadata:
                raise FileFormatError(
                    "not a gaq_compile file", where=str(path), fix="pass a file made by Potential.save"
                )
            # Copies: the last bits of a matrix product depend on where in memory its factors begin.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        header = json.loads(metadata[magic])
    except FileFormatError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"cannot be read: {error}", where=str(path), fix="the file is truncated, damaged or foreign"
        ) from error
    if not isinstance(header, dict):
        raise FileFormatError(
            "the header is no JSON object", where=str(path), fix="the file is damaged or foreign"
        )
    return header, tensors


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Over everything: a changed cutoff or coefficient is as wrong as a changed weight."""
    rest = {key: value for key, value in header.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- graph -> JSON ------------------------------------------------------------------------------


def node_to_json(node: Node, traced: bool = False) -> dict[str, Any]:
    """A node with its tags; with what tracing recorded of its value, if ``traced``.

    Raises:
        FileFormatError: for an operator or an argument that files cannot hold.
    """
    meta = {k: node.meta[k] for k in _META if k in node.meta}
    if traced and node.meta.get("val") is not None:
        meta["val"] = traced_to_json(node.meta["val"])
    return {
        "name": node.name,
        "op": node.op,
        "target": _target_name(node),
        "args": [_to_json(a) for a in node.args],
        "kwargs": {k: _to_json(v) for k, v in node.kwargs.items()},
        "meta": meta,
    }


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    for name, function in _INTEGER_ARITHMETIC.items():
        if node.target is function:
            return f"operator.{name}"
    raise FileFormatError(f"the operator {node.target} cannot be saved", where=node.name)


_CONSTANTS: tuple[type, ...] = (torch.dtype, torch.layout, torch.device, torch.memory_format)


def _to_json(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_to_json(v) for v in value]}
    if isinstance(value, _CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FileFormatError(f"an argument of type {type(value).__name__} cannot be saved", where=repr(value))


# --- JSON -> graph ------------------------------------------------------------------------------


def graph_module_from_json(nodes: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> GraphModule:
    """A graph whose attributes are ``tensors``, all of them buffers, called by plain names.

    Raises:
        FileFormatError, KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError: for what
            is no graph.
    """
    root = nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(check_name(name), tensor)
    return checked(module_of(root, graph_from_json(nodes, tensors)))


def checked(module: GraphModule) -> GraphModule:
    """The module, if its graph is sound and has inputs and an output.

    Raises:
        FileFormatError, RuntimeError: otherwise.
    """
    kinds = {node.op for node in module.graph.nodes}
    if not {"placeholder", "output"} <= kinds:
        raise FileFormatError("the graph has no inputs or no output")
    module.graph.lint()
    return module


def graph_from_json(
    nodes: list[dict[str, Any]], attributes: Collection[str], modules: Collection[str] = ()
) -> Graph:
    """The inverse of :func:`node_to_json`, node by node.

    Args:
        nodes: in order.
        attributes: the names of tensors that nodes may get.
        modules: the names of modules that nodes may call.

    Raises:
        FileFormatError, KeyError, TypeError, ValueError, IndexError, AttributeError: as
            :func:`graph_module_from_json`.
    """
    graph = Graph()
    values: dict[str, Node] = {}
    for item in nodes:
        _check_names(item)
        args = tuple(_from_json(a, values) for a in item["args"])
        kwargs = {k: _from_json(v, values) for k, v in item["kwargs"].items()}
        op, name, target = item["op"], item["name"], item["target"]
        if op == "placeholder":
            node = graph.create_node(op, target, name=name)
        elif (op == "get_attr" and target in attributes) or (op == "call_module" and target in modules):
            node = graph.create_node(op, target, args, kwargs, name=name)
        elif op == "call_function":
            node = graph.create_node(op, _resolve(target), args, kwargs, name=name)
        elif op == "output":
            node = graph.output(args[0])
        else:
            raise FileFormatError(f"a graph node of kind {op!r} and target {target!r} is not allowed")
        node.meta.update({k: str(v) for k, v in item["meta"].items() if k in _META})
        if "val" in item["meta"]:
            node.meta["val"] = traced_from_json(item["meta"]["val"])
        values[name] = node
    return graph


def _check_names(item: Mapping[str, Any]) -> None:
    """Names of nodes, inputs and keywords: torch.fx writes them into Python source."""
    for name in (item["name"], *item["kwargs"], *([item["target"]] if item["op"] == "placeholder" else [])):
        check_name(name)


def check_name(name: Any) -> str:
    """A name that may be written into Python source; raises FileFormatError for any other."""
    if not (isinstance(name, str) and name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
        raise FileFormatError(f"{name!r} is no plain name")
    return name


def _resolve(target: str) -> Any:
    """An operator by name, from the closed list."""
    namespace, _, rest = target.partition(".")
    if namespace == "operator" and rest in _INTEGER_ARITHMETIC:
        return _INTEGER_ARITHMETIC[rest]
    if namespace in ("aten", "gaq"):
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        if _is_pure(found, packet):
            return found
    raise FileFormatError(f"the operator {target!r} is not allowed in a file")


def _is_pure(found: Any, packet: str) -> bool:
    schema = found._schema
    takes_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return not schema.is_mutable and (takes_tensor or packet in _FACTORIES)


def _from_json(value: Any, values: Mapping[str, Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return values[content]
    if kind in ("list", "tuple"):
        items = [_from_json(v, values) for v in content]
        return items if kind == "list" else tuple(items)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "torch":
        return _torch_constant(content)
    raise FileFormatError(f"an argument of kind {kind!r} is not allowed")


def _torch_constant(text: str) -> Any:
    if text in ("cpu", "cuda"):
        return torch.device(text)
    constant = getattr(torch, text)
    if not isinstance(constant, _CONSTANTS):
        raise FileFormatError(f"the constant {text!r} is not allowed")
    return constant
