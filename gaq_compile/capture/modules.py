"""e3nn modules -> modules that call gaq operators, on a copy of the user's model.

Normalisations are folded into the weights, and the layout is component-major inside: each
swapped module converts at its border, and the ``cancel_relayouts`` pass removes the pairs that
meet. A module that is not understood stays as it is and is traced through as plain torch.

Every string that a module passes to an operator is made in ``__init__``: torch's strict export
runs ``forward`` symbolically, and there ``str(Irreps)`` silently becomes an empty string.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from e3nn import nn as enn
from e3nn import o3
from torch import Tensor, nn

from ..ir.layout import blocks, simplified
from ..ir.specs import GateSpec, LinearSpec, TensorProductSpec
from ..operators import activations
from ..operators.registration import ops


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _rows(x: Tensor) -> Tensor:
    """Any number of leading axes as one, which is what operators take."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """Rows with the leading axes of ``x`` again."""
    return rows if x.dim() == 2 else rows.reshape(*x.shape[:-1], rows.shape[-1])


class IrrepsLinear(nn.Module):
    """``gaq::irreps_linear`` with its weights; input and output in e3nn's layout."""

    def __init__(self, spec: LinearSpec, weight: Tensor, bias: Tensor | None, label: str) -> None:
        super().__init__()
        self.spec, self.label = str(spec), label
        self.irreps_in, self.irreps_out = simplified(spec.irreps_in), simplified(spec.irreps_out)
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = ops.relayout(_rows(x), self.irreps_in, "ir_mul")
        y = ops.irreps_linear(rows, self.weight, self.bias, self.spec, False, self.label)
        return _like(x, ops.relayout(y, self.irreps_out, "mul_ir"))


class Gate(nn.Module):
    """``gaq::gate``."""

    def __init__(self, spec: GateSpec, label: str) -> None:
        super().__init__()
        self.spec, self.label = str(spec), label
        self.irreps_in, self.irreps_out = spec.irreps_in, spec.irreps_out

    def forward(self, x: Tensor) -> Tensor:
        y = ops.gate(ops.relayout(_rows(x), self.irreps_in, "ir_mul"), self.spec, self.label)
        return _like(x, ops.relayout(y, self.irreps_out, "mul_ir"))


class TensorProduct(nn.Module):
    """``gaq::tensor_product`` with per-edge weights given by the caller."""

    def __init__(self, spec: TensorProductSpec, label: str) -> None:
        super().__init__()
        self.spec, self.label = str(spec), label
        self.irreps_x, self.irreps_out = simplified(spec.irreps_x), simplified(spec.irreps_out)

    def forward(self, x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        x = ops.relayout(x, self.irreps_x, "ir_mul")
        y = ops.tensor_product(x, sh, weight, self.spec, self.label)
        return ops.relayout(y, self.irreps_out, "mul_ir")


class SphericalHarmonics(nn.Module):
    """``gaq::spherical_harmonics``."""

    def __init__(self, irreps: str, normalize: bool, normalization: str, label: str) -> None:
        super().__init__()
        self.arguments = (irreps, normalize, normalization, label)

    def forward(self, vec: Tensor) -> Tensor:
        return _like(vec, ops.spherical_harmonics(_rows(vec), *self.arguments))


class RadialNetwork(nn.Module):
    """A chain of linear layers on invariants with activations between them."""

    def __init__(self, layers: list[tuple[Tensor, str | None]], label: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.acts: list[str | None] = []
        for i, (weight, act) in enumerate(layers):
            spec = linear_only(weight.shape[0], weight.shape[1])
            self.layers.append(IrrepsLinear(spec, weight.reshape(-1), None, f"{label}.layer{i}"))
            self.acts.append(act)

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = layer(x)
            if act is not None:
                x = activations.apply(act, x)
        return x


def linear_only(n_in: int, n_out: int) -> LinearSpec:
    """The spec of an ordinary dense layer: scalars to scalars."""
    return LinearSpec(f"{n_in}x0e", f"{n_out}x0e", ((0, 0),))


def convert_linear(module: o3.Linear, label: str) -> nn.Module | None:
    """e3nn's ``o3.Linear``, its path normalisation folded into the weights."""
    factored = getattr(module, "f_in", None) is not None or getattr(module, "f_out", None) is not None
    if factored or not module.internal_weights:
        return None
    real = [i for i in module.instructions if 0 not in i.path_shape]
    weight_instructions = [i for i in real if i.i_in != -1]
    bias_instructions = [i for i in real if i.i_in == -1]
    parts, offset = [], 0
    for instruction in weight_instructions:
        size = instruction.path_shape[0] * instruction.path_shape[1]
        parts.append(module.weight[offset : offset + size] * instruction.path_weight)
        offset += size
    spec = LinearSpec(
        _entries(module.irreps_in),
        _entries(module.irreps_out),
        tuple(
            (_place(module.irreps_in, i.i_in), _place(module.irreps_out, i.i_out))
            for i in weight_instructions
        ),
    )
    bias = None
    if bias_instructions:
        if len(bias_instructions) != len(spec.bias_blocks):
            return None
        bias = module.bias
    weight = torch.cat(parts) if parts else torch.zeros(0)
    return IrrepsLinear(spec, weight, bias, label)


def _entries(irreps: o3.Irreps) -> str:
    return "+".join(f"{mul}x{ir}" for mul, ir in irreps if mul > 0)


def _place(irreps: o3.Irreps, index: int) -> int:
    """The index of entry ``index`` once entries of multiplicity 0 are left out."""
    return sum(1 for mul, _ in irreps[:index] if mul > 0)


def convert_tensor_product(module: o3.TensorProduct, label: str) -> nn.Module | None:
    """A ``uvu`` product with external weights and a multiplicity-1 second operand, else None."""
    if module.internal_weights or module.shared_weights or type(module) is not o3.TensorProduct:
        return None
    if any(i.connection_mode != "uvu" or not i.has_weight for i in module.instructions):
        return None
    if not _single_and_distinct(module.irreps_in2):
        return None
    if any(mul == 0 for irreps in (module.irreps_in1, module.irreps_out) for mul, _ in irreps):
        return None
    instructions = tuple((i.i_in1, i.i_in2, i.i_out, float(i.path_weight)) for i in module.instructions)
    spec = TensorProductSpec(
        _entries(module.irreps_in1), _entries(module.irreps_in2), _entries(module.irreps_out), instructions
    )
    return TensorProduct(spec, label)


def _single_and_distinct(irreps: o3.Irreps) -> bool:
    """Multiplicity 1 throughout and no equal neighbours, which the layout would merge."""
    equal = any(a.ir == b.ir for a, b in itertools.pairwise(irreps))
    return not equal and all(mul == 1 for mul, _ in irreps)


def convert_spherical_harmonics(module: o3.SphericalHarmonics, label: str) -> nn.Module | None:
    """Spherical harmonics of each degree once."""
    irreps = module.irreps_out
    if not _single_and_distinct(irreps):
        return None
    return SphericalHarmonics(_entries(irreps), module.normalize, module.normalization, label)


def convert_gate(module: enn.Gate, label: str) -> nn.Module | None:
    """A gate whose scalars are 0e and whose input is the plain concatenation of its parts."""
    scalar_acts = _activation_names(module.act_scalars)
    gate_acts = _activation_names(module.act_gates)
    if scalar_acts is None or gate_acts is None:
        return None
    spec = GateSpec(
        _entries(module.act_scalars.irreps_in),  # the gate's own irreps are merged, its activations are not
        _entries(module.act_gates.irreps_in),
        _entries(module.irreps_gated),
        scalar_acts,
        gate_acts,
    )
    scalars = (*blocks(spec.scalars), *blocks(spec.gates))
    if any(b.l > 0 or b.p != 1 for b in scalars):
        return None
    same_in = spec.irreps_in == simplified(str(module.irreps_in))
    same_out = spec.irreps_out == simplified(str(module.irreps_out))
    return Gate(spec, label) if same_in and same_out else None


def _activation_names(module: nn.Module) -> tuple[str, ...] | None:
    if len(module.irreps_in) != len(module.acts):
        return None
    names = []
    for (mul, _), act in zip(module.irreps_in, module.acts, strict=True):
        if mul == 0:
            continue
        name = "identity" if act is None else activations.name_of(act)
        if name is None:
            return None
        names.append(name)
    return tuple(names)


def convert_radial(module: enn.FullyConnectedNet, label: str) -> nn.Module | None:
    """e3nn's ``FullyConnectedNet``; the activations' factors move into the next layer."""
    layers: list[tuple[Tensor, str | None]] = []
    carried = 1.0
    children = list(module)
    for i, layer in enumerate(children):
        if layer.act is None:
            weight = layer.weight / (layer.h_in * layer.var_in / layer.var_out) ** 0.5
            layers.append((weight * carried, None))
            carried = 1.0
            continue
        text = activations.name_of(layer.act)
        if text is None:
            return None
        name, factor = activations.split(text)
        weight = layer.weight / (layer.h_in * layer.var_in) ** 0.5 * carried
        carried = factor * layer.var_out**0.5
        if i == len(children) - 1:
            name, carried = f"{name}*{carried!r}", 1.0
        layers.append((weight, name))
    return RadialNetwork(layers, label)


def convert_dense(module: nn.Linear, label: str) -> nn.Module | None:
    """``torch.nn.Linear`` on invariants."""
    spec = linear_only(module.in_features, module.out_features)
    return IrrepsLinear(spec, module.weight.t().reshape(-1), module.bias, label)


Converter = Callable[[Any, str], nn.Module | None]

CONVERTERS: dict[type[Any], Converter] = {
    o3.Linear: convert_linear,
    o3.TensorProduct: convert_tensor_product,
    o3.SphericalHarmonics: convert_spherical_harmonics,
    enn.Gate: convert_gate,
    enn.FullyConnectedNet: convert_radial,
    nn.Linear: convert_dense,
}


def swap_first(model: nn.Module) -> nn.Module:
    """What :func:`swap` gives, without copying first what is then replaced: e3nn's modules write and compile
    code when they are copied.

    For models that know their e3nn modules as submodules only: any other reference to one finds its
    replacement, too.
    """
    memo: dict[int, Any] = {}
    _convert_children(model, "", memo)
    return copy.deepcopy(model, memo).eval()


def _convert_children(parent: nn.Module, prefix: str, done: dict[int, Any]) -> None:
    for name, child in parent._modules.items():
        if child is None or id(child) in done:
            continue
        label = f"{prefix}.{name}" if prefix else name
        converter = CONVERTERS.get(type(child))
        replacement = converter(child, label) if converter and not _is_customised(child) else None
        if replacement is None:
            _convert_children(child, label, done)
        else:
            done[id(child)] = replacement


def swap(model: nn.Module, converters: dict[type[Any], Converter] | None = None) -> nn.Module:
    """A copy of ``model`` with every understood module replaced; the original is untouched."""
    model = copy.deepcopy(model).eval()
    table = CONVERTERS if converters is None else converters
    _swap_children(model, table, "", {})
    return model


def _is_customised(module: nn.Module) -> bool:
    """Whether its forward is not the class's alone: hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _swap_children(
    parent: nn.Module, table: dict[type[Any], Converter], prefix: str, done: dict[int, nn.Module]
) -> None:
    for name, child in list(parent._modules.items()):  # named_children skips a module's second name
        if child is None:
            continue
        label = f"{prefix}.{name}" if prefix else name
        converter = table.get(type(child))
        replacement = done.get(id(child))
        if replacement is None and converter is not None and not _is_customised(child):
            replacement = converter(child, label)
        if replacement is None:
            _swap_children(child, table, label, done)
        else:
            done[id(child)] = replacement  # a module used twice stays one module
            setattr(parent, name, replacement)
