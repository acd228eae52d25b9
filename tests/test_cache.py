"""Graphs on disk: what is read gives the same bits, what is wrong is not used, and checks see all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from small_models import Small, neighbours
from torch import nn

import gaq_compile
from gaq_compile import api, cache, subject
from gaq_compile.cache import MAGIC, Stages, cached_forces, fetch, key_of, store
from gaq_compile.capture.export import export_energy
from gaq_compile.capture.pretrained import load_model
from gaq_compile.errors import CacheWarning, VerificationError
from gaq_compile.ir.serial import checksum
from gaq_compile.passes.pipeline import ENERGY_PASSES, forces_of

QUIET = {"backend": "reference", "measure": False, "progress": False}
WATER = Atoms("OHH", [[0, 0, 0], [0.96, 0, 0.1], [-0.24, 0.93, 0]])


def _example(n: int = 6) -> list[torch.Tensor]:
    return list(neighbours(n, seed=n).values())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GAQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GAQ_CACHE_GRAPHS", "1")
    return tmp_path / "graphs"


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Callable[[Path], gaq_compile.Potential]:
    """Fills a folder with what quantizing the small model in ``w8`` leaves there, made once."""
    kept = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAQ_CACHE_DIR", str(kept))
        patch.setenv("GAQ_CACHE_GRAPHS", "1")
        potential = gaq_compile.quantize(Small(), _example(), "w8", **QUIET)

    def fill(folder: Path) -> gaq_compile.Potential:
        shutil.copytree(kept / "graphs", folder)
        return potential

    return fill


@pytest.fixture
def exports(monkeypatch) -> list[str]:
    """One entry for every capture that is really made."""
    found: list[str] = []

    def counted(model, example):
        found.append(model.family)
        return export_energy(model, example)

    monkeypatch.setattr(subject, "export_energy", counted)
    return found


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        yield


def _same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a) and set(a) == set(b)


def _named(example: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("positions", "species", "senders", "receivers"), example, strict=True))


# --- a hit is a miss ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp32", "w8", "w4a8"])
def test_a_hit_gives_the_bits_of_a_miss(exports, scheme, tmp_path):
    model, example = Small(), _example()
    first = gaq_compile.quantize(model, example, scheme, **QUIET)
    second = gaq_compile.quantize(model, example, scheme, **QUIET)
    assert len(exports) == 1
    inputs = _named(_example(9))
    assert _same_bits(first(inputs), second(inputs))
    assert first.report.accuracy == second.report.accuracy and first.form == second.form
    assert list(first.graphs) == list(second.graphs)
    for name in first.graphs:
        assert first.graphs[name].code == second.graphs[name].code, name
        for a, b in zip(first.graphs[name].graph.nodes, second.graphs[name].graph.nodes, strict=True):
            assert (a.name, a.op, str(a.target), a.meta.get("irreps"), a.meta.get("bits")) == (
                b.name, b.op, str(b.target), b.meta.get("irreps"), b.meta.get("bits"),
            )  # fmt: skip
    files = [q.save(tmp_path / f"{k}.gaq").read_bytes() for k, q in enumerate((first, second))]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["sevennet-0", "so3lr"])
@pytest.mark.slow
def test_a_hit_of_a_pretrained_model_gives_the_bits_of_a_miss(exports, name):
    """Groups of rows and packed columns among its graphs; gradients by structure for other examples."""
    pytest.importorskip({"sevennet-0": "sevenn", "so3lr": "so3krates_torch"}[name])
    first = gaq_compile.quantize(name, WATER, "w8", **QUIET)
    second = gaq_compile.quantize(name, WATER, "w8", **QUIET)
    moved = WATER.copy()
    moved.positions[0, 2] += 0.05
    os.environ["GAQ_CACHE_GRAPHS"] = "0"
    other = gaq_compile.quantize(name, moved, "w8", **QUIET)
    os.environ["GAQ_CACHE_GRAPHS"] = "1"
    cached = gaq_compile.quantize(name, moved, "w8", **QUIET)
    assert len(exports) == 2  # the first, and the one without the cache
    for a, b in ((first, second), (other, cached)):
        assert a(WATER).energy == b(WATER).energy
        assert np.array_equal(a(WATER).forces, b(WATER).forces)
        assert list(a.graphs) == list(b.graphs)
        for stage in a.graphs:
            assert a.graphs[stage].code == b.graphs[stage].code, stage


def test_what_tracing_recorded_is_read_back():
    """Drawings show it, and tracing a gradient checks sizes against it."""
    _, traced = subject.trace(Small(), _example())
    _, again = subject.trace(Small(), _example())
    for name in traced:
        for a, b in zip(traced[name].graph.nodes, again[name].graph.nodes, strict=True):
            assert gaq_compile.ir.printing.format_value(a.meta.get("val")) == (
                gaq_compile.ir.printing.format_value(b.meta.get("val"))
            ), a
    shapes = [n.meta["val"].shape for n in again["tag_irreps"].graph.nodes if n.op == "placeholder"]
    assert shapes[0][1] == 3 and isinstance(shapes[0][0], str)


def test_stages_are_read_when_they_are_asked_for(monkeypatch):
    subject.trace(Small(), _example())
    read: list[int] = []
    true = cache._stage_from_json
    monkeypatch.setattr(cache, "_stage_from_json", lambda *a: read.append(1) or true(*a))
    _, stages = subject.trace(Small(), _example())
    both = Stages({}) | stages
    assert len(read) == 1 and len(both) == len(stages) == 1 + len(ENERGY_PASSES)
    assert both["capture"] is both["capture"] and len(read) == 2


# --- what misses --------------------------------------------------------------------------------


def _weight(model: Small) -> None:
    with torch.no_grad():
        model.last.weight[3] += 1e-6


def _attribute(model: Small) -> None:
    model.decay = 1.5


def _plain_tensor(model: Small) -> None:
    model.centres = torch.arange(3.0) + 0.25


def _hook(model: Small) -> None:
    model.embed.register_forward_hook(lambda module, given, made: 2 * made)


def _method(model: Small) -> None:
    true = model.forward

    def doubled(positions, species, senders, receivers):
        return 2 * true(positions, species, senders, receivers)

    model.forward = doubled


@pytest.mark.parametrize("change", [_weight, _attribute, _plain_tensor, _hook, _method])
def test_a_changed_model_is_captured_again(exports, change):
    example = _example()
    before = gaq_compile.quantize(Small(), example, "fp32", **QUIET)(_named(example))
    changed = Small()
    change(changed)
    after = gaq_compile.quantize(changed, example, "fp32", **QUIET)(_named(example))
    assert len(exports) == 2
    assert not torch.equal(before["energy"], after["energy"]) or change is _weight
    truth = changed(*example)
    assert torch.allclose(after["energy"].float(), truth, atol=1e-5)


@pytest.mark.parametrize("change", [_hook, _method])
def test_what_no_key_knows_leaves_no_file(folder, change):
    model = Small()
    change(model)
    gaq_compile.quantize(model, _example(), "fp32", **QUIET)
    kept = list(folder.glob("*")) if folder.exists() else []
    assert all("capture" not in _read(path)[0]["graphs"] for path in kept)


def test_the_source_of_a_class_is_in_the_key(exports, monkeypatch):
    gaq_compile.quantize(Small(), _example(), "fp32", **QUIET)
    true = Small.forward
    monkeypatch.setattr(Small, "forward", lambda self, positions, species, senders, receivers: (
        3 * true(self, positions, species, senders, receivers)
    ))  # fmt: skip
    tripled = gaq_compile.quantize(Small(), _example(), "fp32", **QUIET)(_named(_example()))
    assert len(exports) == 2
    assert torch.allclose(tripled["energy"].float(), Small()(*_example()), atol=1e-5)


def test_the_configuration_and_the_examples_are_in_the_key():
    """A graph with rounded weights follows from all of them."""
    one, _ = subject.trace(Small(), _example())
    other, _ = subject.trace(Small(), [_example()[0] + 0.01, *_example()[1:]])
    w8, w4 = gaq_compile.preset("w8"), gaq_compile.preset("w4")
    names = ("groups_linears", "groups_sums", "stores_halves")
    flags = itertools.product((True, False), repeat=len(names))
    joins = [SimpleNamespace(**dict(zip(names, each, strict=True))) for each in flags]
    keys = [api._build_key(s, c, b) for s in (one, other) for c in (w8, w4) for b in joins]
    assert len(set(keys)) == len(keys)
    assert api._build_key(one, gaq_compile.config.resolve("auto", max_force_error=1.0), joins[0]) is None


def test_structures_are_not_in_the_key_of_a_captured_graph():
    """It is traced on structures of its own: whoever quantizes for other molecules has it already."""
    pytest.importorskip("so3krates_torch")
    model = load_model("so3lr")
    keys = {subject._key(subject._subject(model, s)) for s in (WATER, Atoms("CO", [[0, 0, 0], [1.1, 0, 0]]))}
    assert len(keys) == 1 and keys != {None}


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_are_traced_once_for_all_weights(monkeypatch):
    """By structure: other weights of the same types and shapes get theirs put in."""
    traces: list[int] = []
    monkeypatch.setattr(cache, "forces_of", lambda *a: traces.append(1) or forces_of(*a))
    found = []
    for seed in (0, 1):
        of, stages = subject.trace(Small(seed), _example())
        cached = cached_forces(stages["tag_irreps"], of.form, of.example)
        fresh = forces_of(stages["tag_irreps"], of.form, of.example)
        assert cached.code == fresh.code
        made, expected = cached(*_example()), fresh(*_example())
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
        found.append(made[1])
    assert len(traces) == 1 and not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("what", ["type", "shape", "tied", "node"])
def test_gradients_of_another_structure_are_traced(monkeypatch, what):
    traces: list[int] = []
    monkeypatch.setattr(cache, "forces_of", lambda *a: traces.append(1) or forces_of(*a))
    of, _ = subject.trace(Small(), _example())

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.full((3,), 2.0))
            self.register_buffer("b", torch.full((3,), 2.0))

        def forward(self, positions, species, senders, receivers):
            return torch.ops.aten.sum.dim_IntList(
                torch.ops.aten.mul.Tensor(positions * self.a * self.b, positions), [1]
            )

    def graph(change: bool) -> torch.fx.GraphModule:
        made = Energy()
        if change and what == "type":
            made.a = made.a.double()
        if change and what == "shape":
            made.a = made.a[:1].clone()
        if change and what == "tied":
            made.b = made.a
        gm = torch.fx.symbolic_trace(made)
        for node in gm.graph.nodes:  # as export leaves them
            if node.target is torch.mul or getattr(node.target, "__name__", "") == "mul":
                node.target = torch.ops.aten.mul.Tensor
        if change and what == "node":
            node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
            node.target = torch.ops.aten.add.Tensor
        gm.recompile()
        return gm

    for change in (False, True):
        made = cached_forces(graph(change), of.form, of.example)(*_example())
        expected = forces_of(graph(change), of.form, of.example)(*_example())
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert len(traces) == 2


# --- damage -------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[MAGIC]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


def _write(path: Path, header: dict, tensors: dict[str, torch.Tensor]) -> None:
    """A file that is sound in itself, whatever it says."""
    header = {k: v for k, v in header.items() if k != "checksum"}
    save_file(tensors, path, metadata={MAGIC: json.dumps({**header, "checksum": checksum(tensors, header)})})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.write_bytes(data)


def _foreign(path: Path) -> None:
    save_file({"w": torch.ones(2)}, path)


def _renamed(path: Path) -> None:
    header, tensors = _read(path)
    _write(path, {**header, "key": "0" * 64}, tensors)


def _older(path: Path) -> None:
    header, tensors = _read(path)
    _write(path, {**header, "format": 0}, tensors)


def _no_graph(path: Path) -> None:
    header, tensors = _read(path)
    _write(path, {**header, "graphs": {name: {} for name in header["graphs"]}}, tensors)


def _forbidden(path: Path) -> None:
    header, tensors = _read(path)
    for stage in header["graphs"].values():
        next(n for n in stage["nodes"] if n["op"] == "call_function")["target"] = "aten.from_file.default"
    _write(path, header, tensors)


def _code(path: Path) -> None:
    header, tensors = _read(path)
    for stage in header["graphs"].values():
        stage["tensors"].append(["x + __import__('os').abort() #", next(iter(tensors)), False])
    _write(path, header, tensors)


DAMAGES = [_truncate, _empty, _flip, _foreign, _renamed, _older, _no_graph, _forbidden, _code]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_written_again(folder, exports, damage, filled):
    model, example = Small(), _example()
    first = filled(folder)(_named(example))
    files = sorted(folder.iterdir())
    for path in files:
        damage(path)
    with pytest.warns(CacheWarning, match="not used and made again"):
        second = gaq_compile.quantize(model, example, "w8", **QUIET)(_named(example))
    assert len(exports) == 1 and _same_bits(first, second)
    third = gaq_compile.quantize(model, example, "w8", **QUIET)(_named(example))  # without a warning
    assert len(exports) == 1 and _same_bits(first, third) and sorted(folder.iterdir()) == files


def test_a_wrong_constant_is_refused_by_the_checks(folder, filled):
    """Somebody's file is sound in itself and wrong: the result is compared with the original all the same."""
    model, example = Small(), _example()
    filled(folder)
    (path,) = (p for p in folder.iterdir() if "capture" in _read(p)[0]["graphs"])
    header, tensors = _read(path)
    wide = max(tensors, key=lambda name: tensors[name].numel() * tensors[name].is_floating_point())
    _write(path, header, {**tensors, wide: tensors[wide] * 1.01})
    for other in set(folder.iterdir()) - {path}:
        other.unlink()
    with pytest.raises(VerificationError, match="does not reproduce"):
        gaq_compile.quantize(model, example, "w8", **QUIET)


def test_a_wrong_gradient_is_refused_by_the_checks(folder, filled):
    model, example = Small(), _example()
    filled(folder)
    for path in list(folder.iterdir()):
        header, tensors = _read(path)
        if "forces" in header["graphs"] or "fold_integers" in header["graphs"]:
            for stage in header["graphs"].values():
                for node in stage["nodes"]:
                    if node["target"] == "aten.neg.default":
                        node["target"] = "aten.abs.default"
            _write(path, header, tensors)
    with pytest.raises(VerificationError):
        gaq_compile.quantize(model, example, "fp32", **QUIET)


# --- files --------------------------------------------------------------------------------------


def _graph() -> torch.fx.GraphModule:
    return subject.trace(Small(), _example())[1]["tag_irreps"]


def test_it_can_be_turned_off(folder, exports, monkeypatch):
    monkeypatch.setenv("GAQ_CACHE_GRAPHS", "0")
    for _ in range(2):
        gaq_compile.quantize(Small(), _example(), "fp32", **QUIET)
    assert len(exports) == 2 and not folder.exists()
    assert fetch(key_of("nothing")) is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "graphs").write_text("a file, not a folder")
    with pytest.warns(CacheWarning):
        potential = gaq_compile.quantize(Small(), _example(), "fp32", **QUIET)
    assert torch.isfinite(potential(_named(_example()))["energy"]).all()


@pytest.mark.parametrize("kind", [OSError, SafetensorError, KeyError])
def test_a_failed_write_leaves_nothing(folder, monkeypatch, kind):
    graph = _graph()
    before = set(folder.iterdir())

    def full(*_, **__):
        raise kind("disk full")

    monkeypatch.setattr("gaq_compile.ir.serial.save_file", full)
    with pytest.warns(CacheWarning, match="disk full"):
        store(key_of("x"), {"a": graph}, {})
    assert set(folder.iterdir()) == before


def test_what_files_cannot_hold_is_not_kept(folder):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    store(key_of("odd"), {"a": torch.fx.symbolic_trace(Odd())}, {})
    store(key_of("facts"), {"a": _graph()}, {"x": object()})
    assert fetch(key_of("odd")) is None and fetch(key_of("facts")) is None


def test_tensors_that_several_graphs_have_are_kept_once(folder):
    graph = _graph()
    store(key_of("once"), {"a": graph, "b": graph}, {"n": 1})
    (path,) = (p for p in folder.iterdir() if _read(p)[0]["key"] == key_of("once"))
    tensors = sum(n.op == "get_attr" for n in graph.graph.nodes)
    assert len(_read(path)[1]) == tensors
    entry = fetch(key_of("once"), needed=["a"])
    assert entry is not None and entry.facts == {"n": 1} and entry.graphs["a"].code == graph.code


def test_old_entries_are_deleted(folder, monkeypatch):
    graph = _graph()
    keys = [key_of(str(k)) for k in range(4)]
    for k, key in enumerate(keys):
        store(key, {"a": graph}, {})
        os.utime(cache._path(key), (1000 + k, 1000 + k))
    size = cache._path(keys[0]).stat().st_size
    fetch(keys[0])  # the oldest is read, and so the youngest now
    monkeypatch.setattr(cache, "MOST_BYTES", 3 * size)
    store(key_of("last"), {"a": graph}, {})
    kept = [key for key in (*keys, key_of("last")) if fetch(key) is not None]
    assert keys[0] in kept and key_of("last") in kept and keys[1] not in kept
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 3 * size
