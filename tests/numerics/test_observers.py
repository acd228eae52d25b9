"""Observers: the steps they give, whatever the order and size of the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.config import GRANULARITIES, OBSERVERS
from gaq_compile.errors import ConfigError, GaqError, IrrepsError
from gaq_compile.ir.layout import blocks
from gaq_compile.numerics.activations import activation_scheme, fake_quantize
from gaq_compile.numerics.observers import (
    FLOOR,
    LEAST,
    MeanSquare,
    MinMax,
    Observer,
    Percentile,
    features,
    make_observer,
)

OF_BLOCKS = ("channel", "block")
IRREPS = "3x0e+4x1o+2x2e"
SCHEME = activation_scheme("s8 m8d8")


SIZES = torch.tensor([1.0, 0.3, 0.002, 2.0, 0.01, 0.7, 0.41, 0.05, 0.15])  # of the channels


def example(n: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(n, 25, generator=torch.Generator().manual_seed(seed))


def uneven(n: int = 200, seed: int = 0, exponent: float = 0.0) -> Tensor:
    """Values whose channels differ by up to 500 times."""
    spread = [SIZES[b.channel :][: b.mul].repeat(b.components) for b in blocks(IRREPS)]
    return example(n, seed) * torch.cat(spread) * 10.0**exponent


def seen_by_channel(x: Tensor, text: str) -> list[list[Tensor]]:
    """Per block and channel, the numbers that are rounded, from the layout's definition."""
    found, start, by_component = [], 0, activation_scheme(text).vector == "component"
    for mul, components in ((3, 1), (4, 3), (2, 5)):
        columns = [[start + c * mul + u for c in range(components)] for u in range(mul)]
        parts = [x[:, c].double() for c in columns]
        apart = by_component or components == 1
        found.append([p.abs().flatten() if apart else p.norm(dim=1) for p in parts])
        start += mul * components
    return found


def steps_by_channel(ranges: list[list[float]], text: str, granularity: str, wholes: list[float]) -> Tensor:
    """Steps from what each channel, or (``wholes``) each block, should represent."""
    out, scheme = [], activation_scheme(text)
    for l, (own, whole) in enumerate(zip(ranges, wholes, strict=True)):
        floor = 0.1 * max(own)
        reach = [whole] * len(own) if granularity == "block" else [max(r, floor) for r in own]
        out += [r / scheme.qmax(l) for r in reach]
    return torch.tensor(out)


def scale_of(
    observer: Observer,
    *batches: Tensor,
    irreps: str = IRREPS,
    text: str = "s8 m8d8",
    granularity: str = "channel",
) -> Tensor:
    state = observer.start(granularity)
    for batch in batches:
        state.observe(batch, irreps, activation_scheme(text))
    return state.scale()


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8", "s8 m8exact", "s16 m16d16"])
def test_features_are_what_the_scheme_rounds(text: str) -> None:
    x = torch.zeros(1, 25)
    x[0, :3] = torch.tensor([1.0, -2.0, 0.5])
    x[0, [3, 7, 11]] = torch.tensor([2.0, -3.0, 6.0])  # channel 0 of 4x1o, component-major
    scalars, vectors, tensors = features(x, IRREPS, activation_scheme(text))
    assert scalars.tolist() == [[1.0, 2.0, 0.5]]
    assert vectors.amax(0).tolist() == [6.0 if text == "s8 c8" else 7.0, 0.0, 0.0, 0.0]
    assert (vectors.shape, tensors.shape) == (((3, 4), (5, 2)) if text == "s8 c8" else ((1, 4), (1, 2)))


@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8", "s8 m8exact"])
def test_features_come_by_channel(text: str) -> None:
    x = uneven(7)
    found = features(x, IRREPS, activation_scheme(text))
    for values, expected in zip(found, seen_by_channel(x, text), strict=True):
        for u, want in enumerate(expected):
            torch.testing.assert_close(values[:, u].double().sort().values, want.sort().values)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8d8 common"]),
    st.sampled_from(GRANULARITIES),
    st.floats(-15, 15),
)
def test_minmax_covers_all_it_saw(seed: int, text: str, granularity: str, exponent: float) -> None:
    scheme = activation_scheme(text)
    batches = [uneven(20, seed, exponent), uneven(5, seed + 1, exponent)]
    scale = scale_of(MinMax(headroom=1.0), *batches, text=text, granularity=granularity)
    assert (scale.dtype, scale.shape) == (torch.float32, (9,))
    for batch in batches:
        for l, (block, values) in enumerate(
            zip(blocks(IRREPS), features(batch, IRREPS, scheme), strict=True)
        ):
            assert bool((values / scale[block.channel :][: block.mul] <= scheme.qmax(l)).all())


@pytest.mark.parametrize("granularity", OF_BLOCKS)
@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8", "s16 m16d16", "s8 m8exact common"])
def test_minmax_is_each_channel_s_largest(text: str, granularity: str) -> None:
    x = uneven()
    ranges = [[1.1 * float(v.max()) for v in own] for own in seen_by_channel(x, text)]
    want = steps_by_channel(ranges, text, granularity, [max(own) for own in ranges])
    scale = scale_of(MinMax(1.1), x[:50], x[50:], text=text, granularity=granularity)
    torch.testing.assert_close(scale, want, rtol=1e-6, atol=0)
    least = FLOOR if granularity == "channel" else 1.0  # of channels below a tenth of their blocks' largest
    expected = torch.stack([want[:3].max(), want[3:7].max()]) * least
    torch.testing.assert_close(scale[[2, 4]], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OBSERVERS)
def test_channels_of_a_block_share_a_step_only_where_asked(name: str) -> None:
    x = uneven(3000)
    shared = scale_of(make_observer(name), x, granularity="block")
    assert [len(shared[b.channel :][: b.mul].unique()) for b in blocks(IRREPS)] == [1, 1, 1]
    own = scale_of(make_observer(name), x)
    for block in blocks(IRREPS):
        of_channels = own[block.channel :][: block.mul]
        assert float(of_channels.min()) == pytest.approx(FLOOR * float(of_channels.max()), rel=1e-5) or (
            block.l == 2
        )
        # clipping a block as a whole, nearly all is the largest channel's
        assert bool((of_channels <= shared[block.channel] * 1.3).all())
    torch.testing.assert_close(own[8] / own[7], torch.tensor(3.0), rtol=0.2, atol=0)
    assert scale_of(make_observer(name), x[:1], x[1:]).unique().numel() >= 6  # none but floors repeat


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", OBSERVERS)
def test_one_channel_is_one_block(name: str, granularity: str) -> None:
    x = example(500)[:, :3]
    alone = scale_of(make_observer(name), x, irreps="1x1o", granularity=granularity)
    assert torch.equal(alone, scale_of(make_observer(name), x, irreps="1x1o"))
    assert alone.shape == (1,)


def test_minmax_headroom_widens_the_range() -> None:
    torch.testing.assert_close(
        scale_of(MinMax(1.25), example()), 1.25 * scale_of(MinMax(1.0), example()), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("granularity", OF_BLOCKS)
@pytest.mark.parametrize("name", OBSERVERS)
def test_an_unseen_block_gets_step_one(name: str, granularity: str) -> None:
    x = example()
    x[:, 3:15] = 0.0
    scale = scale_of(make_observer(name), x, x[:0], granularity=granularity)
    assert scale.shape == (9,)
    assert scale[3:7].tolist() == [1.0] * 4
    assert bool((scale > 0).all()) and bool((scale[[0, 1, 2, 7, 8]] < 0.1).all())
    assert scale_of(make_observer(name), x[:0], granularity=granularity).tolist() == [1.0] * 9


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_unseen_channel_gets_the_least_of_its_block(name: str) -> None:
    x = example()
    x[:, [4, 8, 12]] = 0.0  # channel 1 of 4x1o
    scale = scale_of(make_observer(name), x)
    assert float(scale[4]) == pytest.approx(FLOOR * float(scale[3:7].max()), rel=1e-6)
    assert bool((scale[[3, 5, 6]] > 5 * scale[4]).all())


@pytest.mark.parametrize("text", ["s8 c8", "s8 m8d8"])
def test_one_range_for_a_whole_tensor(text: str) -> None:
    x = uneven(3000)
    seen = torch.cat([v for own in seen_by_channel(x, text) for v in own])
    tops = torch.tensor([activation_scheme(text).qmax(b.l) for b in blocks(IRREPS) for _ in range(b.mul)])
    for observer, reach in (
        (MinMax(1.1), 1.1 * float(seen.max())),
        (Percentile(99.0), float(torch.quantile(seen[seen > 0], 0.99))),
    ):
        scale = scale_of(observer, x[:700], x[700:], text=text, granularity="tensor")
        torch.testing.assert_close(scale, reach / tops, rtol=2e-3, atol=0)
    best = scale_of(MeanSquare(), x, text=text, granularity="tensor") * tops
    assert float(best.max() - best.min()) <= 1e-6 * float(best.max()) or text == "s8 m8d8"
    assert 0.1 * float(seen.max()) < float(best.min()) <= float(seen.max()) * (1 + 1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", OBSERVERS)
def test_batches_only_accumulate(name: str, granularity: str) -> None:
    x = uneven(600)
    x[:10, 1] *= 1e-3  # a range that grows, while its neighbours' do not
    whole = scale_of(make_observer(name), x, granularity=granularity)
    splits = (x[:10], x[10:11], x[11:])
    parts = scale_of(make_observer(name), *splits, granularity=granularity)
    torch.testing.assert_close(parts, whole, rtol=2e-3, atol=0)
    assert torch.equal(parts, scale_of(make_observer(name), *splits, granularity=granularity))


def test_percentile_leaves_outliers_out() -> None:
    x = example(5000)
    x[0, 0] = 1e4
    scale = scale_of(Percentile(99.9), x[1:2], x, granularity="block")  # the range grows while it counts
    exact = torch.quantile(x[:, :3].abs().flatten().double(), 0.999)
    assert float(scale[0]) * 127 == pytest.approx(float(exact), abs=2 * 1e4 / 4096)
    assert float(scale_of(Percentile(100.0), x)[0]) * 127 == pytest.approx(1e4, rel=1e-6)


def test_percentile_of_a_channel_ignores_outliers_of_its_neighbours() -> None:
    x = example(5000)
    x[0, 0] = 10.0
    scale = scale_of(Percentile(99.9), x[1:2], x)
    exact = torch.quantile(x[:, :3].abs().double(), 0.999, dim=0)
    torch.testing.assert_close(scale[:3] * 127, exact.float(), rtol=0, atol=2 * 10.0 / 4096)


@pytest.mark.parametrize("granularity", OF_BLOCKS)
@pytest.mark.parametrize("text", ["s8 m8d8", "s8 c8"])
def test_percentile_matches_the_quantile(text: str, granularity: str) -> None:
    x = uneven(5000)
    x[::3, 1] = 0.0  # which are not counted
    scale = scale_of(Percentile(99.0), *x.split(700), text=text, granularity=granularity)
    seen = [[v[v > 0] for v in own] for own in seen_by_channel(x, text)]
    ranges = [[float(torch.quantile(v, 0.99)) for v in own] for own in seen]
    wholes = [float(torch.quantile(torch.cat(own), 0.99)) for own in seen]
    want = steps_by_channel(ranges, text, granularity, wholes)
    torch.testing.assert_close(scale, want, rtol=2e-3, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_percentile_does_not_count_zeros(granularity: str) -> None:
    x = example(2000)
    sparse = torch.cat([x, torch.zeros(200_000, 25)])
    both = [scale_of(Percentile(), t, granularity=granularity) for t in (sparse, x)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("granularity", OF_BLOCKS)
@pytest.mark.parametrize("text", ["s4 m4d8", "s4 c4", "s3 m8d8"])
def test_mse_is_the_best_candidate_of_each_channel(text: str, granularity: str) -> None:
    """Every channel's (or block's) squared error, tried range by range."""
    x, scheme, setting = uneven(300), activation_scheme(text), MeanSquare(sample=10**6, candidates=33)

    def best(values: Tensor, l: int) -> float:
        tried = [float(values.max()) * (0.2 + 0.8 * k / 32) for k in range(33)]
        codes = [torch.round(values * (scheme.qmax(l) / t)).clamp(max=scheme.qmax(l)) for t in tried]
        errors = [
            float((c * (t / scheme.qmax(l)) - values).square().sum())
            for c, t in zip(codes, tried, strict=True)
        ]
        return tried[errors.index(min(errors))]

    seen = seen_by_channel(x, text)
    ranges = [[best(v, l) for v in own] for l, own in enumerate(seen)]
    wholes = [best(torch.cat(own), l) for l, own in enumerate(seen)]
    want = steps_by_channel(ranges, text, granularity, wholes)
    scale = scale_of(setting, x[:100], x[100:], text=text, granularity=granularity)
    torch.testing.assert_close(scale, want, rtol=1e-6, atol=0)
    tops = torch.tensor([float(v.max()) / scheme.qmax(l) for l, own in enumerate(seen) for v in own])
    assert bool((want < 0.99 * tops).any())  # somewhere clipping is worth it


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


@pytest.mark.parametrize(("sample", "mul", "room"), [(4096, 4, 1024), (4096, 64, LEAST), (100, 4, 100)])
def test_mse_reservoir_holds_as_many_of_every_channel(sample: int, mul: int, room: int) -> None:
    """Whole features of their own channel: channel u shows u + a tenth of the batch's number."""
    state = MeanSquare(sample=sample).start()
    for k in range(10):
        rows = torch.arange(mul).float() + k / 10
        state.observe(rows.expand(200, mul).contiguous(), f"{mul}x0e", SCHEME)
    kept = state._kept[0]  # type: ignore[attr-defined]
    assert kept.shape == (room, mul)
    assert torch.equal(kept.floor(), torch.arange(mul).double().expand(room, mul))
    batches = (kept - kept.floor()).mul(10).round()
    assert float(batches.mean()) == pytest.approx(4.5, abs=0.5)
    assert all(len(column.unique()) == 10 for column in batches.T)
    assert not torch.equal(batches[:, 0], batches[:, 1])  # each channel draws its own


def test_block_reservoir_holds_the_whole_sample() -> None:
    state = MeanSquare(sample=500).start("block")
    for k in range(20):
        state.observe(torch.full((100, 4), float(k + 1)), "4x0e", SCHEME)
    kept = state._kept[0]  # type: ignore[attr-defined]
    assert kept.shape == (500, 1) and len(kept.unique()) == 20


def test_make_observer_knows_every_configured_name() -> None:
    assert make_observer("minmax", 1.3) == MinMax(1.3)
    assert [make_observer(name) for name in OBSERVERS] == [MinMax(1.1), Percentile(), MeanSquare()]
    assert make_observer("percentile", percentile=99.9) == Percentile(99.9)
    with pytest.raises(ConfigError, match="guess"):
        make_observer("guess")


@pytest.mark.parametrize(
    "observer", [MinMax(0.5), Percentile(0.0), Percentile(bins=15), MeanSquare(sample=0)]
)
def test_unusable_settings_are_refused(observer: Observer) -> None:
    for granularity in GRANULARITIES:
        with pytest.raises(ConfigError):
            observer.start(granularity)


@pytest.mark.parametrize("name", OBSERVERS)
def test_unknown_granularity_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="layer"):
        make_observer(name).start("layer")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_stop_the_calibration(bad: float) -> None:
    x = example()
    x[3, 20] = bad
    for granularity in GRANULARITIES:
        with pytest.raises(GaqError, match="block 0" if granularity == "tensor" else "block 2"):
            scale_of(MinMax(), x, granularity=granularity)


def test_misuse_is_refused() -> None:
    state = MinMax().start()
    with pytest.raises(GaqError, match="before"):
        state.scale()
    state.observe(example(), IRREPS, SCHEME)
    with pytest.raises(IrrepsError, match="was shown"):
        state.observe(torch.zeros(1, 3), "3x0e", SCHEME)
    with pytest.raises(IrrepsError, match="N, 25"):
        state.observe(torch.zeros(1, 24), IRREPS, SCHEME)
