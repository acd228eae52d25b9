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

_SAME: dict[object, str] = {
    torch.nn.functional.silu: "silu",
    torch.tanh: "tanh",
    torch.nn.functional.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.nn.functional.sigmoid: "sigmoid",
    torch.relu: "relu",
    torch.nn.functional.relu: "relu",
    torch.nn.SiLU: "silu",
    torch.nn.Tanh: "tanh",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.ReLU: "relu",
    torch.nn.Identity: "identity",
}
"""Functions and classes of modules that are known for what they are."""
_CALLED = {"ShiftedSoftPlus": "ssp", "ssp": "ssp"}
"""Names that packages give to functions of their own, which are tried before they are believed."""


def name_of(activation: object) -> str | None:
    """The written form of an activation callable, or None if it is not one we know.

    Understands plain functions, modules, and e3nn's ``normalize2mom`` (whose factor is kept).
    """
    inner, factor = activation, 1.0
    if type(activation).__name__ == "normalize2mom":
        inner, factor = activation.f, float(activation.cst)  # type: ignore[attr-defined]
        if getattr(activation, "_is_id", False):
            factor = 1.0
    name = _known(inner)
    if name is None:
        return None
    return name if factor == 1.0 else f"{name}*{factor!r}"


def _known(function: object) -> str | None:
    """The name of a function or module by its identity, or by its name if it also does as it says."""
    for known in (function, type(function)):
        try:
            if known in _SAME:
                return _SAME[known]
        except TypeError:  # unhashable
            continue
    called = _CALLED.get(getattr(function, "__name__", None) or type(function).__name__)
    if called is None or not callable(function):
        return None
    x = torch.linspace(-6.0, 6.0, 25)
    return called if torch.allclose(function(x), FUNCTIONS[called](x), atol=1e-6) else None


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
