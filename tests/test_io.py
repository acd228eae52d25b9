"""The file format: what was saved comes back to the bit; damaged or hostile files run nothing."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.fx import symbolic_trace

import gaq_compile.backends.reference  # noqa: F401 - registers the backend
from gaq_compile.api import load
from gaq_compile.backends.base import make_backend
from gaq_compile.capture.graphs import GraphFormat, collate
from gaq_compile.config import resolve
from gaq_compile.errors import FileFormatError, GaqError
from gaq_compile.io import MAGIC, read
from gaq_compile.ir.serial import checksum
from gaq_compile.passes.calibrate import quantization_sites
from gaq_compile.passes.derive_forces import derive_forces
from gaq_compile.passes.fold_integers import fold_integers
from gaq_compile.passes.insert_mddq import insert_mddq
from gaq_compile.passes.lower import lower
from gaq_compile.passes.pipeline import group_rows
from gaq_compile.passes.simplify import simplify
from gaq_compile.passes.tag_irreps import tag_irreps
from gaq_compile.passes.weigh_channels import ChannelCosts
from gaq_compile.passes.widen_activations import widen_activations
from gaq_compile.potential import Potential
from gaq_compile.verify.report import Report

gaq = torch.ops.gaq
FORM = GraphFormat(("numbers", "edge_vec", "receivers", "senders", "batch", "ptr"), 4.0, elements=(1, 6, 8))
ETHANOL = Atoms(
    "CCOH",
    [[0.0, 0, 0], [1.5, 0.1, 0], [2.1, 1.3, 0.2], [-0.5, -0.9, 0.1]],
)
PRODUCT = "4x0e * 1x0e+1x1o -> 4x0e+4x1o | 0.0.0*0.5 0.1.1*0.25"


class _Energy(nn.Module):
    """One convolution and integer layers of both kinds: every kind of node that a file holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table, self.radial = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(8))
        self.mix, self.bias = nn.Parameter(torch.randn(4 * 4 + 4 * 4)), nn.Parameter(torch.randn(4))
        self.wide = nn.Parameter(torch.randn(4 * 4 + 4 * 4))

    def forward(self, numbers, edge_vec, receivers, senders, batch, ptr):
        x = self.table[numbers]
        weight = torch.exp(-edge_vec.norm(dim=1, keepdim=True))
        weight = gaq.irreps_linear.default(weight, self.radial, None, "1x0e -> 8x0e", False, "radial")
        sh = gaq.spherical_harmonics.default(edge_vec, "1x0e+1x1o", True, "component", "sh")
        edges = gaq.sort_edges.default(senders, receivers, x.shape[0])
        y = gaq.conv.default(x, sh, weight, [edges[i] for i in range(6)], PRODUCT, "conv")
        y = gaq.irreps_linear.default(y, self.mix, self.bias, "4x0e+4x1o -> 4x0e+4x1o", False, "mix")
        y = gaq.irreps_linear.default(y, self.wide, None, "4x0e+4x1o -> 4x0e+4x1o", False, "wide")
        return y.square().sum(1).double()


@pytest.fixture(scope="module")
def potential() -> Potential:
    config = resolve("w4a8", {"radial": "w8", "wide": "w8a8"})  # weights with and without steps
    tensors = collate([ETHANOL, ETHANOL[:3]], FORM)
    example = [tensors[n] for n in FORM.inputs]
    graph, mix = symbolic_trace(_Energy()), torch.tensor([0.05, 0.03, 0.021, 0.007] * 2)
    steps = {"mix": mix, "wide": torch.linspace(0.02, 0.07, 8)}
    sites = quantization_sites(graph, config)
    quantized = insert_mddq(graph, config, widen_activations(sites, steps, ChannelCosts(), None))
    folded = tag_irreps(fold_integers(tag_irreps(simplify(derive_forces(quantized, FORM, example)))))
    grouped = group_rows(folded, FORM)
    lowered, placements = lower(grouped, [make_backend("reference")])
    report = Report("tiny", "w4a8", "reference", "torch", 4, 12, placements, versions={"torch": "x"})
    graphs = {"fold_integers": folded, "group_rows": grouped, "lower": lowered}
    return Potential(graphs, FORM, config, report)


@pytest.fixture
def saved(potential, tmp_path) -> Path:
    return potential.save(tmp_path / "tiny.gaq")


@pytest.fixture
def flag(tmp_path) -> Path:
    """A file that code hidden in a potential would make."""
    return tmp_path / "executed"


def _header(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[MAGIC]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


def _rewritten(path: Path, change, sealed: bool = True) -> Path:
    """The file with its header changed, everything else valid (and so its checksum, if ``sealed``)."""
    header, tensors = _header(path)
    written = header["checksum"]
    header = change(header) or header
    if sealed and isinstance(header, dict) and header.get("checksum") == written:
        header["checksum"] = checksum(tensors, header)
    save_file(tensors, path, metadata={MAGIC: header if isinstance(header, str) else json.dumps(header)})
    return path


def _refused(path: Path) -> str:
    with pytest.raises(FileFormatError) as error:
        load(path, backend="reference")
    return str(error.value)


# --- there and back -----------------------------------------------------------------------------


def test_round_trip_is_bitwise(potential, saved):
    again = load(saved, backend="reference")
    structures = [ETHANOL, Atoms("H"), Atoms("OH", [[0, 0, 0], [0.97, 0, 0]])]
    for a, b in zip(potential(structures), again(structures), strict=True):
        assert a.energy == b.energy and np.array_equal(a.forces, b.forces)
        assert np.array_equal(a.energies, b.energies)
    assert (again.form, again.config) == (potential.form, potential.config)
    assert again.report == potential.report


def test_graph_metadata_and_weights_come_back(potential, saved):
    ours, theirs = potential.graphs["fold_integers"], read(saved).graph
    assert len(ours.graph.nodes) == len(theirs.graph.nodes)
    for a, b in zip(ours.graph.nodes, theirs.graph.nodes, strict=True):
        assert (a.op, str(a.target), a.meta.get("irreps"), a.meta.get("bits")) == (
            b.op, str(b.target), b.meta.get("irreps"), b.meta.get("bits"),
        )  # fmt: skip
        assert str(a.args) == str(b.args) and str(a.kwargs) == str(b.kwargs)
    for name, tensor in theirs.named_buffers():
        assert torch.equal(tensor, getattr(ours, name)) and tensor.dtype == getattr(ours, name).dtype


def test_saving_twice_gives_the_same_file(potential, saved, tmp_path):
    again = load(saved, backend="reference").save(tmp_path / "again.gaq")
    assert again.read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_a_failed_save_leaves_the_old_file(potential, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("gaq_compile.ir.serial.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        potential.save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_new_process_gives_the_same_bits(potential, saved):
    """And no pickle is read on the way."""
    code = (
        "import pickle, torch\n"
        "from ase import Atoms\n"
        "from gaq_compile import load\n"
        "def never(*a, **k): raise SystemExit('a pickle was read')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = never\n"
        f"q = load({str(saved)!r}, backend='reference')\n"
        f"a = Atoms({ETHANOL.get_chemical_formula(mode='reduce')!r}, {ETHANOL.positions.tolist()!r})\n"
        "a.numbers = [6, 6, 8, 1]\n"
        "p = q(a); print(p.energy.hex(), p.forces.tobytes().hex())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    expected = potential(ETHANOL)
    assert out.stdout.split() == [expected.energy.hex(), expected.forces.tobytes().hex()]


# --- damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    _refused(saved)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_flipped_bit_in_the_weights(saved, place):
    content = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(place * (len(content) - start))] ^= 4
    saved.write_bytes(content)
    assert "checksum" in _refused(saved)


def test_flipped_bits_anywhere_never_give_another_error(saved):
    """Every 41st byte: a typed error, or (outside what is protected) a file that still reads."""
    content = saved.read_bytes()
    for place in range(0, len(content), 41):
        damaged = bytearray(content)
        damaged[place] ^= 1
        saved.write_bytes(damaged)
        try:
            read(saved)
        except GaqError as error:
            assert isinstance(error, FileFormatError), place


def _coefficient(header):
    text = json.dumps(header)
    assert text.count("0.1.1*0.25") >= 1
    return text.replace("0.1.1*0.25", "0.1.1*0.75")


def _cutoff(header):
    header["form"]["cutoff"] = 3.0


def _operator(header):
    node = next(n for n in header["nodes"] if n["target"].startswith("aten.exp"))
    node["target"] = "aten.neg.default"


@pytest.mark.parametrize("change", [_coefficient, _cutoff, _operator])
def test_damage_in_the_header(saved, change):
    _refused(_rewritten(saved, change, sealed=False))


# --- foreign ------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    assert "no such file" in _refused(tmp_path / "nowhere.gaq")


def test_saving_into_a_missing_folder(potential, tmp_path):
    with pytest.raises(FileFormatError, match="no such folder") as error:
        potential.save(tmp_path / "missing" / "tiny.gaq")
    assert str(tmp_path / "missing") in str(error.value)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(3)}, path)
    assert "not a gaq_compile file" in _refused(path)
    save_file({"w": torch.ones(3)}, path, metadata={"format": "pt"})
    assert "not a gaq_compile file" in _refused(path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"hello", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" + b"0" * 90]
)
def test_foreign_bytes(tmp_path, content):
    path = tmp_path / "foreign.gaq"
    path.write_bytes(content)
    _refused(path)


class _Bomb:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return (Path.touch, (self.flag,))


def test_a_pickle_is_not_read(tmp_path, flag):
    path = tmp_path / "pickle.gaq"
    path.write_bytes(pickle.dumps(_Bomb(flag)))
    _refused(path)
    torch.save({"w": _Bomb(flag)}, path)
    _refused(path)
    assert not flag.exists()


@pytest.mark.parametrize("version", [0, 3, "2", None, 1.5, True])
def test_unknown_version(saved, version):
    assert "version" in _refused(_rewritten(saved, lambda h: {**h, "format": version}))


def test_files_of_the_first_version_are_refused(saved):
    """Their steps were one per block: before anything else is looked at, they are to be made again."""

    def change(header):
        node = next(n for n in header["nodes"] if "int_irreps_linear" in n["target"])
        node["args"] = node["args"][:4]
        return {**header, "format": 1}

    with pytest.raises(FileFormatError, match="version") as error:
        read(_rewritten(saved, change))
    assert error.value.fix and "again" in error.value.fix


def test_steps_of_every_channel_are_in_the_file(saved):
    header, tensors = _header(saved)
    assert header["format"] == 2 and header["config"]["version"] == 4
    assert tensors["mix_steps"].shape == tensors["wide_steps"].shape == (8,)
    nodes = [n for n in header["nodes"] if "int_irreps_linear" in n["target"]]
    schemes = [
        [a for a in n["args"] if isinstance(a, str) and (a[0] == "s" or a in ("f32", "g16"))] for n in nodes
    ]
    assert ["s8 m8d8 common"] in schemes and ["s8 m8d8"] in schemes and ["g16"] in schemes


def test_unknown_version_of_the_configuration(saved):
    def change(header):
        header["config"]["version"] = 99

    assert "99" in _refused(_rewritten(saved, change))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"x"', "{'a': 1}", "{}"])
def test_header_that_is_not_ours(saved, text):
    with pytest.raises(FileFormatError):
        read(_rewritten(saved, lambda _: text or " "))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000], ids=["deep", "long number"])
def test_header_that_json_cannot_read(saved, text):
    with pytest.raises(FileFormatError):
        read(_rewritten(saved, lambda _: text))


@pytest.mark.parametrize("key", ["format", "nodes", "form", "config", "report", "checksum"])
def test_missing_part(saved, key):
    _refused(_rewritten(saved, lambda h: {k: v for k, v in h.items() if k != key}))


KINDS = [None, 3, "x", [], {}, [{}], [None]]
PARTS = [(key, v) for key in ("nodes", "form", "config", "report", "checksum") for v in KINDS]
EMPTY = [("nodes", []), ("nodes", {})]


@pytest.mark.parametrize(("key", "value"), [p for p in PARTS if p not in EMPTY], ids=str)
def test_part_of_another_kind(saved, key, value):
    _refused(_rewritten(saved, lambda h: {**h, key: value}))


@pytest.mark.parametrize(("key", "value"), EMPTY, ids=str)
def test_graph_without_nodes(saved, key, value):
    _refused(_rewritten(saved, lambda h: {**h, key: value}))


def test_every_error_names_the_file_and_what_to_do(saved):
    def change(header):
        _first_call(header)["target"] = "aten.from_file.default"

    with pytest.raises(FileFormatError) as error:
        read(_rewritten(saved, change))
    assert str(saved) in str(error.value) and error.value.fix


# --- hostile ------------------------------------------------------------------------------------


def _first_call(header):
    return next(n for n in header["nodes"] if n["op"] == "call_function")


@pytest.mark.parametrize(
    "target",
    [
        "aten.from_file.default",  # maps a file
        "aten.add_.Tensor",
        "aten.index_put_.default",
        "aten.copy_.default",
        "aten.set_.source_Tensor",
        "aten.save.default",
        "aten.resize_.default",
        "aten._print.default",
        "prims.add.default",
        "prim.Print.default",
        "inductor._alloc_from_pool.default",
        "c10d.broadcast.default",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.call",
        "operator.setitem",
        "builtins.exec",
        "os.system",
        "torch.load",
        "aten.__class__.default",
        "aten.add.__init__",
        "gaq.__file__.default",
        "gaq.nothing.default",
        "aten",
        "",
    ],
)
def test_forbidden_operators(saved, target):
    def change(header):
        _first_call(header)["target"] = target

    _refused(_rewritten(saved, change))


@pytest.mark.parametrize(
    ("op", "target"),
    [("call_module", "x"), ("call_method", "numpy"), ("get_attr", "__class__"), ("exec", "x")],
)
def test_forbidden_kinds_of_node(saved, op, target):
    def change(header):
        _first_call(header).update(op=op, target=target)

    _refused(_rewritten(saved, change))


@pytest.mark.parametrize(
    "value", [{"torch": "load"}, {"torch": "nn"}, {"node": "nobody"}, {"code": "1"}, {}], ids=str
)
def test_forbidden_arguments(saved, value):
    def change(header):
        _first_call(header)["args"][0] = value

    _refused(_rewritten(saved, change))


def _evil_input(header, flag):
    node = [n for n in header["nodes"] if n["op"] == "placeholder"][-1]
    node["target"] = f"ptr=open({str(flag)!r}, 'w')"


def _evil_keyword(header, flag):
    _first_call(header)["kwargs"] = {f"a=open({str(flag)!r}, 'w'), b": 1}


def _evil_name(header, flag):
    _first_call(header)["name"] = f"x = open({str(flag)!r}, 'w')"


@pytest.mark.parametrize(
    "change",
    [_evil_input, _evil_keyword, _evil_name],
    ids=lambda f: f.__name__,
)
def test_names_do_not_become_code(saved, flag, change):
    """torch.fx writes Python from a graph: names of inputs and keywords must be plain names."""
    _rewritten(saved, lambda header: change(header, flag))
    with suppress(GaqError, TypeError, RuntimeError, NameError, KeyError, SyntaxError):
        load(saved, backend="reference")(ETHANOL)
    assert not flag.exists()


def test_names_of_weights_do_not_become_code(saved, flag):
    header, tensors = _header(saved)
    name = f'w", open({str(flag)!r}, "w")) or ("'
    node = next(n for n in header["nodes"] if n["op"] == "get_attr")
    tensors[name] = tensors.pop(node["target"])
    node["target"] = name
    header["checksum"] = checksum(tensors, header)
    save_file(tensors, saved, metadata={MAGIC: json.dumps(header)})
    with suppress(GaqError, TypeError, RuntimeError, AttributeError):
        load(saved, backend="reference")(ETHANOL)
    assert not flag.exists()


def test_a_spec_that_does_not_fit_its_weights(saved):
    def change(header):
        node = next(n for n in header["nodes"] if "int_irreps_linear" in n["target"])
        node["args"] = ["3x0e -> 400x0e" if a == "1x0e -> 8x0e" else a for a in node["args"]]

    with pytest.raises((GaqError, RuntimeError)):
        load(_rewritten(saved, change), backend="reference")(ETHANOL)
