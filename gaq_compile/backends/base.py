"""Who can run what: a backend looks at a gaq node and says yes, or gives its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.fx import Node

from ..errors import ConfigError

Attribute = Callable[[Node], Tensor]


@dataclass(frozen=True)
class Lowered:
    """A node's replacement.

    Attributes:
        run: the kernel call, ``run(*tensors)`` with the values of ``arguments``.
        arithmetic: what it computes in, e.g. ``"s8·s8→s32"``.
        arguments: those of the node's arguments that are given at run time; weights are inside.
    """

    run: Callable[..., Any]
    arithmetic: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Refused:
    """Why a backend does not run a node."""

    reason: str


class Backend(Protocol):
    """Something that runs gaq operators."""

    name: str
    target: str

    def lower(self, node: Node, attribute: Attribute) -> Lowered | Refused:
        """A kernel for ``node``, or the reason there is none.

        Args:
            node: a call of a ``gaq::`` operator.
            attribute: reads the tensor behind a ``get_attr`` node.
        """


Factory = Callable[[str | None], Backend]
_FACTORIES: dict[str, Factory] = {}


def register_backend(name: str, factory: Factory) -> None:
    """Make a backend known; ``factory(target)`` builds it for a target (None: this machine)."""
    _FACTORIES[name] = factory


def known_backends() -> tuple[str, ...]:
    """The names of all registered backends."""
    return tuple(sorted(_FACTORIES))


def make_backend(name: str, target: str | None = None) -> Backend:
    """Build a registered backend.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
        MissingPackageError: if the package it needs is not installed.
    """
    if name not in _FACTORIES:
        raise ConfigError(f"unknown backend {name!r}", fix=f"use one of: {', '.join(known_backends())}")
    return _FACTORIES[name](target)
