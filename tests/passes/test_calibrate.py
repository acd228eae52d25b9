"""calibrate: steps that cover what was seen, in every place where a layer is used."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.config import activation_scheme, preset, resolve
from gaq_compile.errors import StructureError
from gaq_compile.numerics.observers import make_observer
from gaq_compile.passes.calibrate import calibrate
from gaq_compile.passes.insert_mddq import insert_mddq

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
    state = make_observer(config.observer, config.headroom).start()
    for (x,) in batches:
        state.observe(x, "2x0e+2x1o", activation_scheme(config.activation))
    assert torch.equal(steps["first"], state.scale())
    assert steps["first"].shape == steps["second"].shape == (2,)
    assert (steps["second"] > 10 * steps["first"]).all()


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
    largest = torch.stack([(100 * x[:, :2]).abs().max(), (100 * x[:, 2:]).reshape(6, 3, 2).norm(dim=1).max()])
    assert (steps * torch.tensor([scheme.qmax(0), scheme.qmax(1)]) >= largest).all()


def test_one_hot_input_stays_exact(with_weights):
    """Zeros and ones select rows of the weights: rounding them must change nothing."""

    def function(self, x):
        rows = aten._to_copy.default(aten.one_hot.default(x, 8), dtype=torch.float32)
        return _linear(rows, self.w, "embedding", "8x0e -> 2x0e")

    graph = with_weights(function, w=torch.randn(16))
    numbers = torch.tensor([1, 7, 0])
    both = [
        insert_mddq(graph, config, calibrate(graph, [[numbers[:1]]], config))
        for config in (preset("w8"), preset("w8a8"))
    ]
    assert torch.equal(both[0](numbers), both[1](numbers))


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
