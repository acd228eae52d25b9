"""One file for one compiled potential: a safetensors file with the graph in its header.

Nothing in a ``.gaq`` file is code. The header holds JSON: the integer graph (operator names and
arguments), configuration, input format, report and versions; the tensors are the weights. Reading
resolves operator names against a closed list (pure ``aten`` operators that take a tensor, ``gaq``
operators, integer arithmetic), so a foreign file can be wrong but cannot run anything. Kernels
are rebuilt from the graph, or found in the kernel cache.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
import operator
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .capture.graphs import CalibratedRange, GraphFormat
from .config import QuantConfig
from .errors import ConfigError, FileFormatError
from .operators import registration as _registration  # noqa: F401 - registers the gaq operators that graphs name
from .passes.graph_tools import attribute
from .passes.tag_irreps import tag_irreps
from .verify.report import Report

if TYPE_CHECKING:
    from .potential import Potential

MAGIC = "gaq_compile"
VERSION = 2

_INTEGER_ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
# Factories have no tensor argument; any other operator without one is refused.
_FACTORIES = {"zeros", "ones", "full", "arange", "scalar_tensor", "empty"}
_META = ("irreps", "bits", "label")


@dataclass(frozen=True)
class Content:
    """What a ``.gaq`` file holds."""

    graph: GraphModule
    form: GraphFormat
    config: QuantConfig
    report: Report
    calibrated: CalibratedRange | None


def save(potential: Potential, path: Path) -> Path:
    """Write ``potential`` to ``path`` (made whole or not at all)."""
    graph = potential.graphs["fold_integers"]
    nodes = [_node_to_json(node) for node in graph.graph.nodes]
    tensors = {
        str(n.target): attribute(graph, n).detach().clone().contiguous()
        for n in graph.graph.nodes
        if n.op == "get_attr"
    }
    header = {
        "format": VERSION,
        "nodes": nodes,
        "form": potential.form.to_dict(),
        "config": json.loads(potential.config.to_json()),
        "report": potential.report.to_dict(),
        "calibrated": asdict(potential.calibrated) if potential.calibrated else None,
    }
    header["checksum"] = _checksum(tensors, header)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as scratch:
        pass
    try:
        save_file(tensors, scratch.name, metadata={MAGIC: json.dumps(header)})
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch.name, 0o666 & ~mask)  # temporary files are private, this one is the user's
        os.replace(scratch.name, path)
    finally:
        Path(scratch.name).unlink(missing_ok=True)
    return path


def read(path: Path) -> Content:
    """Read a ``.gaq`` file.

    Raises:
        FileFormatError: if it does not exist, is truncated, damaged, foreign, or of a version
            that this library does not know.
    """
    header, tensors = _raw(path)
    try:
        if header["format"] != VERSION:
            raise FileFormatError(
                f"file version {header['format']}, this library reads version {VERSION}",
                where=str(path),
                fix="write the file again with this version of gaq_compile",
            )
        if header["checksum"] != _checksum(tensors, header):
            raise FileFormatError(
                "the content does not match its checksum",
                where=str(path),
                fix="the file is damaged: copy it again",
            )
        graph = tag_irreps(_graph_from_json(header["nodes"], tensors))
        config = QuantConfig.from_json(json.dumps(header["config"]))
        calibrated = CalibratedRange.from_dict(header["calibrated"]) if header["calibrated"] else None
        form, report = GraphFormat.from_dict(header["form"]), Report.from_dict(header["report"])
        return Content(graph, form, config, report, calibrated)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, FileFormatError):
            raise _named(error, path) from error
        hint = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise FileFormatError(
            f"the file's content makes no sense: {hint}{error}",
            where=str(path),
            fix="the file is damaged or foreign",
        ) from error


def _named(error: FileFormatError, path: Path) -> FileFormatError:
    """The same error with the file and a way out, where it came from inside the graph."""
    if error.fix:
        return error
    where = f"{path}, {error.where}" if error.where else str(path)
    return FileFormatError(error.what, where=where, fix="the file is damaged or foreign: write it again")


def _raw(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileFormatError("no such file", where=str(path), fix="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if MAGIC not in metadata:
                raise FileFormatError(
                    "not a gaq_compile file", where=str(path), fix="pass a file made by Potential.save"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        header = json.loads(metadata[MAGIC])
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


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Over everything: a changed cutoff or coefficient is as wrong as a changed weight."""
    rest = {key: value for key, value in header.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- graph -> JSON ------------------------------------------------------------------------------


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "target": _target_name(node),
        "args": [_to_json(a) for a in node.args],
        "kwargs": {k: _to_json(v) for k, v in node.kwargs.items()},
        "meta": {k: node.meta[k] for k in _META if k in node.meta},
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


def _graph_from_json(nodes: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> GraphModule:
    graph = Graph()
    values: dict[str, Node] = {}
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(_plain_name(name), tensor)
    for item in nodes:
        _check_names(item)
        args = tuple(_from_json(a, values) for a in item["args"])
        kwargs = {k: _from_json(v, values) for k, v in item["kwargs"].items()}
        op, name, target = item["op"], item["name"], item["target"]
        if op == "placeholder":
            node = graph.placeholder(target)
        elif op == "get_attr" and target in tensors:
            node = graph.get_attr(target)
        elif op == "call_function":
            node = graph.create_node("call_function", _resolve(target), args, kwargs, name=name)
        elif op == "output":
            node = graph.output(args[0])
        else:
            raise FileFormatError(f"a graph node of kind {op!r} and target {target!r} is not allowed")
        node.meta.update({k: str(v) for k, v in item["meta"].items() if k in _META})
        values[name] = node
    kinds = {node.op for node in graph.nodes}
    if not {"placeholder", "output"} <= kinds:
        raise FileFormatError("the graph has no inputs or no output")
    module = GraphModule(root, graph)
    module.graph.lint()
    return module


def _check_names(item: Mapping[str, Any]) -> None:
    """Names of nodes, inputs and keywords: torch.fx writes them into Python source."""
    for name in (item["name"], *item["kwargs"], *([item["target"]] if item["op"] == "placeholder" else [])):
        _plain_name(name)


def _plain_name(name: Any) -> str:
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
