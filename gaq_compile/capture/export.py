"""``torch.export`` of an energy model: one FX graph, atom and edge counts dynamic."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from ..errors import CaptureError
from .base import EnergyModel


def export_energy(model: EnergyModel, inputs: Sequence[Tensor]) -> GraphModule:
    """Export ``model.module(*inputs) -> energies`` with every leading dimension dynamic.

    Dimensions of a model captured from tensors of its own are dynamic where its code allows.

    Args:
        model: an energy model made of gaq operators.
        inputs: an example batch of at least two graphs (a dimension of 0 or 1 would be baked in).

    Returns:
        A functional graph (no in-place operators) with weights as attributes.

    Raises:
        CaptureError: naming the operator and the source line that could not be captured.
    """
    dynamic = Dim.AUTO if model.form.positions else Dim.DYNAMIC
    shapes: Any = tuple({0: dynamic} if x.dim() else None for x in inputs)
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
                return _checked(_plain(program.module(check_guards=False)), model)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
            failure = error
    reason = failure or RuntimeError("no export mode was given")
    raise _explained(reason, model.family) from failure


def _checked(graph_module: GraphModule, model: EnergyModel) -> GraphModule:
    """Refuse a graph in which export has fixed the number of atoms of a model of its own tensors."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for name, node in zip(model.form.inputs, placeholders, strict=True):
        if name == model.form.positions and isinstance(node.meta["val"].shape[0], int):
            raise CaptureError(
                f"export fixed this {model.family} model at {node.meta['val'].shape[0]} atoms",
                where=f"its input {name!r}",
                fix="use sizes (x.shape[0]) in tensor operations, not in Python loops or numbers",
            )
    return graph_module


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
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "gaq_compile" not in f.filename]
    where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "inside torch.export"
    first = (str(error).strip().splitlines() or [""])[0]
    return CaptureError(
        f"torch.export cannot take this {family} model: {type(error).__name__}: {first}",
        where=where,
        fix="rewrite that line without Python branches or loops on tensor values, or add a capture recipe",
    )
