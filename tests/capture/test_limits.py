"""What export takes for granted holds at run time, or the input is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gaq_compile
from gaq_compile.capture.limits import Limits, limits_of
from gaq_compile.errors import CaptureError, StructureError

QUIET = {"backend": "reference", "measure": False, "progress": False}


class Sized(nn.Module):
    """A potential that looks at the sizes of its inputs, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, positions, edges, weights):
        vectors = positions[edges[0]] - positions[edges[1]]
        energy = torch.exp(-vectors.square().sum(1)).sum()
        if self.how == "branch" and positions.shape[0] > 4:
            energy = 2 * energy
        if self.how == "even" and positions.shape[0] % 2 == 0:
            energy = 3 * energy
        if self.how == "edges":
            energy = sum(energy for _ in range(edges.shape[1])) / 30
        if self.how == "twice":
            energy = energy * (1 + torch.cat([weights, weights]) @ positions.square().sum(1))
        return energy


def _inputs(atoms: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(atoms)
    i, j = (~torch.eye(atoms, dtype=torch.bool)).nonzero().T
    return {
        "positions": torch.randn(atoms, 3, generator=generator),
        "edges": torch.stack([i, j]),
        "weights": torch.rand(atoms // 2, generator=generator),
    }


APPLIES = {
    "none": lambda atoms: True,
    "branch": lambda atoms: atoms > 4,
    "even": lambda atoms: atoms % 2 == 0,
    "edges": lambda atoms: atoms == 6,
    "twice": lambda atoms: atoms % 2 == 0,
}


@pytest.mark.parametrize("how", APPLIES)
def test_right_or_refused(how):
    model = Sized(how)
    potential = gaq_compile.quantize(model, list(_inputs(6).values()), "fp32", **QUIET)
    for atoms in (3, 5, 6, 8, 10):
        tensors = _inputs(atoms)
        if APPLIES[how](atoms):
            found, wanted = float(potential(tensors)["energy"].sum()), float(model(**tensors))
            assert found == pytest.approx(wanted, rel=1e-5)
        else:
            with pytest.raises(StructureError):
                potential(tensors)


def test_limits_survive_a_file(tmp_path):
    potential = gaq_compile.quantize(Sized("branch"), list(_inputs(6).values()), "fp32", **QUIET)
    again = gaq_compile.load(potential.save(tmp_path / "sized.gaq"), backend="reference")
    assert again.form.limits == potential.form.limits
    with pytest.raises(StructureError, match=r"positions.shape\[0\] > 4"):
        again(_inputs(3))


LIMITS = Limits(("float32", "int64"), ((None, 3), (2, None)), ("x.shape[0] * 2 <= i.shape[1]",))


def _pair(rows: int = 2, columns: int = 3, edges: int = 4) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(rows, columns), "i": torch.zeros(2, edges, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_pair(columns=4), r"x has shape \(2, 4\).*any, 3"),
        (_pair(edges=3), "holds only where"),
        ({**_pair(), "i": torch.zeros(2, 4)}, "float32, not torch.int64"),
        ({**_pair(), "i": torch.zeros(2, dtype=torch.int64)}, "shape"),
        ({**_pair(), "i": [[0, 1]]}, "list"),
    ],
)
def test_refused(tensors, message):
    LIMITS.check(_pair(), ("x", "i"))
    with pytest.raises(StructureError, match=message):
        LIMITS.check(tensors, ("x", "i"))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "x.shape[0]",
        "1",
        "x.shape[0] == 1.5",
        "x.shape[0] == (",
        "[1] == 1",
        "(",
        "x[0] == 1",
        "x.data[0] == 1",
        "x.shape[y.shape[0]] == 1",
    ],
)
def test_conditions_are_comparisons_of_sizes_and_nothing_else(text):
    with pytest.raises(ValueError):
        Limits.from_dict({**LIMITS.to_dict(), "conditions": [text]})


@pytest.mark.parametrize("text", ["x.shape[7] == 3", "z.shape[0] == 3", "x.shape[0] % 0 == 1"])
def test_conditions_that_cannot_be_asked_do_not_hold(text):
    limits = Limits.from_dict({**LIMITS.to_dict(), "conditions": [text]})
    with pytest.raises(StructureError, match="holds only where"):
        limits.check(_pair(), ("x", "i"))


def test_other_assumptions_are_refused():
    with pytest.raises(CaptureError, match="stride"):
        limits_of([], ["L['x'].stride()[0] == 3"], ("x",), ("x",))


def test_a_recipe_keeps_equalities():
    guards = ["L['a'][1].size()[0] == L['a'][0].size()[0]", "(-1) + L['a'][0].size()[0] >= 2"]
    found = limits_of([], guards, ("x", "y"), ("a",), bounds=False)
    assert found.conditions == ("y.shape[0] == x.shape[0]",)
