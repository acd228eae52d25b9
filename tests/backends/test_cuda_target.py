"""``target="cuda"`` through lowering, with and without a GPU, and whole models on an emulated one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulator import EmulatedGpu
from torch.fx import GraphModule

import gaq_compile
from gaq_compile.api import quantize
from gaq_compile.backends.base import make_backend
from gaq_compile.backends.tvm.backend import TVMBackend, gpu_kernels
from gaq_compile.backends.tvm.cuda.linear import LinearKernel
from gaq_compile.backends.tvm.cuda.linear_kernel import linear_text
from gaq_compile.backends.tvm.cuda.source import ARCHITECTURES, device_function, machine_code, ptx
from gaq_compile.backends.tvm.linear import arithmetic
from gaq_compile.capture.graphs import collate
from gaq_compile.datasets import example_structures
from gaq_compile.errors import DeviceError
from gaq_compile.io import read
from gaq_compile.passes.graph_tools import gaq
from gaq_compile.passes.lower import KernelCall, lower
from gaq_compile.passes.pipeline import group_rows
from gaq_compile.passes.straight_line import straight_line

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
SPEC = "6x0e+3x1e -> 4x0e+5x1e"


def _linear() -> GraphModule:
    graph, root = torch.fx.Graph(), torch.nn.Module()
    root.register_buffer("weight", torch.randn(6 * 4 + 3 * 5, generator=torch.Generator().manual_seed(0)))
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    graph.output(graph.call_function(gaq.irreps_linear.default, (x, weight, None, SPEC, False, "layer")))
    return GraphModule(root, graph)


def _emulated() -> TVMBackend:
    backend = TVMBackend("cuda:sm_80")
    backend.kernels = gpu_kernels(EmulatedGpu())
    return backend


def test_a_graph_runs_on_an_emulated_gpu() -> None:
    gm = _linear()
    lowered, (placement,) = lower(gm, [_emulated(), make_backend("reference")], strict=True)
    x = torch.randn(5, 15)
    torch.testing.assert_close(straight_line(lowered)(x), gm(x))
    assert (placement.backend, placement.arithmetic, placement.reason) == ("tvm", "f32", None)


@without_gpu
@needs_nvcc
def test_without_a_gpu_kernels_compile_and_calls_say_what_is_missing() -> None:
    lowered, _ = lower(_linear(), [TVMBackend("cuda:sm_80"), make_backend("reference")], strict=True)
    with pytest.raises(DeviceError, match=r"(?s)none that torch can use.*what to do: run on a machine"):
        straight_line(lowered)(torch.randn(5, 15))


@without_gpu
def test_measuring_without_a_gpu_is_refused_at_once() -> None:
    with pytest.raises(DeviceError, match="what to do"):
        quantize("so3lr", example_structures("ethanol")[:1], target="cuda", progress=False)


@pytest.fixture(scope="module")
def sevennet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SevenNet-0 in 8-bit integers, saved."""
    pytest.importorskip("sevenn")
    frames = example_structures("ethanol")[:2]
    made = gaq_compile.quantize("sevennet-0", frames, "w8a8", measure=False, progress=False)
    return made.save(tmp_path_factory.mktemp("saved") / "sevennet.gaq")


def _check_emulated(path: Path) -> None:
    """Energy and forces of a molecule as the CPU's kernels have them, with a kernel for every node."""
    content, backend = read(path), _emulated()
    grouped = group_rows(content.graph, content.form, backend)
    lowered, placements = lower(grouped, [backend], strict=True)
    assert placements and all(p.reason is None for p in placements)
    tensors = collate(example_structures("ethanol")[3:4], content.form)
    inputs = [tensors[name] for name in content.form.inputs]
    host = gaq_compile.load(path)
    with torch.no_grad():
        found, expected = straight_line(lowered)(*inputs), host.evaluate(tensors).values()
    for got, want in zip(found, expected, strict=True):
        assert float((got - want).abs().max()) <= 1e-3 * max(1.0, float(want.abs().max()))
    forces, want = found[2], host.evaluate(tensors)["forces"]
    assert float((forces - want).norm() / want.norm()) < 2e-3


@pytest.mark.whole_gpu
def test_so3lr_on_an_emulated_gpu(so3lr_file: Path) -> None:
    _check_emulated(so3lr_file)


@pytest.mark.whole_gpu
def test_sevennet_on_an_emulated_gpu(sevennet_file: Path) -> None:
    _check_emulated(sevennet_file)


def _check_compiled(path: Path) -> None:
    """Every kernel for every architecture: no spills, and dp4a wherever integers are multiplied."""
    texts: dict[str, None] = {}

    class Collecting(EmulatedGpu):
        def kernel(self, text: str):  # type: ignore[no-untyped-def]
            texts[text] = None
            return lambda grid, arguments: None

    content, backend = read(path), _emulated()
    backend.kernels = gpu_kernels(Collecting())
    grouped = group_rows(content.graph, content.form, backend)
    lowered, _ = lower(grouped, [backend], strict=True)
    calls = [m.run for m in lowered.modules() if isinstance(m, KernelCall)]
    integer = {
        linear_text(run.plan)
        for run in calls
        if isinstance(run, LinearKernel) and "s32" in arithmetic(run.plan.problem, backend.target)
    }
    assert len(texts) > 50 and len(integer) > 10
    for text in texts:
        source = device_function(text, "sm_80").source
        assert ("dp4a" in source) == (text in integer)
        for arch in ARCHITECTURES:
            found = machine_code(source, arch)
            assert found.spilled_bytes == 0, (arch, found.resources, text[:500])
            if text in integer:
                assert "dp4a.s32.s32" in ptx(source, arch)


@pytest.mark.whole_gpu
@pytest.mark.timeout(3600)
@needs_nvcc
def test_every_kernel_of_so3lr_compiles(so3lr_file: Path) -> None:
    _check_compiled(so3lr_file)


@pytest.mark.whole_gpu
@pytest.mark.timeout(3600)
@needs_nvcc
def test_every_kernel_of_sevennet_compiles(sevennet_file: Path) -> None:
    _check_compiled(sevennet_file)
