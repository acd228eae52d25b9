"""The irreps-linear for training: the values of the operator, in a form whose derivatives are cheap.

Autograd makes a tensor of zeros for every slice that it goes back through, twice for a loss on forces. Parts
that are split off together come back together.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import CaptureError
from ..ir.layout import Block
from ..ir.specs import linear_spec


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, spec: str, transpose: bool) -> Tensor:
    """:func:`~gaq_compile.operators.reference.irreps_linear`, (N, dim_in) to (N, dim_out), component-major.

    Raises:
        CaptureError: for a transposed one, which graphs of energies do not have.
    """
    if transpose:
        raise CaptureError("a transposed linear in a graph of energies", where=spec)
    s = linear_spec(spec)
    given = _parts(x, s.inputs)
    terms: dict[Block, list[Tensor]] = {block: [] for block in s.outputs}
    for path, matrix in zip(s.paths, torch.split(weight, [p.numel for p in s.paths]), strict=True):
        matrix = matrix.view(path.block_in.mul, path.block_out.mul)
        terms[path.block_out].append(given[path.block_in] @ matrix)
    if bias is not None:
        widths = [block.mul for block in s.bias_blocks]
        for block, part in zip(s.bias_blocks, torch.split(bias, widths), strict=True):
            terms[block].append(part.expand(x.shape[0], 1, -1))
    made = [
        functools.reduce(torch.add, terms[block]) if terms[block] else _nothing(x, block)
        for block in s.outputs
    ]
    return _joined(made, s.outputs)


def _nothing(x: Tensor, block: Block) -> Tensor:
    """What no path leads to."""
    return x.new_zeros(x.shape[0], block.components, block.mul)


def _members(blocks: tuple[Block, ...]) -> list[list[Block]]:
    """The blocks that lie side by side: component-major, neighbours of one degree share their rows."""
    rest, found = list(blocks), []
    while rest:
        members = [rest.pop(0)]
        while sum(block.mul for block in members) < members[0].stride:
            members.append(rest.pop(0))
        found.append(members)
    return found


def _parts(x: Tensor, blocks: tuple[Block, ...]) -> dict[Block, Tensor]:
    """Each block of x as (N, components, mul)."""
    members = _members(blocks)
    sizes = [sum(b.components * b.mul for b in some) for some in members]
    found: dict[Block, Tensor] = {}
    for some, part in zip(members, torch.split(x, sizes, dim=1), strict=True):
        whole = part.unflatten(1, (some[0].components, -1))
        found |= zip(some, torch.split(whole, [b.mul for b in some], dim=2), strict=True)
    return found


def _joined(parts: list[Tensor], blocks: tuple[Block, ...]) -> Tensor:
    """The inverse of :func:`_parts`."""
    of = dict(zip(blocks, parts, strict=True))
    return torch.cat([torch.cat([of[b] for b in some], 2).flatten(1) for some in _members(blocks)], 1)
