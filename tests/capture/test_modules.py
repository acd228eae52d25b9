"""swap: a copy that computes the same with gaq operators; the user's model is never touched."""

from __future__ import annotations

import pytest
import torch
from e3nn import nn as enn
from e3nn import o3
from torch import nn

from gaq_compile.capture import modules
from gaq_compile.capture.modules import swap
from gaq_compile.errors import IrrepsError
from gaq_compile.operators.registration import ops

SILU = nn.functional.silu


class Block(nn.Module):
    """Every kind of module that swap knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sh = o3.SphericalHarmonics("1x0e+1x1o", True, "component")
        out = "4x0e+4x1o"
        paths = [(0, 0, 0, "uvu", True), (0, 1, 1, "uvu", True)]
        self.tp = o3.TensorProduct(
            "4x0e", "1x0e+1x1o", out, paths, shared_weights=False, internal_weights=False
        )
        self.radial = enn.FullyConnectedNet([1, 8, 8], SILU)
        self.inner = nn.ModuleDict({"linear": o3.Linear(out, "8x0e+4x1o")})
        self.gate = enn.Gate("4x0e", [SILU], "4x0e", [torch.sigmoid], "4x1o")
        self.dense = nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, vec):
        message = self.tp(x, self.sh(vec), self.radial(vec.norm(dim=1, keepdim=True)))
        y = self.gate(self.inner["linear"](message))
        return self.dropout(self.dense(y[:, :4])), y


def _inputs():
    return torch.randn(6, 4), torch.randn(6, 3)


def _same(swapped, model, *inputs):
    for a, b in zip(swapped(*inputs), model(*inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_everything_is_swapped_and_equal():
    model = Block().eval()
    swapped = swap(model)
    _same(swapped, model, *_inputs())
    kinds = {type(m) for m in swapped.modules()}
    assert not kinds & {
        o3.Linear,
        o3.TensorProduct,
        o3.SphericalHarmonics,
        enn.Gate,
        enn.FullyConnectedNet,
        nn.Linear,
    }
    labels = {m.label for m in swapped.modules() if isinstance(getattr(m, "label", None), str)}
    assert labels == {"tp", "radial.layer0", "radial.layer1", "inner.linear", "gate", "dense"}
    assert not swapped.training


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched(training):
    model = Block().train(training)
    inputs = _inputs()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = model(*inputs)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [(name, type(m), m.training, id(m)) for name, m in model.named_modules()]
    grads = [(p.requires_grad, id(p)) for p in model.parameters()]
    swapped = swap(model)
    for parameter in swapped.parameters():
        parameter.data.fill_(7.0)
    assert kinds == [(name, type(m), m.training, id(m)) for name, m in model.named_modules()]
    assert grads == [(p.requires_grad, id(p)) for p in model.parameters()]
    after = model.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(model(*inputs), before, strict=True))


class Wrapper(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, *x):
        return (self.child(*x),)


def _parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


class Doubled(o3.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


UNKNOWN = {
    "uvw product": lambda: o3.FullyConnectedTensorProduct("4x0e", "1x0e", "4x0e"),
    "elementwise": lambda: o3.ElementwiseTensorProduct("4x0e", "4x0e"),
    "subclass": lambda: Doubled("4x0e", "4x0e"),
    "parametrized": _parametrized,
    "softplus net": lambda: enn.FullyConnectedNet([4, 5, 3], nn.functional.softplus),
    "some biases": lambda: o3.Linear("4x0e", "2x0e+2x0e", biases=[True, False]),
    "odd scalars": lambda: enn.Gate("4x0o", [torch.tanh], "", [], ""),
    "norm activation": lambda: enn.NormActivation("4x0e", torch.sigmoid),
    "layer norm": lambda: nn.LayerNorm(4),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_stays_and_stays_right(name):
    torch.manual_seed(0)
    model = Wrapper(UNKNOWN[name]()).eval()
    swapped = swap(model)
    assert type(swapped.child) is type(model.child) and swapped.child is not model.child
    inputs = [torch.randn(5, 4) for _ in range(2 if "product" in name or name == "elementwise" else 1)]
    inputs = inputs if name != "uvw product" else [inputs[0], torch.randn(5, 1)]
    assert all(torch.equal(a, b) for a, b in zip(swapped(*inputs), model(*inputs), strict=True))


def _hooked(kind):
    linear = nn.Linear(4, 4)
    if kind == "forward":
        linear.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "forward_pre":
        linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    else:
        linear.forward = lambda x: x * 3
    return linear


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "replaced forward"])
def test_hooked_modules_stay_right(kind):
    model = Wrapper(_hooked(kind)).eval()
    _same(swap(model), model, torch.randn(3, 4))


def test_a_module_used_twice_stays_one():
    shared = o3.Linear("4x0e", "4x0e")
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    swapped = swap(model)
    assert swapped["a"][0] is swapped["b"][0] and isinstance(swapped["a"][0], modules.IrrepsLinear)


def test_two_names_in_one_parent():
    shared = o3.Linear("4x0e", "4x0e")
    swapped = swap(nn.ModuleDict({"a": shared, "b": shared}))
    assert swapped["b"] is swapped["a"] and isinstance(swapped["b"], modules.IrrepsLinear)


@pytest.mark.parametrize("name", ["sh", "gate"])
def test_more_leading_axes(name):
    model = Wrapper(getattr(Block(), name)).eval()
    _same(swap(model), model, torch.randn(2, 5, 3 if name == "sh" else 20))


def test_harmonics_of_one_degree_twice():
    model = Wrapper(o3.SphericalHarmonics("1x1o+1x1o", True, "component"))
    linear = o3.Linear("2x1o", "1x1o")
    both = nn.Sequential(model.child, linear)
    swapped = swap(both)
    vec = torch.randn(5, 3)
    assert torch.allclose(swapped(vec), both(vec), atol=1e-6)
    with pytest.raises(IrrepsError, match="side by side"):
        ops.spherical_harmonics(vec, "1x1o+1x1o", True, "component", "sh")
