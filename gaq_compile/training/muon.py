"""Muon: momentum whose matrices are made orthogonal before they are added; Adam for what is no matrix.

For the momentum ``M`` of a matrix, with singular values ``U S V^T``, the step is ``U V^T``: every direction
that the gradient has found is learned at the same rate, the weak ones too. (K. Jordan et al., "Muon: an
optimizer for hidden layers", 2024; the factor ``0.2 sqrt(max(rows, columns))``, with which one learning rate
serves both kinds of parameter, is of Liu et al., arXiv 2502.16982.) Energies and forces of one molecule are
learned several times faster than by Adam: docs/rmd17.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from e3nn import o3
from torch import Tensor, nn

_SMALLEST = 5  # rows and columns that a matrix has at least
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: five turns take singular values to within 0.7 to 1.2
_TURNS = 5
_TINY = 1e-7


class Matrix(NamedTuple):
    """Where in a parameter, flattened, a matrix lies."""

    start: int
    rows: int
    columns: int

    def of(self, parameter: Tensor) -> Tensor:
        """It, as a view."""
        return parameter.view(-1)[self.start : self.start + self.rows * self.columns].view(
            self.rows, self.columns
        )


def matrices_of(model: nn.Module) -> dict[str, list[Matrix]]:
    """The matrices in a model's parameters, by their names: of torch's linear layers one each, of e3nn's one
    for each path, which mixes the channels of one degree."""
    found = dict[str, list[Matrix]]()
    for label, module in model.named_modules():
        if isinstance(module, o3.Linear):
            shapes = [tuple(path.path_shape) for path in module.instructions]
        elif isinstance(module, nn.Linear):
            shapes = [tuple(module.weight.shape)]
        else:
            continue
        matrices, start = [], 0
        for rows, columns in shapes:
            matrices.append(Matrix(start, rows, columns))
            start += rows * columns
        if min(min(shape) for shape in shapes) >= _SMALLEST:
            found[f"{label}.weight" if label else "weight"] = matrices
    return found


class Muon(torch.optim.Optimizer):
    """See the module.

    Args:
        weights: parameters by name.
        matrices: of those that have some, from :func:`matrices_of`; Adam steps for the others.
        lr: the learning rate, of the size of Adam's.
        momentum: of matrices.
        betas: of the others.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        matrices: Mapping[str, list[Matrix]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self._matrices = {weights[name]: found for name, found in matrices.items() if name in weights}
        super().__init__(list(weights.values()), {"lr": lr, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients that parameters have."""
        if closure is not None:
            raise NotImplementedError("Muon takes gradients as they are, no closure")
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self._matrices:
                    self._adam(parameter, parameter.grad, group)
                    continue
                ahead = self._momentum(parameter, parameter.grad, group["momentum"])
                for matrix in self._matrices[parameter]:
                    pair = matrix.of(parameter), matrix.of(ahead)
                    by_shape.setdefault((matrix.rows, matrix.columns), []).append(pair)
            for shape, pairs in by_shape.items():
                steps = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (weight, _), step in zip(pairs, steps, strict=True):
                    weight.sub_(step, alpha=0.2 * max(shape) ** 0.5 * group["lr"])

    def _momentum(self, parameter: Tensor, grad: Tensor, decay: float) -> Tensor:
        """The momentum that Nesterov looks ahead to."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(decay).add_(grad)
        return grad.add(state["momentum"], alpha=decay)

    def _adam(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        mean = state["mean"].lerp_(grad, 1.0 - first) / (1.0 - first ** state["step"])
        square = state["square"].lerp_(grad.square(), 1.0 - second) / (1.0 - second ** state["step"])
        parameter.sub_(mean / (square.sqrt() + 1e-8), alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """``U V^T`` of each of a stack of matrices (n, rows, columns), roughly: its singular values come out
    between 0.7 and 1.2, which for a step is as good as 1, by a polynomial in place of a decomposition."""
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _TINY)
    for _ in range(_TURNS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
