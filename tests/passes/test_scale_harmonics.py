"""scale_harmonics: attention scales a few harmonics, not hundreds of weights; values stay the same."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.operators.registration import ops
from gaq_compile.passes.graph_tools import calls
from gaq_compile.passes.scale_harmonics import scale_harmonics

ATOMS, EDGES, CHANNELS, PATHS = 5, 12, 6, 3
SPEC = "6x0e+6x1o * 1x0e+1x1o -> 6x0e+6x1o+6x1o | 1.1.0 0.1.1*1.5 1.0.2"
ONE = "6x0e+6x1o * 1x1o -> 6x0e+6x1o+6x1o | 1.0.0 0.0.1 0.0.2"


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    ends = torch.randint(0, ATOMS, (2, EDGES), generator=g)
    rows = ((ATOMS, 24), (EDGES, 4), (EDGES, PATHS * CHANNELS), (EDGES, 2))
    return *(torch.randn(r, generator=g, dtype=torch.float64) for r in rows), ends[0], ends[1]


def _wide(filters):
    """A width that tracing knows, as a network's output has."""
    return filters @ torch.eye(PATHS * CHANNELS, dtype=filters.dtype)


def _attention(filters, alpha, heads=2, first=False):
    split = filters.view(-1, PATHS, heads, CHANNELS // heads)
    factor = alpha[:, None, :, None]
    return (factor * split if first else split * factor).view(-1, PATHS * CHANNELS)


def _conv(x, sh, weight, senders, receivers, spec=SPEC):
    edges = ops.sort_edges(senders, receivers, x.shape[0])
    return ops.conv(x, sh, weight, edges, spec, "conv")


def _specs(gm):
    return [str(conv.args[4]) for conv in calls(gm, torch.ops.gaq.conv.default)]


@pytest.mark.parametrize("first", [False, True])
def test_attention_goes_to_the_harmonics(trace, assert_pure, inputs, first):
    def function(x, sh, filters, alpha, senders, receivers):
        return _conv(x, sh, _attention(_wide(filters), alpha, first=first), senders, receivers)

    gm = trace(function, *inputs)
    after = assert_pure(scale_harmonics, gm)
    assert _specs(after) == [
        "3x0e+3x0e+3x1o+3x1o * 1x0e+1x1o+1x0e+1x1o -> 3x0e+3x0e+3x1o+3x1o+3x1o+3x1o"
        " | 2.1.0 3.3.1 0.1.2*1.5 1.3.3*1.5 2.0.4 3.2.5"
    ]
    (conv,) = calls(after, torch.ops.gaq.conv.default)
    assert conv.args[2].target is torch.ops.aten.mm.default  # the filters themselves
    torch.testing.assert_close(after(*inputs), gm(*inputs), rtol=1e-12, atol=1e-12)
    assert _specs(scale_harmonics(after)) == _specs(after)


@pytest.mark.parametrize(
    ("weight", "spec"),
    [
        (lambda f, a: _attention(f, a[:, :1], heads=1), SPEC),
        (lambda f, a: _attention(f, a[:, :1].expand(-1, 2) + a, heads=2) + f, SPEC),
        (lambda f, a: (f.view(-1, 2, 3, 3) * a[:, :, None, None]).view(-1, PATHS * CHANNELS), SPEC),
        (lambda f, a: (f.view(-1, 2, 3, 3) * f[:, None, :3, None]).view(-1, PATHS * CHANNELS), SPEC),
        (_attention, ONE),
    ],
    ids=["one head", "a sum", "a factor of each path", "other parts than heads", "vectors that would meet"],
)
def test_other_weights_are_left_alone(trace, listing, inputs, weight, spec):
    def function(x, sh, filters, alpha, senders, receivers):
        harmonics = sh if spec is SPEC else sh[:, 1:]
        return _conv(x, harmonics, weight(_wide(filters), alpha), senders, receivers, spec)

    gm = trace(function, *inputs)
    assert listing(scale_harmonics(gm)) == listing(gm)
