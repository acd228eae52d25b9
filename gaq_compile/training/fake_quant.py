"""A quantized energy graph as a module that can be trained: the integers' values, smooth gradients.

It is the graph that inference runs (:mod:`gaq_compile.passes.insert_mddq`), with each operator replaced
by one that can be differentiated twice: what training sees is what the kernels compute, to float32
rounding. Trained are the float weights behind the integers, the scales of weights and the steps of
activations (as logarithms, so that they stay positive), and what stays in float: biases and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..capture.graphs import GraphFormat
from ..config import activation_scheme
from ..errors import CaptureError
from ..ir.specs import LinearSpec, linear_spec
from ..models.forces import energy_and_forces
from ..numerics.activations import activation_blocks
from ..numerics.learned_steps import learned_codes, learned_fake_quantize, learned_weight
from ..numerics.packing import pack_int4, unpack_int4
from ..numerics.weights import CODES, rows_of
from ..operators import reference as ref
from ..passes.graph_tools import add_buffer, aten, attribute, calls, copied, finished, gaq
from ..passes.shift_energies import shift_table
from .convolution import convolve, kernels_of
from .linear import linear

_INSIDE = 0.49  # of a step: how far from its integer a weight starts at most


class FakeQuantized(nn.Module):
    """A quantized potential, trainable.

    Args:
        prepared: the float energy graph.
        quantized: the same with integers in place (:func:`~gaq_compile.passes.insert_mddq.insert_mddq`).
        form: their inputs.
        geometric: whether the gradient of a rounded vector is that of its magnitude and direction
            (:func:`~gaq_compile.numerics.learned_steps.learned_fake_quantize`).

    Raises:
        CaptureError: if a layer of ``quantized`` is not in ``prepared``.
    """

    def __init__(
        self, prepared: GraphModule, quantized: GraphModule, form: GraphFormat, geometric: bool = True
    ) -> None:
        super().__init__()
        self.form, self.quantized = form, (quantized,)  # in a tuple: no submodule
        self.geometric = geometric
        self.weights, self.logs, self.floats = (nn.ParameterDict() for _ in range(3))
        self._graph = (self._trainable(prepared, quantized),)
        table = shift_table(quantized)
        self._table = None if table is None else str(table.target)
        shifts = None if table is None else attribute(quantized, table).clone()
        self.register_buffer("energy_shift", shifts, persistent=False)

    def forward(self, **tensors: Tensor) -> Tensor:
        """Atomic energies (N,), eV, of the tensors that ``form.inputs`` names."""
        graph = self._graph[0]
        values: dict[Node, Any] = {}
        inputs = iter(self.form.inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = tensors[next(inputs)]
            elif node.op == "get_attr":
                values[node] = self._value(str(node.target))
            elif node.op == "output":
                return values[node.args[0]]  # type: ignore[no-any-return]
            else:
                args = torch.fx.node.map_arg(node.args, values.__getitem__)
                named = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **named)
        raise CaptureError("a graph without an output")

    def energy_and_forces(
        self, tensors: Mapping[str, Tensor], create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Energies (graphs,) in eV and forces (N, 3) in eV/Å."""
        return energy_and_forces(self, tensors, create_graph)

    def shift_energies(self, shifts: Mapping[int, float]) -> None:
        """Add energies (eV) to those of atoms, by atomic number; forces stay as they are."""
        if isinstance(self.energy_shift, Tensor):  # a model of its own tensors knows no elements
            for number, shift in shifts.items():
                self.energy_shift[number] += shift

    def vector_parts(self) -> dict[str, Tensor]:
        """Of each parameter that acts on features with l >= 1, where it does: masks by parameter name."""
        gm, found = self.quantized[0], dict[str, Tensor]()
        for node in calls(gm, gaq.decode_weight.default):
            layer = _Layer.of(node)
            weight, scale = f"weights.{_key(layer.codes)}", f"logs.{_key(layer.scale)}"
            found[weight] = torch.zeros(layer.spec.weight_numel, dtype=torch.bool)
            found[scale] = torch.zeros(layer.spec.scale_numel, dtype=torch.bool)
            for path in layer.spec.paths:
                if path.block_in.l:
                    found[weight][path.offset : path.offset + path.numel] = True
                    found[scale][path.scale_offset : path.scale_offset + path.block_out.mul] = True
        for node in calls(gm, gaq.mddq.default):
            _, steps, irreps, *_ = cast(Any, node.args)
            parts = [torch.full((b.mul,), b.l > 0) for b in activation_blocks(irreps)]
            found[f"logs.{_key(steps)}"] = torch.cat(parts)
        return {name: part for name, part in found.items() if bool(part.any())}

    def integer_graph(self) -> GraphModule:
        """The graph that inference runs, with the integers, steps and floats as they are now."""
        gm = copied(self.quantized[0])
        with torch.no_grad():
            for node in calls(gm, gaq.decode_weight.default):
                layer = _Layer.of(node)
                codes = self._codes(layer).to(CODES[layer.bits])
                _change(gm, layer.codes, pack_int4(codes) if layer.bits == 4 else codes)
                _change(gm, layer.scale, self.logs[_key(layer.scale)].exp().to(torch.bfloat16))
            for node in calls(gm, gaq.mddq.default):
                _change(gm, node.args[1], self.logs[_key(node.args[1])].exp())
            for node in list(gm.graph.nodes):
                if node.op == "get_attr" and _key(node) in self.floats:
                    _change(gm, node, self.floats[_key(node)].detach().clone())
                elif node.op == "get_attr" and node.target == self._table:
                    _change(gm, node, self.energy_shift.clone())  # type: ignore[operator,union-attr]
        return finished(gm)

    def _codes(self, layer: _Layer) -> Tensor:
        weight, scale = self.weights[_key(layer.codes)], self.logs[_key(layer.scale)].exp()
        steps = None if layer.steps is None else self.logs[_key(layer.steps)].exp()
        return learned_codes(weight, scale, steps, layer.bits, layer.spec)

    # --- the graph --------------------------------------------------------------------------------

    def _value(self, target: str) -> Tensor:
        key = target.replace(".", "_")
        if key in self.weights:
            return self.weights[key]
        if key in self.logs:
            return self.logs[key].exp()
        if target == self._table:
            return self.energy_shift  # type: ignore[return-value]
        return self.floats[key] if key in self.floats else _tensor_at(self._graph[0], target)

    def _trainable(self, prepared: GraphModule, quantized: GraphModule) -> GraphModule:
        gm = copied(quantized)
        floats = {str(n.args[-1]): n for n in calls(prepared, gaq.irreps_linear.default)}
        for node in calls(gm, gaq.decode_weight.default):
            label = str(node.args[-1])
            if label not in floats:
                raise CaptureError(f"no layer {label!r} in the float graph")
            self._add_weight(gm, node, attribute(prepared, floats[label].args[1]))  # type: ignore[arg-type]
        for node in calls(gm, gaq.mddq.default):
            self._add_log(gm, node.args[1])  # type: ignore[arg-type]
        for node in calls(gm, gaq.irreps_linear.default):
            for argument in node.args[1:3]:
                self._add_float(gm, argument)
        for node in calls(gm, aten.embedding.default):
            self._add_float(gm, node.args[0])
        for node in list(gm.graph.nodes):
            make = _DIFFERENTIABLE.get(node.target)
            if make is not None:
                node.target, node.args = make(node)
            if node.target is _activation:
                node.args = (*node.args, self.geometric)
        return gm

    def _add_weight(self, gm: GraphModule, node: Node, weight: Tensor) -> None:
        layer = _Layer.of(node)
        self._add_log(gm, layer.scale)
        stored, scale = attribute(gm, layer.codes), attribute(gm, layer.scale).float()
        codes = unpack_int4(stored, layer.spec.weight_numel) if layer.bits == 4 else stored
        steps = None if layer.steps is None else attribute(gm, layer.steps)
        self.weights[_key(layer.codes)] = nn.Parameter(_near(weight, codes, scale, steps, layer.spec))

    def _add_log(self, gm: GraphModule, node: Node) -> None:
        if _key(node) not in self.logs:
            self.logs[_key(node)] = nn.Parameter(attribute(gm, node).detach().float().log())

    def _add_float(self, gm: GraphModule, node: Any) -> None:
        if isinstance(node, Node) and node.op == "get_attr" and _key(node) not in self.floats:
            self.floats[_key(node)] = nn.Parameter(attribute(gm, node).detach().clone())


@dataclass(frozen=True)
class _Layer:
    """The arguments of a ``decode_weight`` node."""

    codes: Node
    scale: Node
    steps: Node | None
    bits: int
    spec: LinearSpec

    @staticmethod
    def of(node: Node) -> _Layer:
        codes, scale, steps, bits, spec, _ = cast(Any, node.args)
        return _Layer(codes, scale, steps, int(bits), linear_spec(spec))


def _near(weight: Tensor, codes: Tensor, scale: Tensor, steps: Tensor | None, spec: LinearSpec) -> Tensor:
    """Float weights as near as can be to ``weight`` that round to these integers."""
    parts = []
    for path in spec.paths:
        columns = weight.detach()[path.offset : path.offset + path.numel].view(-1, path.block_out.mul)
        whole = codes[path.offset : path.offset + path.numel].view(-1, path.block_out.mul).float()
        s = scale[path.scale_offset : path.scale_offset + path.block_out.mul]
        s = s if steps is None else s / rows_of(steps, path)
        parts.append((torch.clamp(columns / s, whole - _INSIDE, whole + _INSIDE) * s).flatten())
    return torch.cat(parts) if parts else weight.detach().clone()


def _key(node: Any) -> str:
    return str(node.target).replace(".", "_")


def _tensor_at(module: nn.Module, target: str) -> Tensor:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def _change(gm: GraphModule, node: Any, value: Tensor) -> None:
    """Let a ``get_attr`` node, and all of the same attribute, read another value; its owner is shared."""
    target = str(node.target)
    name = add_buffer(gm, target.replace(".", "_"), value)
    for other in gm.graph.nodes:
        if other.op == "get_attr" and str(other.target) == target:
            other.target = name


# --- operators that can be differentiated twice ---------------------------------------------------

Replacement = tuple[Callable[..., Any], tuple[Any, ...]]


def _weight(codes: Tensor, scale: Tensor, steps: Tensor | None, bits: int, spec: str) -> Tensor:
    return learned_weight(codes, scale, steps, bits, linear_spec(spec))


def _activation(x: Tensor, steps: Tensor, irreps: str, scheme: str, geometric: bool) -> Tensor:
    return learned_fake_quantize(x, steps, irreps, activation_scheme(scheme), geometric)


def _conv(x: Tensor, sh: Tensor, weight: Tensor, edges: Sequence[Tensor], spec: str) -> Tensor:
    return convolve(x, sh, weight, edges, kernels_of(spec))


def _half(x: Tensor, _exponent: int) -> Tensor:
    return x + (x.half().float() - x).detach()


def _without_label(function: Callable[..., Any]) -> Callable[[Node], Replacement]:
    return lambda node: (function, tuple(node.args[:-1]))


_DIFFERENTIABLE: dict[Any, Callable[[Node], Replacement]] = {
    gaq.decode_weight.default: _without_label(_weight),
    gaq.mddq.default: _without_label(_activation),
    gaq.conv.default: _without_label(_conv),
    gaq.irreps_linear.default: _without_label(linear),
    gaq.round_half.default: _without_label(_half),
    gaq.gate.default: _without_label(ref.gate),
    gaq.spherical_harmonics.default: _without_label(ref.spherical_harmonics),
    gaq.tensor_product.default: _without_label(ref.tensor_product),
}
