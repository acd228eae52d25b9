"""Linear kernels against float64 and integer references: every scheme, odd shapes, other processors."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gaq_compile.backends.tvm.build import build_executable, host_target
from gaq_compile.backends.tvm.dense_kernel import dense_text
from gaq_compile.backends.tvm.dense_plan import column_tiles, make_plan
from gaq_compile.backends.tvm.linear import (
    DECODED_ROWS,
    DenseSchedule,
    LinearKernel,
    LinearProblem,
    arithmetic,
    decodes,
    has_vnni,
    launch,
    lower_linear,
)
from gaq_compile.errors import ConfigError, LoweringError
from gaq_compile.ir.layout import Block, blocks, channels, dim, simplified, view
from gaq_compile.ir.specs import GRADIENT_EXPONENT, in_half
from gaq_compile.numerics.activations import fake_quantize, quantize_block
from gaq_compile.numerics.gradients import fake_quantize_gradient, quantize_gradient
from gaq_compile.numerics.weights import dequantize_weight, quantize_weight, with_steps

SCHEMES = ("f32", "s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8exact")
COMMON = ("s8 m8d8 common", "s8 c8 common", "s16 m16d16 common", "s8 m8exact common")
MIXED = "9x0e+5x1e -> 6x0e+18x1e"
PATHS = "5x0e+7x1e+3x0e+9x1e -> 17x0e+3x1e+4x1e+2x2e+2x0o"
BLOCKS = "32x0e+32x0e -> 32x0e+32x0e | 0:0 1:1"
NEIGHBOURS = "5x0e+11x0e+7x1e+9x1e+2x1e -> 17x0e+3x1e+4x1e"


def llvm(cpu: str, **more: str) -> str:
    return json.dumps({"kind": "llvm", "mcpu": cpu, **more})


def runs_here(cpu: str) -> bool:
    """Whether code for an x86 ``cpu`` runs on this machine."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    info = Path("/proc/cpuinfo")
    return cpu == "core2" or (info.exists() and " avx2 " in info.read_text() and " fma " in info.read_text())


def tensors(
    problem: LinearProblem, rows: int, seed: int = 0, held: bool | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """A random input and the constants of a problem, with steps that differ from channel to channel.

    ``held``: whether the codes of a transposed linear hold steps; by default those of 8 bits do.
    """
    g, spec = torch.Generator().manual_seed(seed), problem.linear
    x = torch.randn(rows, dim(problem.irreps_in), generator=g)
    made: dict[str, Tensor | None] = {"weight_scale": None, "x_scale": None, "bias": None}
    if problem.weight == "f32":
        made["weight"] = torch.randn(spec.weight_numel, generator=g)
    else:
        top = 127 if problem.weight == "s8" else 7
        made["weight"] = torch.randint(-top, top + 1, (spec.weight_numel,), generator=g).to(torch.int8)
        made["weight_scale"] = torch.rand(spec.scale_numel, generator=g) * 0.01 + 0.001
    if problem.scheme is not None:
        tops = torch.tensor([problem.scheme.qmax(b.l) for b in blocks(spec.irreps_in) for _ in range(b.mul)])
        made["x_scale"] = (0.4 + 2.6 * torch.rand(len(tops), generator=g)) / tops
    elif problem.transpose and (problem.weight == "s8" if held is None else held):
        made["x_scale"] = 0.004 + 0.026 * torch.rand(channels(spec.irreps_in), generator=g)
    if problem.bias:
        made["bias"] = torch.randn(sum(b.mul for b in spec.bias_blocks), generator=g)
    return x, made


def expected(problem: LinearProblem, x: Tensor, made: dict[str, Tensor | None]) -> Tensor:
    """The operator in float64, on the values that the integers stand for."""
    spec, weight = problem.linear, made["weight"]
    if problem.scheme is not None:
        x = fake_quantize(x, made["x_scale"], simplified(spec.irreps_in), problem.scheme)
    if made["weight_scale"] is not None:
        held = None if problem.scheme is not None and problem.scheme.common else made["x_scale"]
        held = None if held is None else held.double()
        weight = dequantize_weight(weight, made["weight_scale"].double(), spec, held)
    y = torch.zeros(x.shape[0], dim(problem.irreps_out), dtype=torch.float64)
    for path in spec.paths:
        matrix = weight[path.offset : path.offset + path.numel].double()
        matrix = matrix.view(path.block_in.mul, path.block_out.mul)
        a, b = path.block_in, path.block_out
        if problem.transpose:
            a, b, matrix = b, a, matrix.T
        for c in range(a.components):
            rows = x[:, a.base + c * a.stride :][:, : a.mul].double()
            y[:, b.base + c * b.stride :][:, : b.mul] += rows @ matrix
    start = 0
    for b in spec.bias_blocks if problem.bias else ():
        y[:, b.base : b.base + b.mul] += made["bias"][start : start + b.mul].double()
        start += b.mul
    return y


def lower(
    problem: LinearProblem,
    made: dict[str, Tensor | None],
    target: str = "",
    schedule: DenseSchedule | None = None,
) -> LinearKernel:
    order = ("weight", "weight_scale", "x_scale", "bias")
    return lower_linear(problem, *(made[k] for k in order), target or host_target(), schedule)


def run(kernel: LinearKernel, x: Tensor) -> Tensor:
    """The result in an output that held NaNs before."""
    y = torch.full((x.shape[0], kernel.plan.dim_out), torch.nan)
    kernel.run(x, y)
    return y


def assert_close(y: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert y.shape == want.shape
    assert bool(torch.isfinite(y).all())
    assert float((y - want).abs().max()) <= tolerance * float(want.abs().max())


KINDS = [(a, w) for a in SCHEMES for w in ("f32", "s8", "s4")] + [
    (a, w) for a in COMMON for w in ("s8", "s4")
]


@pytest.mark.parametrize("spec", [MIXED, "64x0e -> 100x0e", "3x0e -> 2x0e+5x0o"])
@pytest.mark.parametrize(
    ("activation", "back"), [("f32", False), ("s8 m8d8", False), ("g16", True), ("f32", True)]
)
def test_half_precision_rows_are_the_rounded_ones(spec: str, activation: str, back: bool) -> None:
    """Outputs are the float32 kernel's, rounded once; inputs are read as the numbers that they are."""
    plain, half = (LinearProblem(s, activation, "s8", back) for s in (spec, in_half(spec)))
    for rows in (1, 7, 100, 5 * DECODED_ROWS):
        x, made = tensors(plain, rows, seed=rows)
        x = x.half() if back else x
        found = lower(half, made)(x)
        wanted = lower(plain, made)(x.float() * (2.0**-GRADIENT_EXPONENT if back else 1.0))
        assert found.dtype == (torch.float32 if back else torch.float16)
        assert torch.equal(found, wanted.to(found.dtype)) and bool(found.any())
    with pytest.raises(LoweringError, match="half precision are for integer weights"):
        LinearProblem(in_half(spec))
    with pytest.raises(LoweringError, match="expected a float16 tensor" if back else "expected a float32"):
        lower(half, made)(x.double())


@pytest.mark.parametrize(("activation", "weight"), KINDS)
def test_every_scheme_and_weight(activation: str, weight: str) -> None:
    problem = LinearProblem(MIXED, activation, weight, bias=True)
    for rows in (1, 7, 30):
        x, made = tensors(problem, rows, seed=rows)
        # mddq inputs near a tie may round the other way than in torch: then one operand moves by one
        tolerance = 1e-5 if "d" not in activation else 2e-3
        assert_close(run(lower(problem, made), x), expected(problem, x, made), tolerance)


@pytest.mark.parametrize("spec", [PATHS, BLOCKS])
@pytest.mark.parametrize("weight", ["f32", "s8", "s4"])
def test_paths_blocks_and_transposes(spec: str, weight: str) -> None:
    for problem in (LinearProblem(spec, weight=weight, bias=True), LinearProblem(spec, "f32", weight, True)):
        x, made = tensors(problem, 7)
        assert_close(run(lower(problem, made), x), expected(problem, x, made))


@pytest.mark.parametrize("weight", ["s8", "s4"])
@pytest.mark.parametrize("spec", [PATHS, BLOCKS, NEIGHBOURS])
def test_float_gradients_are_divided_by_the_steps_that_codes_hold(spec: str, weight: str) -> None:
    problem = LinearProblem(spec, "f32", weight, transpose=True)
    for held in (True, False):
        x, made = tensors(problem, 7, held=held)
        assert (made["x_scale"] is not None) == held
        assert_close(run(lower(problem, made), x), expected(problem, x, made), 1e-6)


@pytest.mark.parametrize("weight", ["s8", "s4"])
def test_float_gradients_of_whole_numbers_are_exact(weight: str) -> None:
    """Sums that float32 holds exactly, scales and steps that are powers of two: no other rounding."""
    problem = LinearProblem(NEIGHBOURS, "f32", weight, transpose=True)
    spec, (x, made) = problem.linear, tensors(problem, 9, held=True)
    x = (8 * x).round()
    made["weight_scale"] = 2.0 ** -(torch.arange(spec.scale_numel) % 4).float()
    made["x_scale"] = 2.0 ** -(torch.arange(channels(spec.irreps_in)) * 5 % 8).float()
    want = expected(problem, x, made)
    assert float(want.abs().max()) < 2**24
    assert torch.equal(run(lower(problem, made), x).double(), want)


@pytest.mark.parametrize("activation", [*SCHEMES[1:], *COMMON])
def test_blocks_that_merge_share_a_grid_but_no_steps(activation: str) -> None:
    """Unsimplified irreps: of a common grid the largest step of all neighbours is the unit."""
    problem = LinearProblem(NEIGHBOURS, activation, "s4")
    for largest in (0, 15, 16, 32):  # where the largest step stands: first and last of either block
        x, made = tensors(problem, 7, seed=largest)
        made["x_scale"][largest] *= 12.0
        tolerance = 1e-5 if "d" not in activation else 2e-3
        assert_close(run(lower(problem, made), x), expected(problem, x, made), tolerance)


@pytest.mark.parametrize("weight", ["s8", "s4"])
@pytest.mark.parametrize("activation", COMMON)
def test_one_channel_is_a_block_too(activation: str, weight: str) -> None:
    problem = LinearProblem("1x0e+1x1o+2x2e -> 4x0e+1x1o+3x2e", activation, weight)
    x, made = tensors(problem, 9)
    tolerance = 1e-5 if "d" not in activation else 2e-3
    assert_close(run(lower(problem, made), x), expected(problem, x, made), tolerance)


def test_unreached_outputs_are_zero_or_bias() -> None:
    problem = LinearProblem("4x0e+4x1e -> 3x0e+5x0e+2x1e+2x2o | 0:1 1:2", "s8 c8", "s8", bias=True)
    x, made = tensors(problem, 5)
    y = run(lower(problem, made), x)
    assert torch.equal(y[:, :3], made["bias"][:3].expand(5, 3))
    assert torch.equal(y[:, -10:], torch.zeros(5, 10))


SQUARE = (  # block by block onto itself, so that identity weights show the operands
    "21x0e+19x1e+18x2e -> 21x0e+19x1e+18x2e",
    "13x0e+8x0e+10x1e+5x1e+6x1e+3x0e -> 13x0e+8x0e+10x1e+5x1e+6x1e+3x0e | 0:0 1:1 2:2 3:3 4:4 5:5",
)
INTEGERS = ("s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8d8 common", "s8 c8 common", "s12 m12d10 common")


@pytest.mark.parametrize("weight", ["s8", "s4"])
@pytest.mark.parametrize("activation", INTEGERS)
@pytest.mark.parametrize("spec", SQUARE)
def test_integer_products_are_exact(spec: str, activation: str, weight: str) -> None:
    """With identity weights a kernel shows its operands; the product of these must be exact."""
    problem = LinearProblem(spec, activation, weight)
    x, made = tensors(problem, 29)
    scheme, paths = problem.scheme, problem.linear.paths
    units = [_unit(problem, made["x_scale"], path.block_in) for path in paths]
    ones = made | {
        "weight": torch.cat([torch.eye(p.block_in.mul, dtype=torch.int8).flatten() for p in paths]),
        "weight_scale": torch.cat(
            [(1 / u).expand(p.block_in.mul) for p, u in zip(paths, units, strict=True)]
        ),
    }
    shown = run(lower(problem, ones), x)
    operands = shown.round().long()
    assert float((shown - operands).abs().max()) < 0.01
    y = run(lower(problem, made), x)
    for path, unit in zip(paths, units, strict=True):
        n = path.block_in.mul
        codes = made["weight"][path.offset : path.offset + n * n].view(n, n).long()
        total = view(operands, path.block_in) @ codes
        scale = made["weight_scale"][path.scale_offset : path.scale_offset + n] * unit
        assert torch.equal(view(y, path.block_out), total.float() * scale)
    for b in blocks(simplified(problem.irreps_in)):
        own = made["x_scale"][b.channel : b.channel + b.mul]
        want = quantize_block(view(x, b), b.l, own, scheme)[0].long()
        differs = view(operands, b) != want
        assert float(differs.float().mean()) < (2e-2 if "d" in activation and b.l else 1e-9)
        assert int((view(operands, b) - want).abs().max()) <= 2**15 * 2.0 ** (2 - scheme.vector_bits)
    assert_close(y, expected(problem, x, made), 2e-3 if "d" in activation else 1e-5)


def _unit(problem: LinearProblem, steps: Tensor, block: Block) -> Tensor:
    """What an integer of a block stands for, beside weights that hold the steps if they do."""
    scheme = problem.scheme
    (owner,) = (
        b for b in blocks(simplified(problem.irreps_in)) if b.channel <= block.channel < b.channel + b.mul
    )
    largest = steps[owner.channel : owner.channel + owner.mul].max() if scheme.common else torch.tensor(1.0)
    return largest * 2.0 ** -scheme.fraction_bits(block.l)


@pytest.mark.parametrize("activation", ["s8 m8d8", "s8 c8", "s8 m8exact"])
def test_weights_that_hold_steps_give_the_float_layer_s_values(activation: str) -> None:
    """From float weights to a kernel and back: steps of channels that differ by 20 times cancel."""
    problem = LinearProblem(NEIGHBOURS, activation, "s8")
    spec, (x, made) = problem.linear, tensors(problem, 50)
    top = max(float(x.abs().max()), 4.0)
    tops = torch.tensor([problem.scheme.qmax(b.l) for b in blocks(spec.irreps_in) for _ in range(b.mul)])
    spread = 10.0 ** torch.linspace(-1.3, 0.0, len(tops))[torch.randperm(len(tops))]
    made["x_scale"] = 2 * top * spread / tops
    for b in blocks(spec.irreps_in):  # inputs as large as their channels' ranges
        view(x, b).mul_(spread[b.channel : b.channel + b.mul])
    weight = torch.randn(spec.weight_numel, generator=torch.Generator().manual_seed(1))
    held = with_steps(weight, spec, made["x_scale"])
    made["weight"], made["weight_scale"] = quantize_weight(held, spec, 8)
    plain = LinearProblem(NEIGHBOURS)
    want = expected(plain, x, {"weight": weight, "weight_scale": None, "x_scale": None, "bias": None})
    assert_close(run(lower(problem, made), x), want, 0.03)


GRADIENTS = (  # the transposed radial layer, odd K, a K of one, several paths to and from a block, l up to 2
    "64x0e -> 960x0e",
    "21x0e -> 511x0e",
    "18x0e+5x1e+7x2e -> 33x0e+17x1e+1x2e",
    "5x0e+7x1e+3x0e+9x1e -> 17x0e+3x1e+4x1e+2x2e+2x0o",
    NEIGHBOURS,
)


def gradient_operand(t: Tensor, target: str) -> Tensor:
    """The integers that a kernel makes of rows (N, K), seen through identity weights."""
    k = t.shape[1]
    made = {
        "weight": torch.eye(k, dtype=torch.int8).flatten(),
        "weight_scale": torch.ones(k),
        "x_scale": None,
        "bias": None,
    }
    quick = DenseSchedule(rows=(8,), serial_work=1 << 60)  # one small kernel, soon compiled
    problem = LinearProblem(f"{k}x0e -> {k}x0e", "g16", "s8", True)
    y = run(lower(problem, made, target, quick), t.contiguous())
    whole, step = quantize_gradient(t)
    found = torch.where(step > 0, y / step, y)
    assert float((found - found.round()).abs().max()) < 0.01
    # within float32 rounding of a tie a kernel may round the other way
    assert float((found.round() - whole).abs().max()) <= 1
    assert float((found.round() != whole).float().mean()) < 1e-2
    return found.round().long()


def gradient_sums(problem: LinearProblem, x: Tensor, made: dict, target: str) -> list[Tensor]:
    """The outputs that int64 sums allow: each cut's addition to y rounds once (fused) or twice.

    A sum is multiplied by one over the step that its channel's codes hold, then by the row's step.
    """
    allowed: dict = {}
    for path in problem.linear.paths:
        block, out = path.block_out, path.block_in
        codes = made["weight"][path.offset : path.offset + path.numel].view(out.mul, block.mul).T.long()
        scale = made["weight_scale"][path.scale_offset : path.scale_offset + block.mul]
        steps = made["x_scale"]
        inverse = 1.0 if steps is None else 1.0 / steps[out.channel : out.channel + out.mul]
        for c in range(block.components):
            t = x[:, block.base + c * block.stride :][:, : block.mul] * scale
            operand, step = gradient_operand(t, target), quantize_gradient(t)[1]
            for cut in range(0, block.mul, 512):
                total = operand[:, cut : cut + 512] @ codes[cut : cut + 512]
                assert int(total.abs().max()) < 2**31
                freed = total.float() * inverse
                product = freed * step
                exact = freed.double() * step.double()
                before = allowed.get((out, c))
                sums = [y for b in before or () for y in (b + product, (b + exact).float())]
                allowed[out, c] = sums if before else [product]
    results = [torch.zeros(len(x), dim(problem.irreps_out)) for _ in range(max(map(len, allowed.values())))]
    for (out, c), found in allowed.items():
        for i, y in enumerate(results):
            y[:, out.base + c * out.stride :][:, : out.mul] = found[i % len(found)]
    return results


def assert_gradient_exact(
    problem: LinearProblem, rows: int, target: str = "", held: bool | None = None
) -> None:
    target = target or host_target()
    x, made = tensors(problem, rows, seed=rows, held=held)
    y = run(lower(problem, made, target), x)
    assert bool(torch.stack([y == r for r in gradient_sums(problem, x, made, target)]).any(0).all())
    assert_close(y, expected(problem, x, made), 1e-4)


@pytest.mark.parametrize("weight", ["s8", "s4"])
@pytest.mark.parametrize("spec", GRADIENTS)
def test_integer_gradients_are_exact(spec: str, weight: str) -> None:
    problem = LinearProblem(spec, "g16", weight, transpose=True)
    for rows, held in ((1, True), (7, True), (7, False), (50, True)):
        assert_gradient_exact(problem, rows, held=held)
    assert run(lower(problem, tensors(problem, 0)[1]), tensors(problem, 0)[0]).shape[0] == 0


@pytest.mark.parametrize("cpu", ["core2", "haswell"])
@pytest.mark.parametrize("spec,weight", zip(GRADIENTS[:3], ("s8", "s4", "s8"), strict=True))
def test_integer_gradients_without_vnni(spec: str, cpu: str, weight: str) -> None:
    problem = LinearProblem(spec, "g16", weight, transpose=True)
    if runs_here(cpu):
        assert_gradient_exact(problem, 7, llvm(cpu))
    else:
        build_executable(dense_text(make_plan(problem, llvm(cpu)), parallel=True), llvm(cpu))


def test_integer_gradients_follow_their_definition() -> None:
    """The float definition times the codes, up to the few values that lie next to a tie."""
    problem = LinearProblem("64x0e -> 960x0e", "g16", "s8", transpose=True)
    x, made = tensors(problem, 30)
    codes = made["weight"].view(64, 960).T.double()
    want = fake_quantize_gradient(x * made["weight_scale"]).double() @ codes / made["x_scale"].double()
    assert_close(run(lower(problem, made), x), want, 1e-5)


@pytest.mark.parametrize("weight", ["s8", "s4"])
def test_gradient_sums_of_extreme_values_do_not_overflow(weight: str) -> None:
    problem = LinearProblem("3x0e -> 1031x0e", "g16", weight, transpose=True)
    made = tensors(problem, 2)[1]
    made["weight"] = torch.full_like(made["weight"], -127 if weight == "s8" else -7)
    made["weight_scale"] = torch.ones(1031)
    x = torch.full((2, 1031), 1e20) * torch.tensor([[1.0], [-1.0]])
    assert_close(run(lower(problem, made), x), expected(problem, x, made), 1e-6)


def test_gradient_rows_have_steps_of_their_own() -> None:
    """Rows from 1e-30 to 1e30 are equally exact; zero, tiny and subnormal rows give zeros."""
    problem = LinearProblem("6x0e+3x1e -> 40x0e+20x1e", "g16", "s8", transpose=True)
    x, made = tensors(problem, 9)
    x *= torch.tensor([1e30, 1e15, 1.0, 1e-10, 1e-20, 1e-28, 0.0, 1e-36, 1e-42])[:, None]
    x[2, 40:60] = 0.0  # one component of row 2
    y, want = run(lower(problem, made), x), expected(problem, x, made)
    steps = torch.cat([made["x_scale"][:6], made["x_scale"][6:].repeat(3)])
    y, want = y * steps, want * steps  # a channel's error is the row's, divided by the channel's step
    for row in range(6):
        assert_close(y[row, :6], want[row, :6], 1e-4)
        for c in range(3):
            assert_close(y[row, 6 + 3 * c :][:3], want[row, 6 + 3 * c :][:3], 1e-3)
    assert torch.equal(y[6:], torch.zeros(3, 15)) and torch.equal(y[2, 6:9], torch.zeros(3))


def test_gradients_do_not_depend_on_their_neighbours() -> None:
    problem = LinearProblem("16x0e -> 40x0e", "g16", "s8", transpose=True)
    x, made = tensors(problem, 113)
    alone = torch.cat([run(lower(problem, made), row[None]) for row in x])
    for schedule in (None, DenseSchedule(serial_work=0), DenseSchedule(serial_work=0, components_first=True)):
        kernel = lower(problem, made, schedule=schedule)
        for rows in (0, 1, 7, 47, 48, 49, 113):
            assert torch.equal(run(kernel, x[:rows]), alone[:rows])
        assert torch.equal(kernel(x[3:]), alone[3:])


@pytest.mark.parametrize("cpu", ["", "haswell", "core2"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gradients_that_are_not_finite_stay_visible(bad: float, cpu: str) -> None:
    if cpu and not runs_here(cpu):
        pytest.skip("needs an x86 processor with AVX2")
    problem = LinearProblem("9x0e+5x1e -> 600x0e+18x1e", "g16", "s8", transpose=True)
    x, made = tensors(problem, 4)
    kernel = lower(problem, made, llvm(cpu) if cpu else "")
    want = run(kernel, x)
    x[2, 530], x[1, 600 + 18 + 2] = bad, bad  # a scalar of row 2, component 1 of a vector of row 1
    want[2, :9], want[1, 9 + 5 : 9 + 10] = torch.nan, torch.nan
    assert torch.equal(run(kernel, x).nan_to_num(nan=1e9), want.nan_to_num(nan=1e9))


@pytest.mark.parametrize("activation", ["s8 c8", "s16 c16", "s8 c8 common", "s9 c9 common"])
@pytest.mark.parametrize("weight", ["s8", "s4"])
def test_long_sums_of_extreme_values_do_not_overflow(activation: str, weight: str) -> None:
    problem = LinearProblem("1031x0e -> 3x0e", activation, weight)
    x, made = tensors(problem, 2)
    x = torch.full_like(x, 1e6) * torch.tensor([[1.0], [-1.0]])
    made["x_scale"] = torch.linspace(0.0199, 0.02, 1031)  # on a common grid, all as large as can be
    made["weight"] = torch.full_like(made["weight"], 127 if weight == "s8" else -7)
    assert_close(run(lower(problem, made), x), expected(problem, x, made), 1e-6)


def test_rows_in_every_position_of_a_task() -> None:
    problem = LinearProblem("16x0e -> 40x0e", "s8 c8", "s8")
    schedule = DenseSchedule(serial_work=0)
    x, made = tensors(problem, 113)
    want = expected(problem, x, made)
    for kernel in (lower(problem, made, schedule=schedule), lower(problem, made)):
        for rows in (0, 1, 2, 47, 48, 49, 97, 113):
            y = run(kernel, x[:rows])
            assert_close(y, want[:rows], 1e-6) if rows else None
        assert torch.equal(kernel(x[3:]), run(kernel, x)[3:])  # a view that starts anywhere
        assert torch.equal(kernel(x.T.contiguous().T), run(kernel, x))


@pytest.mark.parametrize("weight", ["s8", "s4"])
@pytest.mark.parametrize(
    ("activation", "transpose"),
    [("f32", False), ("f32", True), ("s8 m8exact", False), ("s16 m16exact", False)],
)
def test_many_rows_decode_weights_once(activation: str, transpose: bool, weight: str) -> None:
    """Whatever the width of column tiles and the depth of sums; few rows give the same but for rounding."""
    for spec in (PATHS, "33x0e+7x1e -> 130x0e+17x1e"):
        problem = LinearProblem(spec, activation, weight, transpose, bias=not transpose)
        x, made = tensors(problem, DECODED_ROWS + 7)
        kernel = lower(problem, made, schedule=DenseSchedule(serial_work=0))
        assert decodes(kernel.plan, len(x)) and not decodes(kernel.plan, DECODED_ROWS - 1)
        want = expected(problem, x, made)
        assert_close(run(kernel, x), want, 2e-6)
        assert_close(run(kernel, x[:9]), want[:9], 2e-6)
        for threads in (1, 3, 200):  # parts of several tasks, unequal ones, and less than a row for each
            task = launch(kernel.plan, len(x), threads)[1]
            parts = torch.full(want.shape, torch.nan)
            kernel._decoded(x, parts, *kernel.constants, task)
            assert torch.equal(parts, run(kernel, x))


def test_lines_are_asked_for_before_they_are_written() -> None:
    """Each that is written, once, for the tile of rows after it; behind the last may lie anything."""
    problem = LinearProblem("16x0e -> 40x0e")
    x, made = tensors(problem, 65)
    kernel = lower(problem, made, schedule=DenseSchedule(serial_work=0))
    text = dense_text(kernel.plan, parallel=True)
    assert text.count("tirx.prefetch") == text.count("    y[") > 0
    assert_close(run(kernel, x), expected(problem, x, made), 1e-6)


def test_neighbouring_rows_and_memory_stay_untouched() -> None:
    problem = LinearProblem("7x0e -> 5x0e")
    x, made = tensors(problem, 6)
    room = torch.full((10, 5), -7.0)
    lower(problem, made).run(x, room[2:8])
    assert bool((room[:2] == -7).all()) and bool((room[8:] == -7).all())


@pytest.mark.parametrize("activation", ["s8 m8d8", "s8 c8", "s8 m8exact", *COMMON])
def test_nan_stays_visible(activation: str) -> None:
    problem = LinearProblem(MIXED, activation, "s8")
    x, made = tensors(problem, 4)
    clean = run(lower(problem, made), x)
    x[2, 1], x[1, 12] = torch.nan, torch.nan  # a scalar of row 2, a vector of row 1
    y = run(lower(problem, made), x)
    assert bool(y[2, :6].isnan().all()) and bool(y[1, 6:24].isnan().any())
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("activation", ["s8 m8d8", *COMMON])
def test_zero_vectors_quantize_to_zero(activation: str) -> None:
    problem = LinearProblem("4x1e -> 4x1e", activation, "s8")
    x, made = tensors(problem, 3)
    assert torch.equal(run(lower(problem, made), torch.zeros_like(x)), torch.zeros(3, 12))
    tiny = run(lower(problem, made), torch.full_like(x, 1e-30))
    assert torch.equal(tiny, torch.zeros(3, 12))


@pytest.mark.parametrize("cpu", ["core2", "haswell"])
@pytest.mark.parametrize(
    "activation,weight",
    [("f32", "f32"), ("s8 m8d8", "s8"), ("s16 c16", "s4"), ("s8 m8d8 common", "s4"), ("s8 c8 common", "s8")],
)
def test_kernels_without_vnni(cpu: str, activation: str, weight: str) -> None:
    """The same bits as with VNNI, run here where this processor can."""
    problem = LinearProblem("9x0e+5x1e -> 6x0e+18x1e", activation, weight)
    x, made = tensors(problem, 7)
    kernel = lower(problem, made, llvm(cpu))
    assert not has_vnni(llvm(cpu))
    if not runs_here(cpu):
        build_executable(dense_text(kernel.plan, parallel=True), llvm(cpu))
        return
    y, here = run(kernel, x), run(lower(problem, made), x)
    assert_close(y, expected(problem, x, made), 2e-3 if "d" in activation else 1e-5)
    assert_close(y, here.double(), 2e-3 if "d" in activation else 1e-6)


@pytest.mark.parametrize(
    "target",
    [
        llvm("skylake-avx512"),
        llvm("alderlake"),
        llvm("cascadelake"),
        llvm("cortex-a72", mtriple="aarch64-linux-gnu"),
    ],
)
def test_other_processors_compile(target: str) -> None:
    spec = "9x0e+5x1e -> 18x0e+3x1e"
    gradients = [LinearProblem(spec, "g16", weight, transpose=True) for weight in ("s8", "s4")]
    common = LinearProblem(spec, "s8 m8d8 common", "s4")
    for problem in (LinearProblem(spec, "s8 m8d8", "s8"), common, *gradients):
        build_executable(dense_text(make_plan(problem, target), parallel=True), target)


def test_arithmetic_and_vnni() -> None:
    vnni = llvm("cascadelake")
    assert has_vnni(vnni) and has_vnni(llvm("alderlake")) and not has_vnni(llvm("haswell"))

    def names(activation: str, weight: str) -> str:
        return arithmetic(LinearProblem(MIXED, activation, weight), vnni)

    assert names("f32", "f32") == "f32"
    assert names("s8 c8", "s8") == "s8·s8→s32"
    assert names("s8 m8d8", "s8") == "s8·s8→s32 + s16·s8→s32"
    assert names("s8 m8exact", "s4") == "s8·s4→s32 + f32·s4→f32"
    assert names("f32", "s8") == "f32·s8→f32"
    assert names("s8 c8 common", "s8") == "s16·s8→s32"
    assert names("s8 m8d8 common", "s4") == "s16·s4→s32"
    assert names("s8 m8exact common", "s4") == "s16·s4→s32 + f32·s4→f32"
    for target in (vnni, llvm("haswell"), llvm("core2")):
        assert arithmetic(LinearProblem(MIXED, "g16", "s8", True), target) == "s16·s8→s32"
        assert arithmetic(LinearProblem(MIXED, "g16", "s4", True), target) == "s16·s4→s32"


def test_four_bit_weights_are_stored_in_half_the_bytes() -> None:
    sizes = {}
    for weight in ("f32", "s8", "s4"):
        problem = LinearProblem("64x0e -> 64x0e", "s8 c8" if weight != "f32" else "f32", weight)
        sizes[weight] = lower(problem, tensors(problem, 1)[1]).constants[0].numel()
    assert (sizes["s8"], sizes["s4"]) == (64 * 64, 32 * 64)


def test_column_tiles_cover_every_channel_once() -> None:
    for lanes in (4, 16):
        for mul in range(1, 200):
            tiles = column_tiles(mul, lanes, (8, 8, 6, 4))
            starts = [(t.start + j * t.vectors, t.vectors) for t in tiles for j in range(t.count)]
            covered = [start + v for start, vectors in starts for v in range(vectors)]
            assert covered == list(range(-(-mul // lanes)))
            if mul % lanes:
                assert tiles[-1].count == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LoweringError, match="gradient"):
        LinearProblem(MIXED, "s8 c8", "s8", transpose=True)
    for arguments in ({"weight": "s8"}, {"weight": "f32", "transpose": True}):
        with pytest.raises(LoweringError, match="g16 is for gradients"):
            LinearProblem(MIXED, "g16", **arguments)
    with pytest.raises(LoweringError, match="no bias"):
        LinearProblem(MIXED, "g16", "s8", transpose=True, bias=True)
    for scheme in COMMON:
        with pytest.raises(LoweringError, match="common grid"):
            LinearProblem(MIXED, scheme, "f32")
    with pytest.raises(LoweringError, match="weight type"):
        LinearProblem(MIXED, weight="s2")
    with pytest.raises(ConfigError):
        LinearProblem(MIXED, "s8 q8", "s8")
    problem = LinearProblem("4x0e -> 4x0e", "s8 c8", "s4", bias=True)
    x, made = tensors(problem, 3)
    for name in ("weight", "weight_scale", "x_scale", "bias"):
        with pytest.raises(LoweringError, match=name):
            lower(problem, made | {name: torch.zeros(3)})
    with pytest.raises(LoweringError, match="x_scale"):
        lower(problem, made | {"x_scale": None})
    for back in (LinearProblem(MIXED, activation, "s8", True) for activation in ("f32", "g16")):
        for count in (2, 24, 24 + 6):  # a step per block, per output channel, per component
            with pytest.raises(LoweringError, match=r"x_scale must be torch.float32 \(14,\)"):
                lower(back, tensors(back, 3)[1] | {"x_scale": torch.ones(count)})
    with pytest.raises(LoweringError, match="exceeds 7"):
        lower(problem, made | {"weight": torch.full((16,), 8, dtype=torch.int8)})
    with pytest.raises(LoweringError, match="float32"):
        lower(problem, made)(x.double())
    with pytest.raises(LoweringError, match="float32"):
        lower(problem, made)(x[:, :3])
