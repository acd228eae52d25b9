"""Observers: the steps they give, whatever the order and size of the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.config import OBSERVERS
from gaq_compile.errors import ConfigError, GaqError, IrrepsError
from gaq_compile.numerics.activations import activation_scheme, fake_quantize
from gaq_compile.numerics.observers import (
    MeanSquare,
    MinMax,
    Observer,
    Percentile,
    features,
    make_observer,
)

IRREPS = "3x0e+4x1o+2x2e"
SCHEME = activation_scheme("s8 m8d8")


def example(n: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(n, 25, generator=torch.Generator().manual_seed(seed))


def scale_of(observer: Observer, *batches: Tensor, irreps: str = IRREPS, text: str = "s8 m8d8") -> Tensor:
    state = observer.start()
    for batch in batches:
        state.observe(batch, irreps, activation_scheme(text))
    return state.scale()


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8", "s8 m8exact", "s16 m16d16"])
def test_features_are_what_the_scheme_rounds(text: str) -> None:
    x = torch.zeros(1, 25)
    x[0, :3] = torch.tensor([1.0, -2.0, 0.5])
    x[0, [3, 7, 11]] = torch.tensor([2.0, -3.0, 6.0])  # channel 0 of 4x1o, component-major
    scalars, vectors, tensors = features(x, IRREPS, activation_scheme(text))
    assert scalars.tolist() == [1.0, 2.0, 0.5]
    assert vectors.max() == (6.0 if text == "s8 c8" else 7.0)
    assert (vectors.numel(), tensors.numel()) == ((12, 10) if text == "s8 c8" else (4, 2))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["s8 m8d8", "s8 c8", "s16 m16d16"]), st.floats(-15, 15))
def test_minmax_covers_all_it_saw(seed: int, text: str, exponent: float) -> None:
    scheme = activation_scheme(text)
    batches = [example(20, seed) * 10.0**exponent, example(5, seed + 1) * 10.0**exponent]
    scale = scale_of(MinMax(headroom=1.0), *batches, text=text)
    assert scale.dtype == torch.float32
    for batch in batches:
        for b, values in enumerate(features(batch, IRREPS, scheme)):
            assert bool((values / scale[b] <= scheme.qmax(b)).all())


def test_minmax_headroom_widens_the_range() -> None:
    torch.testing.assert_close(
        scale_of(MinMax(1.25), example()), 1.25 * scale_of(MinMax(1.0), example()), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_unseen_block_gets_step_one(name: str) -> None:
    x = example()
    x[:, 3:15] = 0.0
    scale = scale_of(make_observer(name), x, x[:0])
    assert scale[1] == 1.0
    assert scale.shape == (3,)
    assert bool((scale > 0).all())
    assert scale_of(make_observer(name), x[:0]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", OBSERVERS)
def test_batches_only_accumulate(name: str) -> None:
    x = example(600)
    whole = scale_of(make_observer(name), x)
    parts = scale_of(make_observer(name), x[:10], x[10:11], x[11:])
    torch.testing.assert_close(parts, whole, rtol=2e-3, atol=0)
    assert torch.equal(parts, scale_of(make_observer(name), x[:10], x[10:11], x[11:]))


def test_percentile_leaves_outliers_out() -> None:
    x = example(5000)
    x[0, 0] = 1e4
    scale = scale_of(Percentile(99.9), x[1:2], x)  # the range grows while it counts
    exact = torch.quantile(x[:, :3].abs().flatten().double(), 0.999)
    assert float(scale[0]) * 127 == pytest.approx(float(exact), abs=2 * 1e4 / 4096)
    assert float(scale_of(Percentile(100.0), x)[0]) * 127 == pytest.approx(1e4, rel=1e-6)


def test_percentile_matches_the_quantile() -> None:
    x = example(5000)
    scale = scale_of(Percentile(99.0), *x.split(700))
    magnitudes = features(x, IRREPS, SCHEME)[1].double()
    assert float(scale[1]) * 255 == pytest.approx(float(torch.quantile(magnitudes, 0.99)), rel=2e-3)


def test_percentile_does_not_count_zeros() -> None:
    x = example(2000)
    sparse = torch.cat([x, torch.zeros(200_000, 25)])
    torch.testing.assert_close(scale_of(Percentile(), sparse), scale_of(Percentile(), x))


@pytest.mark.parametrize("text", ["s8 m8d8", "s4 m4d8", "s4 c4"])
def test_mse_errs_less_than_minmax(text: str) -> None:
    scheme, x = activation_scheme(text), example(3000)

    def error(observer: Observer) -> float:
        scale = scale_of(observer, x, text=text)
        return float(((fake_quantize(x, scale, IRREPS, scheme) - x) ** 2).mean())

    assert error(MeanSquare()) <= error(MinMax(1.0)) * (1 + 1e-3)
    assert error(MeanSquare()) < error(MinMax(1.1))


def test_mse_reservoir_is_bounded_and_fair() -> None:
    state = MeanSquare(sample=500).start()
    for k in range(20):  # each batch has its own magnitude: every one must be in the sample
        state.observe(torch.full((100, 1), float(k + 1)), "1x0e", SCHEME)
    kept = state._kept[0]  # type: ignore[attr-defined]
    assert kept.numel() == 500
    assert len(kept.unique()) == 20
    assert float(kept.mean()) == pytest.approx(10.5, abs=1.0)


def test_make_observer_knows_every_configured_name() -> None:
    assert make_observer("minmax", 1.3) == MinMax(1.3)
    assert [make_observer(name) for name in OBSERVERS] == [MinMax(1.1), Percentile(), MeanSquare()]
    with pytest.raises(ConfigError, match="guess"):
        make_observer("guess")


@pytest.mark.parametrize(
    "observer", [MinMax(0.5), Percentile(0.0), Percentile(bins=15), MeanSquare(sample=0)]
)
def test_unusable_settings_are_refused(observer: Observer) -> None:
    with pytest.raises(ConfigError):
        observer.start()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stop_the_calibration(bad: float) -> None:
    x = example()
    x[3, 20] = bad
    with pytest.raises(GaqError, match="block 2"):
        scale_of(MinMax(), x)


def test_misuse_is_refused() -> None:
    state = MinMax().start()
    with pytest.raises(GaqError, match="before"):
        state.scale()
    state.observe(example(), IRREPS, SCHEME)
    with pytest.raises(IrrepsError, match="was shown"):
        state.observe(torch.zeros(1, 3), "3x0e", SCHEME)
    with pytest.raises(IrrepsError, match="N, 25"):
        state.observe(torch.zeros(1, 24), IRREPS, SCHEME)
