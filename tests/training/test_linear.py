"""The irreps-linear for training has the operator's values and derivatives."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.errors import CaptureError
from gaq_compile.ir.layout import dim
from gaq_compile.ir.specs import linear_spec
from gaq_compile.operators.reference import irreps_linear
from gaq_compile.training.linear import linear

SPECS = (
    "4x0e -> 7x0e",
    "8x0e+6x1o+3x2e -> 5x0e+6x1o+2x2e",
    "8x0e+8x0e+4x1o+6x1o+3x2e -> 8x0e+2x1o+3x1o",  # blocks side by side
    "4x0e+3x1o -> 2x0e+3x1o+5x2e",  # nothing leads to the last
    "4x0e+3x1o -> 2x0e+4x0e+3x1o | 0:1 1:2",
)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_values_and_derivatives(spec: str, with_bias: bool) -> None:
    torch.manual_seed(0)
    s = linear_spec(spec)
    x, weight = (torch.randn(*n, dtype=torch.float64) for n in ((5, dim(s.irreps_in)), (s.weight_numel,)))
    bias = torch.randn(sum(b.mul for b in s.bias_blocks), dtype=torch.float64) if with_bias else None
    given = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    probe = torch.randn(5, dim(s.irreps_out), dtype=torch.float64)

    def derivatives(function):
        y = function(x, weight, bias, spec, False)
        first = torch.autograd.grad((y.sin() * probe).sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
        return [y, *first, *second]

    for found, expected in zip(derivatives(linear), derivatives(irreps_linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_transposed_one_is_not_for_training() -> None:
    with pytest.raises(CaptureError, match="transposed"):
        linear(torch.ones(1, 2), torch.ones(4), None, "2x0e -> 2x0e", True)
