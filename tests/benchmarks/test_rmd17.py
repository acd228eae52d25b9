"""The table of trained schemes: what it says of given figures, and the whole of it in its quick form."""

from __future__ import annotations

import copy
import json

import pytest

import rmd17
import rmd17_page
from gaq_compile.errors import VerificationError


def run(force: float, lee: float, before: float = 9.0, diverged: str | None = None) -> dict:
    figures = {"energy_mae_mev": 1.0, "force_mae_mev_per_a": force, "lee_mev_per_a": lee}
    drift = {"ps": 2.0, "drift_mev_per_atom_ps": 0.01, "drift_error": 0.002, "diverged": diverged}
    return {
        "before": figures | {"force_mae_mev_per_a": before}, "after": figures, "dynamics": drift,
        "weights_bytes": 64_000,
    }  # fmt: skip


@pytest.fixture
def known() -> dict:
    rows = {
        "fp32": {"title": "FP32", "ablation": False, "runs": [run(4.0, 1e-4)]},
        "naive-w4a8": {"title": "naive W4A8", "ablation": False, "runs": [run(8.0, 1.0)]},
        "w4a8": {"title": "GAQ W4A8", "ablation": False, "runs": [run(4.1, 0.1), run(4.3, 0.1)]},
        "w4a8-no-lee": {"title": "without the LEE loss", "ablation": True, "runs": [run(4.2, 0.4)]},
    }
    times = {"eager": {"ms": 10.0, "ratio": 1.0}, "w4a8": {"ms": 1.0, "ratio": 10.0}}
    about = {"command": "python rmd17.py", "machine": "a machine", "epochs": 2, "frames": 60, "data": "rMD17"}
    return {"ethanol": {**about, "rows": rows, "times": times}}


def test_the_page(known):
    """Means over seeds with their spread; ablations in a table of their own, beside the whole."""
    text = rmd17_page.page(known)
    assert "| GAQ W4A8 | 1.00 ± 0.00 | 4.20 ± 0.14 | 9.00 ± 0.00 | 0.1 ± 0 |" in text
    first, second = text.split("One thing changed at a time:")
    assert "without the LEE loss" in second and "without the LEE loss" not in first
    assert "| GAQ W4A8, as above | " in second and "10.0 |" in second and "Eager float32: 10.00 ms" in second
    known["ethanol"]["rows"]["naive-w4a8"]["runs"][0]["dynamics"]["diverged"] = "5000 K after step 9"
    assert "diverged (5000 K after step 9)" in rmd17_page.page(known)


def test_the_plot(known, tmp_path):
    rmd17_page.plot(known, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (run(8.1, 0.1), "better than naive"),
        (run(4.1, 0.1, before=4.0), "training has helped"),
        (run(4.1, 0.6), "LEE"),
        (run(4.1, 0.1, diverged="hot"), "diverge"),
    ],
)
def test_a_wrong_direction_is_an_error(known, wrong, what):
    rows = known["ethanol"]["rows"]
    rmd17.check_direction(rows)
    changed = copy.deepcopy(rows) | {"w4a8": {"runs": [wrong]}}
    with pytest.raises(VerificationError, match=what):
        rmd17.check_direction(changed)


@pytest.mark.slow
def test_the_quick_form(tmp_path):
    """Trained, compiled, measured, and the right way round; a second call makes nothing again."""
    where = [f"--work={tmp_path / 'work'}", f"--json={tmp_path / 'table.json'}", "--runs=2"]
    rmd17.main(["ethanol", "--quick", *where])
    rows = json.loads((tmp_path / "table.json").read_text())["ethanol"]["rows"]
    assert list(rows) == list(rmd17.QUICK)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.json")}
    rmd17.main(["ethanol", "--quick", *where])
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.json")}
    assert (tmp_path / "table.md").read_text().count("GAQ W4A8") == 1
