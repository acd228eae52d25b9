"""The fused convolution kernels against a plain float64 tensor product, path by path."""

from __future__ import annotations

import json

import pytest
import torch
from e3nn.o3 import Irreps, TensorProduct, wigner_3j
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.backends.tvm.build import build_executable, compile_kernel, host_target
from gaq_compile.backends.tvm.conv import (
    backward_source,
    conv_backward,
    conv_forward,
    forward_source,
)
from gaq_compile.backends.tvm.conv_terms import conv_problem, folded_problem
from gaq_compile.backends.tvm.emit import block_lanes, vector_lanes
from gaq_compile.errors import IrrepsError
from gaq_compile.ir.layout import Block, dim, permutation
from gaq_compile.ir.specs import GRADIENT_EXPONENT, TensorProductSpec, in_half, tensor_product_spec
from gaq_compile.passes.scale_harmonics import by_heads

TOLERANCE = 1e-5


def all_paths(x: str, sh: str, keep: str) -> str:
    """Every uvu path with an output in ``keep``, outputs sorted and coefficients as e3nn has them."""
    found: list[tuple[int, int, int]] = []
    outputs = []
    for i, (mul, ir) in enumerate(Irreps(x)):
        for j, (_, other) in enumerate(Irreps(sh)):
            for out in ir * other:
                if out in Irreps(keep):
                    found.append((i, j, len(outputs)))
                    outputs.append((mul, out))
    ordered = Irreps(outputs).sort()
    paths = sorted(((i, j, ordered.p[k]) for i, j, k in found), key=lambda item: item[2])
    items = ((i, j, k, round((2 * ordered.irreps[k].ir.l + 1) ** 0.5, 6)) for i, j, k in paths)
    return str(TensorProductSpec(x, sh, str(ordered.irreps), tuple(items)))


def by_head(x: str, sh: str, keep: str, heads: int) -> str:
    """The same for parts of every block, each with harmonics of its own."""
    return str(by_heads(tensor_product_spec(all_paths(x, sh, keep)), heads))


SEVENNET = "128x0e+64x1e+32x2e"
SH2 = "1x0e+1x1e+1x2e"
SPECS = {
    "sevennet middle": all_paths(SEVENNET, SH2, SH2),
    "sevennet first": all_paths("128x0e", SH2, SH2),
    "sevennet last": all_paths(SEVENNET, SH2, "0e"),
    "odd parity, odd channels, l=3": all_paths("3x0e+5x1o+24x2e+1x3o", "1x0e+1x1o+1x2e+1x3o", "0e+1o+2e+3o"),
    "one channel": all_paths("1x1o+1x2e", "1x1o+1x2e", "0e+0o+1o+2e+2o"),
    "neighbouring equal irreps": all_paths("4x1o+3x1o+2x0e", "1x1o+1x1o+1x0e", "0e+1o+1e"),
    "shared output": "8x0e+8x1o * 1x0e+1x1o+1x2e -> 8x1o | 0.1.0*0.5 1.0.0 1.2.0*-1.25",
    "two heads": by_head("8x0e+8x1o+8x2e", "1x0e+1x1o+1x2e", "0e+1o+2e", 2),
    "heads of two registers": by_head("96x0e+96x1o", "1x0e+1x1o", "0e+1o", 3),
    "unused inputs and outputs": "8x0e+3x1o * 1x0e+1x1o -> 8x0e+8x1o+5x2e | 0.1.1",
}


def columns(block: Block) -> torch.Tensor:
    """Indices (component, channel) of a block."""
    return block.base + torch.arange(block.components)[:, None] * block.stride + torch.arange(block.mul)


def edge_tensors(senders: torch.Tensor, receivers: torch.Tensor, nodes: int) -> list[torch.Tensor]:
    def csr(ends: torch.Tensor) -> list[torch.Tensor]:
        counts = torch.bincount(ends, minlength=nodes)
        pointers = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        return [pointers.int(), torch.argsort(ends, stable=True).int()]

    return [senders.int(), receivers.int(), *csr(receivers), *csr(senders)]


def random_graph(nodes: int, edges: int, generator: torch.Generator) -> list[torch.Tensor]:
    """A multigraph whose last node is isolated (where there is more than one)."""
    ends = torch.randint(0, max(1, nodes - 1), (2, edges), generator=generator)
    return edge_tensors(ends[0], ends[1], nodes)


def problem(spec: str, nodes: int, edges: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``[x, sh, weight, grad]`` and the edge tensors."""
    generator = torch.Generator().manual_seed(seed)
    parsed = tensor_product_spec(spec)
    shapes = [
        (nodes, dim(parsed.irreps_x)),
        (edges, dim(parsed.irreps_sh)),
        (edges, parsed.weight_numel),
        (nodes, dim(parsed.irreps_out)),
    ]
    return [torch.randn(s, generator=generator) for s in shapes], random_graph(nodes, edges, generator)


def reference(spec: str, x, sh, weight, edges) -> torch.Tensor:
    parsed = tensor_product_spec(spec)
    out = x.new_zeros((x.shape[0], dim(parsed.irreps_out)))
    for path in parsed.paths:
        constants = wigner_3j(path.block_x.l, path.block_sh.l, path.block_out.l, dtype=torch.float64)
        gathered = x[edges[0].long()][:, columns(path.block_x)]
        harmonics = sh[:, columns(path.block_sh)[:, 0]]
        scale = path.coefficient * weight[:, path.offset : path.offset + path.block_x.mul]
        message = torch.einsum("eiu,ej,ijk,eu->eku", gathered, harmonics, constants, scale)
        summed = x.new_zeros((x.shape[0], *message.shape[1:])).index_add(0, edges[1].long(), message)
        place = columns(path.block_out)
        out = out.index_add(1, place.flatten(), summed.flatten(1))
    return out


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest expected number; a NaN counts as infinite."""
    if not found.numel():
        return 0.0
    error = float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


def poisoned_forward(spec: str, lanes: int, target: str):
    kernel = compile_kernel(forward_source(spec, lanes), target)

    def run(x, sh, weight, edges):
        out = torch.full((x.shape[0], dim(tensor_product_spec(spec).irreps_out)), float("nan"))
        kernel(x, sh, weight, edges[0], edges[2], edges[3], out)
        return out

    return run


def poisoned_backward(spec: str, lanes: int, target: str):
    kernel = compile_kernel(backward_source(spec, lanes), target)

    def run(grad, x, sh, weight, edges):
        grads = [torch.full_like(t, float("nan")) for t in (x, sh, weight)]
        kernel(grad, x, sh, weight, edges[1], edges[4], edges[5], *grads)
        return grads

    return run


def check_every_path(spec: str, forward, backward, nodes: int, edges: int, seed: int) -> None:
    """Outputs and all gradients, each path alone (only its output block has a gradient)."""
    (x, sh, weight, grad), ends = problem(spec, nodes, edges, seed)
    leaves = [t.double().requires_grad_() for t in (x, sh, weight)]
    expected = reference(spec, *leaves, ends)
    found = forward(x, sh, weight, ends)
    for path in tensor_product_spec(spec).paths:
        place = columns(path.block_out).flatten()
        assert relative(found[:, place], expected[:, place].detach()) <= TOLERANCE, path
        alone = torch.zeros_like(grad)
        alone[:, place] = grad[:, place]
        wanted = torch.autograd.grad(expected, leaves, alone.double(), retain_graph=True)
        for name, a, b in zip(
            ("x", "sh", "weight"), backward(alone, x, sh, weight, ends), wanted, strict=True
        ):
            assert relative(a, b) <= TOLERANCE, (name, path)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for a, b in zip(backward(grad, x, sh, weight, ends), wanted, strict=True):
        assert relative(a, b) <= TOLERANCE


@pytest.mark.parametrize("name", SPECS)
def test_every_path_matches_float64(name):
    spec, target = SPECS[name], host_target()
    lanes = vector_lanes(target)
    seed = int(torch.randint(0, 2**31, ()))
    forward, backward = poisoned_forward(spec, lanes, target), poisoned_backward(spec, lanes, target)
    check_every_path(spec, forward, backward, nodes=7, edges=150, seed=seed)


@pytest.mark.parametrize("lanes", [4, 8])
def test_narrow_registers(lanes):
    spec, target = SPECS["sevennet middle"], host_target()
    forward, backward = poisoned_forward(spec, lanes, target), poisoned_backward(spec, lanes, target)
    check_every_path(spec, forward, backward, nodes=3, edges=40, seed=lanes)


def test_paths_that_repeat_for_every_head_are_one():
    """Text that grows with the number of heads would be many times the code."""
    spec = SPECS["heads of two registers"]
    folded, unfolded = folded_problem(spec), conv_problem(spec)
    assert folded.heads == 3 and 3 * len(folded.terms) == len(unfolded.terms)
    assert 3 * len(folded.columns) == len(unfolded.columns)


@pytest.mark.parametrize(
    ("old", "new"), [("0.0.0 1.2.1", "1.2.0 0.0.1"), ("0.0.0", "0.0.0*2.0"), ("1.2.1", "1.0.1")]
)
def test_heads_that_differ_stay_paths_of_their_own(old: str, new: str) -> None:
    spec = "4x0e+4x0e * 1x0e+1x1o+1x0e+1x1o -> 4x0e+4x0e | 0.0.0 1.2.1"
    other = spec.replace(old, new)
    assert folded_problem(spec).heads == 2 and folded_problem(other).heads == 1
    lanes, target = vector_lanes(host_target()), host_target()
    forward, backward = poisoned_forward(other, lanes, target), poisoned_backward(other, lanes, target)
    check_every_path(other, forward, backward, nodes=4, edges=30, seed=1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 90), st.integers(0, 2**31))
def test_any_graph(nodes, edges, seed):
    spec = SPECS["shared output"]
    forward, backward = conv_forward(spec, host_target()), conv_backward(spec, host_target())
    (x, sh, weight, grad), ends = problem(spec, nodes, edges, seed)
    leaves = [t.double().requires_grad_() for t in (x, sh, weight)]
    expected = reference(spec, *leaves, ends)
    assert relative(forward(x, sh, weight, ends), expected.detach()) <= TOLERANCE
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for a, b in zip(backward(grad, x, sh, weight, ends), wanted, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) <= TOLERANCE


def test_no_edges_gives_zeros():
    spec = SPECS["sevennet first"]
    (x, sh, weight, grad), ends = problem(spec, nodes=3, edges=0, seed=0)
    out = conv_forward(spec, host_target())(x, sh, weight, ends)
    assert out.shape == grad.shape
    assert not out.any()
    for found, like in zip(
        conv_backward(spec, host_target())(grad, x, sh, weight, ends), (x, sh, weight), strict=True
    ):
        assert found.shape == like.shape
        assert not found.any()


def test_two_runs_give_the_same_bits():
    spec = SPECS["sevennet middle"]
    (x, sh, weight, grad), ends = problem(spec, nodes=40, edges=900, seed=1)
    forward, backward = conv_forward(spec, host_target()), conv_backward(spec, host_target())
    assert torch.equal(forward(x, sh, weight, ends), forward(x, sh, weight, ends))
    first, second = (backward(grad, x, sh, weight, ends) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_views_need_no_alignment():
    """Tensors may start at any float, as views of a larger one do."""
    spec = SPECS["sevennet last"]
    (x, sh, weight, grad), ends = problem(spec, nodes=5, edges=60, seed=2)
    shifted = [torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, sh, weight)]
    forward, backward = conv_forward(spec, host_target()), conv_backward(spec, host_target())
    assert torch.equal(forward(*shifted, ends), forward(x, sh, weight, ends))
    for a, b in zip(backward(grad, *shifted, ends), backward(grad, x, sh, weight, ends), strict=True):
        assert torch.equal(a, b)


def test_agrees_with_e3nn():
    spec = SPECS["sevennet middle"]
    parsed = tensor_product_spec(spec)
    instructions = [(i, j, k, "uvu", True, 1.0) for i, j, k, _ in parsed.instructions]
    product = TensorProduct(
        parsed.irreps_x,
        parsed.irreps_sh,
        parsed.irreps_out,
        instructions,
        shared_weights=False,
        internal_weights=False,
    )
    (x, sh, weight, _), ends = problem(spec, nodes=6, edges=50, seed=3)
    into, back = permutation(parsed.irreps_x, "mul_ir"), permutation(parsed.irreps_out, "ir_mul")
    messages = product(x[:, list(into)][ends[0].long()], sh, weight)
    expected = torch.zeros(6, messages.shape[1]).index_add(0, ends[1].long(), messages)[:, list(back)]
    assert relative(conv_forward(spec, host_target())(x, sh, weight, ends), expected.double()) <= TOLERANCE


@pytest.mark.parametrize(
    ("target", "lanes"),
    [
        ({"kind": "llvm", "mcpu": "core2"}, 4),
        ({"kind": "llvm", "mcpu": "haswell"}, 8),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, 4),
    ],
    ids=["sse", "avx2", "arm"],
)
def test_compiles_for_other_processors(target, lanes):
    text = json.dumps(target)
    assert vector_lanes(text) == lanes
    for source in (forward_source, backward_source):
        executable = build_executable(source(SPECS["sevennet last"], lanes), text)
        assert "zmm" not in executable.mod.inspect_source("asm")


def test_lanes():
    assert [block_lanes(n, 16) for n in (128, 24, 4, 1, 3)] == [16, 8, 4, 1, 1]
    assert vector_lanes('{"kind": "llvm", "mcpu": "znver4"}') == 16
    assert vector_lanes('{"kind": "llvm", "mcpu": "znver3"}') == 8
    assert vector_lanes('{"kind": "llvm", "mattr": ["+avx512f"]}') == 16


def test_a_forbidden_path_is_refused():
    with pytest.raises(IrrepsError):
        conv_forward("4x0e * 1x1o -> 4x0e | 0.0.0", host_target())


def check_weights_of_bonds(spec: str, forward, backward, nodes: int = 5, edges: int = 70) -> None:
    """One row of weights for edge e and edge e + E / 2: two equal ones, whose gradients are added up."""
    (x, sh, weight, grad), ends = problem(spec, nodes, edges, seed=4)
    bonds = edges // 2
    half, whole = weight[:bonds].contiguous(), weight[:bonds].repeat(2, 1)
    assert torch.equal(forward(x, sh, half, ends), forward(x, sh, whole, ends))
    found, each = (backward(grad, x, sh, w, ends) for w in (half, whole))
    leaves = [t.double().requires_grad_() for t in (x, sh, half)]
    expected = reference(spec, leaves[0], leaves[1], leaves[2].repeat(2, 1), ends)
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        assert a.shape == b.shape and relative(a, b) <= TOLERANCE
    assert torch.equal(found[1], each[1]) and each[2].shape == whole.shape
    again = backward(grad, x, sh, half, ends)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("name", ["shared output", "sevennet middle"])
def test_weights_of_bonds(name):
    spec = SPECS[name]
    forward = conv_forward(spec, host_target())
    check_weights_of_bonds(spec, forward, conv_backward(spec, host_target()))
    lanes = vector_lanes(host_target())
    poisoned = poisoned_backward(spec, lanes, host_target())
    for nodes, edges in ((1, 6), (2, 100), (9, 34)):
        check_weights_of_bonds(spec, forward, poisoned, nodes, edges)


HALF, UNIT = 2.0**-11, 2.0**GRADIENT_EXPONENT  # float16's rounding, and what gradients are stored times


@pytest.mark.parametrize("name", SPECS)
def test_weights_in_half_precision(name):
    """What float32 weights of the same values give; their gradient is rounded to the nearest."""
    spec = SPECS[name]
    (x, sh, weight, grad), ends = problem(spec, nodes=7, edges=150, seed=5)
    half = weight.half()
    forward, backward = (
        conv_forward(in_half(spec), host_target()),
        conv_backward(in_half(spec), host_target()),
    )
    plain = conv_forward(spec, host_target()), conv_backward(spec, host_target())
    assert torch.equal(forward(x, sh, half, ends), plain[0](x, sh, half.float(), ends))
    found, wanted = backward(grad, x, sh, half, ends), plain[1](grad, x, sh, half.float(), ends)
    assert found[2].dtype == torch.float16
    assert all(relative(a, b.double()) <= TOLERANCE for a, b in zip(found[:2], wanted[:2], strict=True))
    bound = 1.01 * HALF * wanted[2].abs() + (2.0**-24 + TOLERANCE) / UNIT
    assert bool(((found[2].float() / UNIT - wanted[2]).abs() <= bound).all())


@pytest.mark.parametrize("name", ["shared output", "sevennet middle"])
def test_weights_of_bonds_in_half_precision(name):
    """The sum of both edges' gradients, of which the first is rounded before the second is added."""
    spec = SPECS[name]
    (x, sh, weight, grad), ends = problem(spec, nodes=5, edges=70, seed=6)
    half = weight[:35].half()
    backward, plain = conv_backward(in_half(spec), host_target()), conv_backward(spec, host_target())
    found = backward(grad, x, sh, half, ends)
    each = plain(grad, x, sh, half.float().repeat(2, 1), ends)
    assert torch.equal(found[0], plain(grad, x, sh, half.float(), ends)[0])
    first, second = each[2][:35], each[2][35:]
    bound = 1.01 * HALF * (first.abs() + (first + second).abs()) + 2.0**-24 / UNIT
    assert bool(((found[2].float() / UNIT - (first + second)).abs() <= bound).all())
    again = backward(grad, x, sh, half, ends)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
