"""GPU kernels through nvcc: machine code without spills, and integer products in integers.

A kernel of each family here, for one architecture; ``test_cuda_target.py`` has every kernel of both
pretrained models, for all architectures. What has been compiled before is found in the kernel cache.
"""

from __future__ import annotations

import shutil

import pytest
import test_tvm_conv as convolutions
import test_tvm_pointwise as pointwise
import test_tvm_rows as groups
import torch

from gaq_compile.backends.tvm.cuda.conv import add_text, backward_text, forward_text
from gaq_compile.backends.tvm.cuda.device import DEFAULT_ARCH, Gpu, gpu, is_cuda
from gaq_compile.backends.tvm.cuda.gate import gate_backward_text, gate_text
from gaq_compile.backends.tvm.cuda.harmonics import harmonics_backward_text, harmonics_text
from gaq_compile.backends.tvm.cuda.linear_kernel import linear_text
from gaq_compile.backends.tvm.cuda.mddq import mddq_backward_text, mddq_text
from gaq_compile.backends.tvm.cuda.product import product_backward_text, product_text
from gaq_compile.backends.tvm.cuda.rows import rows_text
from gaq_compile.backends.tvm.cuda.source import (
    ARCHITECTURES,
    device_function,
    machine_code,
    parsed,
    ptx,
)
from gaq_compile.backends.tvm.cuda.sum_rows import sum_rows_text
from gaq_compile.backends.tvm.dense_plan import LinearProblem, make_plan
from gaq_compile.backends.tvm.rows_plan import make_plan as make_plan_of_rows
from gaq_compile.errors import ConfigError, LoweringError, MissingPackageError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
LINEAR = "224x0e+384x1e+352x2e -> 224x0e+64x1e+32x2e"
INTEGER = {
    "s8": LinearProblem(LINEAR, "s8 m8d8", "s8"),
    "s4": LinearProblem(LINEAR, "s8 m8d8 common", "s4"),
    "gradient s8": LinearProblem("64x0e -> 960x0e", "g16", "s8", True),
    "gradient s4": LinearProblem(LINEAR, "g16", "s4", True),
}
FLOAT = {
    "f32": LinearProblem(LINEAR, bias=True),
    "weights only": LinearProblem(LINEAR, "f32", "s8"),
    "weights only, gradient": LinearProblem(LINEAR, "f32", "s4", True),
}


def _row_group() -> str:
    g = groups._Group()
    x, y, index = g.argument(4, 32), g.table(4, 32), g.argument(holds="index")
    product = g(groups.aten.mul.Tensor, x, g(groups.aten.index.Tensor, y, [index]))
    total = g(groups.aten.sum.dim_IntList, product, [-1], True)
    scaled = g(groups.aten.mul.Tensor, g(groups.aten.silu.default, total), x)
    return rows_text(make_plan_of_rows(g.fused(total, scaled), Gpu().target))[0]


def _others() -> dict[str, str]:
    middle, mddq = convolutions.SPECS["sevennet middle"], (pointwise.IRREPS[0], pointwise.SCHEMES[0])
    harmonics, product = pointwise.HARMONICS[2], pointwise.PRODUCTS[0]
    return {
        "conv": forward_text(middle),
        "conv backward": backward_text(middle),
        "conv backward, harmonics": add_text(middle),
        "gate": gate_text(pointwise.GATES[0]),
        "gate backward": gate_backward_text(pointwise.GATES[0]),
        "mddq": mddq_text(*mddq),
        "mddq backward": mddq_backward_text(*mddq),
        "harmonics": harmonics_text(*harmonics),
        "harmonics backward": harmonics_backward_text(*harmonics),
        "product": product_text(product),
        "product backward": product_backward_text(product),
        "sum of rows": sum_rows_text(9),
        "row group": _row_group(),
    }


@needs_nvcc
@pytest.mark.parametrize("name", INTEGER)
def test_integer_linears_multiply_integers(name: str) -> None:
    function = device_function(linear_text(make_plan(INTEGER[name], Gpu().target)), DEFAULT_ARCH)
    assert "dp4a.s32.s32" in ptx(function.source, DEFAULT_ARCH)
    assert machine_code(function.source, DEFAULT_ARCH).spilled_bytes == 0


@needs_nvcc
@pytest.mark.parametrize("name", FLOAT)
def test_float_linears_stay_in_registers(name: str) -> None:
    function = device_function(linear_text(make_plan(FLOAT[name], Gpu().target)), DEFAULT_ARCH)
    assert "dp4a" not in ptx(function.source, DEFAULT_ARCH)
    assert machine_code(function.source, DEFAULT_ARCH).spilled_bytes == 0


@needs_nvcc
@pytest.mark.parametrize("name", list(_others()))
def test_other_kernels_stay_in_registers(name: str) -> None:
    function = device_function(_others()[name], DEFAULT_ARCH)
    found = machine_code(function.source, DEFAULT_ARCH)
    assert found.spilled_bytes == 0 and 0 < found.registers <= 255
    assert found.cubin.read_bytes()[:4] == b"\x7fELF"


@needs_nvcc
def test_spills_are_seen() -> None:
    """A kernel that cannot keep its values in registers: the check must notice."""
    lines = [f"float v{k} = x_ptr[{k}];" for k in range(400)]
    lines += ["for (int i = 0; i < n; ++i) {"]
    lines += [f"v{k} = v{k} * v{(k + 7) % 400} + x_ptr[i + {k}];" for k in range(400)]
    lines += ["}", f"x_ptr[n] = {' + '.join(f'v{k}' for k in range(400))};"]
    head = 'extern "C" __global__ void __launch_bounds__(128) main_kernel(float* x_ptr, int n)'
    assert machine_code(f"{head} {{\n{' '.join(lines)}\n}}\n", DEFAULT_ARCH).spilled_bytes > 0


@needs_nvcc
def test_what_nvcc_rejects_is_said() -> None:
    with pytest.raises(LoweringError, match="nvcc rejected"):
        machine_code("this is no CUDA", DEFAULT_ARCH)


def test_without_nvcc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackageError, match="CUDA toolkit"):
        machine_code("// never compiled before", DEFAULT_ARCH)


def test_signatures() -> None:
    source = (
        'extern "C" __global__ void __launch_bounds__(96) '
        "main_kernel(float* __restrict__ out_ptr, signed char* __restrict__ w_ptr, int n) {}"
    )
    function = parsed(source)
    assert function.threads == 96
    assert [(p.name, p.type, p.is_pointer) for p in function.parameters] == [
        ("out", "float*", True), ("w", "signedchar*", True), ("n", "int", False),
    ]  # fmt: skip
    with pytest.raises(LoweringError, match="found 0"):
        parsed("int main() {}")


def test_targets() -> None:
    assert is_cuda("cuda") and is_cuda("cuda:sm_89") and is_cuda(Gpu("sm_90").target)
    assert not is_cuda(None) and not is_cuda('{"kind": "llvm"}')
    assert gpu("cuda:sm_120") == Gpu("sm_120") == gpu(Gpu("sm_120").target)
    if not torch.cuda.is_available():
        assert gpu("cuda") == Gpu(DEFAULT_ARCH)
    for wrong in ("cuda:80", "cuda:sm_x", "cuda:sm_35"):
        with pytest.raises(ConfigError, match="architecture"):
            gpu(wrong)
    assert len(ARCHITECTURES) == 5
