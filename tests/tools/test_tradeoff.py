"""tradeoff: error against bytes along the choices that `quantize(..., max_force_error=)` has."""

from __future__ import annotations

import io

import pytest
import torch
from e3nn import o3
from rich.console import Console
from torch import nn

import gaq_compile
from gaq_compile.errors import ConfigError


class Springs(nn.Module):
    """Atoms on springs of an e3nn network's making."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = o3.Linear("1x1o", "16x1o")
        self.second = o3.Linear("16x0e", "16x0e")
        self.third = o3.Linear("16x0e", "1x0e")

    def forward(self, positions, senders, receivers):
        vectors = self.first(positions[senders] - positions[receivers])
        lengths = vectors.view(-1, 16, 3).square().sum(2)
        return self.third(torch.tanh(self.second(lengths))).squeeze(-1)


def example(n: int = 7) -> dict[str, torch.Tensor]:
    i, j = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    positions = 1.5 * torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return {"positions": positions, "senders": i.contiguous(), "receivers": j.contiguous()}


@pytest.fixture(scope="module")
def found():
    return gaq_compile.tradeoff(Springs(), list(example().values()), points=4, progress=False)


def test_bytes_buy_accuracy(found):
    sizes = [p.bytes for p in found.points]
    assert len(sizes) == 4 and sizes == sorted(set(sizes)) and sizes[-1] < 0.6 * found.float_bytes
    errors = [p.error.force_mev_per_a for p in found.points]
    assert errors[0] > 50 * errors[-1] > 0
    assert found.atoms >= 100


def test_a_point_is_what_quantize_gives_for_its_share(found):
    """`quantize` with a force error between two points pays for no more than the better one."""
    most = found.points[0].error.force_mev_per_a * 0.99
    potential = gaq_compile.quantize(
        Springs(), list(example().values()), "auto",
        max_force_error=most, backend="reference", measure=False, progress=False,
    )  # fmt: skip
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
def test_what_is_no_trade_off_is_refused(scheme, points):
    with pytest.raises(ConfigError, match="trade-off"):
        gaq_compile.tradeoff(Springs(), list(example().values()), scheme, points=points, progress=False)
