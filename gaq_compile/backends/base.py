"""Who can run what: a backend looks at a gaq node and says yes, or gives its reason."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError
from ..passes.lower import Attribute, Backend, Lowered, Refused

__all__ = ["Attribute", "Backend", "Lowered", "Refused", "known_backends", "make_backend", "register_backend"]

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
