"""``quantize`` and ``load``: the whole library in two functions."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from torch.fx import GraphModule

import gaq_compile.backends.reference
import gaq_compile.backends.tvm  # noqa: F401 - backends register themselves when imported

from .backends.base import Backend, make_backend
from .backends.tvm.cuda.device import is_cuda
from .backends.tvm.cuda.driver import gpu_architecture, require_gpu
from .cache import Stages, arithmetic, cached_forces, fetch, key_of, store
from .capture.fingerprint import tensor_bytes
from .capture.graphs import CalibratedRange, calibrated_range
from .config import AUTO, DEFAULT_SCHEME, QuantConfig, is_conservative, resolve
from .errors import AccuracyWarning, ConfigError
from .garbage import rarely_collected, set_aside
from .ir.specs import linear_spec
from .passes.calibrate import quantization_sites
from .passes.choose_bits import choose_bits
from .passes.graph_tools import attribute, gaq
from .passes.lower import Placement, lower
from .passes.observe import Observed
from .passes.pipeline import PREPARED, group_rows, quantize_graph
from .potential import Potential
from .subject import Subject, trace
from .verify import checks
from .verify.parity import Parity
from .verify.report import Report


def quantize(
    model: nn.Module | str,
    example_graph: Atoms | Sequence[Atoms] | Sequence[Tensor] | Mapping[str, Tensor],
    scheme: str | QuantConfig = DEFAULT_SCHEME,
    *,
    max_force_error: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    backend: str = "tvm",
    target: str | None = None,
    strict: bool = False,
    measure: bool = True,
    progress: bool = True,
) -> Potential:
    """Compile a trained equivariant potential to low-bit integer kernels, forces included.

    The model is captured, its irreps found, quantized, fused, differentiated, lowered and then
    measured against the original before it is returned. The model itself is not modified. Graphs
    that were made before from the same model, examples and settings come from disk
    (:mod:`.cache`); environment variable ``GAQ_CACHE_GRAPHS=0`` makes them anew.

    Args:
        model: a trained potential (SevenNet, So3krates/SO3LR, or any module built from e3nn), or
            the name of a pretrained one ("sevennet-0", "so3lr").
        example_graph: a structure, or several; they and rattled copies of them are the
            calibration data, and the first one is what is measured on. For a model of any other
            family, the tensors that its own forward takes (one of them called ``positions`` or
            ``pos``); it must return its energy.
        scheme: a preset ("w8a8", "w4a8", "naive-w8a8", "w8", "w4", "w8a16", "w4a16", "fp32",
            "exact-w8a8", "exact-w4a8"), "auto", or a :class:`QuantConfig`.
        max_force_error: the mean absolute error of a force component (meV/Å) that the result may
            have. The scheme's bits are then the fewest that a node gets, and no share of bytes is
            given: more go where they help most, until the error, measured on rattled copies that
            calibration has not seen, is small enough. "auto" needs it, and is "w4" with that.
        overrides: per-module settings by name pattern, e.g. ``{"*weight_nn*": "w8"}``.
        backend: "tvm" (generated kernels) or "reference" (plain torch).
        target: a TVM target in JSON, "cuda" (this machine's GPU) or "cuda:sm_89"; by default this
            machine's CPU. Without a GPU, kernels for one are compiled and nothing is measured or
            checked (``measure=False``); calling the result raises a ``DeviceError``.
        strict: raise instead of falling back where a node has no kernel.
        measure: also measure time and memory against the original.
        progress: show progress bars.

    Returns:
        A :class:`Potential`: call it, print its ``report``, read its ``graphs``, ``save`` it.

    Raises:
        StructureError, NoEdgesError, UnknownElementError: for structures that cannot be used.
        CaptureError: if the model cannot be captured; names the operator and the source line.
        ConfigError: for an unknown scheme, backend or override, or if no choice of bits keeps
            ``max_force_error``.
        LoweringError: with ``strict``, if a node has no kernel.
        DeviceError: with ``measure``, for a GPU where there is none.
        VerificationError: if the fusion-only form differs from the original beyond rounding.
    """
    config = _config(scheme, overrides, max_force_error)
    backends = _backends(backend, target)
    runs_here = not is_cuda(backends[0].target) or gpu_architecture() is not None
    if measure and not runs_here:
        require_gpu()
    with rarely_collected():
        subject, stages = trace(model, example_graph)
        set_aside()
        traced = _Trace(stages, subject, backends, strict, progress)
        config.check_patterns(_names(traced.prepared))
        built, figures = _checked(traced, config, measure) if runs_here else _unchecked(traced, config)
        potential = _finished(traced, built, figures)
    _warn_if_missed(potential.report, config.max_force_error)
    return potential


def _config(
    scheme: str | QuantConfig, overrides: Mapping[str, Any] | None, max_force_error: float | None
) -> QuantConfig:
    """What :func:`quantize` was asked for."""
    config = resolve(scheme, overrides, max_force_error)
    if config.scheme == AUTO and config.max_force_error is None:
        raise ConfigError(
            f"{AUTO!r} chooses bits for a force error, and none is given", fix="max_force_error=5.0 (meV/Å)"
        )
    return config


def _warn_if_missed(report: Report, most: float | None) -> None:
    found = report.accuracy.get("force_mae_mev_per_a", 0.0)  # none without a GPU to measure on
    if most is not None and not found <= most:
        warnings.warn(
            f"the force error is {found:.3g} meV/Å on structures that were not used to choose bits, where "
            f"{most:g} was asked for; more varied examples give a safer choice",
            AccuracyWarning,
            stacklevel=3,
        )


def _calibrated(subject: Subject, config: QuantConfig) -> CalibratedRange | None:
    """The range to warn outside of; only rounded activations saturate."""
    rounds = not is_conservative(config)
    if subject.form.positions is not None or not (rounds or config.rounds_together):
        return None
    inputs = subject.form.inputs
    batches = [dict(zip(inputs, batch, strict=True)) for batch in subject.calibration_batches]
    return calibrated_range(batches, rounds)


def _names(prepared: GraphModule) -> list[str]:
    """What override patterns can match: layers, and gathered features."""
    layers = [str(n.args[-1]) for n in prepared.graph.nodes if n.target is gaq.irreps_linear.default]
    sites = quantization_sites(prepared, resolve("w8a8"))
    return list(dict.fromkeys([*layers, *(site.label for site in sites)]))


def load(
    path: str | Path, *, backend: str = "tvm", target: str | None = None, strict: bool = False
) -> Potential:
    """Read a ``.gaq`` file; kernels come from the cache or are compiled again.

    Args:
        path: a file written by :meth:`Potential.save`.
        backend: as for :func:`quantize`.
        target: as for :func:`quantize`.
        strict: as for :func:`quantize`.

    Raises:
        FileFormatError: for a truncated, damaged or foreign file; none of its content is run.
    """
    from .io import read

    with rarely_collected():
        content = read(Path(path))
        backends = _backends(backend, target)
        grouped = group_rows(content.graph, content.form, backends[0])
        lowered, placements = lower(grouped, backends, strict)
        on_gpu = is_cuda(backends[0].target)
        report = replace(content.report, placements=placements)
        report = replace(report, target=backends[0].target) if on_gpu else report
        graphs = {"fold_integers": content.graph, "group_rows": grouped, "lower": lowered}
        return Potential(graphs, content.form, content.config, report, content.calibrated, on_gpu)


@dataclass(frozen=True)
class _Trace:
    """What every build of one model shares."""

    stages: Stages
    subject: Subject
    backends: list[Backend]
    strict: bool
    progress: bool

    @property
    def prepared(self) -> GraphModule:
        """The float energy graph."""
        return self.stages[PREPARED]


@dataclass(frozen=True)
class _Built:
    """One configuration's graphs, who runs them, and the potential they make.

    ``config`` is what was asked for, with what was chosen.
    """

    config: QuantConfig
    choice: dict[str, Any]
    graphs: Stages
    placements: tuple[Placement, ...]
    potential: Potential


def _checked(traced: _Trace, config: QuantConfig, measure: bool) -> tuple[_Built, dict[str, Any]]:
    """The configuration's graphs and the report's figures, after the fusion-only form has stood beside the
    original, and the kernels beside the same graph in torch.
    """
    subject, plain = traced.subject, resolve("fp32")
    in_torch = replace(traced, backends=[make_backend("reference")])
    fused = _build(traced if config == plain else in_torch, plain)
    fp32 = checks.check_fp32(subject.sides(fused.potential), subject.tests, subject.name)
    built = fused if config == plain else _build(traced, config)
    _check_kernels(traced, built)
    return built, _measured(subject, built, fp32, measure)


def _unchecked(traced: _Trace, config: QuantConfig) -> tuple[_Built, dict[str, Any]]:
    """The same where the kernels cannot run."""
    built = _build(traced, config)
    return built, {"memory": weight_bytes(built.graphs["fold_integers"])}


def _finished(traced: _Trace, built: _Built, figures: Mapping[str, Any]) -> Potential:
    """The potential with all its graphs and its report."""
    subject, graphs = traced.subject, traced.stages | built.graphs
    blank = _blank_report(subject, built.config, traced.backends[0])
    report = replace(blank, placements=built.placements, choice=built.choice, **figures)
    calibrated, on_gpu = _calibrated(subject, built.config), is_cuda(report.target)
    return Potential(graphs, subject.form, built.config, report, calibrated, on_gpu)


def _build(trace: _Trace, config: QuantConfig) -> _Built:
    subject, backend = trace.subject, trace.backends[0]
    key, choice = _build_key(subject, config, backend), dict[str, Any]()
    entry = fetch(key, needed=["fold_integers", "group_rows"])
    if entry is not None:
        stages = entry.graphs
    else:
        prepared = subject.centered(trace.prepared, config)
        observed = subject.observe(prepared, config, trace.progress)
        config, choice = _chosen(trace, prepared, config, observed)
        made = {"center_inputs": prepared} if config.centered else {}
        made |= quantize_graph(
            prepared, config, observed, subject.form, subject.example, subject.calibration_batches,
            cached_forces,
        )  # fmt: skip
        made["group_rows"] = group_rows(made["fold_integers"], subject.form, backend)
        store(key, made, {})
        stages = Stages(made)
    lowered, placements = lower(stages["group_rows"], trace.backends, trace.strict, trace.progress)
    graphs = stages | {"lower": lowered}
    blank = _blank_report(subject, config, backend)
    potential = Potential(graphs, subject.form, config, blank, on_gpu=is_cuda(blank.target))
    return _Built(config, choice, graphs, placements, potential)


def _build_key(subject: Subject, config: QuantConfig, backend: Backend) -> str | None:
    """The key of a configuration's graphs: of the captured graph, the configuration, what joins groups of
    rows, how torch computes, and the bytes of all calibration batches, if anything is rounded. None where
    bits are chosen by measuring.
    """
    if subject.key is None or config.max_force_error is not None:
        return None
    joins = str((backend.groups_linears, backend.groups_sums, backend.stores_halves))
    parts: list[str | bytes] = ["build", subject.key, config.to_json(), joins]
    if config != resolve("fp32"):
        for batch in subject.calibration_batches:
            parts += ["batch", *map(tensor_bytes, batch)]
    return key_of(*parts, *arithmetic())


def _check_kernels(trace: _Trace, built: _Built) -> None:
    """Compare a scheme's kernels with the same graph in torch; ``fp32`` stood beside the original."""
    if built.config == resolve("fp32") or trace.backends[0].name == "reference":
        return
    subject = trace.subject
    lowered, _ = lower(built.graphs["group_rows"], [make_backend("reference")])
    report = replace(built.potential.report, backend="reference")
    in_torch = Potential({"lower": lowered}, subject.form, built.config, report)
    checks.check_kernels(
        subject.sides(in_torch),
        subject.sides(built.potential).compiled,
        subject.tests[:1],
        is_conservative(built.config),
        subject.name,
    )


def _chosen(
    trace: _Trace, prepared: GraphModule, config: QuantConfig, observed: Observed
) -> tuple[QuantConfig, dict[str, Any]]:
    """The configuration with its bits chosen, if it leaves a choice, and how it came about."""
    if config.max_force_error is None:
        return config, {}
    comparison = trace.subject.comparison(prepared, trace.subject.trials)
    choice = choose_bits(prepared, config, observed, comparison.error, trace.progress)
    found = {
        "max_force_error_mev_per_a": config.max_force_error,
        "force_mae_mev_per_a": choice.chosen.error.force_mev_per_a,
        "atoms": comparison.atoms,
        "max_weight_share": choice.config.max_weight_share,
        "max_wide_share": choice.config.max_wide_share,
        "trials": [asdict(trial) for trial in choice.trials],
    }
    return choice.config, found


def _backends(name: str, target: str | None) -> list[Backend]:
    chosen = make_backend(name, target)
    return [chosen] if name == "reference" else [chosen, make_backend("reference")]


def _blank_report(subject: Subject, config: QuantConfig, backend: Backend) -> Report:
    tensors = subject.collate(subject.structures[:1])
    edges = tensors["edge_vec"].shape[0] if "edge_vec" in tensors else 0
    return Report(
        model=subject.name,
        scheme=config.scheme,
        backend=backend.name,
        target=backend.target,
        atoms=len(subject.structures[0]),
        edges=int(edges),
        versions=_versions(),
    )


def _measured(subject: Subject, built: _Built, fp32: Parity, full: bool) -> dict[str, Any]:
    """Every figure of the report; time and memory only if ``full``."""
    sides, tests = subject.sides(built.potential), subject.tests
    found: dict[str, Any] = {
        "accuracy": checks.accuracy_figures(sides, tests, fp32),
        "conservativity": checks.conservativity_figures(
            sides.compiled, tests[:1], is_conservative(built.config)
        ),
        "memory": weight_bytes(built.graphs["fold_integers"]),
    }
    if subject.rotates:
        found["equivariance"] = checks.equivariance_figures(sides.compiled, tests[:1])
    if full:
        prepared = subject.original.prepare(subject.structures[0])
        tensors = subject.collate(subject.structures[:1])

        def eager() -> Any:
            return subject.original.run(prepared)

        def compiled() -> Any:
            return built.potential.evaluate(tensors)

        found["memory"] |= checks.memory_figures(eager, compiled)
        found["speed"] = checks.speed_figures(eager, compiled, runs=9, warmup=5)
    return found


def weight_bytes(folded: GraphModule) -> dict[str, int]:
    """Bytes of the layers' weights, as float32 and as stored (codes with their scales)."""
    fp32 = stored = 0
    seen: set[str] = set()  # forward and backward nodes share their weights
    for node in folded.graph.nodes:
        if node.target is gaq.int_irreps_linear.default:
            parts, spec = node.args[2:4], node.args[5]
        elif node.target is gaq.irreps_linear.default:
            parts, spec = node.args[1:2], node.args[3]
        else:
            continue
        if parts[0].op != "get_attr" or str(parts[0].target) in seen:
            continue
        seen.add(str(parts[0].target))
        fp32 += 4 * linear_spec(str(spec)).weight_numel
        stored += sum(t.numel() * t.element_size() for t in (attribute(folded, part) for part in parts))
    return {"weights_fp32_bytes": fp32, "weights_bytes": stored}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
    for package in ("gaq-compile", "e3nn", "apache-tvm", "sevenn", "so3krates-torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["threads"] = str(torch.get_num_threads())
    return found


__all__ = ["load", "quantize", "trace"]
