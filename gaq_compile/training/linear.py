"""The irreps-linear for training: the values of the operator, in a form whose derivatives are cheap.

Autograd makes a tensor of zeros for every slice that it goes back through, twice for a loss on forces. Parts
that are split off together come back together.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import CaptureError
from ..ir.specs import linear_spec


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, spec: str, transpose: bool) -> Tensor:
    """:func:`~gaq_compile.operators.reference.irreps_linear`, (N, dim_in) to (N, dim_out), component-major.

    Raises:
        CaptureError: for a transposed one, which graphs of energies do not have.
    """
    if transpose:
        raise CaptureError("a transposed linear in a graph of energies", where=spec)
    s = linear_spec(spec)
    given, made = s.inputs, s.outputs
    parts = torch.split(x, [block.components * block.mul for block in given], dim=1)
    by_base = {
        block.base: part.unflatten(1, (block.components, block.mul))
        for block, part in zip(given, parts, strict=True)
    }
    sums: dict[int, list[Tensor]] = {block.base: [] for block in made}
    for path, matrix in zip(s.paths, torch.split(weight, [p.numel for p in s.paths]), strict=True):
        matrix = matrix.view(path.block_in.mul, path.block_out.mul)
        sums[path.block_out.base].append(by_base[path.block_in.base] @ matrix)
    if bias is not None:
        for block, part in zip(s.bias_blocks, torch.split(bias, [b.mul for b in s.bias_blocks]), strict=True):
            sums[block.base].append(part.expand(x.shape[0], 1, -1))
    return torch.cat(
        [
            functools.reduce(torch.add, sums[block.base]).flatten(1)
            if sums[block.base]
            else x.new_zeros(x.shape[0], block.components * block.mul)
            for block in made
        ],
        dim=1,
    )
