"""Convolutions for GPUs, emulated: every path, forward and every gradient, against float64."""

from __future__ import annotations

import pytest
import test_tvm_conv as checks
import torch
from cuda_emulator import EmulatedGpu

from gaq_compile.backends.tvm.cuda.conv import backward_groups, conv_backward, conv_forward, forward_groups
from gaq_compile.errors import IrrepsError

GPU = EmulatedGpu()


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", checks.SPECS)
def test_every_path_matches_float64(name: str) -> None:
    spec = checks.SPECS[name]
    forward, backward = conv_forward(spec, GPU), conv_backward(spec, GPU)
    checks.check_every_path(spec, forward, backward, nodes=7, edges=150, seed=len(spec))


@pytest.mark.parametrize(("nodes", "edges"), [(1, 1), (1, 0), (37, 5), (3, 97), (2, 64)])
@pytest.mark.parametrize("name", ["shared output", "unused inputs and outputs", "sevennet last"])
def test_any_graph(name: str, nodes: int, edges: int) -> None:
    """Nodes without edges, whole chunks and parts of them, and no edges at all."""
    spec = checks.SPECS[name]
    (x, sh, weight, grad), ends = checks.problem(spec, nodes, edges, seed=edges)
    leaves = [t.double().requires_grad_() for t in (x, sh, weight)]
    expected = checks.reference(spec, *leaves, ends)
    found = conv_forward(spec, GPU)(x, sh, weight, ends)
    assert found.shape == grad.shape and checks.relative(found, expected.detach()) <= checks.TOLERANCE
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for a, b in zip(conv_backward(spec, GPU)(grad, x, sh, weight, ends), wanted, strict=True):
        assert a.shape == b.shape and checks.relative(a, b) <= checks.TOLERANCE


def test_two_runs_give_the_same_bits() -> None:
    spec = checks.SPECS["sevennet middle"]
    (x, sh, weight, grad), ends = checks.problem(spec, nodes=6, edges=200, seed=1)
    forward, backward = conv_forward(spec, GPU), conv_backward(spec, GPU)
    assert torch.equal(forward(x, sh, weight, ends), forward(x, sh, weight, ends))
    first, second = (backward(grad, x, sh, weight, ends) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_nodes_give_nothing() -> None:
    spec = checks.SPECS["shared output"]
    (x, sh, weight, grad), ends = checks.problem(spec, nodes=0, edges=0, seed=1)
    assert conv_forward(spec, GPU)(x, sh, weight, ends).shape == grad.shape
    assert conv_backward(spec, GPU)(grad, x, sh, weight, ends)[0].shape == x.shape


@pytest.mark.parametrize("name", checks.SPECS)
def test_each_result_has_one_owner(name: str) -> None:
    """No two warps write to one place, and every block has a warp that does."""
    for groups in (forward_groups(checks.SPECS[name]), backward_groups(checks.SPECS[name])):
        bases = [block.base for group in groups for block in group.blocks]
        assert len(bases) == len(set(bases))
        assert [g.first for g in groups] == [sum(h.warps for h in groups[:k]) for k in range(len(groups))]
        paths = [terms for group in groups for terms in group.paths]
        assert len(paths) == len(set(paths))


def test_a_forbidden_path_is_refused() -> None:
    with pytest.raises(IrrepsError):
        conv_forward("4x0e * 1x1o -> 4x0e | 0.0.0", GPU)


def test_weights_of_bonds() -> None:
    spec = checks.SPECS["shared output"]
    checks.check_weights_of_bonds(spec, conv_forward(spec, GPU), conv_backward(spec, GPU))
