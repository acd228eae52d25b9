"""Sums of rows by index: the order of the index, whatever the threads and the memory before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm")

from gaq_compile.backends.tvm.build import host_target
from gaq_compile.backends.tvm.sum_rows_kernel import lower_sum_rows

WIDTHS = (1, 3, 9, 24, 128)
SIZES = ((0, 0), (0, 5), (1, 1), (7, 3), (300, 41), (300, 2000), (6000, 41), (6000, 1), (20000, 7))


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _in_order(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """One addition after another: a single thread of torch, one column at a time."""
    out = torch.zeros(rows, *values.shape[1:], dtype=values.dtype)
    return out.index_add_(0, index, values)


def _example(edges: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(edges + rows + width)
    return torch.randn(edges, width, generator=generator), torch.randint(
        0, max(rows, 1), (edges,), generator=generator
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_agree_with_float64_and_with_adding_in_order(width: int) -> None:
    run, threads = lower_sum_rows(width, host_target()), torch.get_num_threads()
    for edges, rows in SIZES:
        values, index = _example(edges, rows, width)
        got, exact = run(values, index, rows), _in_order(values.double(), index, rows)
        sizes = _in_order(values.double().abs(), index, rows)
        assert got.shape == (rows, width) and got.dtype == torch.float32
        counts = torch.bincount(index, minlength=rows).unsqueeze(1)
        assert bool(((got - exact).abs() <= 6e-8 * counts * sizes).all())
        torch.set_num_threads(1)
        expected = _in_order(values, index, rows)
        torch.set_num_threads(threads)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_order_of_the_index_does_not_matter_to_which_row_is_hit(width: int) -> None:
    run = lower_sum_rows(width, host_target())
    values, index = _example(5000, 200, width)
    values = values.round()  # exact sums
    order = index.argsort()
    for chosen in (order, order.flip(0)):
        assert torch.equal(run(values[chosen], index[chosen], 200), run(values, index, 200))


@pytest.mark.parametrize("width", WIDTHS)
def test_bits_do_not_depend_on_the_run_or_on_memory(width: int) -> None:
    run = lower_sum_rows(width, host_target())
    for edges, rows in ((50, 20), (9000, 300)):
        values, index = _example(edges, rows, width)
        first = run(values, index, rows)
        run(values * torch.nan, index, rows)
        assert all(torch.equal(run(values, index, rows), first) for _ in range(3))


def test_rows_that_nothing_hits_are_zero() -> None:
    run = lower_sum_rows(24, host_target())
    values, _ = _example(4000, 1, 24)
    for target in (0, 6, 499):
        out = run(values, torch.full((4000,), target), 500)
        assert int((out != 0).any(1).sum()) == 1 and bool((out[target] != 0).all())


def test_rows_of_several_axes_and_of_none() -> None:
    values, index = _example(2000, 30, 24)
    shaped = lower_sum_rows(24, host_target())(values.view(2000, 4, 6), index, 30)
    assert shaped.shape == (30, 4, 6)
    assert torch.equal(shaped.view(30, 24), lower_sum_rows(24, host_target())(values, index, 30))
    single = lower_sum_rows(1, host_target())(values[:, 0].contiguous(), index, 30)
    assert single.shape == (30,)
    assert torch.equal(single, lower_sum_rows(1, host_target())(values[:, :1].contiguous(), index, 30)[:, 0])


def test_nan_stays_in_its_row() -> None:
    values, index = _example(3000, 50, 9)
    values[index == 7] = torch.nan
    out = lower_sum_rows(9, host_target())(values, index, 50)
    assert out[7].isnan().all() and not out[:7].isnan().any() and not out[8:].isnan().any()
