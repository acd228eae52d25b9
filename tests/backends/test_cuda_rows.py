"""Groups of row operators as GPU kernels, emulated: the CPU kernels' own checks against torch in float64."""

from __future__ import annotations

import pytest
import test_tvm_rows as checks
from cuda_emulator import EmulatedGpu

from gaq_compile.backends.tvm.cuda.rows import lower_rows

GPU = EmulatedGpu()


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, poisoned_memory):
    """The checks' kernels are those of an emulated GPU, and new tensors begin as NaN."""
    monkeypatch.setattr(checks, "lower_rows", lower_rows)
    monkeypatch.setattr(checks, "host_target", lambda: GPU)
    monkeypatch.setitem(checks._check.__kwdefaults__, "rows", (0, 1, 37))


@pytest.mark.parametrize("row", [(), (3,), (2, 3), (17,), (4, 32)])
def test_plain_operators_are_exact_to_rounding(row: tuple[int, ...]) -> None:
    checks.test_plain_operators_are_exact_to_rounding(row)


@pytest.mark.parametrize("row", [(), (24,)])
def test_functions_are_as_exact_as_they_say(row: tuple[int, ...]) -> None:
    checks.test_functions_are_as_exact_as_they_say(row)
    checks.test_powers_are_as_exact_as_their_logarithm(row)


@pytest.mark.parametrize("exponent", [0, 10])
def test_halves_are_rounded_as_torch_rounds_them(exponent: int) -> None:
    checks.test_halves_are_rounded_as_torch_rounds_them(17, exponent)


@pytest.mark.parametrize(
    "check",
    [
        checks.test_log_of_zero_and_negative_numbers,
        checks.test_log_keeps_nan_and_infinity,
        checks.test_exp_overflows_where_it_says,
        checks.test_powers_of_zero_and_of_negative_numbers,
        checks.test_clamp_and_comparisons_of_nan,
    ],
)
def test_special_numbers(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks._special.__kwdefaults__, "widths", (1, 17))
    check()


@pytest.mark.parametrize("name", checks.NAMES)
def test_functions_keep_nan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks._special.__kwdefaults__, "widths", (1,))
    checks.test_functions_keep_nan(name)


@pytest.mark.parametrize("width", [2, 17])
def test_where_ignores_nan_in_the_branch_not_taken(width: int) -> None:
    checks.test_where_ignores_nan_in_the_branch_not_taken(width)


def test_columns_meet_rows() -> None:
    checks.test_columns_meet_rows()


@pytest.mark.parametrize("row", [(3,), (4, 32)])
def test_constants_meet_rows(row: tuple[int, ...]) -> None:
    checks.test_constants_meet_rows(row)


@pytest.mark.parametrize(
    "check",
    [
        checks.test_constants_meet_rows_without_axes,
        checks.test_whole_numbers_are_constants_too,
        checks.test_a_single_number_can_be_an_argument,
        checks.test_flags_can_be_the_same_for_all_rows,
        checks.test_rows_in_other_shapes,
        checks.test_joined_rows,
        checks.test_rows_joined_along_inner_axes,
        checks.test_sums_of_slices_and_expanded_rows,
        checks.test_products_with_constant_matrices,
        checks.test_gathered_numbers,
        checks.test_a_table_can_be_a_matrix_too,
        checks.test_several_results_of_one_value_and_views_of_arguments,
        checks.test_chains_of_functions_on_wide_rows_compile_soon,
    ],
)
def test_groups(check) -> None:
    check()


@pytest.mark.parametrize("row", [(6,), (4, 32)])
def test_sums(row: tuple[int, ...]) -> None:
    checks.test_sums(row)


@pytest.mark.parametrize("row", [(3,), (24,)])
def test_gathered_rows(row: tuple[int, ...]) -> None:
    checks.test_gathered_rows(row)


def test_groups_of_constants_only_are_refused() -> None:
    checks.test_a_group_of_constants_only_is_refused()


@pytest.mark.parametrize("target", [checks.aten.softplus.default])
def test_further_arguments_are_refused(target) -> None:
    checks.test_further_arguments_are_refused(target, (2.0, 20.0))
