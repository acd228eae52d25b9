"""Muon: what it takes for matrices, what its steps are, and that it goes on from where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gaq_compile.models import EuclideanTransformer, TransformerConfig
from gaq_compile.training.muon import Matrix, Muon, matrices_of, orthogonal


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(o3.Linear("8x0e+6x1o", "8x0e+7x1o"), nn.Linear(29, 12), nn.SiLU(), nn.Linear(12, 1))


def test_matrices_of_linears_are_their_paths() -> None:
    found = matrices_of(net())
    assert found == {"0.weight": [Matrix(0, 8, 8), Matrix(64, 6, 7)], "1.weight": [Matrix(0, 12, 29)]}
    model = EuclideanTransformer(TransformerConfig((1, 6), 8, 2, layers=2, heads=2, radial=6))
    named = dict(model.named_parameters())
    for name, matrices in matrices_of(model).items():
        assert sum(m.rows * m.columns for m in matrices) == named[name].numel()
    assert "layers.1.mix.weight" in matrices_of(model) and "embedding.weight" not in matrices_of(model)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(0, 99), st.floats(-20, 20))
def test_steps_are_orthogonal_whatever_the_gradients_size(rows, columns, seed, exponent) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(3, rows, columns, dtype=torch.float64)
    found = orthogonal(matrix * 2.0**exponent)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(found)
    # directions with next to no gradient stay small; all others come out alike
    clear = s / s.norm(dim=1, keepdim=True) > 0.02
    assert values.max() < 1.25
    along = torch.diagonal(u.mT @ found @ v.mT, dim1=1, dim2=2)
    assert (along[clear] > 0.6).all() and (along < 1.25).all()


def test_a_step() -> None:
    model, rate = net(), 1e-2
    before = copy.deepcopy(model)
    optimizer = Muon(dict(model.named_parameters()), matrices_of(model), rate)
    model(torch.randn(9, 26)).square().mean().backward()
    optimizer.step()
    moved = [a.detach() - b.detach() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    block = moved[0][:64].view(8, 8)
    assert torch.linalg.svdvals(block).max() == pytest.approx(0.2 * 8**0.5 * rate, rel=0.3)
    bias = dict(zip((n for n, _ in model.named_parameters()), moved, strict=True))["3.bias"]
    assert bias.abs().item() == pytest.approx(rate, rel=1e-3)  # Adam's first step
    assert (moved[0] * model[0].weight.grad).sum() < 0


def test_it_goes_on_from_its_state() -> None:
    x = torch.randn(9, 26)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    whole = net()
    first = Muon(dict(whole.named_parameters()), matrices_of(whole), 1e-2)
    steps(whole, first, 2)
    other = copy.deepcopy(whole)
    second = Muon(dict(other.named_parameters()), matrices_of(other), 1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(whole, first, 3)
    steps(other, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
