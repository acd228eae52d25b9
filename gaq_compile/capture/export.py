"""``torch.export`` of an energy model: one FX graph, atom and edge counts dynamic."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from ..errors import CaptureError
from .base import EnergyModel
from .limits import Limits, limits_of


class Exported(NamedTuple):
    """A functional graph (no in-place operators) with weights as attributes, and what it assumes."""

    graph: GraphModule
    limits: Limits


def export_energy(model: EnergyModel, inputs: Sequence[Tensor]) -> Exported:
    """Export ``model.module(*inputs) -> energies`` with every leading dimension dynamic.

    Dimensions of a model captured from tensors of its own are dynamic where its code allows.

    Args:
        model: an energy model made of gaq operators.
        inputs: an example batch of at least two graphs (a dimension of 0 or 1 would be baked in).

    Returns:
        The graph and its :class:`Limits`.

    Raises:
        CaptureError: naming the operator and the source line that could not be captured.
    """
    shapes: Any = tuple(_dynamic(x, model) for x in inputs)
    module = model.module.eval()
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values()):
        shapes = (shapes,)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    failure: BaseException | None = None
    for strict in model.export_modes:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=strict)
                program = program.run_decompositions({})
            return _exported(program, model)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
            failure = error
    reason = failure or RuntimeError("no export mode was given")
    raise _explained(reason, model.family) from failure


def _dynamic(x: Tensor, model: EnergyModel) -> dict[int, Any] | None:
    """Rows of any number; of a model's own integers (a (2, edges) list) every axis."""
    if model.form.positions is None:
        return {0: Dim.DYNAMIC} if x.dim() else None
    return dict.fromkeys(range(1 if x.is_floating_point() else x.dim()), Dim.AUTO) if x.dim() else None


def _exported(program: torch.export.ExportedProgram, model: EnergyModel) -> Exported:
    graph = _plain(program.module(check_guards=False))
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    parameters = list(inspect.signature(model.module.forward).parameters)
    limits = limits_of(
        placeholders,
        program._guards_code or (),  # in no public place, and nothing else knows them
        model.form.inputs,
        parameters,
        bounds=model.form.positions is not None,
    )
    return Exported(graph, limits)


def _plain(exported: nn.Module) -> GraphModule:
    """The exported graph as an ordinary GraphModule: tensors in, one tensor out, no hooks.

    The hooks would refuse sizes of 0 and 1, which the graph itself handles.
    """
    graph = exported.graph  # type: ignore[union-attr]
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_module" and "_guards" in str(node.target):
            graph.erase_node(node)
    output = graph.output_node()
    (value,) = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    output.args = (value,)
    graph.eliminate_dead_code()
    module = GraphModule(exported, graph)
    module.graph.lint()
    return module


def _explained(error: BaseException, family: str) -> CaptureError:
    """The user's own line in the traceback, not torch's machinery."""
    if isinstance(error, CaptureError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "gaq_compile" not in f.filename]
    where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "inside torch.export"
    first = (str(error).strip().splitlines() or [""])[0]
    return CaptureError(
        f"torch.export cannot take this {family} model: {type(error).__name__}: {first}",
        where=where,
        fix="rewrite that line without Python branches or loops on tensor values, or add a capture recipe",
    )
