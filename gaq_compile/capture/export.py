"""``torch.export`` of an energy model: one FX graph, atom and edge counts dynamic."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from ..errors import CaptureError


def export_energy(
    module: nn.Module, inputs: Sequence[Tensor], family: str, modes: Sequence[bool] = (True, False)
) -> GraphModule:
    """Export ``module(*inputs) -> atomic energies`` with every leading dimension dynamic.

    Args:
        module: an energy model made of gaq operators.
        inputs: an example batch of at least two graphs (a dimension of 0 or 1 would be baked in).
        family: the model family, for messages.
        modes: export modes to try in order, strict (``True``) or not: neither takes every model.

    Returns:
        A functional graph (no in-place operators) with weights as attributes.

    Raises:
        CaptureError: naming the operator and the source line that could not be captured.
    """
    shapes = tuple({0: Dim.DYNAMIC} if x.dim() else None for x in inputs)
    module = module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    failure: BaseException | None = None
    for strict in modes:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=strict)
                program = program.run_decompositions({})
                return _plain(program.module(check_guards=False))
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
            failure = error
    reason = failure or RuntimeError("no export mode was given")
    raise _explained(reason, family) from failure


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
    message = str(error).strip().splitlines()
    return CaptureError(
        f"torch.export cannot take this {family} model: {type(error).__name__}: {message[0] if message else ''}",
        where=where,
        fix="rewrite that line without Python branches or loops on tensor values, or add a capture recipe",
    )
