"""Linear kernels for GPUs, emulated: the CPU kernels' own checks, which know nothing of where they run."""

from __future__ import annotations

import pytest
import test_tvm_linear as checks
import torch
from cuda_emulator import EmulatedGpu
from torch import Tensor

from gaq_compile.backends.tvm.cuda.linear import LinearKernel, lower_linear
from gaq_compile.backends.tvm.cuda.linear_kernel import jobs, rows_per_block
from gaq_compile.backends.tvm.dense_plan import LinearProblem
from gaq_compile.errors import LoweringError
from gaq_compile.ir.layout import dim

ROWS = (0, 1, 37)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, poisoned_memory):
    """The checks' kernels are those of an emulated GPU, and new tensors begin as NaN."""
    monkeypatch.setattr(checks, "lower", _lower)
    monkeypatch.setattr(checks, "run", lambda kernel, x: kernel(x))


def _lower(problem: LinearProblem, made: dict[str, Tensor | None], *_: object) -> LinearKernel:
    order = ("weight", "weight_scale", "x_scale", "bias")
    return lower_linear(problem, *(made[k] for k in order), EmulatedGpu())


@pytest.mark.parametrize(
    ("activation", "weight"),
    [(a, w) for a in checks.SCHEMES for w in ("f32", "s8")]
    + [("f32", "s4"), ("s8 m8d8", "s4"), ("s8 m8exact", "s4")]
    + [(a, "s4") for a in checks.COMMON],
)
def test_every_scheme_and_weight(activation: str, weight: str) -> None:
    checks.test_every_scheme_and_weight(activation, weight)


@pytest.mark.parametrize("weight", ["f32", "s8", "s4"])
@pytest.mark.parametrize("spec", [checks.PATHS, checks.BLOCKS])
def test_paths_blocks_and_transposes(spec: str, weight: str) -> None:
    checks.test_paths_blocks_and_transposes(spec, weight)


def test_weights_of_16_bits() -> None:
    problem = LinearProblem(checks.PATHS, "f32", "s16", bias=True)
    for rows in ROWS:
        x, made = checks.tensors(problem, rows)
        made["weight"] = torch.randint(-32767, 32768, made["weight"].shape).to(torch.int16)
        y = _lower(problem, made)(x)
        assert y.shape == (rows, dim(problem.irreps_out))
        if rows:
            checks.assert_close(y, checks.expected(problem, x, made), 1e-6)


@pytest.mark.parametrize("weight", ["s8", "s4"])
def test_float_gradients(weight: str) -> None:
    checks.test_float_gradients_are_divided_by_the_steps_that_codes_hold(checks.NEIGHBOURS, weight)
    checks.test_float_gradients_of_whole_numbers_are_exact(weight)


@pytest.mark.parametrize("activation", ["s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8d8 common", "s8 c8 common"])
@pytest.mark.parametrize("weight", ["s8", "s4"])
def test_integer_products_are_exact(activation: str, weight: str) -> None:
    checks.test_integer_products_are_exact(checks.SQUARE[1], activation, weight)


@pytest.mark.parametrize(
    ("spec", "weight"), [*((spec, "s8") for spec in checks.GRADIENTS), (checks.GRADIENTS[1], "s4")]
)
def test_integer_gradients_are_exact(spec: str, weight: str) -> None:
    checks.test_integer_gradients_are_exact(spec, weight)


@pytest.mark.parametrize("weight", ["s8", "s4"])
def test_sums_of_extreme_values_do_not_overflow(weight: str) -> None:
    checks.test_gradient_sums_of_extreme_values_do_not_overflow(weight)
    for activation in ("s8 c8", "s16 c16", "s9 c9 common"):
        checks.test_long_sums_of_extreme_values_do_not_overflow(activation, weight)


def test_gradient_rows_have_steps_of_their_own() -> None:
    checks.test_gradient_rows_have_steps_of_their_own()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gradients_that_are_not_finite_stay_visible(bad: float) -> None:
    checks.test_gradients_that_are_not_finite_stay_visible(bad, "")


@pytest.mark.parametrize("activation", ["s8 m8d8", "s8 c8", "s8 m8exact", "s8 m8d8 common"])
def test_nan_stays_visible(activation: str) -> None:
    checks.test_nan_stays_visible(activation)


@pytest.mark.parametrize("activation", ["s8 m8d8", "s8 m8d8 common"])
def test_zero_vectors_quantize_to_zero(activation: str) -> None:
    checks.test_zero_vectors_quantize_to_zero(activation)


def test_unreached_outputs_are_zero_or_bias() -> None:
    checks.test_unreached_outputs_are_zero_or_bias()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    problem = LinearProblem("48x0e+7x1e -> 70x0e+5x1e", "s8 m8d8", "s8")
    x, made = checks.tensors(problem, 37)
    kernel = _lower(problem, made)
    alone = torch.cat([kernel(row[None]) for row in x])
    for rows in (*ROWS, 15, 16, 17):
        assert torch.equal(kernel(x[:rows]), alone[:rows])


def test_wide_rows_take_fewer_at_once() -> None:
    """Shared memory decides; the result does not notice."""
    problem = LinearProblem("1200x0e+352x2e -> 3x0e+33x2e", "s16 m16d16", "s8")
    x, made = checks.tensors(problem, 5)
    kernel = _lower(problem, made)
    assert rows_per_block(kernel.plan) == 8
    assert len(jobs(kernel.plan)) == 2
    checks.assert_close(kernel(x), checks.expected(problem, x, made), 2e-3)
    with pytest.raises(LoweringError, match="shared memory"):
        too_wide = LinearProblem("11000x0e -> 1x0e")
        _lower(too_wide, checks.tensors(too_wide, 1)[1])


def test_four_bit_weights_are_stored_in_half_the_bytes() -> None:
    sizes = {}
    for weight in ("s8", "s4"):
        problem = LinearProblem("64x0e -> 64x0e", "s8 c8", weight)
        sizes[weight] = _lower(problem, checks.tensors(problem, 1)[1]).constants["words"].numel() * 4
    assert (sizes["s8"], sizes["s4"]) == (64 * 64, 32 * 64)
