"""Every small kernel for GPUs, emulated, against the reference in float64, on outputs that begin as NaN."""

from __future__ import annotations

import pytest
import test_tvm_pointwise as checks
import torch
from cuda_emulator import EmulatedGpu

from gaq_compile.backends.tvm.cuda.device import checked
from gaq_compile.backends.tvm.cuda.gate import lower_gate, lower_gate_backward
from gaq_compile.backends.tvm.cuda.harmonics import lower_harmonics, lower_harmonics_backward
from gaq_compile.backends.tvm.cuda.mddq import lower_mddq, lower_mddq_backward
from gaq_compile.backends.tvm.cuda.product import lower_product, lower_product_backward
from gaq_compile.backends.tvm.cuda.sum_rows import lower_sum_rows, sorted_rows
from gaq_compile.backends.tvm.launch import MAX_ELEMENTS
from gaq_compile.errors import LoweringError
from gaq_compile.ir.specs import gate_spec

GPU = EmulatedGpu()


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, poisoned_memory):
    """The checks' kernels are those of an emulated GPU, and new tensors begin as NaN."""
    monkeypatch.setattr(checks, "host_target", lambda: GPU)
    monkeypatch.setattr(checks, "ROWS", (1, 37, 1000))
    for lower in (
        lower_gate, lower_gate_backward, lower_harmonics, lower_harmonics_backward, lower_mddq,
        lower_mddq_backward, lower_product, lower_product_backward,
    ):  # fmt: skip
        monkeypatch.setattr(checks.pointwise, lower.__name__, lower)
    torch.manual_seed(0)


@pytest.mark.parametrize("spec", checks.GATES)
def test_gate(spec: str) -> None:
    checks.test_gate(spec)


def test_gate_is_finite_far_out() -> None:
    checks.test_gate_is_finite_far_out()


@pytest.mark.parametrize("spec", [checks.GATES[0], checks.GATES[2]])
def test_gate_keeps_nan(spec: str) -> None:
    """CUDA's min and max would drop it."""
    width = gate_spec(spec).irreps_in
    x = torch.full((2, checks.dim(width)), torch.nan)
    assert lower_gate(spec, GPU)(x).isnan().all()


@pytest.mark.parametrize("arguments", checks.HARMONICS)
def test_harmonics(arguments: tuple[str, bool, str]) -> None:
    checks.test_harmonics(arguments)
    checks.test_harmonics_of_zero(arguments)


@pytest.mark.parametrize("spec", checks.PRODUCTS)
def test_product(spec: str) -> None:
    checks.test_product(spec)


@pytest.mark.parametrize("scheme", checks.SCHEMES)
@pytest.mark.parametrize("irreps", checks.IRREPS)
def test_mddq(irreps: str, scheme: str) -> None:
    checks.test_mddq(irreps, scheme)


@pytest.mark.parametrize("scheme", (*checks.SCHEMES, "s8 m8d8 common"))
@pytest.mark.parametrize("irreps", checks.IRREPS)
def test_mddq_backward(irreps: str, scheme: str) -> None:
    checks.test_mddq_backward(irreps, scheme)


@pytest.mark.parametrize("scheme", checks.SCHEMES)
def test_mddq_takes_each_channel_s_own_step(scheme: str) -> None:
    checks.test_mddq_takes_each_channel_s_own_step(scheme)


def test_mddq_keeps_nan_and_rounds_half_to_even() -> None:
    checks.test_mddq_keeps_nan_and_rounds_half_to_even()


def test_mddq_rejects_scales_that_do_not_fit() -> None:
    checks.test_mddq_rejects_scales_that_do_not_fit()


@pytest.mark.parametrize("width", [1, 3, 9, 24, 128, 200])
def test_sums_of_rows(width: int) -> None:
    """Rows that nothing hits are zero; few rows and many; the same bits every time."""
    run = lower_sum_rows(width, GPU)
    for edges, rows in ((0, 0), (0, 5), (1, 1), (7, 3), (300, 41), (3000, 1), (37, 200)):
        generator = torch.Generator().manual_seed(edges)
        values = torch.randn(edges, width, generator=generator)
        index = torch.randint(0, max(rows, 1), (edges,), generator=generator)
        exact, sizes = (
            torch.zeros(rows, width, dtype=torch.float64).index_add_(0, index, v)
            for v in (values.double(), values.double().abs())
        )
        got = run(values, index, rows)
        assert got.shape == (rows, width) and got.dtype == torch.float32
        counts = torch.bincount(index, minlength=rows).unsqueeze(1)
        assert bool(((got - exact).abs() <= 6e-8 * counts * sizes).all())
        assert torch.equal(run(values, index, rows), got)


def test_sums_of_rows_of_several_axes_and_of_none() -> None:
    values, index = torch.randn(60, 4, 6), torch.randint(0, 7, (60,))
    shaped = lower_sum_rows(24, GPU)(values, index, 7)
    assert shaped.shape == (7, 4, 6)
    single = lower_sum_rows(1, GPU)(values[:, 0, 0].contiguous(), index, 7)
    torch.testing.assert_close(single, torch.zeros(7).index_add_(0, index, values[:, 0, 0]))


def test_the_order_of_an_index_is_kept_while_it_is_the_same() -> None:
    index = torch.tensor([3, 1, 3, 0])
    order, pointer = sorted_rows(index, 5)
    assert order.tolist() == [3, 1, 0, 2] and pointer.tolist() == [0, 1, 2, 2, 4, 4]
    assert sorted_rows(index, 5)[0] is order
    assert sorted_rows(index, 6)[1].tolist() == [0, 1, 2, 2, 4, 4, 4]
    index[0] = 0
    assert sorted_rows(index, 5)[0].tolist() == [0, 3, 1, 2]


def test_tensors_beyond_32_bit_indices_are_refused() -> None:
    huge = torch.empty(1).expand(MAX_ELEMENTS + 1)
    with pytest.raises(LoweringError, match="count in 32 bits"):
        checked(lambda grid, arguments: None)((1, 1), {"x": huge})
