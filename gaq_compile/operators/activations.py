"""The pointwise nonlinearities that gates and radial networks use, by name.

An activation is written ``"silu"`` or, with e3nn's second-moment normalisation,
``"silu*1.6765..."`` (the factor multiplies the result).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LOG2 = 0.6931471805599453

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "ssp": lambda x: torch.nn.functional.softplus(x) - _LOG2,
    "identity": lambda x: x,
}

_NAMES = {
    "silu": "silu",
    "SiLU": "silu",
    "tanh": "tanh",
    "Tanh": "tanh",
    "sigmoid": "sigmoid",
    "Sigmoid": "sigmoid",
    "relu": "relu",
    "ReLU": "relu",
    "ShiftedSoftPlus": "ssp",
    "ssp": "ssp",
    "Identity": "identity",
}


def name_of(activation: object) -> str | None:
    """The written form of an activation callable, or None if it is not one we know.

    Understands plain functions, modules, and e3nn's ``normalize2mom`` (whose factor is kept).
    """
    inner, factor = activation, 1.0
    if type(activation).__name__ == "normalize2mom":
        inner, factor = activation.f, float(activation.cst)  # type: ignore[attr-defined]
        if getattr(activation, "_is_id", False):
            factor = 1.0
    label = getattr(inner, "__name__", None) or type(inner).__name__
    name = _NAMES.get(label)
    if name is None:
        return None
    return name if factor == 1.0 else f"{name}*{factor!r}"


def split(text: str) -> tuple[str, float]:
    """``"silu*1.5"`` -> ``("silu", 1.5)``."""
    name, _, factor = text.partition("*")
    return name, float(factor) if factor else 1.0


def apply(text: str, x: Tensor) -> Tensor:
    """The activation written ``text`` applied to ``x``."""
    name, factor = split(text)
    y = FUNCTIONS[name](x)
    return y if factor == 1.0 else y * factor


def derivative(text: str, x: Tensor) -> Tensor:
    """d/dx of the activation written ``text``, elementwise."""
    name, factor = split(text)
    if name in ("silu", "sigmoid", "ssp"):
        s = torch.sigmoid(x)
        slope = {"silu": s * (1 + x * (1 - s)), "sigmoid": s * (1 - s), "ssp": s}[name]
    elif name == "tanh":
        slope = 1 - torch.tanh(x) ** 2
    elif name == "relu":
        slope = (x > 0).to(x.dtype)
    else:
        slope = torch.ones_like(x)
    return slope if factor == 1.0 else slope * factor
