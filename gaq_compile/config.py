"""What to quantize and how: frozen, versioned settings that round-trip through JSON.

One configuration, one behaviour: a :class:`QuantConfig` names the bits of weights and activations,
the observer that calibrates them, and per-layer overrides. Presets have short names ("w8",
"w4a8", ...). Nothing here imports torch, so that a configuration can be read anywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal

from .errors import ConfigError

VERSION = 4

# Weights of 8 bits and float activations keep the energy smooth, so the forces stay its gradient;
# any rounded activation makes the energy piecewise constant and is therefore a choice, not a default.
DEFAULT_SCHEME = "w8"
AUTO = "auto"

OBSERVERS = ("minmax", "percentile", "mse")
GRANULARITIES = ("channel", "block", "tensor")
ROUNDINGS = ("second-order", "nearest")
WEIGHT_BITS = (4, 8, 16)
WIDE_SHARE = 0.3  # of the multiplications, 8-bit activations: with 0.1 dynamics heat up (docs/numerics.md)
# Of float32's bytes; all weights at 4 (8) bits take 0.13 (0.26) with their scales. The rest goes to the
# layers that suffer most, species embeddings first.
WEIGHT_SHARES = {4: 0.148, 8: 0.268}

_ACTIVATION = re.compile(r"s(\d{1,2}) (?:c(\d{1,2})|m(\d{1,2})(?:([dk])(\d{1,2})|exact))( common)?")
_ACTIVATION_FIX = "write e.g. 's8 m8d8', 's8 c8', 's16 m16d16', 's8 m8exact' or 's8 m8k8'"
_LETTERS = {"mddq": "d", "svq": "k"}
_OPERAND_MAX = 32767  # vector operands are 16-bit integers


@dataclass(frozen=True)
class ActivationScheme:
    """The integers that stand for a tensor of irreps; see ``numerics.activations`` for formulas.

    Args:
        scalar_bits: bits of an l = 0 value, symmetric, 2 to 16.
        vector: how a block of l >= 1 is held: ``"mddq"`` (magnitude times grid direction),
            ``"exact"`` (integer magnitude, float direction), ``"component"`` (geometry ignored) or
            ``"svq"`` (magnitude times one of a few learned directions).
        vector_bits: bits of the magnitude, or of each component, 2 to 16.
        direction_bits: of "mddq", bits of a direction's component, 4 to 16; of "svq", bits of a
            whole direction, 4 to 12; 0 for others.
        common: whether the channels of a block, each with a step of its own, come on one common
            grid of 16 bits before they are multiplied, so that weights need not hold the steps.

    Raises:
        ConfigError: for bits outside these ranges or an unknown kind of vector.
    """

    scalar_bits: int
    vector: Literal["mddq", "exact", "component", "svq"]
    vector_bits: int
    direction_bits: int = 0
    common: bool = False

    def __post_init__(self) -> None:
        # Below 4 direction bits the grid of a high degree could round a direction to zero.
        known = {"mddq": range(4, 17), "svq": range(4, 13), "exact": (0,), "component": (0,)}
        direction = self.direction_bits in known.get(self.vector, ())
        if not (direction and 2 <= self.scalar_bits <= 16 and 2 <= self.vector_bits <= 16):
            raise ConfigError(
                "an activation scheme needs 2-16 bits per scalar, magnitude or component and "
                "4-16 bits per direction component (4-12 per learned direction)",
                where=repr(self),
                fix=_ACTIVATION_FIX,
            )

    def fraction_bits(self, l: int) -> int:
        """f: an operand comes in units of ``2**-f`` of the step (of a block's largest, if common)."""
        if l and self.vector in ("mddq", "svq"):
            return max(0, 15 - self.vector_bits)
        if self.common and not (l and self.vector == "exact"):
            return 16 - (self.vector_bits if l else self.scalar_bits)
        return 0

    @property
    def direction_levels(self) -> int:
        """B = 2^(D-1) - 1, the largest integer of the direction grid."""
        return 2 ** (self.direction_bits - 1) - 1 if self.vector == "mddq" else 0

    def qmax(self, l: int) -> int:
        """The largest integer in units of the scale: |value|, magnitude or |component|."""
        if l == 0:
            return 2 ** (self.scalar_bits - 1) - 1
        if self.vector == "component":
            return 2 ** (self.vector_bits - 1) - 1
        return min(2**self.vector_bits - 1, _OPERAND_MAX)

    def operand_max(self, l: int) -> int:
        """The largest absolute value of an operand integer X (``"exact"``: of a float)."""
        return self.qmax(l) * 2 ** self.fraction_bits(l)

    def __str__(self) -> str:
        end = " common" if self.common else ""
        if self.vector == "component":
            return f"s{self.scalar_bits} c{self.vector_bits}{end}"
        tail = "exact" if self.vector == "exact" else f"{_LETTERS[self.vector]}{self.direction_bits}"
        return f"s{self.scalar_bits} m{self.vector_bits}{tail}{end}"


@lru_cache(maxsize=256)
def activation_scheme(text: str) -> ActivationScheme:
    """Parse the string form of an :class:`ActivationScheme`; ``str()`` writes it.

    >>> activation_scheme("s8 m8d8")
    ActivationScheme(scalar_bits=8, vector='mddq', vector_bits=8, direction_bits=8)

    Raises:
        ConfigError: for a malformed string or bits out of range.
    """
    match = _ACTIVATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"unknown activation scheme {text!r}", fix=_ACTIVATION_FIX)
    scalar, component, magnitude, letter, direction, end = match.groups()
    common = end is not None
    if component:
        return ActivationScheme(int(scalar), "component", int(component), common=common)
    if direction:
        kind: Literal["mddq", "svq"] = "mddq" if letter == "d" else "svq"
        return ActivationScheme(int(scalar), kind, int(magnitude), int(direction), common)
    return ActivationScheme(int(scalar), "exact", int(magnitude), common=common)


def _check_precision(weight_bits: Any, activation: Any, where: str) -> None:
    if weight_bits is not None and (type(weight_bits) is not int or weight_bits not in WEIGHT_BITS):
        raise ConfigError(f"weight_bits must be 16, 8, 4 or None, not {weight_bits!r}", where=where)
    if activation is None:
        return
    if not isinstance(activation, str):
        raise ConfigError(
            f"an activation scheme must be a string, not {activation!r}", where=where, fix=_ACTIVATION_FIX
        )
    activation_scheme(activation)


@dataclass(frozen=True)
class LayerConfig:
    """One layer's precision.

    Args:
        weight_bits: 16, 8, 4 or None for float32.
        activation: an activation scheme such as "s8 m8d8", or None for float32.

    Raises:
        ConfigError: for other bits or a malformed scheme.
    """

    weight_bits: int | None
    activation: str | None

    def __post_init__(self) -> None:
        _check_precision(self.weight_bits, self.activation, type(self).__name__)


@dataclass(frozen=True)
class Override:
    """The precision of every layer whose name matches a shell pattern; None means float32."""

    pattern: str
    weight_bits: int | None
    activation: str | None

    def __post_init__(self) -> None:
        if not (isinstance(self.pattern, str) and self.pattern):
            raise ConfigError(f"an override's pattern must be a name, not {self.pattern!r}")
        _check_precision(self.weight_bits, self.activation, f"override {self.pattern!r}")


@dataclass(frozen=True)
class QuantConfig:
    """A whole model's quantization.

    Args:
        scheme: its name, for reports; :func:`preset` knows the usual ones.
        weight_bits: 16, 8, 4 or None for float32.
        activation: an activation scheme such as "s8 m8d8", or None for float32.
        observer: "minmax", "percentile" or "mse".
        granularity: what has an activation step of its own: every "channel", every "block" of irreps,
            or the whole "tensor" (then also a layer's weights, where they are rounded to nearest).
        percentile: of the features that "percentile" lets a step reach; in (0, 100].
        headroom: factor >= 1 on the range that "minmax" saw: a value beyond the calibrated
            range is clipped, which is a silent error.
        rounding: how weights become integers: "second-order" (together, against what the energy
            and the forces feel of each error) or "nearest" (one by one).
        max_weight_share: if given, the layers that suffer most from fewer bits get 8 (and with float
            inputs, such as species, 16), as long as all weights take at most this share of their
            float32 bytes.
        max_wide_share: if given, the activations that cost most per multiplication get 16 bits, as
            long as these take at most this share of the multiplications.
        max_force_error: if given, layers get more bits, in the order of what that gains per byte,
            until the measured force error is at most this (meV/Å, mean absolute error of a
            component); what was chosen then replaces ``max_weight_share`` and ``max_wide_share``.
        centered: whether scalars that enter a layer with a bias are rounded about the middle of their
            calibrated range, which the bias makes up for.
        overrides: per-layer precision; the last matching pattern wins.
        version: the version of this format.

    Raises:
        ConfigError: for any value outside these.
    """

    scheme: str
    weight_bits: int | None = None
    activation: str | None = None
    observer: str = "minmax"
    granularity: str = "channel"
    percentile: float = 99.99
    headroom: float = 1.1
    rounding: str = "second-order"
    max_weight_share: float | None = None
    max_wide_share: float | None = None
    max_force_error: float | None = None
    centered: bool = False
    overrides: tuple[Override, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        where = f"configuration {self.scheme!r}"
        if not (isinstance(self.scheme, str) and self.scheme):
            raise ConfigError(f"a scheme's name must be a string, not {self.scheme!r}")
        if type(self.version) is not int or self.version != VERSION:
            raise ConfigError(
                f"version {self.version!r} of the configuration format is unknown",
                where=where,
                fix=f"this gaq_compile reads version {VERSION}; update it, or quantize again",
            )
        _check_precision(self.weight_bits, self.activation, where)
        if self.observer not in OBSERVERS:
            raise ConfigError(
                f"unknown observer {self.observer!r}", where=where, fix=f"use one of {', '.join(OBSERVERS)}"
            )
        if self.rounding not in ROUNDINGS:
            raise ConfigError(
                f"unknown rounding {self.rounding!r}", where=where, fix=f"use one of {', '.join(ROUNDINGS)}"
            )
        if self.granularity not in GRANULARITIES:
            raise ConfigError(
                f"unknown granularity {self.granularity!r}",
                where=where,
                fix=f"use one of {', '.join(GRANULARITIES)}",
            )
        for name in ("max_weight_share", "max_wide_share", "max_force_error"):
            limit = getattr(self, name)
            number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if limit is not None and not (number and 0.0 < limit < math.inf):
                raise ConfigError(f"{name} must be a positive number or None, not {limit!r}", where=where)
        if self.max_force_error is not None and not self.rounds_together:
            raise ConfigError(
                "a force error can be kept only where weights are rounded against it",
                where=where,
                fix="give weight_bits and leave rounding as it is, or leave max_force_error out",
            )
        share = self.percentile
        if not (type(share) in (int, float) and 0.0 < share <= 100.0):
            raise ConfigError(f"percentile must be above 0 and at most 100, not {share!r}", where=where)
        number = isinstance(self.headroom, int | float) and not isinstance(self.headroom, bool)
        if not (number and 1.0 <= self.headroom < math.inf):
            raise ConfigError(
                f"headroom must be a number >= 1, not {self.headroom!r}",
                where=where,
                fix="1.1 is the default",
            )
        if not (isinstance(self.overrides, tuple) and all(isinstance(o, Override) for o in self.overrides)):
            raise ConfigError(
                "overrides must be a tuple of Override",
                where=where,
                fix="resolve(scheme, {'pattern': 'w8'}) builds them",
            )

    @property
    def weighs_errors(self) -> bool:
        """Whether what errors cost decides anything."""
        return self.rounds_together or self.max_wide_share is not None

    @property
    def rounds_together(self) -> bool:
        """Whether any weights are rounded against calibration data."""
        bits = (self.weight_bits, *(override.weight_bits for override in self.overrides))
        return self.rounding == "second-order" and any(b is not None for b in bits)

    def for_layer(self, name: str) -> LayerConfig:
        """The precision of the layer called ``name`` (case-sensitive; the last match wins)."""
        for override in reversed(self.overrides):
            if fnmatchcase(name, override.pattern):
                return LayerConfig(override.weight_bits, override.activation)
        return LayerConfig(self.weight_bits, self.activation)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Check that every override's pattern matches at least one of the layers ``names``.

        Raises:
            ConfigError: naming the first pattern that matches nothing.
        """
        names = tuple(names)
        for override in self.overrides:
            if not any(fnmatchcase(name, override.pattern) for name in names):
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ConfigError(
                    f"the override pattern {override.pattern!r} matches no layer",
                    fix=f"the layers are: {shown or '(none)'}",
                )

    def to_json(self) -> str:
        """This configuration as JSON text; equal configurations give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> QuantConfig:
        """Read :meth:`to_json`'s text.

        Raises:
            ConfigError: for text that is no JSON object, unknown or missing keys, an unknown
                version, or values of a wrong kind.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"a configuration that is no JSON: {error}") from error
        if isinstance(data, dict) and data.get("version") != VERSION:
            raise ConfigError(
                f"version {data.get('version')!r} of the configuration format is unknown",
                fix=f"this gaq_compile reads version {VERSION}; update it, or quantize again",
            )
        values = _checked_keys(data, cls, "configuration")
        entries = values["overrides"]
        if not isinstance(entries, list):
            raise ConfigError("overrides must be a list", where="configuration")
        overrides = (Override(**_checked_keys(e, Override, f"override {i}")) for i, e in enumerate(entries))
        return cls(**{**values, "overrides": tuple(overrides)})


# What others do, in the same code, to be compared with: weights to nearest, no wide layers.
BASELINES: dict[str, dict[str, Any]] = {
    "naive": {"activation": "s8 c8", "granularity": "block"},
    "naive-tensor": {"activation": "s8 c8", "granularity": "tensor"},
    "naive-channel": {"activation": "s8 c8", "granularity": "channel"},
    # the ranges of Degree-Quant: percentiles, so that a few atoms with many neighbours do not set them
    # (S. A. Tailor et al., ICLR 2021)
    "degree": {
        "activation": "s8 c8",
        "granularity": "tensor",
        "observer": "percentile",
        "percentile": 99.9,
    },
    # spherical k-means: 256 learned directions
    "svq": {"activation": "s8 m8k8", "granularity": "block"},
}

PRESETS: dict[str, LayerConfig] = {
    "fp32": LayerConfig(None, None),
    "w8": LayerConfig(8, None),
    "w4": LayerConfig(4, None),
    AUTO: LayerConfig(4, None),
    "w8a16": LayerConfig(8, "s16 m16d16"),
    "w4a16": LayerConfig(4, "s16 m16d16"),
    "w8a8": LayerConfig(8, "s8 m8d8"),
    "w4a8": LayerConfig(4, "s8 m8d8"),
    "exact-w8a8": LayerConfig(8, "s8 m8exact"),
    "exact-w4a8": LayerConfig(4, "s8 m8exact"),
    **{
        f"{kind}-w{bits}a8": LayerConfig(bits, b["activation"])
        for kind, b in BASELINES.items()
        for bits in (8, 4)
    },
}


def preset(name: str) -> QuantConfig:
    """The configuration that goes by a short name.

    ======================  ===========  ==========================================
    name                    weight bits  activations
    ======================  ===========  ==========================================
    fp32                    float32      float32
    w8, w4                  8, 4         float32: forces are the energy's gradient
    w8a16, w4a16            8, 4         scalars 16, magnitude 16, direction 16 bits
    w8a8, w4a8              8, 4         scalars 8, magnitude 8, direction 8 bits
    exact-w8a8, exact-w4a8  8, 4         scalars 8, magnitude 8 bits, float direction
    naive-w8a8, -w4a8       8, 4         8 bits per component, geometry ignored; steps per block
    naive-tensor-w8a8, ..   8, 4         the same, one step per tensor
    naive-channel-w8a8, ..  8, 4         the same, a step per channel
    degree-w8a8, ..         8, 4         the same, one step per tensor by Degree-Quant's percentiles
    svq-w8a8, ..            8, 4         scalars 8, magnitude 8, one of 256 k-means directions
    auto                    4 or more    float32; weights as a force error asks for
    ======================  ===========  ==========================================

    Raises:
        ConfigError: for any other name; lists the known ones.
    """
    layer = PRESETS.get(name)
    if layer is None:
        raise ConfigError(f"unknown scheme {name!r}", fix=f"use one of {', '.join(PRESETS)}")
    baseline = BASELINES.get(name.rpartition("-")[0])
    if baseline is not None:
        return QuantConfig(name, layer.weight_bits, rounding="nearest", **baseline)
    return QuantConfig(
        name,
        layer.weight_bits,
        layer.activation,
        max_weight_share=WEIGHT_SHARES.get(layer.weight_bits or 0),
        max_wide_share=WIDE_SHARE if name.endswith("a8") else None,
        centered=layer.activation is not None,
    )


def resolve(
    scheme: str | QuantConfig,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    max_force_error: float | None = None,
) -> QuantConfig:
    """A user's arguments as one configuration.

    Args:
        scheme: a preset's name, or a configuration.
        overrides: layer-name pattern -> preset name (of which bits and activation scheme count), or
            ``{"weight_bits": .., "activation": ..}`` where a missing key keeps the scheme's own
            value. Later entries win over earlier ones and over those that ``scheme`` already has.
        max_force_error: the force error to keep, meV/Å.

    Raises:
        ConfigError: for an unknown scheme, key or value.
    """
    if not isinstance(scheme, str | QuantConfig):
        raise ConfigError(
            f"a scheme must be a name or a QuantConfig, not {type(scheme).__name__}",
            fix=f"use one of {', '.join(PRESETS)}",
        )
    config = preset(scheme) if isinstance(scheme, str) else scheme
    added = tuple(_override(config, pattern, value) for pattern, value in (overrides or {}).items())
    most = config.max_force_error if max_force_error is None else max_force_error
    return replace(config, overrides=config.overrides + added, max_force_error=most)


def is_conservative(config: QuantConfig) -> bool:
    """True exactly if no activation is rounded anywhere: then forces are the energy's gradient.

    Judged without the model: an override that rounds activations counts even if it matches no
    layer, and only the pattern ``*`` is known to hide what stands before it.
    """
    for override in reversed(config.overrides):
        if override.activation is not None:
            return False
        if override.pattern == "*":
            return True
    return config.activation is None


def rounds_only_invariants(config: QuantConfig) -> bool:
    """True if activations are rounded somewhere, and directions nowhere ("exact" schemes)."""
    schemes = [config.activation, *(override.activation for override in config.overrides)]
    rounded = [activation_scheme(text) for text in schemes if text is not None]
    return bool(rounded) and all(scheme.vector == "exact" for scheme in rounded)


def _override(config: QuantConfig, pattern: str, value: str | Mapping[str, Any]) -> Override:
    where = f"override {pattern!r}"
    if value == AUTO:
        raise ConfigError(f"{AUTO!r} chooses bits for a whole model", where=where, fix="use it as the scheme")
    if isinstance(value, str):
        layer = preset(value)
        return Override(pattern, layer.weight_bits, layer.activation)
    if not isinstance(value, Mapping) or (set(value) - {"weight_bits", "activation"}):
        raise ConfigError(
            f"cannot read {value!r}",
            where=where,
            fix="give a scheme's name or a dict with 'weight_bits' and/or 'activation'",
        )
    return Override(
        pattern, value.get("weight_bits", config.weight_bits), value.get("activation", config.activation)
    )


def _checked_keys(data: Any, kind: type, where: str) -> dict[str, Any]:
    """``data`` as a dict whose keys are exactly the fields of the dataclass ``kind``."""
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict):
        raise ConfigError(f"expected an object with the keys {', '.join(sorted(names))}", where=where)
    for problem, keys in (("unknown", set(data) - names), ("missing", names - set(data))):
        if keys:
            raise ConfigError(f"{problem} keys: {', '.join(sorted(keys))}", where=where)
    return data
