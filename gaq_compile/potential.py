"""A compiled potential: call it on structures, read its graphs, print its report, save it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from ase import Atoms
from torch import Tensor
from torch.fx import GraphModule

from .capture.graphs import CalibratedRange, GraphFormat, Tensors, check_tensors, collate
from .config import QuantConfig
from .errors import CalibrationWarning
from .passes.derive_forces import outputs
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
        calibrated: the surroundings that activation steps were calibrated on; None where no
            activation is rounded.
    """

    def __init__(
        self,
        graphs: Mapping[str, GraphModule],
        form: GraphFormat,
        config: QuantConfig,
        report: Report,
        calibrated: CalibratedRange | None = None,
    ) -> None:
        self.graphs, self.form, self.config, self.report = dict(graphs), form, config, report
        self.calibrated = calibrated
        self._run = self.graphs["lower"]

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
        """
        if isinstance(structures, Atoms):
            return self.predict([structures])[0]
        if isinstance(structures, Mapping):
            return self.evaluate(structures)
        return self.predict(list(structures))

    def predict(self, structures: Sequence[Atoms]) -> list[Prediction]:
        """Predictions for a batch of structures, evaluated together.

        Warns with a :class:`CalibrationWarning` where rounded activations may have saturated.
        """
        tensors = collate(structures, self.form)
        complaint = self.calibrated.complaint(tensors) if self.calibrated else None
        if complaint:
            warnings.warn(
                f"outside the calibrated range: {complaint}; rounded activations may saturate, "
                "so calibrate on structures like these or use a weights-only scheme",
                CalibrationWarning,
                stacklevel=3,
            )
        out = self._evaluate(tensors)
        predictions, start = [], 0
        for i, atoms in enumerate(structures):
            rows = slice(start, start + len(atoms))
            start += len(atoms)
            stress = None
            if atoms.pbc.all():
                virial = out["virial"][i].double().numpy()
                stress = (virial + virial.T) / (2 * atoms.get_volume())
            predictions.append(
                Prediction(
                    float(out["energy"][i]),
                    out["forces"][rows].numpy().copy(),
                    stress,
                    out["atomic_energies"][rows].numpy().copy(),
                )
            )
        return predictions

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Raw outputs for the graph's own tensors.

        Raises:
            StructureError: if a tensor is missing, has another type or shape than the graph takes, is
                not finite, or points at atoms that are not there.
            UnknownElementError: for an element that the potential was not trained on.
        """
        check_tensors(tensors, self.form)
        return self._evaluate(tensors)

    def _evaluate(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The graph's answer for tensors that are known to be sound."""
        with torch.no_grad(), _one_torch_thread(self.report.backend != "reference"):
            values = self._run(*(tensors[name] for name in self.form.inputs))
        return dict(zip(outputs(self.form), values, strict=True))

    def save(self, path: str | Path) -> Path:
        """Write one ``.gaq`` file (see :mod:`gaq_compile.io`); returns its path."""
        from .io import save

        return save(self, Path(path))

    def __repr__(self) -> str:
        r = self.report
        return f"Potential({r.model}, scheme={self.config.scheme!r}, backend={r.backend!r})"


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
