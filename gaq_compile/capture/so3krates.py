"""So3krates (``so3krates-torch``), with or without SO3LR's long-range physics.

The model has its own Clebsch-Gordan code instead of e3nn's; this recipe restates it in gaq
operators: spherical harmonics, per-head dense maps as block-diagonal irreps-linears, the update
of the equivariant features as a convolution. The captured energy is a function of the edge
vectors alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from ..ir.specs import LinearSpec, TensorProductSpec
from ..operators.registration import ops
from .base import EnergyModel, RawPrediction
from .graphs import GraphFormat
from .modules import CONVERTERS, Converter, IrrepsLinear, linear_only, swap

CUTOFF_LR = 12.0  # Å, the defaults of SO3LR's own ASE calculator
DISPERSION_DAMPING = 2.0  # Å


class So3kratesRecipe:
    """Recipe for ``so3krates_torch.modules.models.So3krates`` and ``SO3LR``."""

    def matches(self, model: nn.Module) -> bool:
        """True for So3krates-type models of the ``so3krates_torch`` package."""
        return type(model).__module__.startswith("so3krates_torch.modules") and hasattr(
            model, "euclidean_transformers"
        )

    def energy_model(self, model: nn.Module) -> EnergyModel:
        """Atomic energies over edge vectors, with So3krates' blocks restated in gaq operators."""
        swapped = swap(model, _converters())
        long_range = bool(getattr(model, "use_lr", False))
        cutoff_lr = None
        if long_range:
            cutoff_lr = float(getattr(model, "r_max_lr", None) or CUTOFF_LR)
            swapped.r_max_lr = cutoff_lr  # type: ignore[assignment]
            if getattr(swapped, "dispersion_energy_cutoff_lr_damping", None) is None:
                swapped.dispersion_energy_cutoff_lr_damping = DISPERSION_DAMPING  # type: ignore[assignment]
        names: tuple[str, ...] = (
            "numbers",
            "edge_vec",
            "receivers",
            "senders",
            "batch",
            "ptr",
            "charge",
            "spin",
        )
        if long_range:
            names += ("edge_vec_lr", "receivers_lr", "senders_lr")
        num_elements = int(model.num_elements)  # type: ignore[arg-type]
        form = GraphFormat(
            names,
            float(model.r_max),
            cutoff_lr,
            elements=_trained_elements(model, num_elements),  # type: ignore[arg-type]
        )
        return EnergyModel(_So3kratesEnergy(swapped, num_elements), form, "So3krates", (False,))

    def original(self, model: nn.Module, ours: bool = False) -> So3kratesOriginal:
        """The model as its own package runs it."""
        return So3kratesOriginal(model)


class So3kratesOriginal:
    """The user's model on structures, through its own code (a copy; the model is untouched)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).eval()
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._cutoff_lr = None
        if getattr(model, "use_lr", False):
            self._cutoff_lr = float(getattr(model, "r_max_lr", None) or CUTOFF_LR)
            self._model.r_max_lr = self._cutoff_lr  # type: ignore[assignment]
            if getattr(model, "dispersion_energy_cutoff_lr_damping", None) is None:
                self._model.dispersion_energy_cutoff_lr_damping = DISPERSION_DAMPING  # type: ignore[assignment]

    def change(self, wrap: Callable[[nn.Module], Any]) -> None:
        """Run what ``wrap`` makes of the model, e.g. ``torch.compile``, in its place."""
        self._model = wrap(self._model)

    def prepare(self, atoms: Atoms) -> Any:
        """The package's batch of one structure."""
        return self.prepare_batch([atoms])

    def prepare_batch(self, structures: Sequence[Atoms]) -> Any:
        """The package's batch of structures, all of them periodic or none."""
        from so3krates_torch.tools import torch_geometric

        loader = torch_geometric.dataloader.DataLoader(
            dataset=[self._data(atoms) for atoms in structures],
            batch_size=len(structures),
            shuffle=False,
            drop_last=False,
        )
        return next(iter(loader)), bool(structures[0].pbc.all())

    def _data(self, atoms: Atoms) -> Any:
        from so3krates_torch.data.atomic_data import AtomicData
        from so3krates_torch.data.utils import KeySpecification, config_from_atoms
        from so3krates_torch.tools import utils

        plain = atoms.copy()
        plain.info["charge"] = float(atoms.info.get("charge", 0.0))
        plain.info["total_spin"] = float(atoms.info.get("spin", 0.0))
        keys = KeySpecification(
            info_keys={"total_charge": "charge", "total_spin": "total_spin"}, arrays_keys={}
        )
        table = utils.AtomicNumberTable(list(range(1, int(self._model.num_elements) + 1)))  # type: ignore[arg-type]
        return AtomicData.from_config(
            config_from_atoms(plain, key_specification=keys),
            z_table=table,
            cutoff=float(self._model.r_max),  # type: ignore[arg-type]
            cutoff_lr=self._cutoff_lr,
        )

    def run(self, prepared: Any) -> Any:
        """Energy and forces (and stress of a periodic cell) of a prepared batch; what is timed."""
        batch, periodic = prepared
        return self._model(batch.clone().to_dict(), compute_stress=periodic)

    def predict(self, atoms: Atoms) -> RawPrediction:
        """The model's answer for one structure."""
        from ase.stress import full_3x3_to_voigt_6_stress

        out = self.run(self.prepare(atoms))
        parts = out.get("node_energy")  # the class without physics gives the sum alone
        energies = None if parts is None else parts.detach().double().reshape(-1).numpy()
        stress = None
        if out.get("stress") is not None:
            stress = full_3x3_to_voigt_6_stress(out["stress"].detach().reshape(3, 3).numpy())
        energy = float(out["energy"].detach().sum()) if energies is None else float(energies.sum())
        return RawPrediction(energy, out["forces"].detach().numpy(), stress, energies)


class _So3kratesEnergy(nn.Module):
    """Atomic energies from species and edge vectors."""

    def __init__(self, model: nn.Module, num_elements: int) -> None:
        super().__init__()
        self.model, self.num_elements = model, num_elements
        self.bare = not hasattr(model, "zbl_repulsion_bool")  # So3krates itself, not SO3LR
        head = model.atomic_energy_output_block
        self.register_buffer("energy_shift", head.energy_shifts.detach().double())  # type: ignore[union-attr, operator]
        head.energy_shifts = nn.Parameter(torch.zeros_like(head.energy_shifts), requires_grad=False)  # type: ignore[union-attr, arg-type]
        model._get_graph = self._get_graph  # type: ignore[assignment]

    def _get_graph(self, data: dict[str, Tensor], **_: object) -> None:
        """The model's graph context from edge vectors; its own would bake in the number of graphs."""
        from so3krates_torch.data.utils import GraphContext, InteractionKwargs

        long_range = data.get("shifts_lr")
        self.model.ctx = GraphContext(  # type: ignore[assignment]
            is_lammps=False,
            num_graphs=data["ptr"].shape[0] - 1,
            num_atoms_arange=torch.arange(data["positions"].shape[0]),
            displacement=None,
            positions=data["positions"],
            vectors=data["shifts"],
            lengths=data["shifts"].norm(dim=-1, keepdim=True),
            vectors_lr=long_range,
            lengths_lr=None if long_range is None else long_range.norm(dim=-1, keepdim=True),
            cell=data["cell"],
            node_heads=data["head"],
            interaction_kwargs=InteractionKwargs(None, (0, 0)),
            vectors_all=None,
        )

    def forward(
        self,
        numbers: Tensor,
        edge_vec: Tensor,
        receivers: Tensor,
        senders: Tensor,
        batch: Tensor,
        ptr: Tensor,
        charge: Tensor,
        spin: Tensor,
        edge_vec_lr: Tensor | None = None,
        receivers_lr: Tensor | None = None,
        senders_lr: Tensor | None = None,
    ) -> Tensor:
        data = {
            "positions": edge_vec.new_zeros(numbers.shape[0], 3),
            "node_attrs": nn.functional.one_hot(numbers - 1, self.num_elements).to(edge_vec.dtype),
            "atomic_numbers": numbers,
            "edge_index": torch.stack([receivers, senders]),
            "shifts": edge_vec,
            "batch": batch,
            "ptr": ptr,
            "cell": edge_vec.new_zeros(3, 3),
            "head": torch.zeros_like(ptr[1:]),
            "total_charge": charge,
            "total_spin": spin,
        }
        if edge_vec_lr is not None and receivers_lr is not None and senders_lr is not None:
            data["edge_index_lr"] = torch.stack([receivers_lr, senders_lr])
            data["shifts_lr"] = edge_vec_lr
        if self.bare:
            features, _ = self.model.get_representation(data, compute_force=False)  # type: ignore[operator]
            out = {"node_energy": self.model.atomic_energy_output_block(features, data)}  # type: ignore[operator]
        else:
            out = self.model(data, compute_force=False)
        # The reference energies of atoms are added in float64: in float32 they would cost digits.
        return out["node_energy"].squeeze(-1).double() + self.energy_shift[numbers - 1]  # type: ignore[index]


def _trained_elements(model: nn.Module, num_elements: int) -> tuple[int, ...]:
    """The atomic numbers that training has touched: their energy scales have left the initial 1.

    SO3LR has rows for 118 elements but was trained on eight; the others' are random numbers.
    """
    scales = model.atomic_energy_output_block.energy_scales.weight.detach().reshape(-1)  # type: ignore[union-attr]
    trained = tuple(z for z in range(1, num_elements + 1) if float(scales[z - 1]) != 1.0)
    return trained or tuple(range(1, num_elements + 1))


def _irreps_of(degrees: list[int]) -> str:
    return "+".join(f"1x{degree}{'o' if degree % 2 else 'e'}" for degree in degrees)


def _head_linear(weight: Tensor, label: str) -> IrrepsLinear:
    """``einsum('nhd,hde->nhe')`` as a block-diagonal map of ``h`` blocks of scalars."""
    heads, width, _ = weight.shape
    irreps = "+".join([f"{width}x0e"] * heads)
    spec = LinearSpec(irreps, irreps, tuple((h, h) for h in range(heads)))
    return IrrepsLinear(spec, weight.reshape(-1), None, label)


class _Attention(nn.Module):
    """So3krates' Euclidean attention (Frank et al. 2024, Eqs. 15, 21, 26)."""

    def __init__(self, block: nn.Module, label: str) -> None:
        super().__init__()
        self.degrees: list[int] = list(block.degrees)  # type: ignore[arg-type]
        self.inv_heads, self.ev_heads = int(block.inv_heads), int(block.ev_heads)  # type: ignore[arg-type]
        self.norm_inv, self.norm_ev = float(block.att_norm_inv), float(block.att_norm_ev)  # type: ignore[arg-type]
        self.so3_conv_invariants = block.so3_conv_invariants
        self.filter_net_inv = swap_dense(block.filter_net_inv, f"{label}.filter_net_inv")
        self.filter_net_ev = swap_dense(block.filter_net_ev, f"{label}.filter_net_ev")
        self.qk_non_linearity = block.qk_non_linearity
        for name in ("q_inv", "k_inv", "v_inv", "q_ev", "k_ev"):
            self.add_module(name, _head_linear(getattr(block, f"W_{name}"), f"{label}.{name}"))
        sh = _irreps_of(self.degrees)
        instructions = tuple((0, i, i, math.sqrt(2 * degree + 1)) for i, degree in enumerate(self.degrees))
        self.spec, self.label = str(TensorProductSpec("1x0e", sh, sh, instructions)), f"{label}.ev_update"

    def forward(
        self,
        inv_features: Tensor,
        ev_features: Tensor,
        rbf: Tensor,
        senders: Tensor,
        receivers: Tensor,
        sh_vectors: Tensor,
        cutoffs: Tensor,
        return_att: bool = False,
    ) -> tuple[Tensor, Tensor]:
        invariants = self.so3_conv_invariants(ev_features[senders] - ev_features[receivers])
        alpha_inv = self._alpha(inv_features, invariants, rbf, senders, receivers, "inv")
        alpha_ev = self._alpha(inv_features, invariants, rbf, senders, receivers, "ev")
        edges, (nodes, width) = senders.shape[0], inv_features.shape
        values = self.v_inv(inv_features)[senders].reshape(edges, self.inv_heads, width // self.inv_heads)
        messages = (cutoffs * alpha_inv)[..., None] * values
        d_inv = inv_features.new_zeros(nodes, width).index_add(0, receivers, messages.reshape(edges, width))
        ones = inv_features.new_ones(nodes, 1)
        updates = ops.tensor_product(ones[senders], sh_vectors, cutoffs * alpha_ev, self.spec, self.label)
        d_ev = ev_features.new_zeros(nodes, ev_features.shape[1]).index_add(0, receivers, updates)
        return d_inv, d_ev

    def _alpha(
        self,
        inv_features: Tensor,
        invariants: Tensor,
        rbf: Tensor,
        senders: Tensor,
        receivers: Tensor,
        kind: str,
    ) -> Tensor:
        """Attention coefficients (E, heads) of one branch."""
        heads = self.inv_heads if kind == "inv" else self.ev_heads
        norm = self.norm_inv if kind == "inv" else self.norm_ev
        query = self.qk_non_linearity(getattr(self, f"q_{kind}")(inv_features))[receivers]
        key = self.qk_non_linearity(getattr(self, f"k_{kind}")(inv_features))[senders]
        filters = getattr(self, f"filter_net_{kind}")(rbf, invariants)
        shape = (senders.shape[0], heads, inv_features.shape[1] // heads)
        products = (query * key * filters).reshape(shape)
        return products.sum(-1) / norm


class _Interaction(nn.Module):
    """So3krates' interaction block (Eqs. 24, 25).

    Its one layer on ``[features, invariants]`` is stated as two: in SO3LR the rows of the four
    invariants are 12 to 36 times larger than those of the features, and one scale per output
    column would leave the features a fraction of their bits (8.4% force error in 8-bit weights).
    """

    def __init__(self, block: nn.Module, label: str) -> None:
        super().__init__()
        self.so3_conv_invariants = block.so3_conv_invariants
        layer = block.linear_layer
        width = layer.in_features - len(block.degree_repeats)  # type: ignore[arg-type, union-attr, operator]
        weight, out = layer.weight.t(), layer.out_features  # type: ignore[union-attr]
        self.from_features = IrrepsLinear(
            linear_only(width, out), weight[:width].reshape(-1), layer.bias, f"{label}.from_features"
        )
        self.from_invariants = IrrepsLinear(
            linear_only(weight.shape[0] - width, out),
            weight[width:].reshape(-1),
            None,
            f"{label}.from_invariants",
        )
        degrees = [(int(n) - 1) // 2 for n in block.degree_repeats]  # type: ignore[union-attr]
        irreps = _irreps_of(degrees)
        instructions = tuple((i, 0, i, math.sqrt(2 * degree + 1)) for i, degree in enumerate(degrees))
        self.spec, self.label = (
            str(TensorProductSpec(irreps, "1x0e", irreps, instructions)),
            f"{label}.ev_scale",
        )

    def forward(self, inv_features: Tensor, ev_features: Tensor) -> tuple[Tensor, Tensor]:
        invariants = self.so3_conv_invariants(ev_features)
        mixed = self.from_features(inv_features) + self.from_invariants(invariants)
        d_inv, scales = mixed.split([inv_features.shape[-1], invariants.shape[-1]], dim=-1)
        one = torch.ones_like(scales[:, :1])
        return d_inv, ops.tensor_product(ev_features, one, scales, self.spec, self.label)


class _Harmonics(nn.Module):
    """So3krates' real spherical harmonics: e3nn's, with integral normalisation."""

    def __init__(self, module: nn.Module, label: str) -> None:
        super().__init__()
        self.irreps, self.label = _irreps_of(list(module.degrees)), label  # type: ignore[arg-type]

    def forward(self, vec: Tensor) -> Tensor:
        return ops.spherical_harmonics(vec, self.irreps, True, "integral", self.label)


def swap_dense(module: nn.Module, label: str) -> nn.Module:
    """A copy of a plain dense network whose ``nn.Linear`` layers are gaq operators."""
    from .modules import convert_dense

    return swap(module, {nn.Linear: lambda child, name: convert_dense(child, f"{label}.{name}")})  # type: ignore[arg-type]


def _converters() -> dict[type[nn.Module], Converter]:
    from so3krates_torch.blocks.embedding import ChargeSpinEmbedding
    from so3krates_torch.blocks.euclidean_transformer import EuclideanAttentionBlock, InteractionBlock
    from so3krates_torch.modules.spherical_harmonics import RealSphericalHarmonics

    def dense(module: nn.Module, label: str) -> nn.Module | None:
        # The per-element scales of the energy are a table, not a layer: rounding them gains nothing.
        return None if label.endswith("energy_scales") else CONVERTERS[nn.Linear](module, label)

    return {
        nn.Linear: dense,
        EuclideanAttentionBlock: _Attention,
        InteractionBlock: _Interaction,
        RealSphericalHarmonics: _Harmonics,
        ChargeSpinEmbedding: _traceable_charge_spin,
    }


def _traceable_charge_spin(module: nn.Module, label: str) -> nn.Module | None:
    """The block itself with its dense layers swapped; its forward is kept from the compiler's view."""
    swapped = swap_dense(module, label)
    forward = getattr(type(module).forward, "__wrapped__", None)
    if forward is not None:
        swapped.forward = forward.__get__(swapped)  # type: ignore[method-assign]
    return swapped
