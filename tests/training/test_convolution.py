"""Convolutions for training: values, gradients and gradients of gradients beside e3nn's in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm")

from gaq_compile.capture.graphs import collate
from gaq_compile.capture.transformer import form_of
from gaq_compile.datasets import example_structures
from gaq_compile.models import EuclideanTransformer, TransformerConfig
from gaq_compile.models.transformer import Convolution
from gaq_compile.training.convolution import FastConvolution, with_fast_convolutions

CONFIG = TransformerConfig((1, 6, 8), channels=16, heads=2, layers=2, radial=6)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("irreps", ["16x0e", CONFIG.features])
def test_every_second_derivative(irreps: str) -> None:
    """Of a loss that reads the result and all three gradients, by everything that goes in."""
    plain = Convolution(irreps, CONFIG)
    fast = FastConvolution(plain)
    g = torch.Generator().manual_seed(0)
    senders = torch.randint(0, 7, (40,), generator=g)
    receivers = torch.randint(0, 7, (40,), generator=g)
    width = plain.product.irreps_in1.dim
    given = [
        torch.randn(*size, generator=g) for size in ((7, width), (40, 9), (40, plain.product.weight_numel))
    ]
    seeds = [torch.randn(t.shape, generator=g) for t in given]
    out = torch.randn(7, plain.product.irreps_out.dim, generator=g)

    def derivatives(convolution: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_(True) for t in given]
        grad = out.to(dtype).requires_grad_(True)
        result = convolution(*inputs, receivers, senders)
        first = torch.autograd.grad(result, inputs, grad, create_graph=True)
        loss = result.square().sum() + sum((a * s.to(dtype)).sum() for a, s in zip(first, seeds, strict=True))
        second = torch.autograd.grad(loss, [*inputs, grad])
        return [result.detach(), *(t.detach() for t in first), *second]

    expected = derivatives(plain.double(), torch.float64)
    plain.float()
    found = derivatives(fast, torch.float32)
    assert len(found) == 8
    for a, b in zip(found, expected, strict=True):
        assert _relative(a, b) < 2e-6


@pytest.mark.parametrize("attention", ["normalized", "plain"])
def test_a_models_loss_has_the_same_gradient(attention: str) -> None:
    torch.manual_seed(1)
    model = EuclideanTransformer(TransformerConfig((1, 6, 8), 16, heads=2, layers=2, attention=attention))
    model.set_scales([0.0, 0.0, 0.0], 1.0, 8.0)
    fast = with_fast_convolutions(model)
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    assert not any(isinstance(m, Convolution) for m in fast.modules())
    tensors = collate(example_structures("ethanol")[:2], form_of(model))
    found = []
    for one in (model, fast):
        energies, forces = one.energy_and_forces(tensors, create_graph=True)
        model.zero_grad()
        (forces.square().mean() + energies.mean()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name], expected, rtol=1e-3, atol=1e-6 * float(expected.norm()) + 1e-9
        )
