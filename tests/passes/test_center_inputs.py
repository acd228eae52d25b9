"""Inputs about the middle of their range: the graph before and after, and that float results stay."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.config import preset, resolve
from gaq_compile.operators import reference as ref
from gaq_compile.passes.calibrate import calibrate, quantization_sites
from gaq_compile.passes.center_inputs import center_inputs

BIASED, PLAIN = "3x0e -> 2x0e", "3x0e+2x1o -> 2x0e+1x1o"


@pytest.fixture
def graph(with_weights):
    """Two biased linears on the same scalars, and one without a bias on vectors too."""

    def function(self, x):
        linear = torch.ops.gaq.irreps_linear.default
        scalars = torch.ops.aten.slice.Tensor(x, 1, 0, 3)
        a = linear(scalars, self.first, self.bias, BIASED, False, "a")
        b = linear(scalars, self.second, self.other, BIASED, False, "b")
        return a + b, linear(x, self.plain, None, PLAIN, False, "c")

    torch.manual_seed(0)
    sizes = {"first": 6, "second": 6, "plain": 8, "bias": 2, "other": 2}
    return with_weights(function, **{name: torch.randn(size) for name, size in sizes.items()})


@pytest.fixture
def batches():
    """Channels between 2 and 3, 10 and 14, -1 and 0."""
    random = torch.Generator().manual_seed(1)
    rows = torch.rand(40, 9, generator=random)
    rows[:, :3] = rows[:, :3] * torch.tensor([1.0, 4.0, 1.0]) + torch.tensor([2.0, 10.0, -1.0])
    return [[rows[:20]], [rows[20:]]]


def test_before_and_after(graph, batches, listing, assert_pure):
    """One subtraction serves both readers; the layer without a bias stays."""
    assert listing(graph) == [
        "slice_tensor = aten.slice(x, 1, 0, 3)",
        "irreps_linear_default = gaq.irreps_linear(slice_tensor, first, bias, '3x0e -> 2x0e')",
        "irreps_linear_default_1 = gaq.irreps_linear(slice_tensor, second, other, '3x0e -> 2x0e')",
        "add = add(irreps_linear_default, irreps_linear_default_1)",
        "irreps_linear_default_2 = gaq.irreps_linear(x, plain, '3x0e+2x1o -> 2x0e+1x1o')",
        "return (add, irreps_linear_default_2)",
    ]
    after = assert_pure(lambda g: center_inputs(g, preset("w8a8"), batches), graph)
    assert listing(after) == [
        "slice_tensor = aten.slice(x, 1, 0, 3)",
        "sub_tensor = aten.sub(slice_tensor, slice_tensor_middle)",
        "irreps_linear_default = gaq.irreps_linear(sub_tensor, first, a_centered_bias, '3x0e -> 2x0e')",
        "irreps_linear_default_1 = gaq.irreps_linear(sub_tensor, second, b_centered_bias, '3x0e -> 2x0e')",
        "add = add(irreps_linear_default, irreps_linear_default_1)",
        "irreps_linear_default_2 = gaq.irreps_linear(x, plain, '3x0e+2x1o -> 2x0e+1x1o')",
        "return (add, irreps_linear_default_2)",
    ]


def test_the_same_in_float(graph, batches):
    x = batches[0][0]
    after = center_inputs(graph, preset("w8a8"), batches)
    torch.testing.assert_close(after(x), graph(x), rtol=1e-5, atol=1e-5)


def test_the_middle_of_all_batches(graph, batches):
    after = center_inputs(graph, preset("w8a8"), batches)
    scalars = torch.cat([batch[0] for batch in batches])[:, :3]
    middle = next(t for name, t in after.named_buffers() if name.endswith("_middle"))
    torch.testing.assert_close(middle, (scalars.amin(0) + scalars.amax(0)) / 2)
    moved = ref.irreps_linear(middle[None], graph.first, graph.bias, BIASED, False)[0]
    torch.testing.assert_close(after.a_centered_bias, moved)


def test_steps_span_a_channels_own_range(graph, batches):
    """Between 10 and 14 the step is that of a range of 4, not of 28."""
    config = preset("w8a8")
    after = center_inputs(graph, config, batches)
    assert [site.label for site in quantization_sites(after, config)] == ["a", "b", "c"]
    before, steps = (calibrate(g, batches, config) for g in (graph, after))
    assert float(before["a"][1] / steps["a"][1]) > 6.5
    assert torch.equal(before["c"], steps["c"])


@pytest.mark.parametrize("scheme", ["w8", "fp32", "naive-w8a8", "degree-w4a8"])
def test_nothing_where_a_scheme_does_not_ask_for_it(graph, batches, listing, scheme):
    assert listing(center_inputs(graph, preset(scheme), batches)) == listing(graph)


def test_layers_that_stay_in_float_are_left_alone(graph, batches, listing):
    config = resolve("w8a8", {"a": "w8"})
    after = listing(center_inputs(graph, config, batches))
    assert sum("_centered_bias" in line for line in after if "gaq.irreps_linear" in line) == 1


def test_what_is_not_finite_is_left_to_calibration(graph, listing):
    bad = [[torch.full((4, 9), float("nan"))]]
    assert listing(center_inputs(graph, preset("w8a8"), bad)) == listing(graph)
