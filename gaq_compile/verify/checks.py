"""The checks that a compiled potential passes before it is handed out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from ..errors import VerificationError
from .conservativity import conservativity
from .equivariance import equivariance
from .measure import alternate, tensor_peak
from .parity import Parity, parity
from .types import Evaluate

# Float32 rounding of a whole network: energies and forces may differ by this much and no more.
FP32_ENERGY = 0.01  # meV/atom
FP32_FORCE = 0.05  # meV/Å, mean; the largest component may be twenty times that
FP32_RELATIVE = 1e-4
FP32_STRESS = 0.01  # meV/Å^3


@dataclass(frozen=True)
class Sides:
    """The original model and a compiled one, as evaluators of structures."""

    original: Evaluate
    compiled: Evaluate


def check_fp32(sides: Sides, structures: Sequence[Atoms], where: str) -> Parity:
    """Refuse a fusion-only result that differs from the original beyond float32 rounding.

    Raises:
        VerificationError: naming the quantity, its error, the tolerance and likely causes.
    """
    found = parity(sides.original, sides.compiled, list(structures))
    force_tolerance = _force_rounding(found)
    limits = (
        ("energy (meV/atom)", found.energy_max_mev_per_atom, FP32_ENERGY),
        ("mean force (meV/Å)", found.force_mae_mev_per_a, force_tolerance),
        ("stress (meV/Å^3)", found.stress_mae or 0.0, FP32_STRESS),
        ("largest force component (meV/Å)", found.force_max_mev_per_a, 20 * force_tolerance),
    )
    for name, error, tolerance in limits:
        if not error <= tolerance:
            raise VerificationError(
                f"the fused float32 graph does not reproduce the original model: {name} is off by "
                f"{error:.4g}, allowed is {tolerance:.4g}",
                where=where,
                fix="likely causes: a model whose forward depends on state or on the number of atoms, "
                "neighbours counted differently (self-images, cutoff), or a kernel fault; "
                "compare quantize(..., scheme='fp32', backend='reference')",
            )
    return found


def check_kernels(
    in_torch: Sides, kernels: Evaluate, structures: Sequence[Atoms], smooth: bool, where: str
) -> Parity:
    """Refuse kernels that do not compute what the same graph computes in torch.

    Where activations are rounded, last bits decide which way some are rounded: forces may then differ as
    much as rounding itself makes them differ from the original's, twice over.

    Args:
        in_torch: the original, and the graph in torch.
        kernels: the graph by its kernels.
        structures: to compare on.
        smooth: whether no activation is rounded.
        where: for the error.

    Raises:
        VerificationError: naming the difference and what is allowed.
    """
    found = parity(in_torch.compiled, kernels, list(structures))
    allowed = _force_rounding(found)
    if not smooth:
        rounding = parity(in_torch.original, in_torch.compiled, list(structures))
        allowed += 2 * rounding.force_mae_mev_per_a
    if not found.force_mae_mev_per_a <= allowed:
        raise VerificationError(
            f"kernels do not compute what the graph does: forces differ by {found.force_mae_mev_per_a:.4g} "
            f"meV/Å, allowed is {allowed:.4g}",
            where=where,
            fix="a kernel is wrong on this machine: report it; backend='reference' runs without kernels",
        )
    return found


def _force_rounding(found: Parity) -> float:
    """The mean force error (meV/Å) that float32 may make, of forces as large as these."""
    scale = found.force_mae_mev_per_a / found.force_rel if found.force_rel > 0 else 0.0
    return max(FP32_FORCE, FP32_RELATIVE * scale if np.isfinite(scale) else 0.0)


def accuracy_figures(sides: Sides, structures: Sequence[Atoms], fp32: Parity) -> dict[str, float]:
    """Errors against the original, and those of the fusion-only form beside them."""
    found = parity(sides.original, sides.compiled, list(structures))
    return {
        "energy_mev_per_atom": found.energy_mev_per_atom,
        "force_mae_mev_per_a": found.force_mae_mev_per_a,
        "force_rel": found.force_rel,
        "fp32_energy_mev_per_atom": fp32.energy_mev_per_atom,
        "fp32_force_mae_mev_per_a": fp32.force_mae_mev_per_a,
    }


def equivariance_figures(
    evaluate: Evaluate, structures: Sequence[Atoms], rotations: int = 4
) -> dict[str, float]:
    """LEE over random rotations of the structures."""
    found = equivariance(evaluate, list(structures), rotations=rotations)
    return {
        "lee_force_mev_per_a": found.force_mev_per_a,
        "lee_energy_mev_per_atom": found.energy_mev_per_atom,
    }


def conservativity_figures(evaluate: Evaluate, structures: Sequence[Atoms], claimed: bool) -> dict[str, Any]:
    """F = -dE/dx by central differences; ``claimed`` is what the scheme says of itself.

    Raises:
        VerificationError: if a scheme that claims true forces does not have them.
    """
    found = conservativity(evaluate, list(structures))
    if claimed and found.error > max(1e-2, 10 * found.resolution):
        raise VerificationError(
            f"forces are not the gradient of the energy: {found.error:.2e} relative, "
            f"{found.resolution:.1e} explained by rounding",
            fix="a kernel or a backward pass is wrong; compare backend='reference'",
        )
    return {
        "gradient_rel_error": found.error,
        "gradient_rel_resolution": found.resolution,
        "scheme_is_conservative": claimed,
    }


def speed_figures(
    original: Callable[[], Any], compiled: Callable[[], Any], runs: int, warmup: int
) -> dict[str, Any]:
    """Both sides timed in alternation."""
    timing = alternate(original, compiled, runs=runs, warmup=warmup)
    return {
        "eager_ms": timing.a_ms,
        "compiled_ms": timing.b_ms,
        "ratio": timing.ratio,
        "ratio_quartiles": [timing.ratio_low, timing.ratio_high],
        "runs": timing.runs,
    }


def memory_figures(original: Callable[[], Any], compiled: Callable[[], Any]) -> dict[str, Any]:
    """Peak memory of each side's tensors while it evaluates."""
    return {
        "eager_peak_bytes": tensor_peak(original),
        "compiled_peak_bytes": tensor_peak(compiled),
        "peak_is": "tensors alive at once",
    }
