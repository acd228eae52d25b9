"""``quantize`` and ``load``: the whole library in two functions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from torch.fx import GraphModule

from .backends.base import Backend, make_backend
from .capture import Original, find_recipe
from .capture.export import export_energy
from .capture.graphs import GraphFormat, collate
from .capture.pretrained import load_model
from .config import DEFAULT_SCHEME, QuantConfig, is_conservative, resolve
from .errors import ConfigError, NoEdgesError
from .passes.graph_tools import attribute, gaq
from .passes.lower import Placement, lower
from .passes.pipeline import prepare, quantize_graph
from .potential import Potential
from .verify import checks
from .verify.report import Report
from .verify.structures import rattled
from .verify.types import Prediction


def quantize(
    model: nn.Module | str,
    example_graph: Atoms | Sequence[Atoms],
    scheme: str | QuantConfig = DEFAULT_SCHEME,
    *,
    overrides: Mapping[str, Any] | None = None,
    backend: str = "tvm",
    target: str | None = None,
    strict: bool = False,
    measure: bool = True,
    progress: bool = True,
) -> Potential:
    """Compile a trained equivariant potential to low-bit integer kernels, forces included.

    The model is captured, its irreps found, quantized, fused, differentiated, lowered and then
    measured against the original before it is returned. The model itself is not modified.

    Args:
        model: a trained potential (SevenNet, So3krates/SO3LR), or the name of a pretrained one
            ("sevennet-0", "so3lr").
        example_graph: a structure, or several; they and rattled copies of them are the
            calibration data, and the first one is what is measured on.
        scheme: a preset ("w8a8", "w4a8", "naive-w8a8", "w8", "w4", "w8a16", "w4a16", "fp32",
            "exact-w8a8", "exact-w4a8") or a :class:`QuantConfig`.
        overrides: per-module settings by name pattern, e.g. ``{"*weight_nn*": "w8"}``.
        backend: "tvm" (generated kernels) or "reference" (plain torch).
        target: a TVM target in JSON; by default this machine's CPU.
        strict: raise instead of falling back where a node has no kernel.
        measure: also measure time and memory against the original.
        progress: show progress bars.

    Returns:
        A :class:`Potential`: call it, print its ``report``, read its ``graphs``, ``save`` it.

    Raises:
        StructureError, NoEdgesError, UnknownElementError: for structures that cannot be used.
        CaptureError: if the model cannot be captured; names the operator and the source line.
        ConfigError: for an unknown scheme, backend or override.
        LoweringError: with ``strict``, if a node has no kernel.
        VerificationError: if the fusion-only form differs from the original beyond rounding.
    """
    config = resolve(scheme, overrides)
    backends = _backends(backend, target)
    name, model = (model, load_model(model)) if isinstance(model, str) else (type(model).__name__, model)
    recipe = find_recipe(model)
    structures = [example_graph] if isinstance(example_graph, Atoms) else list(example_graph)
    energy_model = recipe.energy_model(model)
    form = energy_model.form
    _check_edges(structures, form)

    example = _inputs([structures[0], *_tracing_partner(structures)], form)
    captured = export_energy(energy_model.module, example, energy_model.family, energy_model.export_modes)
    stages = prepare(captured)
    prepared = stages["tag_irreps"]
    config.check_patterns([str(n.args[-1]) for n in prepared.graph.nodes if n.target is gaq.irreps_linear.default])

    original = recipe.original(model)
    tests = _test_structures(structures)
    trace = _Trace(prepared, form, example, _calibration(structures, form))
    fused = _build(trace, resolve("fp32"), backends, strict, progress)
    fp32 = checks.check_fp32(_sides(original, fused), tests, f"{name}, {tests[0].get_chemical_formula()}")
    is_fp32 = config == resolve("fp32")
    built = fused if is_fp32 else _build(trace, config, backends, strict, progress)
    report = _report(name, config, backends[0], built, structures[0])
    found = _measured(original, built, tests, fp32, config, structures[0] if measure else None)
    return Potential({**stages, **built.graphs}, form, config, _with(report, found))


def load(path: str | Path, *, backend: str = "tvm", target: str | None = None, strict: bool = False) -> Potential:
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

    content = read(Path(path))
    lowered, placements = lower(content.graph, _backends(backend, target), strict)
    report = _with(content.report, {"placements": placements})
    return Potential({"fold_integers": content.graph, "lower": lowered}, content.form, content.config, report)


@dataclass(frozen=True)
class _Trace:
    """What every build of one model shares."""

    prepared: GraphModule
    form: GraphFormat
    example: list[Tensor]
    calibration: list[list[Tensor]]


@dataclass(frozen=True)
class _Built:
    """One configuration's graphs, who runs them, and an evaluator."""

    graphs: dict[str, GraphModule]
    placements: tuple[Placement, ...]
    potential: Potential

    def predict(self, structures: list[Atoms]) -> list[Prediction]:
        return self.potential.predict(structures)


def _build(trace: _Trace, config: QuantConfig, backends: list[Backend], strict: bool, progress: bool) -> _Built:
    stages = quantize_graph(
        trace.prepared, config, trace.form.inputs, trace.example, trace.calibration, progress
    )
    lowered, placements = lower(stages["fold_integers"], backends, strict, progress)
    graphs = {**stages, "lower": lowered}
    blank = Report("", config.scheme, backends[0].name, backends[0].target, 0, 0)
    return _Built(graphs, placements, Potential(graphs, trace.form, config, blank))


def _backends(name: str, target: str | None) -> list[Backend]:
    import gaq_compile.backends.reference
    import gaq_compile.backends.tvm  # noqa: F401 - backends register themselves when imported

    chosen = make_backend(name, target)
    return [chosen] if name == "reference" else [chosen, make_backend("reference")]


def _inputs(structures: Sequence[Atoms], form: GraphFormat) -> list[Tensor]:
    tensors = collate(structures, form)
    return [tensors[name] for name in form.inputs]


def _check_edges(structures: Sequence[Atoms], form: GraphFormat) -> None:
    tensors = collate(structures, form)
    if tensors["edge_vec"].shape[0] == 0:
        raise NoEdgesError(
            f"the example has no edges within the cutoff of {form.cutoff} Å",
            fix="pass a structure whose atoms have neighbours; single atoms can be evaluated afterwards",
        )


def _tracing_partner(structures: Sequence[Atoms]) -> list[Atoms]:
    """A second graph of another size: sizes of 0 and 1, and equal sizes, would be baked in."""
    from ase import Atoms as Structure

    first = structures[0]
    symbol = first.get_chemical_symbols()[0]
    triple = Structure([symbol] * 3, positions=[[0, 0, 0], [1.5, 0, 0], [0, 1.6, 0.2]])
    triple.info.update({k: v for k, v in first.info.items() if k in ("charge", "spin")})
    return [triple]


def _calibration(structures: Sequence[Atoms], form: GraphFormat) -> list[list[Tensor]]:
    """The user's structures and rattled copies: more of the range than one geometry shows."""
    copies = [s for s in structures]
    copies += [_moved(s, stdev, seed) for seed, stdev in enumerate((0.03, 0.06, 0.1)) for s in structures]
    return [_inputs([s], form) for s in copies]


def _test_structures(structures: Sequence[Atoms]) -> list[Atoms]:
    """Perturbed structures that calibration has not seen."""
    return [_moved(structures[0], 0.05, 101), _moved(structures[-1], 0.04, 102)]


def _moved(atoms: Atoms, stdev: float, seed: int) -> Atoms:
    moved = rattled(atoms, stdev, seed)
    moved.info.update({k: v for k, v in atoms.info.items() if k in ("charge", "spin")})
    return moved


def _sides(original: Original, built: _Built) -> checks.Sides:
    return checks.Sides(lambda structures: [_prediction(original, s) for s in structures], built.predict)


def _prediction(original: Original, atoms: Atoms) -> Prediction:
    from ase.stress import voigt_6_to_full_3x3_stress

    raw = original.predict(atoms)
    stress = None if raw.stress is None else voigt_6_to_full_3x3_stress(raw.stress)
    return Prediction(raw.energy, raw.forces, stress, raw.energies)


def _report(name: str, config: QuantConfig, backend: Backend, built: _Built, atoms: Atoms) -> Report:
    tensors = collate([atoms], built.potential.form)
    return Report(
        model=name,
        scheme=config.scheme,
        backend=backend.name,
        target=backend.target,
        atoms=len(atoms),
        edges=int(tensors["edge_vec"].shape[0]),
        placements=built.placements,
        versions=_versions(),
    )


def _with(report: Report, changes: Mapping[str, Any]) -> Report:
    from dataclasses import replace

    return replace(report, **changes)


def _measured(
    original: Original,
    built: _Built,
    tests: list[Atoms],
    fp32: Any,
    config: QuantConfig,
    timed: Atoms | None,
) -> dict[str, Any]:
    """Every figure of the report."""
    sides = _sides(original, built)
    found: dict[str, Any] = {
        "accuracy": checks.accuracy_figures(sides, tests, fp32),
        "equivariance": checks.equivariance_figures(built.predict, tests[:1]),
        "conservativity": checks.conservativity_figures(built.predict, tests[:1], is_conservative(config)),
        "memory": weight_bytes(built.graphs["fold_integers"]),
    }
    if timed is not None:
        prepared = original.prepare(timed)
        tensors = collate([timed], built.potential.form)
        eager = lambda: original.run(prepared)  # noqa: E731
        compiled = lambda: built.potential.evaluate(tensors)  # noqa: E731
        found["memory"] |= checks.memory_figures(eager, compiled)
        found["speed"] = checks.speed_figures(eager, compiled, runs=9, warmup=5)
    return found


def weight_bytes(folded: GraphModule) -> dict[str, int]:
    """Bytes of the layers' weights, as float32 and as stored (codes with their scales)."""
    seen: set[str] = set()
    fp32 = stored = 0
    for node in folded.graph.nodes:
        if node.target is gaq.int_irreps_linear.default:
            parts, numel = (node.args[2], node.args[3]), 0
        elif node.target is gaq.irreps_linear.default:
            parts, numel = (node.args[1],), 0
        else:
            continue
        if str(parts[0].target) in seen:
            continue
        seen.add(str(parts[0].target))
        tensors = [attribute(folded, part) for part in parts]
        numel = _weight_count(node)
        fp32 += 4 * numel
        stored += sum(t.numel() * t.element_size() for t in tensors)
    return {"weights_fp32_bytes": fp32, "weights_bytes": stored}


def _weight_count(node: Any) -> int:
    from .ir.specs import linear_spec

    position = 5 if node.target is gaq.int_irreps_linear.default else 3
    return linear_spec(str(node.args[position])).weight_numel


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
    for package in ("gaq-compile", "e3nn", "apache-tvm", "sevenn", "so3krates-torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["threads"] = str(torch.get_num_threads())
    return found


__all__ = ["load", "quantize", "ConfigError"]
