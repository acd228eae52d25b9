"""What may be tuned: for each kernel family its constants, its kernels' text, and a seeded example.

A **choice** is one value for each of a family's options; :func:`candidate` turns it into a schedule and
the text of the kernel that will run. Candidates whose text and launch agree are the same candidate
(``code`` is the hash of both): most of the options matter to some problems only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...ir.layout import blocks, channels, dim
from ...ir.specs import gate_spec, tensor_product_spec
from .build import kernel_key
from .conv import backward_source, forward_source
from .conv_schedule import ConvSchedule, conv_schedule_from
from .conv_terms import conv_problem
from .database import KernelKey
from .dense_kernel import dense_text
from .dense_plan import DensePlan, DenseSchedule, LinearProblem, default_schedule, make_plan
from .emit import vector_lanes
from .gate_kernel import gate_backward_source, gate_source
from .linear import decodes, launch, lower_linear, schedule_from
from .mddq_kernel import mddq_backward_source, mddq_source
from .row_kernel import UNTUNED, RowSchedule, row_schedule_from
from .vnni import vector_unit

Choice = dict[str, Any]
Call = Callable[[], Sequence[Tensor]]
_DEGREES = {64: 8, 512: 23, 6048: 28}  # neighbours of an atom: a molecule's, a crystal's
_FLIP = 8  # a kernel this far from the threshold between serial and parallel is not asked to change


@dataclass(frozen=True)
class Candidate:
    """A schedule (as JSON fields), the text of its kernel, and the hash of what runs."""

    schedule: dict[str, Any]
    source: str
    code: str


class Family(Protocol):
    """A kind of kernel that can be tuned."""

    def options(self, key: KernelKey, threads: int) -> dict[str, tuple[Any, ...]]:
        """The values that each constant may take, on a machine with so many threads."""

    def default(self, key: KernelKey) -> dict[str, Any]:
        """The fields of the schedule that runs when nothing is stored."""

    def schedule(self, key: KernelKey, choice: Choice) -> dict[str, Any]:
        """The fields of the schedule that a choice stands for."""

    def text(self, key: KernelKey, schedule: dict[str, Any], threads: int) -> tuple[str, tuple[Any, ...]]:
        """The kernel's text, and how it is launched."""

    def example(
        self, key: KernelKey, schedule: dict[str, Any], threads: int, kernel: Callable[..., None]
    ) -> Call:
        """A call of the compiled text on the key's seeded example; it returns the kernel's outputs."""

    def work(self, problem: str) -> int:
        """Multiplications per row."""


class LinearFamily:
    """Linear maps: register tile, rows of a task, order of the loops, and serial or parallel.

    The last only where there are threads to choose between: what one thread finds says nothing about
    the threshold, and its choices serve machines with more.
    """

    def options(self, key: KernelKey, threads: int) -> dict[str, tuple[Any, ...]]:
        """Tiles that the registers hold, and the loop order and threshold only where they matter."""
        unit = vector_unit(key.target)
        default = default_schedule(unit)
        problem, plan = _problem(key), _plan(key, default)
        tiles = []
        for vectors in range(1, len(default.rows) + 1):
            for height in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14):
                if vectors * (height + 1) + 1 <= unit.registers and vectors * height >= unit.registers // 4:
                    tiles.append((*default.rows[: vectors - 1], height))
        work = key.rows * plan.work_per_row
        near = default.serial_work // _FLIP <= work <= default.serial_work * _FLIP and threads > 1
        vectors = any(b.components > 1 for b in blocks(problem.irreps_out))
        return {
            "rows": tuple(tiles),
            "task_rows": tuple(t for t in (8, 16, 24, 32, 48, 64, 96, 128, 192, 384) if t <= key.rows),
            "components_first": (False, True) if vectors else (default.components_first,),
            "flip": (False, True) if near else (False,),
        }

    def default(self, key: KernelKey) -> dict[str, Any]:
        """The fields of the plan's own schedule for the target's vector unit."""
        return _fields(default_schedule(vector_unit(key.target)))

    def schedule(self, key: KernelKey, choice: Choice) -> dict[str, Any]:
        """The choice's tile and task; a flip moves the threshold to the other side of the work."""
        default = default_schedule(vector_unit(key.target))
        work, threshold = key.rows * _plan(key, default).work_per_row, default.serial_work
        if choice["flip"]:
            threshold = work // 4 if work <= threshold else work * 4
        made = DenseSchedule(choice["rows"], choice["task_rows"], threshold, choice["components_first"])
        return _fields(made)

    def text(self, key: KernelKey, schedule: dict[str, Any], threads: int) -> tuple[str, tuple[Any, ...]]:
        """The kernel's text, and whether it runs in parallel with rows of a task."""
        plan = _plan(key, schedule_from(schedule))
        parallel, task = launch(plan, key.rows, threads)
        return dense_text(plan, parallel, parallel and decodes(plan, key.rows)), (parallel, task)

    def example(
        self, key: KernelKey, schedule: dict[str, Any], threads: int, kernel: Callable[..., None]
    ) -> Call:
        """A call on seeded rows, with the weights and steps as the kernel packs them."""
        problem = _problem(key)
        x, tensors = _linear_tensors(problem, key.rows)
        lowered = lower_linear(problem, *tensors, key.target, schedule_from(schedule))
        x = x.half() if problem.half_in else x
        y = torch.empty(
            key.rows, dim(problem.irreps_out), dtype=torch.half if problem.half_out else torch.float
        )
        _, task = launch(lowered.plan, key.rows, threads)

        def call() -> Sequence[Tensor]:
            kernel(x, y, *lowered.constants, task)
            return (y,)

        return call

    def work(self, problem: str) -> int:
        """Multiplications per row, over all paths."""
        spec = LinearProblem(**json.loads(problem)).linear
        return sum(p.numel * p.block_in.components for p in spec.paths)


class ConvFamily:
    """Convolutions: edges of a chunk, registers of sums (forward), where weights are prefetched to.

    Args:
        backward: the gradient's kernels, not the forward ones.
    """

    def __init__(self, backward: bool) -> None:
        self.backward = backward

    def options(self, key: KernelKey, threads: int) -> dict[str, tuple[Any, ...]]:
        """Edges of a chunk, registers of sums (forward only), and where to prefetch to."""
        lanes = vector_lanes(key.target)
        sums = (8, 10, 12) if lanes == 8 else (8, 12, 16, 20, 24, 28)
        return {
            "chunk": (16, 32, 48, 64),
            "sums": (0,) if self.backward else sums,
            "prefetch": (0, 1, 2),
        }

    def default(self, key: KernelKey) -> dict[str, Any]:
        """The fields of the untuned schedule."""
        return asdict(ConvSchedule())

    def schedule(self, key: KernelKey, choice: Choice) -> dict[str, Any]:
        """A choice has the schedule's own fields."""
        return asdict(ConvSchedule(**choice))

    def text(self, key: KernelKey, schedule: dict[str, Any], threads: int) -> tuple[str, tuple[Any, ...]]:
        """The kernel's text; it needs nothing else to be launched."""
        source = backward_source if self.backward else forward_source
        spec = str(json.loads(key.problem)["spec"])
        return source(spec, vector_lanes(key.target), conv_schedule_from(schedule)), ()

    def example(
        self, key: KernelKey, schedule: dict[str, Any], threads: int, kernel: Callable[..., None]
    ) -> Call:
        """A call on seeded features of a regular graph, with weights for each bond; gradients if backward."""
        spec = tensor_product_spec(str(json.loads(key.problem)["spec"]))
        edges, nodes = _graph(key.rows)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(nodes, dim(spec.irreps_x), generator=g)
        grad = torch.randn(nodes, dim(spec.irreps_out), generator=g)
        sh = torch.randn(key.rows, dim(spec.irreps_sh), generator=g)
        weight = torch.randn(key.rows // 2, spec.weight_numel, generator=g)
        weight = weight.half() if spec.half else weight
        outputs: list[Tensor] = [torch.empty_like(grad)]
        arguments = [x, sh, weight, edges[0], edges[2], edges[3]]
        if self.backward:
            outputs = [torch.empty_like(t) for t in (x, sh, weight)]
            arguments = [grad, x, sh, weight, edges[1], edges[4], edges[5]]

        def call() -> Sequence[Tensor]:
            kernel(*arguments, *outputs)
            return outputs

        return call

    def work(self, problem: str) -> int:
        """Multiplications per edge; the backward kernel has three products for one."""
        terms = conv_problem(str(json.loads(problem)["spec"])).terms
        once = sum(t.path.block_x.mul * len(t.pairs) for t in terms)
        return 3 * once if self.backward else once


@dataclass(frozen=True)
class RowKernel:
    """A small kernel as tuning sees it.

    Attributes:
        source: its text for a problem and a schedule.
        widths: of its float tensors with rows, inputs first, the output last.
        constants: what it takes between these; seeded.
    """

    source: Callable[[dict[str, str], RowSchedule], str]
    widths: Callable[[dict[str, str]], tuple[int, ...]]
    constants: Callable[[dict[str, str], torch.Generator], tuple[Tensor, ...]] = lambda _, __: ()


class RowFamily:
    """Gates and quantization: channels at once, and where threads pay, rows of a block.

    Args:
        kernel: which of them.
    """

    def __init__(self, kernel: RowKernel) -> None:
        self.kernel = kernel

    def options(self, key: KernelKey, threads: int) -> dict[str, tuple[Any, ...]]:
        """Blocks, and serial or parallel, only where there are threads to share (as for linears)."""
        shared, alone = threads > 1, key.rows * self.work(key.problem) <= UNTUNED.serial_work
        return {
            "lanes": (8, 16, 32),
            "serial": (False, True) if shared else (alone,),
            "block_work": (1024, 4096, 16384, 65536) if shared else (UNTUNED.block_work,),
        }

    def default(self, key: KernelKey) -> dict[str, Any]:
        """The fields of the untuned schedule."""
        return asdict(UNTUNED)

    def schedule(self, key: KernelKey, choice: Choice) -> dict[str, Any]:
        """The choice's fields; the threshold, where it is to move, to the other side of the work."""
        work, threshold = key.rows * self.work(key.problem), UNTUNED.serial_work
        if (work <= threshold) != choice["serial"]:
            threshold = 4 * work if choice["serial"] else work // 4
        return asdict(RowSchedule(choice["lanes"], threshold, choice["block_work"]))

    def text(self, key: KernelKey, schedule: dict[str, Any], threads: int) -> tuple[str, tuple[Any, ...]]:
        """The kernel's text; it needs nothing else to be launched."""
        return self.kernel.source(json.loads(key.problem), row_schedule_from(schedule)), ()

    def example(
        self, key: KernelKey, schedule: dict[str, Any], threads: int, kernel: Callable[..., None]
    ) -> Call:
        """A call on seeded rows."""
        problem, g = json.loads(key.problem), torch.Generator().manual_seed(0)
        *given, made = self.kernel.widths(problem)
        inputs = [torch.randn(key.rows, width, generator=g) for width in given]
        constants, out = self.kernel.constants(problem, g), torch.empty(key.rows, made)

        def call() -> Sequence[Tensor]:
            kernel(*inputs, *constants, out)
            return (out,)

        return call

    def work(self, problem: str) -> int:
        """Floats read and written per row; a multiplication each, as far as shares are concerned."""
        return sum(self.kernel.widths(json.loads(problem)))


def _gate_widths(problem: dict[str, str]) -> tuple[int, int]:
    spec = gate_spec(problem["spec"])
    return dim(spec.irreps_in), dim(spec.irreps_out)


def _mddq_steps(problem: dict[str, str], g: torch.Generator) -> tuple[Tensor, ...]:
    return (0.01 + 0.01 * torch.rand(channels(problem["irreps"]), generator=g),)


ROW_KERNELS = {
    "gate": RowKernel(lambda p, s: gate_source(p["spec"], s), _gate_widths),
    "gate_backward": RowKernel(
        lambda p, s: gate_backward_source(p["spec"], s),
        lambda p: (_gate_widths(p)[1], _gate_widths(p)[0], _gate_widths(p)[0]),
    ),
    "mddq": RowKernel(
        lambda p, s: mddq_source(p["irreps"], p["scheme"], s), lambda p: (dim(p["irreps"]),) * 2, _mddq_steps
    ),
    "mddq_backward": RowKernel(
        lambda p, s: mddq_backward_source(p["irreps"], p["scheme"], s),
        lambda p: (dim(p["irreps"]),) * 3,
        _mddq_steps,
    ),
}

FAMILIES: dict[str, Family] = {
    "linear": LinearFamily(),
    "conv": ConvFamily(False),
    "conv_backward": ConvFamily(True),
    **{name: RowFamily(kernel) for name, kernel in ROW_KERNELS.items()},
}


def candidate(key: KernelKey, schedule: dict[str, Any], threads: int) -> Candidate:
    """A schedule with the text and the hash of the code that it leads to on so many threads."""
    source, launched = FAMILIES[key.family].text(key, schedule, threads)
    identity = f"{kernel_key(source, key.target)} {launched}"
    return Candidate(schedule, source, hashlib.sha256(identity.encode()).hexdigest()[:16])


def choices(key: KernelKey, threads: int) -> list[Choice]:
    """Every combination of a kernel's options."""
    options = FAMILIES[key.family].options(key, threads)
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _fields(schedule: DenseSchedule) -> dict[str, Any]:
    """As JSON keeps them: lists, no tuples."""
    return asdict(schedule) | {"rows": list(schedule.rows)}


def _problem(key: KernelKey) -> LinearProblem:
    """The linear map that a key describes."""
    return LinearProblem(**json.loads(key.problem))


def _plan(key: KernelKey, schedule: DenseSchedule) -> DensePlan:
    """How a key's linear map is computed with a schedule."""
    return make_plan(_problem(key), key.target, schedule)


def _linear_tensors(
    problem: LinearProblem, rows: int
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """A seeded input, and weight, weight scales, activation steps and bias."""
    g, spec = torch.Generator().manual_seed(0), problem.linear
    x = torch.randn(rows, dim(problem.irreps_in), generator=g)
    bias = torch.randn(sum(b.mul for b in spec.bias_blocks), generator=g) if problem.bias else None
    if problem.weight == "f32":
        weight, scale = torch.randn(spec.weight_numel, generator=g), None
    else:
        top = 127 if problem.weight == "s8" else 7
        weight = torch.randint(-top, top + 1, (spec.weight_numel,), generator=g).to(torch.int8)
        scale = torch.rand(spec.scale_numel, generator=g) * 0.01 + 0.001
    scheme = problem.scheme
    if scheme is None:
        return x, (weight, scale, None, bias)
    steps = torch.cat([torch.full((b.mul,), 2.5 / scheme.qmax(b.l)) for b in blocks(spec.irreps_in)])
    return x, (weight, scale, steps, bias)


def graph_size(edges: int) -> int:
    """Nodes of the graph that a convolution with so many edges is measured on."""
    return max(1, edges // _DEGREES.get(edges, 16))


def _graph(edges: int) -> tuple[list[Tensor], int]:
    """A graph whose second half of edges is the first reversed, as convolutions take it, and its nodes."""
    degree, nodes = max(1, _DEGREES.get(edges, 16) // 2), graph_size(edges)
    index = torch.arange(edges // 2)
    first = torch.clamp(index // degree, max=nodes - 1)
    second = (first + 1 + 3 * (index % degree)) % nodes
    receivers, senders = torch.cat([first, second]), torch.cat([second, first])

    def ordered(ends: Tensor) -> list[Tensor]:
        counts = torch.bincount(ends, minlength=nodes)
        pointers = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        return [pointers.int(), torch.argsort(ends, stable=True).int()]

    return [senders.int(), receivers.int(), *ordered(receivers), *ordered(senders)], nodes
