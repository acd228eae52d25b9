"""A kernel call as data: what is read and made, and what happens where a kernel cannot count so far."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm")

from gaq_compile.backends.tvm import launch as launches
from gaq_compile.backends.tvm.build import compile_kernel, host_target
from gaq_compile.backends.tvm.conv import conv_backward, conv_forward
from gaq_compile.backends.tvm.emit import kernel_text, loop
from gaq_compile.backends.tvm.launch import (
    Choice,
    Input,
    Launch,
    Output,
    always,
    count,
    flat,
    most_rows,
)
from gaq_compile.backends.tvm.linear import LinearProblem, lower_linear
from gaq_compile.backends.tvm.pointwise import lower_gate
from gaq_compile.backends.tvm.sum_rows_kernel import lower_sum_rows
from gaq_compile.errors import LoweringError

CONV = "4x0e * 1x0e+1x1e -> 4x0e+4x1e | 0.0.0 0.1.1"

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _conv_inputs(nodes: int, edges: int) -> tuple[list[Tensor], list[Tensor]]:
    """x, sh, weight; and the ends of edges, sorted both ways."""
    g = torch.Generator().manual_seed(nodes + edges)
    ends = torch.randint(0, nodes, (2, edges), generator=g)
    found = [ends[0].int(), ends[1].int()]
    for end in (ends[1], ends[0]):
        starts = torch.bincount(end, minlength=nodes).cumsum(0)
        found += [torch.cat([starts.new_zeros(1), starts]).int(), end.argsort(stable=True).int()]
    sizes = ((nodes, 4), (edges, 4), (edges, 8))
    return [torch.randn(size, generator=g) for size in sizes], found


def _flags() -> Launch:
    """``(x, mask) -> (where both are on, x or 0)`` on rows of three."""
    body = loop(
        "i in T.serial(n)",
        loop(
            "j in T.serial(3)",
            [
                'on[i, j] = T.Cast("int8", (mask[i, j] != T.int8(0)) and (x[i, j] > T.float32(0)))',
                "y[i, j] = T.Select(mask[i, j] != T.int8(0), x[i, j], T.float32(0))",
            ],
        ),
    )
    kinds = {"x": "float32", "mask": "int8", "on": "int8", "y": "float32"}
    text = kernel_text([(name, "n, 3", kind) for name, kind in kinds.items()], body)
    parts = (Input(0, (3,)), Input(1, (3,), torch.bool), Output(0, (3,), torch.bool), Output(0, (3,)))
    return Launch(parts, always(compile_kernel(text, host_target())), several=True)


def test_results_are_fresh() -> None:
    run = lower_gate("8x0e ;  ;  ; silu ; ", host_target())
    x = torch.randn(20, 8)
    first, again = run(x), run(x)
    assert first.data_ptr() != again.data_ptr() and torch.equal(first, again)
    kept = first.clone()
    run(x * 3)
    again.fill_(torch.nan)
    assert torch.equal(first, kept) and torch.equal(run(x), kept)
    torch.testing.assert_close(first, torch.nn.functional.silu(x), rtol=1e-6, atol=1e-7)


def test_it_is_its_own_launch_and_knows_its_results() -> None:
    run = conv_backward(CONV, host_target())
    assert run.launch is run and [r.row for r in run.results] == [(4,), (4,), (8,)]
    assert [r.row_bytes for r in run.results] == [16, 16, 32]
    assert Output(0, (2, 3), torch.int64).row_bytes == 48
    linear = lower_linear(
        LinearProblem("3x0e -> 5x0e", "f32", "f32"), torch.ones(15), None, None, None, host_target()
    )
    assert linear.launch.results == (Output(0, (5,)),)


def test_lists_are_counted_one_by_one() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [id(v) for v in flat([a, [b, c], 7, (c,)])] == [id(v) for v in (a, b, c, 7, c)]
    tensors, ends = _conv_inputs(6, 30)
    run = conv_forward(CONV, host_target())
    assert torch.equal(run(*tensors, ends), run(*tensors, *ends))
    grad = torch.randn(6, 16)
    back = conv_backward(CONV, host_target())
    pairs = zip(back(grad, *tensors, ends), back(grad, *tensors, *ends), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_without_rows_the_other_function_is_called() -> None:
    tensors, ends = _conv_inputs(6, 0)
    out = conv_forward(CONV, host_target())(*tensors, ends)
    assert out.shape == (6, 16) and not out.any()
    grads = conv_backward(CONV, host_target())(torch.ones(6, 16), *tensors, ends)
    assert [tuple(g.shape) for g in grads] == [(6, 4), (0, 4), (0, 8)] and not grads[0].any()
    seen = []

    def empty(*arguments: Tensor) -> str:
        seen.append(arguments)
        return "nothing"

    parts = (Input(0, (8,)), Output(0, (8,)))
    run = Launch(parts, always(operator.not_), empty=empty)
    x = torch.empty(0, 8)
    assert run(x) == "nothing" and seen == [(x,)]


def test_a_kernel_that_can_do_no_rows_is_called_with_none() -> None:
    assert lower_gate("8x0e ;  ;  ; silu ; ", host_target())(torch.empty(0, 8)).shape == (0, 8)
    sums = lower_sum_rows(3, host_target())(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 4)
    assert sums.shape == (4, 3) and not sums.any()


def test_truth_values_in_and_out() -> None:
    x, mask = torch.randn(40, 3), torch.rand(40, 3) < 0.5
    on, y = _flags()(x, mask)
    assert on.dtype is torch.bool and y.dtype is torch.float32
    assert torch.equal(on, mask & (x > 0)) and torch.equal(y, torch.where(mask, x, 0.0))


def test_other_axes_like_those_of_an_argument() -> None:
    values, index = torch.randn(50, 4, 6), torch.randint(0, 7, (50,))
    run = lower_sum_rows(24, host_target())
    out = run(values, index, 7)
    assert out.shape == (7, 4, 6) and torch.equal(out.view(7, 24), run(values.view(50, 24), index, 7))
    assert lower_sum_rows(1, host_target())(values[:, 0, 0].clone(), index, 7).shape == (7,)


def test_rows_of_a_tensor_and_numbers_are_counted() -> None:
    assert count(torch.empty(4, 2)) == 4 and count(9) == 9
    assert Input(0, (2, 3)).seen(torch.ones(5, 6)).shape == (5, 2, 3)
    assert Input(0, (2, 3), has_rows=False).seen(torch.ones(6)).shape == (2, 3)
    x = torch.ones(5, 6)
    assert Input(0, (6,)).seen(x) is x
    assert Input(0, (6,), torch.bool).seen(x > 0).dtype is torch.int8


def test_the_function_depends_on_the_rows_that_count() -> None:
    asked, called = [], []

    def choose(rows: int) -> Choice:
        asked.append(rows)
        return Choice(lambda *values: called.append(values[-2:]), (rows, -rows))

    run = Launch((Input(0, (2,)), Input(1, (3,)), Output(0, (2,))), choose, counted=1)
    assert run(torch.ones(4, 2), torch.ones(9, 3)).shape == (4, 2)
    assert asked == [9] and called == [(9, -9)]


@pytest.mark.parametrize("size", ["input", "result"])
def test_more_elements_than_a_kernel_counts_are_refused(monkeypatch, size: str) -> None:
    """Also where only what is made has so many; one fewer is taken."""
    wide, narrow = ("16x0e", "2x0e") if size == "input" else ("2x0e", "16x0e")
    parts = tuple(
        kind(0, (int(irreps[:-3]),)) for kind, irreps in zip((Input, Output), (wide, narrow), strict=True)
    )
    run = Launch(parts, always(lambda *values: None))
    monkeypatch.setattr(launches, "MAX_ELEMENTS", 160)
    x = torch.ones(11, parts[0].row[0])
    assert run(x[:10]).shape == (10, parts[1].row[0])
    with pytest.raises(LoweringError, match="counts up to 160 elements") as error:
        run(x)
    assert f"given {x.numel()}" in str(error.value) and "fewer structures" in str(error.value)


def test_a_convolution_of_too_many_elements_is_refused_not_wrapped(monkeypatch) -> None:
    tensors, ends = _conv_inputs(6, 30)
    runs = conv_forward(CONV, host_target()), conv_backward(CONV, host_target())
    grad = torch.randn(6, 16)
    monkeypatch.setattr(launches, "MAX_ELEMENTS", 30 * 8 - 1)  # the weights have one more
    with pytest.raises(LoweringError, match="evaluate fewer structures"):
        runs[0](*tensors, ends)
    with pytest.raises(LoweringError, match="given 240"):
        runs[1](grad, *tensors, ends)
    monkeypatch.setattr(launches, "MAX_ELEMENTS", 30 * 8)
    assert runs[0](*tensors, ends).shape == (6, 16)
    assert len(runs[1](grad, *tensors, ends)) == 3


def test_longer_ones_go_another_way_where_there_is_one(monkeypatch) -> None:
    """Sums go to torch, linears in stretches."""
    values, index = torch.randn(60, 3).round(), torch.randint(0, 5, (60,))
    sums = lower_sum_rows(3, host_target())
    problem = LinearProblem("3x0e -> 5x0e", "f32", "f32")
    linear = lower_linear(problem, torch.randn(15), None, None, None, host_target())
    expected = sums(values, index, 5), linear(values)
    monkeypatch.setattr(launches, "MAX_ELEMENTS", 37)
    assert most_rows(5) == 7 and most_rows(0) == 37
    assert torch.equal(sums(values, index, 5), expected[0])
    assert torch.equal(linear(values), expected[1])
