"""The static half of a gaq operator, written as one readable string.

Operators carry these strings as arguments, so that a printed graph says what it computes, and
kernels, tags and reference implementations all read the same description.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..config import activation_scheme
from ..errors import IrrepsError
from .layout import Block, blocks, lmax, simplified

GRADIENT = "g16"
"""The activation of a gradient in integers (numerics.gradients)."""
HALF = "f16"
"""What follows a spec's ``;`` where rows are kept in half precision (:mod:`..passes.store_halves`)."""
GRADIENT_EXPONENT = 10
"""Gradients are kept in half precision times 2^10: all digits from 6e-8 eV, none from 64 eV on."""
FLOATS = ("f32", GRADIENT)  # activations without a scheme


def learned_directions(activation: str, irreps: str) -> bool:
    """Whether an operator's activation scheme takes directions of these irreps from a learned table."""
    return activation not in FLOATS and activation_scheme(activation).vector == "svq" and lmax(irreps) > 0


def in_half(spec: str) -> str:
    """The spec of the same map with rows in half precision: of a linear's output, of a product's weights."""
    return f"{spec} ; {HALF}"


def _storage(text: str) -> tuple[str, bool]:
    """A spec without what follows its ``;``, and whether that is half precision."""
    plain, _, stored = text.partition(";")
    if stored.strip() not in ("", HALF):
        raise IrrepsError(f"rows cannot be stored as {stored.strip()!r}", where=text)
    return plain, bool(stored)


@dataclass(frozen=True)
class LinearPath:
    """One weight matrix ``(block_in.mul, block_out.mul)`` at ``weight[offset:]``, row-major."""

    block_in: Block
    block_out: Block
    offset: int
    scale_offset: int

    @property
    def numel(self) -> int:
        return self.block_in.mul * self.block_out.mul


@dataclass(frozen=True)
class LinearSpec:
    """An equivariant linear map: channels of equal irreps mix, components do not.

    ``y[n, base_out + c*stride_out + w] += sum_u x[n, base_in + c*stride_in + u] * W_path[u, w]``

    The string is ``"<irreps_in> -> <irreps_out>"``, every matching pair being a path in e3nn's
    order (input block outer, output block inner), or ``"... | 0:0 1:2"`` with explicit
    ``i_in:i_out`` pairs (``"none"`` where there are none). Normalisation is folded into the
    weights. A bias, where there is one, is the concatenation over the ``0e`` output blocks.
    ``scale_offset`` is a path's place in a flat
    per-output-channel scale vector (one scale per path and output channel). ``"...; f16"``: rows of
    ``irreps_out`` are float16, the map's results and, times 2^10, what its adjoint takes.
    """

    irreps_in: str
    irreps_out: str
    pairs: tuple[tuple[int, int], ...]
    half: bool = False

    @property
    def inputs(self) -> tuple[Block, ...]:
        return blocks(self.irreps_in)

    @property
    def outputs(self) -> tuple[Block, ...]:
        return blocks(self.irreps_out)

    @property
    def paths(self) -> tuple[LinearPath, ...]:
        out, offset, scale_offset = [], 0, 0
        for i, j in self.pairs:
            path = LinearPath(self.inputs[i], self.outputs[j], offset, scale_offset)
            out.append(path)
            offset += path.numel
            scale_offset += path.block_out.mul
        return tuple(out)

    @property
    def weight_numel(self) -> int:
        return sum(p.numel for p in self.paths)

    @property
    def scale_numel(self) -> int:
        return sum(p.block_out.mul for p in self.paths)

    @property
    def bias_blocks(self) -> tuple[Block, ...]:
        return tuple(b for b in self.outputs if b.l == 0 and b.p == 1)

    def __str__(self) -> str:
        text = f"{self.irreps_in} -> {self.irreps_out}"
        if self.pairs != _matching_pairs(self.irreps_in, self.irreps_out):
            text += " | " + (" ".join(f"{i}:{j}" for i, j in self.pairs) or "none")
        return in_half(text) if self.half else text


def _matching_pairs(irreps_in: str, irreps_out: str) -> tuple[tuple[int, int], ...]:
    return tuple(
        (i, j)
        for i, a in enumerate(blocks(irreps_in))
        for j, b in enumerate(blocks(irreps_out))
        if (a.l, a.p) == (b.l, b.p)
    )


@lru_cache(maxsize=4096)
def linear_spec(text: str) -> LinearSpec:
    """Parse the string form of :class:`LinearSpec`.

    Raises:
        IrrepsError: if a pair joins blocks of different irreps, or for an unknown storage type.
    """
    plain, half = _storage(text)
    head, _, tail = plain.partition("|")
    irreps_in, _, irreps_out = (part.strip() for part in head.partition("->"))
    pairs = _matching_pairs(irreps_in, irreps_out)
    if tail.strip() == "none":
        pairs = ()
    elif tail.strip():
        pairs = tuple(_pair(item) for item in tail.split())
    spec = LinearSpec(irreps_in, irreps_out, pairs, half)
    for path in spec.paths:
        if path.block_in.ir != path.block_out.ir:
            raise IrrepsError(
                f"a linear path cannot join {path.block_in.ir} to {path.block_out.ir}", where=text
            )
    return spec


def _pair(item: str) -> tuple[int, int]:
    i, j = item.split(":")
    return int(i), int(j)


@dataclass(frozen=True)
class TensorProductPath:
    """One ``uvu`` instruction: ``out[u, m3] += coefficient * w[u] * x[u, m1] * sh[m2] * C``.

    ``C[m1, m2, m3]`` is e3nn's real Wigner 3j symbol of (l1, l2, l3); ``w`` is
    ``weight[..., offset : offset + mul]``.
    """

    block_x: Block
    block_sh: Block
    block_out: Block
    offset: int
    coefficient: float


@dataclass(frozen=True)
class TensorProductSpec:
    """A channelwise (``uvu``) tensor product of node features with spherical harmonics.

    The string is ``"<irreps_x> * <irreps_sh> -> <irreps_out> | 0.0.0 1.1.2*0.5 ..."``: the
    instructions ``i_x.i_sh.i_out``, with a coefficient where it is not 1. ``irreps_sh`` has
    multiplicity 1 throughout, ``irreps_out`` may be unsimplified (each instruction its own entry);
    each instruction owns ``mul`` consecutive per-edge weights, in order. ``"...; f16"``: weights are
    float16, and so is their gradient times 2^10.
    """

    irreps_x: str
    irreps_sh: str
    irreps_out: str
    instructions: tuple[tuple[int, int, int, float], ...]
    half: bool = False

    @property
    def paths(self) -> tuple[TensorProductPath, ...]:
        xs, shs, outs = blocks(self.irreps_x), blocks(self.irreps_sh), blocks(self.irreps_out)
        found, offset = [], 0
        for i, j, k, coefficient in self.instructions:
            found.append(TensorProductPath(xs[i], shs[j], outs[k], offset, coefficient))
            offset += xs[i].mul
        return tuple(found)

    @property
    def weight_numel(self) -> int:
        return sum(p.block_x.mul for p in self.paths)

    def __str__(self) -> str:
        items = (f"{i}.{j}.{k}" + ("" if c == 1.0 else f"*{c!r}") for i, j, k, c in self.instructions)
        text = f"{self.irreps_x} * {self.irreps_sh} -> {self.irreps_out} | {' '.join(items)}"
        return in_half(text) if self.half else text


@lru_cache(maxsize=4096)
def tensor_product_spec(text: str) -> TensorProductSpec:
    """Parse the string form of :class:`TensorProductSpec`.

    Raises:
        IrrepsError: if an instruction violates the triangle rule or parity, or if multiplicities
            do not fit ``uvu`` with a multiplicity-1 second operand, or for an unknown storage type.
    """
    plain, half = _storage(text)
    head, _, tail = plain.partition("|")
    operands, _, irreps_out = (part.strip() for part in head.partition("->"))
    irreps_x, _, irreps_sh = (part.strip() for part in operands.partition("*"))
    instructions = tuple(_instruction(item) for item in tail.split())
    spec = TensorProductSpec(irreps_x, irreps_sh, irreps_out, instructions, half)
    for path in spec.paths:
        a, b, c = path.block_x, path.block_sh, path.block_out
        allowed = abs(a.l - b.l) <= c.l <= a.l + b.l and a.p * b.p == c.p
        if not (allowed and a.mul == c.mul and b.mul == 1):
            raise IrrepsError(f"no uvu path {a.mul}x{a.ir} * {b.mul}x{b.ir} -> {c.mul}x{c.ir}", where=text)
    return spec


def _instruction(item: str) -> tuple[int, int, int, float]:
    indices, _, coefficient = item.partition("*")
    i, j, k = (int(part) for part in indices.split("."))
    return i, j, k, float(coefficient) if coefficient else 1.0


@dataclass(frozen=True)
class GateSpec:
    """e3nn's gate: scalars go through an activation, blocks l >= 1 are scaled by gate scalars.

    The string is ``"<scalars> ; <gates> ; <gated> ; <act,act,...> ; <act,...>"`` with one
    activation (see :mod:`.activations`) per scalar block and per gate block. The input is the
    simplified concatenation of the three, the output of scalars and gated.
    """

    scalars: str
    gates: str
    gated: str
    scalar_activations: tuple[str, ...]
    gate_activations: tuple[str, ...]

    @property
    def irreps_in(self) -> str:
        return simplified("+".join(part for part in (self.scalars, self.gates, self.gated) if part))

    @property
    def irreps_out(self) -> str:
        return simplified("+".join(part for part in (self.scalars, self.gated) if part))

    def __str__(self) -> str:
        acts = (",".join(self.scalar_activations), ",".join(self.gate_activations))
        return " ; ".join((self.scalars, self.gates, self.gated, *acts))


@lru_cache(maxsize=4096)
def gate_spec(text: str) -> GateSpec:
    """Parse the string form of :class:`GateSpec`.

    Raises:
        IrrepsError: if there is not one gate per gated channel, or not one activation per block.
    """
    scalars, gates, gated, act_scalars, act_gates = (part.strip() for part in text.split(";"))
    spec = GateSpec(
        scalars,
        gates,
        gated,
        tuple(a for a in act_scalars.split(",") if a),
        tuple(a for a in act_gates.split(",") if a),
    )
    counts = [sum(block.mul for block in blocks(part)) for part in (gates, gated)]
    if counts[0] != counts[1]:
        raise IrrepsError(f"{counts[0]} gates for {counts[1]} gated channels", where=text)
    for part, found in ((scalars, spec.scalar_activations), (gates, spec.gate_activations)):
        if len(blocks(part)) != len(found):
            raise IrrepsError(f"{len(found)} activations for {part!r}", where=text)
    return spec
