"""calibrate: steps that cover what was seen, in every place where a layer is used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gaq_compile.config import activation_scheme, preset, resolve
from gaq_compile.errors import StructureError
from gaq_compile.numerics.observers import make_observer
from gaq_compile.passes.calibrate import calibrate, quantization_sites
from gaq_compile.passes.insert_mddq import insert_mddq
from gaq_compile.passes.weigh_channels import ChannelCosts
from gaq_compile.passes.widen_activations import widen_activations

gaq, aten = torch.ops.gaq, torch.ops.aten
SPEC = "2x0e+2x1o -> 2x0e+2x1o"


def _linear(x, w, label, spec=SPEC):
    return gaq.irreps_linear.default(x, w, None, spec, False, label)


@pytest.fixture
def two_layers(with_weights):
    def function(self, x):
        return _linear(aten.mul.Tensor(_linear(x, self.w, "first"), 100.0), self.w, "second")

    return with_weights(function, w=torch.randn(8, generator=torch.Generator().manual_seed(0)))


def _batches(*seeds):
    return [[torch.randn(6, 8, generator=torch.Generator().manual_seed(s))] for s in seeds]


@pytest.mark.parametrize("scheme", ["w8a8", "naive-w8a8", "exact-w8a8", "w8a16"])
def test_steps_are_the_observer_s(two_layers, scheme, assert_pure):
    config, batches = preset(scheme), _batches(1, 2, 3)
    steps = assert_pure(lambda graph: calibrate(graph, batches, config), two_layers)
    assert set(steps) == {"first", "second"}
    granularity = "block" if scheme == "w8a16" else config.granularity  # 16 bits need no step a channel
    state = make_observer(config.observer, config.headroom).start(granularity)
    for (x,) in batches:
        state.observe(x, "2x0e+2x1o", activation_scheme(config.activation))
    assert torch.equal(steps["first"], state.scale())
    assert steps["first"].shape == steps["second"].shape == (4,)
    assert (steps["second"] > 10 * steps["first"].max()).all()
    per_block = [len(steps["first"][:2].unique()), len(steps["first"][2:].unique())]
    assert per_block == ([1, 1] if granularity == "block" else [2, 2])


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_granularity_and_observer_are_the_configuration_s(two_layers, observer):
    found = {}
    for granularity in ("channel", "block"):
        config = replace(preset("w8a8"), observer=observer, granularity=granularity)
        state = make_observer(observer, config.headroom).start(granularity)
        for (x,) in _batches(1, 2, 3):
            state.observe(x, "2x0e+2x1o", activation_scheme(config.activation))
        found[granularity] = calibrate(two_layers, _batches(1, 2, 3), config)["first"]
        assert torch.equal(found[granularity], state.scale())
    assert not torch.equal(found["channel"], found["block"])


def test_more_data_never_narrows_the_range(two_layers):
    config = preset("w8a8")
    few, more = (calibrate(two_layers, _batches(*seeds), config) for seeds in ((1,), (1, 2, 3, 4)))
    assert all((more[k] >= few[k]).all() for k in few)


def test_weights_only_needs_no_calibration(two_layers):
    assert calibrate(two_layers, [], preset("w8")) == {} and calibrate(two_layers, [], preset("fp32")) == {}


def test_overrides_choose_layers(two_layers):
    only = calibrate(two_layers, _batches(1), resolve("w8", {"second": "w8a8"}))
    assert set(only) == {"second"}


def test_a_layer_used_twice_covers_both_uses(with_weights):
    """One label, two inputs of very different size: neither may be clipped."""

    def function(self, x):
        large = _linear(aten.mul.Tensor(x, 100.0), self.w, "shared")
        return aten.add.Tensor(large, _linear(x, self.w, "shared"))

    graph = with_weights(function, w=torch.ones(8))
    ((x,),) = _batches(1)
    steps = calibrate(graph, [[x]], preset("w8a8"))["shared"]
    scheme = activation_scheme("s8 m8d8")
    scalars, vectors = (100 * x[:, :2]).abs().amax(0), (100 * x[:, 2:]).reshape(6, 3, 2).norm(dim=1).amax(0)
    reach = steps * torch.tensor([scheme.qmax(0)] * 2 + [scheme.qmax(1)] * 2)
    assert (reach >= torch.cat([scalars, vectors])).all()
    torch.testing.assert_close(reach, 1.1 * torch.cat([scalars, vectors]))


def test_one_hot_input_stays_exact(with_weights):
    """Zeros and ones select rows of the weights: rounding them must change nothing."""

    def function(self, x):
        rows = aten._to_copy.default(aten.one_hot.default(x, 8), dtype=torch.float32)
        return _linear(rows, self.w, "embedding", "8x0e -> 2x0e")

    graph = with_weights(function, w=torch.randn(16))
    numbers = torch.tensor([1, 7, 0])
    results = []
    for scheme in ("w8", "w8a8", "w4", "w4a8"):
        config = preset(scheme)
        steps = calibrate(graph, [[numbers[:1]]], config)
        assert not steps or torch.equal(steps["embedding"], torch.ones(8))
        sites = widen_activations(quantization_sites(graph, config), steps, ChannelCosts(), None)
        results.append(insert_mddq(graph, config, sites)(numbers))
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(two_layers, bad):
    x = torch.randn(3, 8)
    x[1, 2] = bad
    with pytest.raises(StructureError, match="first"):
        calibrate(two_layers, [[x]], preset("w8a8"))


def test_a_batch_without_rows_says_nothing(two_layers):
    config = preset("w8a8")
    with_empty = calibrate(two_layers, [[torch.zeros(0, 8)], *_batches(1)], config)
    alone = calibrate(two_layers, _batches(1), config)
    assert all(torch.equal(with_empty[k], alone[k]) for k in alone)
