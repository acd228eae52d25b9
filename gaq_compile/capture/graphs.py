"""``ase.Atoms`` -> the tensors that a captured potential takes.

Edges are directed pairs within the cutoff: receiver ``i``, sender ``j``, edge vector
``r_j - r_i + S @ cell`` (Å). Several structures become one batch of disconnected graphs.

Edges come in pairs: of E edges, edge ``e + E/2`` is the reverse of edge ``e``, with the same ends
swapped and exactly the negative vector. What depends on a length alone is then known to be the same
in both halves. The first half holds the first halves of all structures, the second their reverses
in the same order. Long-range pairs come likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ..errors import StructureError, UnknownElementError
from .limits import Limits
from .structures import COINCIDENT, check_arrays, check_distances, is_thin

Tensors = dict[str, Tensor]

# Å; of a pair closer than this, the check for coincident atoms decides, to the last digit.
SUSPICIOUS = 2 * COINCIDENT
# Atoms of a molecule up to which looking at every pair costs less than dividing space into cells.
FEW = 64

TENSOR_NAMES = (
    "numbers", "edge_vec", "receivers", "senders",
    "edge_vec_lr", "receivers_lr", "senders_lr",
    "batch", "ptr", "charge", "spin",
)  # fmt: skip
# Each list of edges: its vectors and their ends. All come in pairs, in the order that the module states.
EDGE_VECTORS = {"edge_vec": ("receivers", "senders"), "edge_vec_lr": ("receivers_lr", "senders_lr")}


@dataclass(frozen=True)
class CalibratedRange:
    """What calibration has seen: elements, and the surroundings of atoms.

    Weights are rounded in favour of what calibration showed, and rounded activations saturate
    outside their range; no kernel notices either, so a structure beyond them is a warning.

    Attributes:
        elements: atomic numbers.
        fewest, most: neighbours of an atom; None where activations are not rounded.
        shortest: distance, Å; None where activations are not rounded.
    """

    elements: tuple[int, ...]
    fewest: int | None = None
    most: int | None = None
    shortest: float | None = None

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CalibratedRange:
        """The inverse of ``dataclasses.asdict``, also after JSON."""
        return CalibratedRange(**{**data, "elements": tuple(data["elements"])})

    def complaint(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What lies outside, in words, or None. Neighbour counts may leave the range by a fifth."""
        unseen = sorted(set(tensors["numbers"].tolist()) - set(self.elements))
        if unseen:
            return f"calibrated were {_symbols(self.elements)}, not {_symbols(unseen)}"
        if self.fewest is None or self.most is None or self.shortest is None:
            return None
        fewest, most, shortest = _surroundings([tensors])
        if fewest < 0.8 * self.fewest or most > 1.2 * self.most:
            calibrated = f"calibrated were {self.fewest} to {self.most}"
            return f"atoms with {fewest} to {most} neighbours, {calibrated}"
        if shortest < 0.9 * self.shortest:
            return f"a distance of {shortest:.2f} Å, the shortest calibrated was {self.shortest:.2f} Å"
        return None


def calibrated_range(batches: Sequence[Mapping[str, Tensor]], surroundings: bool) -> CalibratedRange:
    """The range of calibration batches; neighbour counts and distances only if they matter."""
    elements = tuple(sorted({z for tensors in batches for z in tensors["numbers"].tolist()}))
    return CalibratedRange(elements, *(_surroundings(batches) if surroundings else ()))


def _surroundings(batches: Sequence[Mapping[str, Tensor]]) -> tuple[int, int, float]:
    """Fewest and most neighbours of an atom, and the shortest distance (Å)."""
    counts = torch.cat([torch.bincount(t["receivers"], minlength=len(t["numbers"])) for t in batches])
    lengths = [t["edge_vec"].norm(dim=1).min() for t in batches if len(t["edge_vec"])]
    shortest = float(torch.stack(lengths).min()) if lengths else float("inf")
    return int(counts.min()), int(counts.max()), shortest


@dataclass(frozen=True)
class GraphFormat:
    """How structures become tensors for one potential.

    Attributes:
        inputs: the names of the tensors that the captured graph takes, in order
            (see ``TENSOR_NAMES``, or a model's own). Edges are in pairs, see :func:`in_pairs`.
        cutoff: radius of the edges, Å.
        cutoff_lr: radius of the long-range pairs, Å, where the potential has them.
        elements: atomic numbers that the potential knows (empty: any).
        positions: for a model captured from tensors of its own, the name of the positions.
        limits: what the captured graph assumes about its inputs; None before it is captured.
    """

    inputs: tuple[str, ...]
    cutoff: float
    cutoff_lr: float | None = None
    elements: tuple[int, ...] = ()
    positions: str | None = None
    limits: Limits | None = None

    @property
    def vectors(self) -> tuple[str, ...]:
        """The inputs that forces are derivatives by: edge vectors, or positions of their own."""
        return (self.positions,) if self.positions else tuple(n for n in self.inputs if n in EDGE_VECTORS)

    def to_dict(self) -> dict[str, Any]:
        return {
            "inputs": list(self.inputs),
            "cutoff": self.cutoff,
            "cutoff_lr": self.cutoff_lr,
            "elements": list(self.elements),
            "positions": self.positions,
            "limits": self.limits.to_dict() if self.limits else None,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> GraphFormat:
        return GraphFormat(
            tuple(data["inputs"]),
            float(data["cutoff"]),
            data["cutoff_lr"],
            tuple(data["elements"]),
            data["positions"],
            Limits.from_dict(data["limits"]) if data["limits"] else None,
        )


class Pairs(NamedTuple):
    """One direction of each pair of atoms closer than some reach, sorted by its ends, then by image.

    Attributes:
        receivers, senders: int64; of the two ends, the receiver is the lower.
        vectors: float64, Å. Of an atom's pairs with its own images at S and -S there is one.
        lengths: their norms, Å.
    """

    receivers: np.ndarray
    senders: np.ndarray
    vectors: np.ndarray
    lengths: np.ndarray

    def within(self, cutoff: float) -> Pairs:
        """Those closer than ``cutoff`` Å."""
        near = self.lengths < cutoff
        return self if near.all() else Pairs(*(values[near] for values in self))

    def turned(self, rotation: np.ndarray) -> Pairs:
        """The pairs of the structure turned by ``rotation`` (3, 3)."""
        return self._replace(vectors=self.vectors @ rotation.T)


def find_pairs(atoms: Atoms, cutoff: float) -> Pairs:
    """All pairs closer than ``cutoff`` Å, atoms on top of each other included."""
    periodic = bool(atoms.pbc.any())
    if not periodic and len(atoms) <= FEW:
        return _pairs_of_few(atoms.positions).within(cutoff)
    from vesin import NeighborList

    box = atoms.cell.array if periodic else np.zeros((3, 3))
    finder = NeighborList(cutoff=cutoff, full_list=False)
    ends, shifts, vectors, lengths = finder.compute(
        points=atoms.positions, box=box, periodic=atoms.pbc, quantities="PSDd", copy=False
    )
    # Indexing also copies what the finder takes with it.
    order = np.lexsort((*shifts.T[::-1], *ends.T[::-1]))
    receivers, senders = ends[order].T.astype(np.int64, order="C")
    return Pairs(receivers, senders, vectors[order], lengths[order])


def _pairs_of_few(positions: np.ndarray) -> Pairs:
    """Every pair of a molecule's atoms."""
    receivers, senders = np.triu_indices(len(positions), 1)
    vectors = positions[senders] - positions[receivers]
    return Pairs(receivers, senders, vectors, np.sqrt((vectors * vectors).sum(axis=1)))


def neighbours(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directed pairs within ``cutoff`` Å: receivers i, senders j, edge vectors (float64).

    Of E pairs, the second E/2 are the reverses of the first, in the same order; the first are sorted
    by receiver, then sender.
    """
    i, j, vectors, _ = find_pairs(atoms, cutoff)
    return np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([vectors, -vectors])


def collate(structures: Sequence[Atoms], form: GraphFormat) -> Tensors:
    """One batch of tensors from structures.

    Args:
        structures: one or more structures; each becomes a graph.
        form: the potential's cutoffs, elements and input names.

    Returns:
        The tensors that ``form.inputs`` names, float32 and int64; edges in pairs.

    Raises:
        StructureError: for bad or empty structures.
        UnknownElementError: for an element that the potential was not trained on.
    """
    return batched(structures, checked_pairs(structures, form), form)


def checked_pairs(structures: Sequence[Atoms], form: GraphFormat) -> list[Pairs]:
    """The pairs of each structure within the longest cutoff; raises what :func:`collate` says."""
    if form.positions is not None:
        raise StructureError(
            "this potential was captured from tensors of its own, not from structures",
            fix=f"call it with a dictionary of {', '.join(form.inputs)}",
        )
    if not structures:
        raise StructureError("no structures were given", fix="pass an ase.Atoms or a list of them")
    reach = max(form.cutoff, form.cutoff_lr or 0.0, SUSPICIOUS)
    found = []
    for index, atoms in enumerate(structures):
        check_arrays(atoms)
        if is_thin(atoms):
            check_distances(atoms)  # before its images within reach fill the memory
        pairs = find_pairs(atoms, reach)
        if pairs.lengths.min(initial=reach) < SUSPICIOUS:
            check_distances(atoms)
        _check_elements(atoms.numbers.tolist(), form, f"structure {index}, {len(atoms)} atoms")
        found.append(pairs)
    return found


def batched(structures: Sequence[Atoms], pairs: Sequence[Pairs], form: GraphFormat) -> Tensors:
    """The tensors of structures that are known to be sound.

    Args:
        structures: one or more; each becomes a graph.
        pairs: of each structure, those within the longest cutoff at least.
        form: as for :func:`collate`.

    Raises:
        StructureError: for a charge or spin that is no number.
    """
    sizes = [len(atoms) for atoms in structures]
    ptr = np.cumsum([0, *sizes], dtype=np.int64)
    found: dict[str, np.ndarray] = {
        "numbers": np.concatenate([atoms.numbers for atoms in structures]).astype(np.int64),
        "batch": np.repeat(np.arange(len(structures)), sizes).astype(np.int64),
        "ptr": ptr,
        "charge": _numbers(structures, "charge"),
        "spin": _numbers(structures, "spin"),
    }
    found |= _edges(pairs, ptr, form.cutoff, "")
    if form.cutoff_lr is not None:
        found |= _edges(pairs, ptr, form.cutoff_lr, "_lr")
    return {name: _tensor(found[name]) for name in form.inputs}


def _numbers(structures: Sequence[Atoms], name: str) -> np.ndarray:
    """``atoms.info[name]`` of each structure, 0 where it is not set."""
    found = []
    for index, atoms in enumerate(structures):
        value = atoms.info.get(name, 0.0)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not math.isfinite(number):
            raise StructureError(
                f"atoms.info[{name!r}] is {value!r}, not a number",
                where=f"structure {index}, {len(atoms)} atoms",
                fix="set it to a finite number, in units of the elementary charge or of unpaired electrons",
            )
        found.append(number)
    return np.array(found, dtype=np.float32)


def _tensor(array: np.ndarray) -> Tensor:
    """A compact tensor; an empty array keeps strides that kernels refuse, so it is made anew."""
    tensor = torch.from_numpy(array)
    return tensor if array.size else torch.empty(array.shape, dtype=tensor.dtype)


def check_tensors(tensors: Mapping[str, Tensor], form: GraphFormat) -> None:
    """Refuse tensors, made elsewhere, that the graph would compute nonsense from.

    Raises:
        StructureError: if one is missing, has another type or shape, is not finite, or points at
            atoms or graphs that are not there.
        UnknownElementError: for an element that the potential was not trained on.
    """
    missing = [name for name in form.inputs if name not in tensors]
    if missing:
        raise StructureError(f"missing input tensors: {', '.join(missing)}", fix="see Potential.form.inputs")
    if form.limits is not None:
        form.limits.check(tensors, form.inputs)
    for name in form.inputs:
        if tensors[name].is_floating_point() and not bool(torch.isfinite(tensors[name]).all()):
            raise StructureError(f"{name} has NaN or infinite entries", fix="look where it was made")
    if form.positions is None:
        _check_graph(tensors, form)


def _check_graph(tensors: Mapping[str, Tensor], form: GraphFormat) -> None:
    """The tensors of :func:`collate`: elements, indices into the atoms, and the division into graphs."""
    atoms = len(tensors["numbers"])
    _check_elements(tensors["numbers"].tolist(), form, "the tensor 'numbers'")
    for vectors, ends in EDGE_VECTORS.items():
        for name in ends if vectors in form.inputs else ():
            index = tensors[name]
            if len(index) != len(tensors[vectors]):
                raise StructureError(f"{len(index)} {name} for {len(tensors[vectors])} rows of {vectors}")
            low, high = (int(end) for end in index.aminmax()) if len(index) else (0, 0)
            if len(index) and not 0 <= low <= high < atoms:
                raise StructureError(
                    f"{name} from {low} to {high}, but there are {atoms} atoms",
                    fix="indices count the atoms of the whole batch, from 0",
                )
    ptr = tensors["ptr"]
    sizes = ptr.diff()
    whole = len(ptr) > 1 and int(ptr[0]) == 0 and int(ptr[-1]) == atoms and bool((sizes > 0).all())
    expected = torch.repeat_interleave(torch.arange(len(sizes)), sizes) if whole else None
    if expected is None or not torch.equal(tensors["batch"], expected):
        raise StructureError(
            "ptr and batch do not divide the atoms into graphs",
            where=f"{atoms} atoms, ptr {ptr.tolist()[:8]}",
            fix="ptr[g] is the first atom of graph g, and its last entry the number of atoms",
        )
    for name in ("charge", "spin"):
        if name in form.inputs and len(tensors[name]) != len(sizes):
            raise StructureError(f"{len(tensors[name])} entries of {name} for {len(sizes)} graphs")


def in_pairs(tensors: Mapping[str, Tensor], form: GraphFormat) -> Mapping[str, Tensor]:
    """Tensors whose edges come in pairs: edge ``e + E/2`` is the reverse of edge ``e``.

    Args:
        tensors: what :func:`check_tensors` accepts, with edges in any order.
        form: the potential's. One without edge vectors, or with positions of its own, has no pairs.

    Returns:
        ``tensors`` itself where its edges are in this order; else a copy in which edge vectors,
        receivers and senders are permuted together, the first half sorted by receiver, then sender.

    Raises:
        StructureError: if an edge has no reverse whose vector is its exact negative (-0 is 0).
    """
    if form.positions is not None:
        return tensors
    permuted: Tensors = {}
    for vectors, ends in EDGE_VECTORS.items():
        names = (vectors, *ends)
        if not set(names) <= set(form.inputs) or _paired(*(tensors[name] for name in names)):
            continue
        order = _pairing(names, [tensors[name].detach().numpy() for name in names])
        permuted |= {name: tensors[name][order] for name in names}
    return {**tensors, **permuted} if permuted else tensors


def _paired(vectors: Tensor, receivers: Tensor, senders: Tensor) -> bool:
    half = len(vectors) // 2
    return (
        len(vectors) % 2 == 0
        and torch.equal(receivers[half:], senders[:half])
        and torch.equal(senders[half:], receivers[:half])
        and torch.equal(vectors[half:], -vectors[:half])
    )


def _pairing(names: Sequence[str], arrays: Sequence[np.ndarray]) -> Tensor:
    """The permutation that brings edges into pairs; raises what :func:`in_pairs` says."""
    vectors, receivers, senders = arrays
    x, y, z = vectors.T
    # Of the two directions of a pair, the first has the lower receiver; an atom and its own image
    # tell them apart by the sign of the vector's first component that is not 0.
    upwards = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
    first = (receivers < senders) | ((receivers == senders) & upwards)
    sign = np.where(first, 1, -1).astype(vectors.dtype)
    keys = [np.minimum(receivers, senders), np.maximum(receivers, senders), *(vectors * sign[:, None]).T]
    order = np.lexsort(keys[::-1])
    there, back = order[first[order]], order[~first[order]]
    if len(there) != len(back) or not all(np.array_equal(key[there], key[back]) for key in keys):
        # Groups of edges with the same ends and vector: each has as many of one direction as of the other.
        _, group = np.unique(np.stack(keys, axis=1) + 0.0, axis=0, return_inverse=True)
        surplus = np.bincount(group.ravel(), weights=sign)[group.ravel()]
        edge = int(np.flatnonzero(surplus * sign > 0)[0])
        raise StructureError(
            f"edge {edge} of {len(vectors)} has no reverse",
            where=", ".join(f"{name} {a[edge].tolist()}" for name, a in zip(names, arrays, strict=True)),
            fix="give both directions of every edge, with vectors that are exact negatives",
        )
    return torch.from_numpy(np.concatenate([there, back]))


def _symbols(numbers: Sequence[int]) -> str:
    from ase.data import chemical_symbols

    known = range(len(chemical_symbols))
    return ", ".join(chemical_symbols[z] if z in known else f"Z={z}" for z in numbers)


def _edges(pairs: Sequence[Pairs], ptr: np.ndarray, cutoff: float, suffix: str) -> dict[str, np.ndarray]:
    near = [p.within(cutoff) for p in pairs]
    i = [p.receivers + start for p, start in zip(near, ptr, strict=False)]
    j = [p.senders + start for p, start in zip(near, ptr, strict=False)]
    vectors = np.concatenate([p.vectors for p in near], dtype=np.float32)
    return {
        f"receivers{suffix}": np.concatenate(i + j),
        f"senders{suffix}": np.concatenate(j + i),
        f"edge_vec{suffix}": np.concatenate([vectors, -vectors]),
    }


def _check_elements(numbers: Iterable[int], form: GraphFormat, where: str) -> None:
    unknown = sorted(set(numbers).difference(form.elements)) if form.elements else []
    if unknown:
        raise UnknownElementError(
            f"the potential does not know {_symbols(unknown)}",
            where=where,
            fix="use a potential trained on these elements",
        )
