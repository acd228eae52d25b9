"""A compiled potential: call it on structures, read its graphs, print its report, save it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch.fx import GraphModule

from .backends.tvm.cuda.driver import require_gpu
from .backends.tvm.runner import native
from .cache import Stages
from .capture.frames import own_frame
from .capture.graphs import (
    CalibratedRange,
    GraphFormat,
    Tensors,
    batched,
    check_tensors,
    checked_pairs,
    in_pairs,
)
from .config import QuantConfig, rounds_only_invariants
from .errors import CalibrationWarning
from .passes.derive_forces import outputs
from .passes.straight_line import straight_line
from .verify.report import Report
from .verify.types import Prediction


class Potential:
    """Energy and forces from compiled kernels.

    Call it with an ``ase.Atoms`` for a :class:`Prediction`, with a list for a list of them (they
    run as one batch), or with the tensors that ``form.inputs`` names.

    Attributes:
        graphs: every stage of the compilation by pass name; ``.code`` reads each.
        report: what runs where, and what was measured.
        config: what was quantized and how.
        form: how structures become the graph's tensors.
        calibrated: what calibration has seen, to warn outside of it; None where nothing depends on it.
        framed: whether structures are evaluated in a frame of their own, so that the same
            structure gives the same bits however it is turned (:mod:`.capture.frames`); on where
            only invariants are rounded.
        on_gpu: whether the kernels are a GPU's. Weights are uploaded at the first call; inputs and
            results live on the CPU.
    """

    def __init__(
        self,
        graphs: Mapping[str, GraphModule],
        form: GraphFormat,
        config: QuantConfig,
        report: Report,
        calibrated: CalibratedRange | None = None,
        on_gpu: bool = False,
    ) -> None:
        self.graphs, self.form, self.config, self.report = Stages(graphs), form, config, report
        self.calibrated = calibrated
        self.framed = rounds_only_invariants(config)
        self.on_gpu = on_gpu
        self._run = self._first_on_gpu if on_gpu else native(self.graphs["lower"], form)

    def __call__(
        self, structures: Atoms | Sequence[Atoms] | Tensors
    ) -> Prediction | list[Prediction] | Tensors:
        """Evaluate.

        Returns:
            A :class:`Prediction` (energy eV, forces eV/Å, stress eV/Å^3 of fully periodic
            structures) per structure; for tensors, the raw outputs ``energy``,
            ``atomic_energies``, ``forces``, ``virial`` (models captured from tensors of their
            own: ``energy`` and ``forces``).

        Raises:
            StructureError: for NaN positions, coincident atoms, unknown elements or bad shapes.
            DeviceError: if the kernels are a GPU's, and there is none.
        """
        if isinstance(structures, Atoms):
            return self.predict([structures])[0]
        if isinstance(structures, Mapping):
            return self.evaluate(structures)
        return self.predict(list(structures))

    def predict(self, structures: Sequence[Atoms]) -> list[Prediction]:
        """Predictions for a batch of structures, evaluated together.

        Warns with a :class:`CalibrationWarning` for elements that calibration has not seen, and
        where rounded activations may have saturated.
        """
        with self._alone():
            pairs = checked_pairs(structures, self.form)
            frames = [own_frame(atoms) if self.framed else None for atoms in structures]
            pairs = [p if frame is None else p.turned(frame) for p, frame in zip(pairs, frames, strict=True)]
            tensors = batched(structures, pairs, self.form)
            complaint = self.calibrated.complaint(tensors) if self.calibrated else None
            if complaint:
                warnings.warn(
                    f"outside the calibrated range: {complaint}; errors may be larger than reported, "
                    "so pass structures like these to quantize",
                    CalibrationWarning,
                    stacklevel=3,
                )
            out = {name: values.numpy() for name, values in self._evaluate(tensors).items()}
            ends = list(accumulate(len(atoms) for atoms in structures))
            return [
                _prediction(out, i, slice(end - len(atoms), end), atoms, frame)
                for i, (atoms, frame, end) in enumerate(zip(structures, frames, ends, strict=True))
            ]

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Raw outputs for the graph's own tensors.

        Edges are brought into the order of :func:`.graphs.in_pairs` where they are in another.

        Raises:
            StructureError: if a tensor is missing, has another type or shape than the graph takes, is
                not finite, or points at atoms that are not there; or if an edge has no reverse.
            UnknownElementError: for an element that the potential was not trained on.
        """
        with self._alone():
            check_tensors(tensors, self.form)
            return self._evaluate(in_pairs(tensors, self.form))

    def _alone(self) -> AbstractContextManager[None]:
        """Torch on one thread, where kernels have threads of their own: what prepares a call, too."""
        return _one_torch_thread(self.report.backend != "reference")

    def _evaluate(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The graph's answer for tensors that are known to be sound."""
        with torch.no_grad():
            values = self._run(*(tensors[name] for name in self.form.inputs))
        return dict(zip(outputs(self.form), values, strict=True))

    def _first_on_gpu(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The first call: everything that stays the same moves to the GPU, once."""
        device = require_gpu()
        run = straight_line(self.graphs["lower"], device)

        def there_and_back(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(t.cpu() for t in run(*(value.to(device) for value in values)))

        self._run = there_and_back
        return there_and_back(*inputs)

    def save(self, path: str | Path) -> Path:
        """Write one ``.gaq`` file (see :mod:`gaq_compile.io`); returns its path."""
        from .io import save

        return save(self, Path(path))

    def __repr__(self) -> str:
        r = self.report
        return f"Potential({r.model}, scheme={self.config.scheme!r}, backend={r.backend!r})"


def _prediction(
    out: Mapping[str, np.ndarray], graph: int, rows: slice, atoms: Atoms, frame: np.ndarray | None
) -> Prediction:
    """One structure's part of a batch, turned back from its frame."""
    forces, energies = out["forces"][rows], out["atomic_energies"][rows].copy()
    forces = forces.copy() if frame is None else (forces.astype(np.float64) @ frame).astype(forces.dtype)
    stress = None
    if atoms.pbc.all():
        virial = out["virial"][graph].astype(np.float64)
        virial = virial if frame is None else frame.T @ virial @ frame
        stress = (virial + virial.T) / (2 * atoms.get_volume())
    return Prediction(float(out["energy"][graph]), forces, stress, energies)


@contextmanager
def _one_torch_thread(wanted: bool) -> Iterator[None]:
    """Leave the cores to the kernels' thread pool while a lowered graph runs.

    Two pools whose workers both spin while they wait slow each other down several times; the
    operators that stay with torch are small.
    """
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
