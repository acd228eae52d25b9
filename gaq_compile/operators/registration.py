"""The ``gaq::`` operators: the vocabulary that passes rewrite and backends run.

Each is a ``torch.library`` operator with a shape rule, a gradient written in terms of other gaq
operators (so that tracing energy and forces gives one readable graph), and the plain-torch
meaning of :mod:`.reference`. The last argument ``label`` is the name of the module it came from:
it survives every retracing and is what reports, overrides and drawings call the node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import activation_scheme
from ..ir.layout import dim
from ..ir.specs import GRADIENT_EXPONENT, LinearSpec, gate_spec, linear_spec, tensor_product_spec
from ..numerics import activations as act
from ..numerics import packing, weights
from . import reference as ref

ops = torch.ops.gaq


def _custom(name: str):  # type: ignore[no-untyped-def]
    return torch.library.custom_op(f"gaq::{name}", mutates_args=())


# --- layout -------------------------------------------------------------------------------------


@_custom("relayout")
def relayout(x: Tensor, irreps: str, to: str) -> Tensor:
    """Reorder the last axis to ``to`` ("ir_mul" or "mul_ir")."""
    return ref.relayout(x, irreps, to)


@relayout.register_fake
def _(x, irreps, to):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _relayout_backward(ctx, grad):  # type: ignore[no-untyped-def]
    back = "mul_ir" if ctx.to == "ir_mul" else "ir_mul"
    return ops.relayout(grad, ctx.irreps, back), None, None


def _relayout_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, ctx.irreps, ctx.to = inputs


relayout.register_autograd(_relayout_backward, setup_context=_relayout_setup)

# --- irreps_linear ------------------------------------------------------------------------------


@_custom("irreps_linear")
def irreps_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: str, transpose: bool, label: str
) -> Tensor:
    """Channel-mixing linear map (:class:`.specs.LinearSpec`); ``transpose`` gives its adjoint."""
    return ref.irreps_linear(x, weight, bias, spec, transpose)


@irreps_linear.register_fake
def _(x, weight, bias, spec, transpose, label):  # type: ignore[no-untyped-def]
    s = linear_spec(spec)
    return x.new_empty(x.shape[0], dim(s.irreps_in if transpose else s.irreps_out))


def _linear_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _, ctx.spec, ctx.transpose, ctx.label = inputs
    ctx.trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(weight, *([x] if ctx.trained else []))


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, *rest = ctx.saved_tensors
    back = ops.irreps_linear(grad, weight, None, ctx.spec, not ctx.transpose, ctx.label)
    to_weight = to_bias = None
    if ctx.needs_input_grad[1]:
        to_weight = ref.irreps_linear_weight_gradient(grad, *rest, ctx.spec, ctx.transpose)
    if ctx.needs_input_grad[2]:
        to_bias = torch.cat([ref.view(grad, b)[:, 0].sum(0) for b in linear_spec(ctx.spec).bias_blocks])
    return back, to_weight, to_bias, None, None, None


irreps_linear.register_autograd(_linear_backward, setup_context=_linear_setup)

# --- integer weights ----------------------------------------------------------------------------


@_custom("decode_weight")
def decode_weight(
    codes: Tensor, scale: Tensor, steps: Tensor | None, bits: int, spec: str, label: str
) -> Tensor:
    """Flat float weights of integer codes; 4-bit codes come packed two to a byte.

    ``steps`` are those of the layer's input where the codes hold them (``weights.with_steps``).
    """
    s = linear_spec(spec)
    return weights.dequantize_weight(_plain(codes, bits, s), scale.float(), s, steps)


def _plain(codes: Tensor, bits: int, spec: LinearSpec) -> Tensor:
    return packing.unpack_int4(codes, spec.weight_numel) if bits == 4 else codes


@decode_weight.register_fake
def _(codes, scale, steps, bits, spec, label):  # type: ignore[no-untyped-def]
    return scale.new_empty(linear_spec(spec).weight_numel, dtype=torch.float32)


@_custom("int_irreps_linear")
def int_irreps_linear(
    x: Tensor,
    x_scale: Tensor | None,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    spec: str,
    scheme: str,
    bits: int,
    transpose: bool,
    label: str,
) -> Tensor:
    """``irreps_linear(mddq(x), decode_weight(codes))`` as one node, for integer kernels.

    ``scheme`` is the activation scheme, ``"f32"`` where activations stay float, or ``"g16"`` for
    a gradient in 16-bit integers with a step per row (:mod:`..numerics.gradients`). The codes hold
    the steps ``x_scale`` of the layer's input, if given, unless the scheme has a common grid. This
    reference computes in float; kernels compute the same products in integers.
    """
    s = linear_spec(spec)
    plain, weight_scale = _plain(codes, bits, s), weight_scale.float()
    x = ref.from_half(x, GRADIENT_EXPONENT, torch.float32) if s.half and transpose else x
    if scheme == "g16":
        return ref.gradient_linear(x, plain, weight_scale, x_scale, spec)
    held = x_scale
    if scheme != "f32" and x_scale is not None:
        x = act.fake_quantize(x, x_scale, s.irreps_in, activation_scheme(scheme))
        held = None if activation_scheme(scheme).common else x_scale
    weight = weights.dequantize_weight(plain, weight_scale, s, held)
    y = ref.irreps_linear(x, weight.to(x.dtype), bias, spec, transpose)
    return y.half() if s.half and not transpose else y


@int_irreps_linear.register_fake
def _(x, x_scale, codes, weight_scale, bias, spec, scheme, bits, transpose, label):  # type: ignore[no-untyped-def]
    s = linear_spec(spec)
    dtype = None if not s.half else torch.float32 if transpose else torch.float16
    return x.new_empty(x.shape[0], dim(s.irreps_in if transpose else s.irreps_out), dtype=dtype)


# --- activation quantization --------------------------------------------------------------------


@_custom("mddq")
def mddq(x: Tensor, scale: Tensor, irreps: str, scheme: str, label: str) -> Tensor:
    """Quantize and dequantize activations: magnitudes and directions apart (:mod:`..numerics`)."""
    return act.fake_quantize(x, scale, irreps, activation_scheme(scheme))


@mddq.register_fake
def _(x, scale, irreps, scheme, label):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@_custom("mddq_backward")
def mddq_backward(grad: Tensor, x: Tensor, scale: Tensor, irreps: str, scheme: str, label: str) -> Tensor:
    """The geometric straight-through gradient of ``mddq``."""
    return act.fake_quantize_backward(grad, x, scale, irreps, activation_scheme(scheme))


@mddq_backward.register_fake
def _(grad, x, scale, irreps, scheme, label):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _mddq_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, scale, ctx.irreps, ctx.scheme, ctx.label = inputs
    ctx.save_for_backward(x, scale)


def _mddq_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, scale = ctx.saved_tensors
    back = ops.mddq_backward(grad, x, scale, ctx.irreps, ctx.scheme, ctx.label)
    return back, None, None, None, None


mddq.register_autograd(_mddq_backward, setup_context=_mddq_setup)

# --- half precision -----------------------------------------------------------------------------


@_custom("round_half")
def round_half(x: Tensor, exponent: int, label: str) -> Tensor:
    """``2^exponent x`` to the nearest float16, and back: what rows that are stored in half precision hold."""
    return ref.from_half(ref.to_half(x, exponent), exponent, x.dtype)


@round_half.register_fake
def _(x, exponent, label):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _half_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, ctx.label = inputs


def _half_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return ops.round_half(grad, GRADIENT_EXPONENT, ctx.label), None, None


round_half.register_autograd(_half_backward, setup_context=_half_setup)

# --- spherical harmonics ------------------------------------------------------------------------


@_custom("spherical_harmonics")
def spherical_harmonics(vec: Tensor, irreps: str, normalize: bool, normalization: str, label: str) -> Tensor:
    """Real spherical harmonics of edge vectors (n, 3)."""
    return ref.spherical_harmonics(vec, irreps, normalize, normalization)


@spherical_harmonics.register_fake
def _(vec, irreps, normalize, normalization, label):  # type: ignore[no-untyped-def]
    return vec.new_empty(vec.shape[0], dim(irreps))


@_custom("spherical_harmonics_backward")
def spherical_harmonics_backward(
    grad: Tensor, vec: Tensor, irreps: str, normalize: bool, normalization: str, label: str
) -> Tensor:
    """Gradient of ``spherical_harmonics`` with respect to the vectors."""
    return ref.spherical_harmonics_backward(grad, vec, irreps, normalize, normalization)


@spherical_harmonics_backward.register_fake
def _(grad, vec, irreps, normalize, normalization, label):  # type: ignore[no-untyped-def]
    return torch.empty_like(vec)


def _sh_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    vec, *ctx.rest = inputs
    ctx.save_for_backward(vec)


def _sh_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (vec,) = ctx.saved_tensors
    return ops.spherical_harmonics_backward(grad, vec, *ctx.rest), None, None, None, None


spherical_harmonics.register_autograd(_sh_backward, setup_context=_sh_setup)

# --- gate ---------------------------------------------------------------------------------------


@_custom("gate")
def gate(x: Tensor, spec: str, label: str) -> Tensor:
    """Gated nonlinearity (:class:`.specs.GateSpec`)."""
    return ref.gate(x, spec)


@gate.register_fake
def _(x, spec, label):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dim(gate_spec(spec).irreps_out))


@_custom("gate_backward")
def gate_backward(grad: Tensor, x: Tensor, spec: str, label: str) -> Tensor:
    """Gradient of ``gate``."""
    return ref.gate_backward(grad, x, spec)


@gate_backward.register_fake
def _(grad, x, spec, label):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _gate_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, ctx.spec, ctx.label = inputs
    ctx.save_for_backward(x)


def _gate_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (x,) = ctx.saved_tensors
    return ops.gate_backward(grad, x, ctx.spec, ctx.label), None, None


gate.register_autograd(_gate_backward, setup_context=_gate_setup)

# --- tensor product and convolution -------------------------------------------------------------


@_custom("tensor_product")
def tensor_product(x: Tensor, sh: Tensor, weight: Tensor, spec: str, label: str) -> Tensor:
    """Channelwise tensor product of per-edge tensors (:class:`.specs.TensorProductSpec`)."""
    return ref.tensor_product(x, sh, weight, spec)


@tensor_product.register_fake
def _(x, sh, weight, spec, label):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dim(tensor_product_spec(spec).irreps_out))


@_custom("tensor_product_backward")
def tensor_product_backward(
    grad: Tensor, x: Tensor, sh: Tensor, weight: Tensor, spec: str, label: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``tensor_product`` with respect to x, sh and weight."""
    return ref.tensor_product_backward(grad, x, sh, weight, spec)


@tensor_product_backward.register_fake
def _(grad, x, sh, weight, spec, label):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(sh), torch.empty_like(weight)


def _tp_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, sh, weight, ctx.spec, ctx.label = inputs
    ctx.save_for_backward(x, sh, weight)


def _tp_backward(ctx, grad):  # type: ignore[no-untyped-def]
    grads = ops.tensor_product_backward(grad, *ctx.saved_tensors, ctx.spec, ctx.label)
    return *grads, None, None


tensor_product.register_autograd(_tp_backward, setup_context=_tp_setup)


@_custom("sort_edges")
def sort_edges(senders: Tensor, receivers: Tensor, num_nodes: int) -> list[Tensor]:
    """Both adjacency orders of an edge list as int32 CSR (:func:`.reference.sort_edges`)."""
    return ref.sort_edges(senders, receivers, num_nodes)


@sort_edges.register_fake
def _(senders, receivers, num_nodes):  # type: ignore[no-untyped-def]
    def empty(n):  # type: ignore[no-untyped-def]
        return senders.new_empty(n, dtype=torch.int32)

    e = senders.shape[0]
    return [empty(e), empty(e), empty(num_nodes + 1), empty(e), empty(num_nodes + 1), empty(e)]


@_custom("bonds")
def bonds(receivers: Tensor, senders: Tensor) -> list[Tensor]:
    """Edges and their reverses (:func:`.reference.bonds`)."""
    return ref.bonds(receivers, senders)


@bonds.register_fake
def _(receivers, senders):  # type: ignore[no-untyped-def]
    e = receivers.shape[0]
    per_bond = [receivers.new_empty(e // 2) for _ in range(4)]
    return [receivers.new_empty(e), receivers.new_empty(e, dtype=torch.float32), *per_bond]


@_custom("sum_rows")
def sum_rows(values: Tensor, index: Tensor, rows: int, width: int, label: str) -> Tensor:
    """Rows of ``width`` elements added up by index: (E, ...) -> (rows, ...)."""
    return ref.sum_rows(values, index, rows)


@sum_rows.register_fake
def _(values, index, rows, width, label):  # type: ignore[no-untyped-def]
    return values.new_empty(rows, *values.shape[1:])


@_custom("sum_sorted")
def sum_sorted(values: Tensor, index: Tensor, order: Tensor, ptr: Tensor, rows: int, label: str) -> Tensor:
    """``sum_rows`` where it is known which edges each row has: ``order[ptr[n] : ptr[n + 1]]``, ascending."""
    return ref.sum_rows(values, index, rows)


@sum_sorted.register_fake
def _(values, index, order, ptr, rows, label):  # type: ignore[no-untyped-def]
    return values.new_empty(rows, *values.shape[1:])


@_custom("conv")
def conv(x: Tensor, sh: Tensor, weight: Tensor, edges: Sequence[Tensor], spec: str, label: str) -> Tensor:
    """Gather, tensor product and scatter as one: (N, dim_x) -> (N, dim_out)."""
    return ref.conv(x, sh, weight.to(x.dtype), list(edges), spec)


@conv.register_fake
def _(x, sh, weight, edges, spec, label):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dim(tensor_product_spec(spec).irreps_out))


@_custom("conv_backward")
def conv_backward(
    grad: Tensor, x: Tensor, sh: Tensor, weight: Tensor, edges: Sequence[Tensor], spec: str, label: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``conv`` with respect to x, sh and weight, each in its tensor's shape."""
    to_x, to_sh, to_weight = ref.conv_backward(grad, x, sh, weight.to(x.dtype), list(edges), spec)
    half = tensor_product_spec(spec).half
    return to_x, to_sh, ref.to_half(to_weight, GRADIENT_EXPONENT) if half else to_weight


@conv_backward.register_fake
def _(grad, x, sh, weight, edges, spec, label):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(sh), torch.empty_like(weight)


def _conv_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, sh, weight, edges, ctx.spec, ctx.label = inputs
    ctx.save_for_backward(x, sh, weight, *edges)


def _conv_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, sh, weight, *edges = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        grads = ops.conv_backward(grad, x, sh, weight, edges, ctx.spec, ctx.label)
    else:  # of fixed edges: a third less work
        to_x, _, to_weight = ref.conv_backward(grad, x, sh, weight, edges, ctx.spec, of_sh=False)
        grads = to_x, None, to_weight
    return *grads, [None] * len(edges), None, None


conv.register_autograd(_conv_backward, setup_context=_conv_setup)
