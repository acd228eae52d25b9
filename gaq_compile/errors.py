"""Typed errors: each says what was wrong, where, and what to do about it."""

from __future__ import annotations


class GaqError(Exception):
    """Base of every error that gaq_compile raises on purpose.

    Args:
        what: what was wrong, in one sentence.
        where: the structure, node, file or argument it was found in.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  what to do: {fix}")
        super().__init__("\n".join(lines))


class StructureError(GaqError, ValueError):
    """A structure that no potential can evaluate: NaN positions, coincident atoms, bad shapes."""


class NoEdgesError(StructureError):
    """A whole example graph without a single edge: nothing to calibrate or verify on."""


class UnknownElementError(StructureError):
    """An element that the potential was not trained on."""


class CaptureError(GaqError, RuntimeError):
    """A model that ``torch.export`` cannot take; names the operator and the source line."""


class ConfigError(GaqError, ValueError):
    """An unknown scheme, a pattern that matches nothing, or a malformed configuration."""


class IrrepsError(GaqError, ValueError):
    """Irreps that do not fit a tensor, or a pass that would change an earlier irreps tag."""


class LoweringError(GaqError, RuntimeError):
    """A node that no backend runs, raised where ``strict=True`` forbids fallbacks."""


class VerificationError(GaqError, RuntimeError):
    """A result that differs from the original model by more than it may."""


class FileFormatError(GaqError, ValueError):
    """A ``.gaq`` file that is truncated, damaged, foreign or of an unknown version."""


class MissingPackageError(GaqError, ImportError):
    """An optional package that this call needs is not installed."""


class DeviceError(GaqError, RuntimeError):
    """A GPU that is not there, or a call of its driver that failed."""


class RemoteError(GaqError, ConnectionError):
    """A tracker of machines that cannot be reached, or machines behind it that are not there or not fit."""


class GaqWarning(UserWarning):
    """Base of every warning of gaq_compile's own."""


class CalibrationWarning(GaqWarning):
    """A structure with elements or surroundings that calibration has not seen."""


class CacheWarning(GaqWarning):
    """A file of the cache that cannot be used, or not be written; what it would hold is made again."""


class AccuracyWarning(GaqWarning):
    """A result that misses the accuracy that was asked for."""
