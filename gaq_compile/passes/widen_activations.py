"""Activations that cost most per multiplication get 16 bits instead of 8; the smallest layers stay in float.

A rounded site costs ``sum_u I[u] v[u]`` (:mod:`.weigh_channels`), with variances v of ``s[u]^2 / 12``
for a step s, or of ``x[u]^2`` itself where that is less; 16 bits cost next to nothing. Integer
products of 16 bits take twice as long as those of 8, so sites are widened in the order of what they
cost per multiplication, as long as all wide ones together take at most a given share of the
multiplications. In practice these are the first layers of radial networks, with
few inputs that everything else depends on. What is multiplied in less than a five-hundredth of all
multiplications, such as the last layer of a read-out, stays in float: integers gain nothing there, and
what they lose goes into the energy as it is. Its weights may then have 16 bits (:mod:`.round_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ActivationScheme, activation_scheme
from ..ir.layout import blocks, dim
from ..ir.specs import linear_spec
from .calibrate import Site
from .graph_tools import gaq
from .weigh_channels import ChannelCosts

WIDE = 16
NEGLIGIBLE = 0.002  # of all multiplications


@dataclass(frozen=True)
class RoundedSite:
    """How one site is rounded.

    Attributes:
        scheme: the activation scheme.
        steps: (n_channels,).
        error: what the rounding costs; 0 where it is not known, or no bits are short.
    """

    scheme: str
    steps: Tensor
    error: float = 0.0


def widen_activations(
    sites: Sequence[Site], steps: Mapping[str, Tensor], costs: ChannelCosts, max_share: float | None
) -> dict[str, RoundedSite]:
    """The scheme and the steps of every site that is rounded, by its label.

    Args:
        sites: from :func:`.calibrate.quantization_sites`.
        steps: theirs, from :func:`.calibrate.calibrate`.
        costs: theirs, from :func:`.weigh_channels.weigh_channels`; sites that are not among them stay.
        max_share: of all multiplications, what wide sites may take; None widens nothing, and rounds all.
    """
    found: dict[str, RoundedSite] = {}
    work: dict[str, float] = {}
    for site in sites:
        found[site.label] = RoundedSite(site.scheme, steps[site.label], _cost(site, steps[site.label], costs))
        work[site.label] = _multiplications(site, costs)  # of all uses of the label: their rows are summed
    if max_share is None:
        return found
    all_work = sum(work.values())
    for label in _negligible(sites, work, NEGLIGIBLE * all_work):
        del found[label]
    left = max_share * all_work
    for label in sorted(found, key=lambda k: -found[k].error / max(work[k], 1.0)):
        narrow = activation_scheme(found[label].scheme).scalar_bits < WIDE
        if narrow and found[label].error > 0 and 0 < work[label] <= left:
            left -= work[label]
            irreps = next(site.irreps for site in sites if site.label == label)
            found[label] = _widened(found[label], irreps)
    return found


def _negligible(sites: Sequence[Site], work: Mapping[str, float], most: float) -> set[str]:
    """Inputs of linears, of those whose work is known, that do less of it than ``most``."""
    linear = {s.label for s in sites if all(n.target is gaq.irreps_linear.default for n in s.consumers)}
    return {label for label in linear if 0 < work[label] < most}


def _cost(site: Site, steps: Tensor, costs: ChannelCosts) -> float:
    if site.label not in costs.impacts:
        return 0.0
    components = torch.cat([torch.full((b.mul,), float(b.components)) for b in blocks(site.irreps)])
    mean_square = costs.powers[site.label] / (components * costs.rows[site.label])
    variance = torch.minimum(steps.double() ** 2 / 12.0, mean_square)
    return float((costs.impacts[site.label] * variance).sum())


def _multiplications(site: Site, costs: ChannelCosts) -> float:
    """Per atom, of the layers that read the site."""
    per_row = 0.0
    for node in site.consumers:
        if node.target is gaq.irreps_linear.default:
            paths = linear_spec(str(node.args[3])).paths
            per_row += sum(path.numel * path.block_in.components for path in paths)
        else:
            per_row += dim(site.irreps)
    return costs.rows.get(site.label, 0.0) * per_row


def _widened(site: RoundedSite, irreps: str) -> RoundedSite:
    narrow = activation_scheme(site.scheme)
    wide = replace(
        narrow,
        scalar_bits=WIDE,
        vector_bits=WIDE,
        direction_bits=WIDE if narrow.vector == "mddq" else narrow.direction_bits,
    )
    return RoundedSite(str(wide), _finer(site.steps, narrow, wide, irreps))


def _finer(steps: Tensor, narrow: ActivationScheme, wide: ActivationScheme, irreps: str) -> Tensor:
    """The steps of the same ranges, one for each block: with so many levels no channel needs its own."""
    parts = []
    for b in blocks(irreps):
        largest = steps[b.channel :][: b.mul].max()
        parts.append((largest * (narrow.qmax(b.l) / wide.qmax(b.l))).expand(b.mul))
    return torch.cat(parts)
