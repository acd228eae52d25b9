"""Configurations: presets, overrides, JSON, and which of them have true forces."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaq_compile import config as config_module
from gaq_compile.config import (
    BASELINES,
    DEFAULT_SCHEME,
    GRANULARITIES,
    OBSERVERS,
    PRESETS,
    WEIGHT_SHARES,
    WIDE_SHARE,
    ActivationScheme,
    LayerConfig,
    Override,
    QuantConfig,
    activation_scheme,
    is_conservative,
    preset,
    resolve,
    rounds_only_invariants,
)
from gaq_compile.errors import ConfigError

BITS = st.sampled_from([None, 4, 8])
WIDTHS = st.integers(2, 16)
SCHEMES = st.one_of(
    st.builds(ActivationScheme, WIDTHS, st.just("mddq"), WIDTHS, st.integers(4, 16), st.booleans()),
    st.builds(
        ActivationScheme, WIDTHS, st.sampled_from(["exact", "component"]), WIDTHS, common=st.booleans()
    ),
)
ACTIVATIONS = st.none() | SCHEMES.map(str)
CONFIGS = st.builds(
    QuantConfig,
    scheme=st.text(min_size=1),
    weight_bits=BITS,
    activation=ACTIVATIONS,
    observer=st.sampled_from(OBSERVERS),
    granularity=st.sampled_from(GRANULARITIES),
    headroom=st.floats(1.0, 10.0),
    overrides=st.lists(st.builds(Override, st.text(min_size=1), BITS, ACTIVATIONS), max_size=4).map(tuple),
)


@given(SCHEMES)
def test_activation_scheme_round_trips_through_its_string(scheme: ActivationScheme) -> None:
    assert activation_scheme(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "qmax", "fraction_bits", "operand_max"),
    [
        ("s8 m8d8", (127, 255), (0, 7), (127, 32640)),
        ("s8 c8", (127, 127), (0, 0), (127, 127)),
        ("s16 m16d16", (32767, 32767), (0, 0), (32767, 32767)),
        ("s8 m8exact", (127, 255), (0, 0), (127, 255)),
        ("s12 m12d10", (2047, 4095), (0, 3), (2047, 32760)),
        ("s8 m8d8 common", (127, 255), (8, 7), (32512, 32640)),
        ("s8 c8 common", (127, 127), (8, 8), (32512, 32512)),
        ("s16 m16d16 common", (32767, 32767), (0, 0), (32767, 32767)),
        ("s8 m8exact common", (127, 255), (8, 0), (32512, 255)),
        ("s12 c4 common", (2047, 7), (4, 12), (32752, 28672)),
    ],
)
def test_activation_scheme_ranges(
    text: str, qmax: tuple[int, int], fraction_bits: tuple[int, int], operand_max: tuple[int, int]
) -> None:
    scheme = activation_scheme(text)
    assert (scheme.qmax(0), scheme.qmax(2)) == qmax
    assert (scheme.operand_max(0), scheme.operand_max(2)) == operand_max
    assert tuple(scheme.fraction_bits(l) for l in (0, 2)) == fraction_bits
    assert scheme.common == text.endswith("common")


@given(SCHEMES)
def test_operands_fit_into_16_bits(scheme: ActivationScheme) -> None:
    assert all(scheme.qmax(l) <= scheme.operand_max(l) <= 32767 for l in range(4))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s8",
        "m8d8",
        "s8 m8",
        "s8 m8d3",
        "s8 m8d17",
        "s1 c8",
        "s8 c17",
        "s8 m8d8 ",
        "S8 c8",
        "s8 c8d8",
        "s8 m8d8common",
        "s8 m8d8  common",
        "s8 common",
        "common",
        "s8 c8 common common",
        "s8 c8 Common",
    ],
)
def test_malformed_activation_schemes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        activation_scheme(text)


@given(CONFIGS)
def test_config_round_trips_through_json(config: QuantConfig) -> None:
    text = config.to_json()
    assert QuantConfig.from_json(text) == config
    assert QuantConfig.from_json(text).to_json() == text


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": 2},
        {"version": 3},
        {"version": True},
        {"version": None},
        {"extra": 1},
        {"weight_bits": 3},
        {"weight_bits": "8"},
        {"weight_bits": 8.0},
        {"activation": "s8"},
        {"activation": 8},
        {"observer": "guess"},
        {"observer": ["minmax"]},
        {"granularity": "layer"},
        {"percentile": 0.0},
        {"percentile": 101},
        {"max_force_error": -1.0},
        {"max_force_error": "5"},
        {"max_force_error": 5.0, "rounding": "nearest"},
        {"granularity": None},
        {"granularity": ["channel"]},
        {"headroom": 0.9},
        {"headroom": "1.1"},
        {"headroom": float("nan")},
        {"headroom": float("inf")},
        {"overrides": None},
        {"overrides": [{"pattern": "a"}]},
        {"overrides": [3]},
        {"overrides": [{"pattern": 3, "weight_bits": 8, "activation": None}]},
        {"scheme": None},
    ],
)
def test_json_with_wrong_values_is_refused(change: dict[str, object]) -> None:
    data = {**json.loads(preset("w8a8").to_json()), **change}
    with pytest.raises(ConfigError):
        QuantConfig.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"version": 2}'])
def test_text_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        QuantConfig.from_json(text)


@pytest.mark.parametrize(
    ("name", "weight_bits", "activation"),
    [
        ("fp32", None, None),
        ("w8", 8, None),
        ("w4", 4, None),
        ("w8a8", 8, "s8 m8d8"),
        ("w4a8", 4, "s8 m8d8"),
        ("w8a16", 8, "s16 m16d16"),
        ("w4a16", 4, "s16 m16d16"),
        ("exact-w8a8", 8, "s8 m8exact"),
        ("exact-w4a8", 4, "s8 m8exact"),
    ],
)
def test_presets(name: str, weight_bits: int | None, activation: str | None) -> None:
    config = preset(name)
    assert config == QuantConfig(
        name,
        weight_bits,
        activation,
        max_weight_share=WEIGHT_SHARES.get(weight_bits or 0),
        max_wide_share=WIDE_SHARE if name.endswith("a8") else None,
        centered=activation is not None,
    )
    assert (config.observer, config.granularity, config.headroom) == ("minmax", "channel", 1.1)
    assert config.rounds_together == (weight_bits is not None)
    assert rounds_only_invariants(config) == name.startswith("exact")
    assert config.for_layer("any.layer") == LayerConfig(weight_bits, activation)
    assert is_conservative(config) == (name in ("fp32", "w8", "w4"))
    assert name in PRESETS


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_round_to_nearest(kind: str, bits: int) -> None:
    config = preset(f"{kind}-w{bits}a8")
    assert (config.weight_bits, config.rounding) == (bits, "nearest")
    assert config.max_weight_share is None and config.max_wide_share is None and not config.weighs_errors
    assert activation_scheme(config.activation or "").vector == ("svq" if kind == "svq" else "component")
    assert config.granularity == {"naive-channel": "channel", "naive": "block", "svq": "block"}.get(
        kind, "tensor"
    )
    assert (config.observer == "percentile") == (kind == "degree")
    assert QuantConfig.from_json(config.to_json()) == config and not rounds_only_invariants(config)


def test_auto_starts_from_four_bits_and_keeps_a_force_error() -> None:
    config = resolve("auto", max_force_error=5.0)
    assert (config.weight_bits, config.activation, config.max_force_error) == (4, None, 5.0)
    assert is_conservative(config) and QuantConfig.from_json(config.to_json()) == config
    assert resolve(config) == config and resolve(config, max_force_error=2).max_force_error == 2
    assert resolve("auto").max_force_error is None  # quantize wants one
    for scheme in ("fp32", "naive-w8a8"):
        with pytest.raises(ConfigError, match="rounded against"):
            resolve(scheme, max_force_error=5.0)
    with pytest.raises(ConfigError, match="whole model"):
        resolve("w8", {"first": "auto"})


@pytest.mark.parametrize("wrong", [0.0, -1, math.nan, math.inf, True, "5"])
def test_force_errors_that_cannot_be_kept_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="max_force_error"):
        resolve("auto", max_force_error=wrong)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    config = resolve("auto", max_force_error=np.float64(2.5))
    assert QuantConfig.from_json(config.to_json()) == config


def test_configurations_of_the_first_version_are_refused() -> None:
    """They say nothing of the granularity, and their steps were one per block."""
    data = json.loads(preset("w8a8").to_json())
    assert data["version"] == 4 and data["granularity"] == "channel"
    del data["granularity"]
    with pytest.raises(ConfigError, match="version"):
        QuantConfig.from_json(json.dumps(data | {"version": 1}))
    with pytest.raises(ConfigError):
        QuantConfig.from_json(json.dumps(data))


def test_the_default_scheme_has_true_forces() -> None:
    assert is_conservative(preset(DEFAULT_SCHEME))


def test_an_unknown_scheme_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("w2")
    assert all(name in str(caught.value) for name in PRESETS)
    with pytest.raises(ConfigError, match="not int"):
        resolve(8)  # type: ignore[arg-type]


def test_the_last_matching_override_wins() -> None:
    config = resolve("w8a8", {"*.radial.*": "fp32", "conv.0.*": {"weight_bits": 4}, "conv.0.radial.1": "w8"})
    assert config.for_layer("conv.1.linear") == LayerConfig(8, "s8 m8d8")
    assert config.for_layer("conv.1.radial.0") == LayerConfig(None, None)
    assert config.for_layer("conv.0.radial.0") == LayerConfig(4, "s8 m8d8")  # keeps the scheme's activation
    assert config.for_layer("conv.0.radial.1") == LayerConfig(8, None)
    assert config.for_layer("CONV.0.linear") == LayerConfig(8, "s8 m8d8")
    assert resolve(config, {"*": "w8"}).for_layer("conv.0.radial.0") == LayerConfig(8, None)
    assert resolve(config) == config


@pytest.mark.parametrize("value", ["w2", {"bits": 8}, {"weight_bits": 5}, {"activation": "x"}, 8, None])
def test_unreadable_overrides_are_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        resolve("w8", {"a": value})  # type: ignore[dict-item]


def test_a_pattern_that_matches_nothing_is_named() -> None:
    config = resolve("w8", {"conv.*": "w4", "typo.*": "fp32"})
    with pytest.raises(ConfigError, match=r"typo"):
        config.check_patterns(["conv.0", "readout"])
    resolve("w8", {"conv.*": "w4"}).check_patterns(["conv.0", "readout"])


def test_conservative_means_no_activation_is_rounded_anywhere() -> None:
    assert is_conservative(resolve("w8", {"a": "w4", "b": "fp32"}))
    assert not is_conservative(resolve("w8", {"a": "exact-w8a8"}))
    assert not is_conservative(resolve("w8a8", {"a*": "w8"}))
    assert is_conservative(resolve("w8a8", {"*": "w8"}))
    assert not is_conservative(resolve("w8a8", {"*": "w8", "a": "w8a16"}))


def test_configurations_are_frozen_and_hashable() -> None:
    config = preset("w8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 4  # type: ignore[misc]
    assert len({config, preset("w8"), preset("w4")}) == 2


def test_reading_a_configuration_needs_no_torch() -> None:
    """``config`` alone, without the package's ``__init__``, which does import torch."""
    code = (
        "import sys, types, importlib, pathlib\n"
        "package = types.ModuleType('gaq_compile')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "sys.modules['gaq_compile'] = package\n"
        "importlib.import_module('gaq_compile.config')\n"
        "sys.exit('torch' in sys.modules)"
    )
    folder = str(Path(config_module.__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0
