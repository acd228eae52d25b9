"""tradeoff: error against bytes along the choices that `quantize(..., max_force_error=)` has."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import gaq_compile
from gaq_compile.errors import ConfigError


@pytest.fixture(scope="module")
def found(springs):
    return gaq_compile.tradeoff(*springs, points=4, progress=False)


def test_bytes_buy_accuracy(found):
    sizes = [p.bytes for p in found.points]
    assert len(sizes) == 4 and sizes == sorted(set(sizes)) and sizes[-1] < 0.6 * found.float_bytes
    errors = [p.error.force_mev_per_a for p in found.points]
    assert errors[0] > 50 * errors[-1] > 0
    assert found.atoms >= 100


def test_quantize_pays_for_no_more_than_an_error_takes(found, springs):
    most = found.points[0].error.force_mev_per_a * 0.99
    potential = gaq_compile.quantize(
        *springs, "auto", max_force_error=most, backend="reference", measure=False, progress=False
    )
    choice = potential.report.choice
    assert choice["force_mae_mev_per_a"] <= most and choice["atoms"] == found.atoms
    assert found.points[0].bytes < potential.report.memory["weights_bytes"] <= found.points[-1].bytes
    assert potential.config.max_weight_share == choice["max_weight_share"]
    assert potential.report.scheme == "auto" and "force error asked for" in str(potential.report)
    assert {"bytes", "error", "max_weight_share", "max_wide_share"} == set(choice["trials"][0])


def test_it_can_be_printed_drawn_and_stored(found, tmp_path):
    out = io.StringIO()
    found.print(Console(file=out, width=120))
    assert f"{found.points[-1].bytes / found.float_bytes:.3f}" in out.getvalue()
    assert found.plot(tmp_path / "bytes.png").stat().st_size > 5000
    assert found.to_dict()["points"][0]["error"]["force_mev_per_a"] == found.points[0].error.force_mev_per_a


@pytest.mark.parametrize(("scheme", "points"), [("w4", 1), ("fp32", 4), ("naive-w8a8", 4)])
def test_what_is_no_trade_off_is_refused(springs, scheme, points):
    with pytest.raises(ConfigError, match="trade-off"):
        gaq_compile.tradeoff(*springs, scheme, points=points, progress=False)
