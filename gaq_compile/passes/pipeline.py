"""The passes in order: the table of contents of the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.fx import GraphModule

from ..capture.graphs import GraphFormat
from ..config import QuantConfig
from .cancel_relayouts import cancel_relayouts
from .derive_forces import derive_forces
from .fold_integers import fold_integers
from .fuse_rows import fuse_rows
from .fuse_tensor_products import fuse_tensor_products
from .insert_mddq import insert_mddq
from .lower import Backend
from .observe import Observed
from .pack_rows import pack_rows
from .round_weights import round_weights
from .scale_convolutions import scale_convolutions
from .scale_harmonics import scale_harmonics
from .shift_energies import shift_energies
from .simplify import simplify
from .tag_irreps import tag_irreps

Pass = Callable[[GraphModule], GraphModule]
Derivation = Callable[[GraphModule, GraphFormat, Sequence[Tensor]], GraphModule]

PREPARED = "tag_irreps"  # the last stage of :func:`prepare`
# On the captured energy graph, before anything is quantized.
ENERGY_PASSES: tuple[Pass, ...] = (
    simplify, cancel_relayouts, fuse_tensor_products, scale_convolutions, scale_harmonics, simplify,
    tag_irreps,
)  # fmt: skip


def prepare(captured: GraphModule) -> dict[str, GraphModule]:
    """Capture -> a tagged, fused float energy graph; every stage under its pass's name."""
    stages = {"capture": captured}
    graph = captured
    for apply in ENERGY_PASSES:
        graph = apply(graph)
        name = apply.__name__
        stages[name if name not in stages else f"{name}_fused"] = graph
    return stages


def forces_of(quantized: GraphModule, form: GraphFormat, example: Sequence[Tensor]) -> GraphModule:
    """An energy graph -> energy and forces, simplified and tagged; arguments as :func:`derive_forces`."""
    return tag_irreps(simplify(derive_forces(quantized, form, example), differentiated=True))


def quantize_graph(
    prepared: GraphModule,
    config: QuantConfig,
    observed: Observed,
    form: GraphFormat,
    example: Sequence[Tensor],
    calibration: Sequence[Sequence[Tensor]],
    derive: Derivation | None = None,
) -> dict[str, GraphModule]:
    """A prepared energy graph -> integer energy and forces, ready to be lowered.

    Args:
        prepared: the last stage of :func:`prepare`.
        config: what to quantize and how.
        observed: what calibration showed (:func:`.observe.observe`).
        form: the graph's inputs.
        example: inputs of a batch of at least two graphs, for tracing forces.
        calibration: input batches, whose mean energies are kept.
        derive: gives what :func:`forces_of` gives, which is the default, in another way.
    """
    derive = derive or forces_of
    activations = observed.activations(config.max_wide_share)
    weights = round_weights(prepared, config, observed.costs, activations)
    quantized = insert_mddq(prepared, config, activations, weights)
    if weights or activations:
        quantized = shift_energies(quantized, prepared, form, calibration)
    quantized = tag_irreps(quantized)
    forces = derive(quantized, form, example)
    folded = tag_irreps(fold_integers(forces))
    return {"insert_mddq": quantized, "derive_forces": forces, "fold_integers": folded}


def group_rows(integer: GraphModule, form: GraphFormat, backend: Backend | None = None) -> GraphModule:
    """What torch would run operator by operator, in groups that one kernel each can run.

    Args:
        integer: the last stage of :func:`quantize_graph`, which is also what files hold.
        form: the graph's inputs.
        backend: whose kernels these are to be, which says what else joins groups, and whether halves are
            stored; by default all does, and they are.
    """
    flags = (backend.groups_linears, backend.groups_sums, backend.stores_halves) if backend else ()
    return pack_rows(fuse_rows(integer, form, *flags))
