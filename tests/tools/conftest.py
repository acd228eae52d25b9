"""A small potential whose layers the tools look at."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from torch import Tensor, nn


class Springs(nn.Module):
    """Atoms on springs of an e3nn network's making."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = o3.Linear("1x1o", "16x1o")
        self.second = o3.Linear("16x0e", "16x0e")
        self.third = o3.Linear("16x0e", "1x0e")

    def forward(self, positions: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        vectors = self.first(positions[senders] - positions[receivers])
        lengths = vectors.view(-1, 16, 3).square().sum(2)
        return self.third(torch.tanh(self.second(lengths))).squeeze(-1)


@pytest.fixture(scope="session")
def springs() -> tuple[nn.Module, list[Tensor]]:
    """The potential, and seven atoms that are all connected."""
    i, j = (~torch.eye(7, dtype=torch.bool)).nonzero().T
    positions = 1.5 * torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    return Springs(), [positions, i.contiguous(), j.contiguous()]
