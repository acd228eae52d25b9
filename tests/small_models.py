"""A potential of one's own, as several test files quantize it, and tensors for it."""

from __future__ import annotations

import torch
from e3nn import nn as enn
from e3nn import o3
from torch import Tensor, nn


class Small(nn.Module):
    """A convolution, an embedding, integer layers, and a size that depends on an attribute."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(10, 4)
        self.sh = o3.SphericalHarmonics("1x0e+1x1o", True, "component")
        paths = [(0, 0, 0, "uvu", True), (0, 1, 1, "uvu", True)]
        self.tp = o3.TensorProduct(
            "4x0e", "1x0e+1x1o", "4x0e+4x1o", paths, shared_weights=False, internal_weights=False
        )
        self.radial = enn.FullyConnectedNet([3, 6, 8], nn.functional.silu)
        self.last = o3.Linear("4x0e+4x1o", "4x0e+4x1o")
        self.decay = 1.0
        self.centres = torch.arange(3.0)

    def sums(self, positions: Tensor, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """What atoms receive: (N, 16)."""
        vectors = positions[senders] - positions[receivers]
        length = vectors.norm(dim=1, keepdim=True)
        basis = torch.exp(-self.decay * (length - self.centres) ** 2)
        message = self.tp(self.embed(species)[senders], self.sh(vectors), self.radial(basis))
        return torch.zeros(positions.shape[0], 16, dtype=length.dtype).index_add(0, receivers, message)

    def forward(self, positions: Tensor, species: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        y = self.last(self.sums(positions, species, senders, receivers))
        return y[:, :4].sum(1) + y[:, 4:].square().sum(1)


def neighbours(n: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Atoms that are all neighbours of each other."""
    g = torch.Generator().manual_seed(seed)
    i, j = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    positions, species = torch.randn(n, 3, generator=g) * 1.5, torch.randint(0, 10, (n,), generator=g)
    ends = {"senders": i.contiguous(), "receivers": j.contiguous()}
    return {"positions": positions, "species": species, **ends}
