"""An SO(3) transformer of the So3krates type on e3nn.

Atoms carry invariant features (``C x 0e``) and equivariant ones (``C x 1o + C x 2e`` for ``l_max = 2``). A
layer has two blocks, as So3krates has (Frank et al., Nat. Commun. 15, 6539 (2024)):

* *Euclidean attention*: atom ``i`` attends to its neighbours with coefficients that are invariant,
  ``alpha_ij``, and receives ``sum_j alpha_ij w(r_ij) (h_j (x) Y(r_ij))``, a tensor product of the sender's
  features with the spherical harmonics of the edge, for the invariant and the equivariant branch alike;
* *interaction*: the lengths of an atom's equivariant features join its invariant ones, which in turn scale
  the equivariant ones.

Attention is either So3krates' own, ``alpha_ij = f(r_ij) q_i . (w'(r_ij) k_j) / sqrt(d)``, or the robust
normalization of the GAQ paper (arXiv 2603.05343), ``softmax_j(tau q_i/|q_i| . k_j/|k_j|)``: scores lie
within ``tau`` of 0, whatever rounding does to q and k. Softmax's weights are ``f(r_ij) exp(s_ij)`` over their
sum and 1, so that a neighbour which leaves the cutoff leaves smoothly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from e3nn import o3
from torch import Tensor, nn

from ..errors import ConfigError
from .forces import energy_and_forces

TINY = 1e-6  # of squared norms, so that the gradient of a length of 0 is 0


@dataclass(frozen=True)
class TransformerConfig:
    """What an :class:`EuclideanTransformer` is made of.

    Attributes:
        elements: atomic numbers that it knows.
        channels: C, of every degree; a multiple of ``heads``.
        l_max: the highest degree of the equivariant features.
        layers: how often atoms attend to their neighbours.
        heads: attention coefficients of an edge, each for ``channels / heads`` channels.
        radial: Bessel functions of a distance.
        cutoff: Å.
        attention: "normalized" (softmax of bounded scores) or "plain" (So3krates').
        temperature: tau, the largest score of normalized attention.

    Raises:
        ConfigError: for settings that make no model.
    """

    elements: tuple[int, ...]
    channels: int = 64
    l_max: int = 2
    layers: int = 3
    heads: int = 4
    radial: int = 16
    cutoff: float = 5.0
    attention: Literal["normalized", "plain"] = "normalized"
    temperature: float = 4.0

    def __post_init__(self) -> None:
        sizes = (self.channels, self.l_max, self.layers, self.heads, self.radial)
        sound = all(size >= 1 for size in sizes) and self.cutoff > 0 and self.temperature > 0
        if not sound or not self.elements or self.channels % self.heads:
            raise ConfigError(
                "a transformer needs elements, sizes of 1 or more, a cutoff, and heads that divide channels",
                where=repr(self),
            )
        if self.attention not in ("normalized", "plain"):
            raise ConfigError(f"no attention {self.attention!r}", fix="'normalized' or 'plain'")

    @property
    def sh(self) -> str:
        """Irreps of the spherical harmonics."""
        return "+".join(f"1x{l}{'eo'[l % 2]}" for l in range(self.l_max + 1))

    @property
    def features(self) -> str:
        """Irreps of an atom's features."""
        return self.sh.replace("1x", f"{self.channels}x")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TransformerConfig:
        """The inverse of :meth:`to_dict`, also after JSON.

        Raises:
            ConfigError: if it is no such dictionary.
        """
        try:
            return TransformerConfig(**{**data, "elements": tuple(data["elements"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"no configuration of a transformer: {error}", where=repr(data)) from error


class EuclideanTransformer(nn.Module):
    """Atomic energies (eV) from elements and edge vectors (Å).

    Args:
        config: its sizes.

    Attributes:
        config: the same.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        index = torch.full((max(config.elements) + 1,), -1, dtype=torch.int64)
        index[list(config.elements)] = torch.arange(len(config.elements))
        self.register_buffer("species_of", index)
        self.register_buffer("energy_shift", torch.zeros(len(config.elements), dtype=torch.float64))
        self.register_buffer("energy_scale", torch.ones(()))
        self.register_buffer("neighbours", torch.ones(()))
        self.embedding = nn.Embedding(len(config.elements), config.channels)
        self.radial_basis = RadialBasis(config.radial, config.cutoff)
        self.harmonics = o3.SphericalHarmonics(config.sh, normalize=True, normalization="component")
        self.layers = nn.ModuleList(Layer(config, first=k == 0) for k in range(config.layers))
        self.head = dense(config.channels, config.channels, 1)

    def forward(
        self,
        numbers: Tensor,
        edge_vec: Tensor,
        receivers: Tensor,
        senders: Tensor,
        batch: Tensor,
        ptr: Tensor,
    ) -> Tensor:
        """Atomic energies (N,), float64; arguments as :func:`~gaq_compile.capture.graphs.collate` makes them.

        ``batch`` and ``ptr`` are taken for the sake of one format; atomic energies do not need them.
        """
        species = self.species_of[numbers]  # type: ignore[index]
        basis, envelope = self.radial_basis(edge_vec)
        edges = Edges(self.harmonics(edge_vec), basis, envelope, receivers, senders)
        x, vectors = self.embedding(species), None
        for layer in self.layers:
            x, vectors = layer(x, vectors, edges, self.neighbours)
        energies = self.head(x).squeeze(1) * self.energy_scale
        return energies.double() + self.energy_shift[species]  # type: ignore[index]

    def energy_and_forces(
        self, tensors: Mapping[str, Tensor], create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Energies (graphs,) in eV and forces (N, 3) in eV/Å, the negative gradient.

        Args:
            tensors: the arguments of :meth:`forward` by name.
            create_graph: whether what is returned can be differentiated again, as training needs.
        """
        return energy_and_forces(self, tensors, create_graph)

    def set_scales(self, shifts: Sequence[float], scale: float, neighbours: float) -> None:
        """What training data says before training: energies of elements (eV), the size of what comes on top
        of them (eV), and the mean number of neighbours."""
        self.energy_shift.copy_(torch.tensor(shifts, dtype=torch.float64))  # type: ignore[operator]
        self.energy_scale.fill_(scale)  # type: ignore[operator]
        self.neighbours.fill_(neighbours)  # type: ignore[operator]


@dataclass(frozen=True)
class Edges:
    """What layers read of edges: harmonics, radial basis, smooth cutoff (E, 1), and both ends."""

    harmonics: Tensor
    basis: Tensor
    envelope: Tensor
    receivers: Tensor
    senders: Tensor


class RadialBasis(nn.Module):
    """Bessel functions of distances, and a polynomial that goes to 0 at the cutoff with two derivatives.

    ``b_n(r) = sqrt(2 / c) sin(n pi r / c) / r * f(r)`` and ``f(x) = 1 - 28 x^6 + 48 x^7 - 21 x^8`` for
    ``x = r / c`` (Gasteiger et al., ICLR 2020, with p = 6).
    """

    def __init__(self, count: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("waves", torch.arange(1, count + 1) * (math.pi / cutoff))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(E, count) and (E, 1) for vectors (E, 3)."""
        r = vectors.norm(dim=1, keepdim=True)
        x = (r / self.cutoff).clamp(max=1.0)
        envelope = 1.0 + x**6 * (-28.0 + x * (48.0 - 21.0 * x))
        waves = torch.sin(r * self.waves) / r
        return waves * envelope * math.sqrt(2.0 / self.cutoff), envelope


class Layer(nn.Module):
    """Attention to neighbours, then the exchange between an atom's own invariants and equivariants.

    The first layer is given no equivariant features: there are none before atoms have seen their neighbours.
    """

    def __init__(self, config: TransformerConfig, first: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.convolution = Convolution(config.features if not first else f"{config.channels}x0e", config)
        self.channels, self.heads = config.channels, config.heads
        self.mix = o3.Linear(self.convolution.irreps_in, self.convolution.irreps_in)
        self.filters = dense(config.radial, 32, self.convolution.paths * config.channels)
        self.update = o3.Linear(self.convolution.irreps_out, config.features)
        self.interaction = Interaction(config)

    def forward(
        self, x: Tensor, vectors: Tensor | None, edges: Edges, neighbours: Tensor
    ) -> tuple[Tensor, Tensor]:
        alpha = self.attention(x, edges, neighbours)
        shape = (alpha.shape[0], self.convolution.paths, self.heads, self.channels // self.heads)
        weights = self.filters(edges.basis).reshape(shape) * alpha[:, None, :, None]
        sent = self.mix(x if vectors is None else torch.cat([x, vectors], dim=1))
        sums = self.convolution(sent, edges.harmonics, weights.flatten(1), edges.receivers, edges.senders)
        update = self.update(sums)
        to_x, to_vectors = update.split([self.channels, update.shape[1] - self.channels], dim=1)
        return self.interaction(x + to_x, to_vectors if vectors is None else vectors + to_vectors)


class Attention(nn.Module):
    """Invariant coefficients (E, heads) of the neighbours of each atom.

    They are scaled so that a sum over as many neighbours as training data have is of order 1.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.channels // config.heads
        self.normalized, self.temperature = config.attention == "normalized", config.temperature
        self.query = nn.Linear(config.channels, config.channels, bias=False)
        self.key = nn.Linear(config.channels, config.channels, bias=False)
        outputs = config.heads if self.normalized else config.channels
        self.distance = dense(config.radial, 32, outputs)

    def forward(self, x: Tensor, edges: Edges, neighbours: Tensor) -> Tensor:
        query, key = (self._by_head(layer(x)) for layer in (self.query, self.key))
        if not self.normalized:
            key = key[edges.senders] * self._by_head(self.distance(edges.basis))
            scores = (query[edges.receivers] * key).sum(-1) / (self.width * neighbours).sqrt()
            return edges.envelope * scores
        query, key = unit(query), unit(key)
        scores = self.temperature * (query[edges.receivers] * key[edges.senders]).sum(-1)
        weights = edges.envelope * torch.exp(scores + self.distance(edges.basis))
        total = weights.new_ones(x.shape[0], self.heads).index_add(0, edges.receivers, weights)
        return weights / total[edges.receivers] * neighbours.sqrt()

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.heads, self.width)


class Convolution(nn.Module):
    """``sum_j TP(h_j, Y(r_ij); w_ij)`` over the neighbours of each atom.

    The paths are all of ``l (x) l' -> l''`` up to l_max that parity allows, each channel by channel ("uvu")
    with weights of the edge.
    """

    def __init__(self, irreps_in: str, config: TransformerConfig) -> None:
        super().__init__()
        self.irreps_in = irreps_in
        given, sh, kept = o3.Irreps(irreps_in), o3.Irreps(config.sh), o3.Irreps(config.features)
        found = [
            (i, j, out)
            for i, (_, a) in enumerate(given)
            for j, (_, b) in enumerate(sh)
            for out in a * b
            if out in [ir for _, ir in kept]
        ]
        found.sort(key=lambda path: path[2])
        self.paths = len(found)
        self.irreps_out = "+".join(f"{config.channels}x{out}" for *_, out in found)
        self.product = o3.TensorProduct(
            given, sh, o3.Irreps(self.irreps_out),
            [(i, j, k, "uvu", True) for k, (i, j, _) in enumerate(found)],
            shared_weights=False, internal_weights=False,
        )  # fmt: skip

    def forward(self, h: Tensor, sh: Tensor, weights: Tensor, receivers: Tensor, senders: Tensor) -> Tensor:
        messages = self.product(h[senders], sh, weights)
        return messages.new_zeros(h.shape[0], messages.shape[1]).index_add(0, receivers, messages)


class Interaction(nn.Module):
    """Lengths of vectors join the invariants; invariants scale vectors, mixed over channels, in return."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.channels, self.degrees = config.channels, range(1, config.l_max + 1)
        self.mix = o3.Linear(vectors_of(config), vectors_of(config))
        self.exchange = dense(
            config.channels * (config.l_max + 1), config.channels, config.channels * (config.l_max + 1)
        )

    def forward(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mix(vectors).split([self.channels * (2 * l + 1) for l in self.degrees], dim=1)
        parts = [part.unflatten(1, (self.channels, -1)) for part in mixed]
        lengths = [torch.sqrt(part.square().sum(-1) + TINY) for part in parts]
        to_x, *gates = self.exchange(torch.cat([x, *lengths], dim=1)).chunk(1 + len(parts), dim=1)
        scaled = [(gate[:, :, None] * part).flatten(1) for gate, part in zip(gates, parts, strict=True)]
        return x + to_x, vectors + torch.cat(scaled, dim=1)


def vectors_of(config: TransformerConfig) -> str:
    """Irreps of the equivariant features alone."""
    return config.features.partition("+")[2]


def unit(x: Tensor) -> Tensor:
    """Vectors over their lengths; 0 stays 0."""
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + TINY)


def dense(given: int, hidden: int, made: int) -> nn.Sequential:
    """A network with one hidden layer."""
    return nn.Sequential(nn.Linear(given, hidden), nn.SiLU(), nn.Linear(hidden, made))
