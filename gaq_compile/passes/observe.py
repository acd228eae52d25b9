"""What calibration shows of a float energy graph: the ranges of activations, and what errors cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from ..capture.graphs import GraphFormat
from ..config import QuantConfig
from .calibrate import Site, calibrate, quantization_sites
from .weigh_channels import ChannelCosts, weigh_channels
from .widen_activations import RoundedSite, widen_activations


@dataclass(frozen=True)
class Observed:
    """What a configuration's choices are made from.

    Attributes:
        sites: the activations to be quantized.
        steps: theirs by label, (n_channels,).
        costs: what errors cost; empty where nothing is decided by them.
    """

    sites: tuple[Site, ...]
    steps: dict[str, Tensor]
    costs: ChannelCosts

    def activations(self, max_wide_share: float | None) -> dict[str, RoundedSite]:
        """How each site is rounded if 16 bits may take this share of the multiplications."""
        return widen_activations(self.sites, self.steps, self.costs, max_wide_share)


def observe(
    prepared: GraphModule,
    config: QuantConfig,
    form: GraphFormat,
    calibration: Sequence[Sequence[Tensor]],
    progress: bool = False,
) -> Observed:
    """Run the calibration batches.

    Args:
        prepared: the float energy graph.
        config: what is to be quantized, and which observer.
        form: the graph's inputs.
        calibration: input batches.
        progress: show progress bars.

    Raises:
        StructureError: if calibration meets NaN or infinite activations.
    """
    sites = quantization_sites(prepared, config)
    steps = calibrate(prepared, calibration, config, progress)
    costs = ChannelCosts()
    if config.weighs_errors:
        costs = weigh_channels(prepared, form, calibration, sites, progress)
    return Observed(tuple(sites), steps, costs)
