"""One file for one compiled potential: a safetensors file with the graph in its header.

Nothing in a ``.gaq`` file is code. The header holds JSON: the integer graph (operator names and
arguments), configuration, input format, report and versions; the tensors are the weights. Reading
resolves operator names against a closed list (pure ``aten`` operators that take a tensor, ``gaq``
operators, integer arithmetic), so a foreign file can be wrong but cannot run anything. Kernels
are rebuilt from the graph, or found in the kernel cache.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from .capture.graphs import CalibratedRange, GraphFormat
from .config import QuantConfig
from .errors import ConfigError, FileFormatError
from .ir.serial import checksum, graph_module_from_json, node_to_json, read_file, write_file
from .operators import registration as _registration  # noqa: F401 - registers the gaq operators that graphs name
from .passes.graph_tools import attribute
from .passes.tag_irreps import tag_irreps
from .verify.report import Report

if TYPE_CHECKING:
    from .potential import Potential

MAGIC = "gaq_compile"
VERSION = 2


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
    nodes = [node_to_json(node) for node in graph.graph.nodes]
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
    write_file(path, MAGIC, header, tensors)
    return path


def read(path: Path) -> Content:
    """Read a ``.gaq`` file.

    Raises:
        FileFormatError: if it does not exist, is truncated, damaged, foreign, or of a version
            that this library does not know.
    """
    header, tensors = read_file(path, MAGIC)
    try:
        if header["format"] != VERSION:
            raise FileFormatError(
                f"file version {header['format']}, this library reads version {VERSION}",
                where=str(path),
                fix="write the file again with this version of gaq_compile",
            )
        if header["checksum"] != checksum(tensors, header):
            raise FileFormatError(
                "the content does not match its checksum",
                where=str(path),
                fix="the file is damaged: copy it again",
            )
        graph = tag_irreps(graph_module_from_json(header["nodes"], tensors))
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
