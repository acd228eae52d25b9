"""Which gaq operators have generated kernels, and what each computes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ...config import activation_scheme
from ...ir.specs import learned_directions
from ...operators.registration import ops
from ...passes.graph_tools import is_gaq
from ...passes.row_groups import FusedRows
from ..base import Attribute, Lowered, Refused, register_backend
from .build import host_target, tvm_version
from .conv import conv_backward, conv_forward
from .cuda import conv as cuda_conv
from .cuda import gate as cuda_gate
from .cuda import harmonics as cuda_harmonics
from .cuda import linear as cuda_linear
from .cuda import mddq as cuda_mddq
from .cuda import product as cuda_product
from .cuda import rows as cuda_rows
from .cuda import sum_rows as cuda_sum_rows
from .cuda.device import Gpu, gpu, is_cuda
from .linear import LinearKernel, arithmetic, lower_linear
from .linear_nodes import LEARNED, LINEARS, is_fixed, linear_problem, lower_linear_node
from .pointwise import (
    lower_gate,
    lower_gate_backward,
    lower_harmonics,
    lower_harmonics_backward,
    lower_mddq,
    lower_mddq_backward,
    lower_product,
    lower_product_backward,
)
from .rows_kernel import lower_rows
from .rows_plan import UnsupportedRowsError
from .sum_rows_kernel import lower_sum_rows


@dataclass(frozen=True)
class Kernels:
    """One kind of processor's kernels: how each family is lowered, and for what.

    Attributes:
        place: what every function takes last: a CPU's target in JSON, or a GPU.
        target: the TVM target in JSON.
        groups_linears: whether the kernels of groups take linears in.
        groups_sums: whether they take sums over the ends of edges in.
        stores_halves: whether linears and convolutions read and write float16.
    """

    place: Any
    target: str
    groups_linears: bool
    groups_sums: bool
    stores_halves: bool
    linear: Callable[..., Callable[..., Any]]
    conv: Callable[..., Callable[..., Any]]
    conv_backward: Callable[..., Callable[..., Any]]
    gate: Callable[..., Callable[..., Any]]
    gate_backward: Callable[..., Callable[..., Any]]
    product: Callable[..., Callable[..., Any]]
    product_backward: Callable[..., Callable[..., Any]]
    harmonics: Callable[..., Callable[..., Any]]
    harmonics_backward: Callable[..., Callable[..., Any]]
    mddq: Callable[..., Callable[..., Any]]
    mddq_backward: Callable[..., Callable[..., Any]]
    sum_rows: Callable[..., Callable[..., Any]]
    rows: Callable[..., tuple[Callable[..., Any], tuple[LinearKernel, ...]]]


def cpu_kernels(target: str) -> Kernels:
    """The kernels of a CPU (TVM target in JSON)."""
    return Kernels(
        place=target,
        target=target,
        groups_linears=True,
        groups_sums=True,
        stores_halves=True,
        linear=lambda *given: lower_linear(*given).compiled(),
        conv=conv_forward,
        conv_backward=conv_backward,
        gate=lower_gate,
        gate_backward=lower_gate_backward,
        product=lower_product,
        product_backward=lower_product_backward,
        harmonics=lower_harmonics,
        harmonics_backward=lower_harmonics_backward,
        mddq=lower_mddq,
        mddq_backward=lower_mddq_backward,
        sum_rows=lower_sum_rows,
        rows=lower_rows,
    )


def gpu_kernels(device: Gpu) -> Kernels:
    """The kernels of a GPU."""
    return Kernels(
        place=device,
        target=device.target,
        groups_linears=False,
        groups_sums=False,
        stores_halves=False,
        linear=cuda_linear.lower_linear,
        conv=cuda_conv.conv_forward,
        conv_backward=cuda_conv.conv_backward,
        gate=cuda_gate.lower_gate,
        gate_backward=cuda_gate.lower_gate_backward,
        product=cuda_product.lower_product,
        product_backward=cuda_product.lower_product_backward,
        harmonics=cuda_harmonics.lower_harmonics,
        harmonics_backward=cuda_harmonics.lower_harmonics_backward,
        mddq=cuda_mddq.lower_mddq,
        mddq_backward=cuda_mddq.lower_mddq_backward,
        sum_rows=cuda_sum_rows.lower_sum_rows,
        rows=cuda_rows.lower_rows,
    )


Rule = Callable[[Node, Attribute, Kernels], "Lowered | Refused"]


class TVMBackend:
    """Generated kernels for CPUs and for NVIDIA GPUs.

    Args:
        target: a TVM target in JSON, ``"cuda"`` (this machine's GPU; ``sm_80`` where there is none) or
            ``"cuda:sm_89"``; by default this machine's CPU.

    Raises:
        ConfigError: for an unknown GPU architecture.
        MissingPackageError: if TVM is not installed.
    """

    name = "tvm"

    def __init__(self, target: str | None = None) -> None:
        tvm_version()
        on_gpu = target is not None and is_cuda(target)
        self.kernels = gpu_kernels(gpu(str(target))) if on_gpu else cpu_kernels(target or host_target())
        self.target = self.kernels.target
        self.groups_linears, self.groups_sums = self.kernels.groups_linears, self.kernels.groups_sums
        self.stores_halves = self.kernels.stores_halves

    def lower(self, node: Node, attribute: Attribute) -> Lowered | Refused:
        """The generated kernel for ``node``, or why there is none."""
        rule = _RULES.get(node.target)
        if rule is None:
            return Refused(f"no generated kernel for {node.target}")
        return rule(node, attribute, self.kernels)

    def lower_rows(self, fused: FusedRows) -> Lowered | Refused:
        """One generated kernel for the group, or why there is none."""
        try:
            run, linears = self.kernels.rows(fused, self.kernels.place)
        except UnsupportedRowsError as reason:
            return Refused(str(reason))
        kernels = iter(linears)
        within = tuple(
            arithmetic(next(kernels).plan.problem, self.target) if n.target in LINEARS else "f32"
            for n in fused.graph.nodes
            if is_gaq(n)
        )
        return Lowered(run, "f32", (), within)


def _linear(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    kernel = lower_linear_node(node, attribute, k.place, k.linear)
    if isinstance(kernel, Refused):
        return kernel
    return Lowered(kernel, arithmetic(linear_problem(node), k.target), (node.args[0],))


def _conv(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    return Lowered(k.conv(str(node.args[-2]), k.place), "f32", node.args[:-2])


def _conv_backward(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    return Lowered(k.conv_backward(str(node.args[-2]), k.place), "f32", node.args[:-2])


def _gate(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    return Lowered(k.gate(str(node.args[-2]), k.place), "f32", node.args[:-2])


def _gate_backward(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    return Lowered(k.gate_backward(str(node.args[-2]), k.place), "f32", node.args[:-2])


def _sum_rows(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    return Lowered(k.sum_rows(int(node.args[3]), k.place), "f32", node.args[:3])  # type: ignore[call-overload]


def _product(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    return Lowered(k.product(str(node.args[-2]), k.place), "f32", node.args[:-2])


def _product_backward(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    return Lowered(k.product_backward(str(node.args[-2]), k.place), "f32", node.args[:-2])


def _harmonics(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    vec, irreps, normalize, normalization, _ = node.args
    run = k.harmonics(str(irreps), bool(normalize), str(normalization), k.place)
    return Lowered(run, "f32", (vec,))


def _harmonics_backward(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    grad, vec, irreps, normalize, normalization, _ = node.args
    run = k.harmonics_backward(str(irreps), bool(normalize), str(normalization), k.place)
    return Lowered(run, "f32", (grad, vec))


def _mddq(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    x, scale, irreps, scheme, _ = node.args
    if not is_fixed(scale):
        return Refused("activation steps are computed at run time, kernels need them fixed")
    if learned_directions(str(scheme), str(irreps)):
        return Refused(LEARNED)
    if activation_scheme(str(scheme)).common:
        return Refused("activations on a common grid have a kernel only together with integer weights")
    return Lowered(k.mddq(str(irreps), str(scheme), attribute(scale), k.place), "f32", (x,))


def _mddq_backward(node: Node, attribute: Attribute, k: Kernels) -> Lowered | Refused:
    grad, x, scale, irreps, scheme, _ = node.args
    if not is_fixed(scale):
        return Refused("activation steps are computed at run time, kernels need them fixed")
    run = k.mddq_backward(str(irreps), str(scheme), attribute(scale), k.place)
    return Lowered(run, "f32", (grad, x))


_RULES: dict[object, Rule] = {
    **dict.fromkeys(LINEARS, _linear),
    ops.sum_rows.default: _sum_rows,
    ops.conv.default: _conv,
    ops.conv_backward.default: _conv_backward,
    ops.gate.default: _gate,
    ops.gate_backward.default: _gate_backward,
    ops.tensor_product.default: _product,
    ops.tensor_product_backward.default: _product_backward,
    ops.spherical_harmonics.default: _harmonics,
    ops.spherical_harmonics_backward.default: _harmonics_backward,
    ops.mddq.default: _mddq,
    ops.mddq_backward.default: _mddq_backward,
}

register_backend("tvm", TVMBackend)
