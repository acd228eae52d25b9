"""The command line: files in, files and reports out, errors as messages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ase.io import write

from gaq_compile import cli
from gaq_compile.cli import REPORT_KEYS, main
from gaq_compile.datasets import example_structures
from gaq_compile.errors import AccuracyWarning
from gaq_compile.tools.bench import find_allocator


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The message of a command that must fail with status 1 and no traceback."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in argv])
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def success(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert exit_info.value.code == 0, captured.err
    return captured.out


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frames") / "azobenzene.xyz"
    write(path, example_structures("azobenzene")[3:6])
    return path


def check_report(path: Path, measured: tuple[str, ...]) -> dict:
    """Every key of the public interface; figures in the ``measured`` groups."""
    found = json.loads(path.read_text())
    assert {"model", "scheme", "backend", "target", "atoms", "edges", "nodes"} <= set(found)
    assert {"lowered", "fallback", "arithmetic"} <= set(found["nodes"])
    for group, names in REPORT_KEYS.items():
        assert set(names) <= set(found[group])
        if group in measured:
            values = [found[group][name] for name in names]
            assert all(math.isfinite(v) for v in values), (group, values)
    return found


# --- messages -----------------------------------------------------------------------------------


def test_help_lists_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gaq_compile.cli", "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("quantize", "inspect", "check", "bench", "tune"))


def test_a_tracker_is_host_and_port(capsys, tmp_path) -> None:
    file = tmp_path / "x.gaq"
    assert "host:port" in failure(capsys, "tune", file, "--tracker", "nowhere", "--key", "nodes")
    assert "--key" in failure(capsys, "tune", file, "--tracker", "nowhere:9190")


def test_unknown_model(capsys, tmp_path, frames) -> None:
    message = failure(capsys, "quantize", "nequip-9", frames, "-o", tmp_path / "x.gaq")
    assert "nequip-9" in message
    assert "sevennet-0, so3lr" in message


def test_unknown_scheme(capsys, tmp_path, frames) -> None:
    message = failure(capsys, "quantize", "so3lr", frames, "-o", tmp_path / "x.gaq", "--scheme", "w3")
    assert "w4a8" in message


@pytest.mark.parametrize("content", [None, "", "a table of nothing\n1 2 3\n", "3\n\nC 0 0 0\n"])
def test_unreadable_structures(capsys, tmp_path, content) -> None:
    path = tmp_path / "broken.xyz"
    if content is not None:
        path.write_text(content)
    message = failure(capsys, "quantize", "so3lr", path, "-o", tmp_path / "x.gaq")
    assert str(path) in message
    assert not (tmp_path / "x.gaq").exists()


def test_unwritable_output_fails_before_the_work(capsys, tmp_path, frames) -> None:
    assert "no folder" in failure(capsys, "quantize", "so3lr", frames, "-o", tmp_path / "no" / "x.gaq")
    argv = ("quantize", "so3lr", frames, "-o", tmp_path / "x.gaq", "--json", tmp_path)
    assert "a folder, not a file" in failure(capsys, *argv)


@pytest.mark.parametrize("command", ["inspect", "check", "bench"])
def test_foreign_file(capsys, tmp_path, frames, command) -> None:
    path = tmp_path / "foreign.gaq"
    path.write_bytes(b"\x80\x04 not a potential")
    arguments = (path,) if command == "inspect" else (path, frames)
    message = failure(capsys, command, *arguments)
    assert str(path) in message


def test_missing_allocator(capsys, frames) -> None:
    message = failure(capsys, "bench", "so3lr", frames, "--preload", "/nowhere/libjemalloc.so.2")
    assert "/nowhere/libjemalloc.so.2" in message


def test_allocator_choice(monkeypatch, tmp_path) -> None:
    library = tmp_path / "libjemalloc.so.2"
    library.touch()
    monkeypatch.setenv("GAQ_PRELOAD", str(library))
    monkeypatch.setattr(sys, "platform", "linux")
    assert find_allocator() == str(library)
    assert find_allocator("none") is None
    assert find_allocator("libtcmalloc.so.4") == "libtcmalloc.so.4"


# --- structures ---------------------------------------------------------------------------------


def test_frames_are_evenly_spaced(capsys, tmp_path) -> None:
    path = tmp_path / "all.xyz"
    whole = example_structures("ethanol")
    write(path, whole)
    chosen = cli._read_structures(path, 4)
    assert [a.info["rmd17_index"] for a in chosen] == [whole[i].info["rmd17_index"] for i in (0, 3, 6, 9)]
    assert "using 4 of 10 structures" in capsys.readouterr().err
    assert len(cli._read_structures(path, 10)) == 10
    assert capsys.readouterr().err == ""


# --- a real potential ---------------------------------------------------------------------------


def test_inspect(capsys, tmp_path, so3lr_file) -> None:
    svg, html = tmp_path / "lower.svg", tmp_path / "lower.html"
    printed = success(capsys, "inspect", so3lr_file, "--svg", svg, "--html", html)
    assert "so3lr · w8a8 · tvm" in printed
    assert "def forward(" in printed
    assert "tvm s8·s8→s32" in printed
    assert svg.read_text().startswith("<svg")
    assert "<html" in html.read_text()
    assert "lower" in failure(capsys, "inspect", so3lr_file, "--stage", "nonsense")
    assert "gaq.int_irreps_linear(" in success(capsys, "inspect", so3lr_file, "--stage", "fold_integers")


def test_check(capsys, tmp_path, frames, so3lr_file) -> None:
    path = tmp_path / "report.json"
    printed = success(capsys, "check", so3lr_file, frames, "--frames", "2", "--json", path)
    assert "energy error" in printed
    found = check_report(path, ("accuracy", "equivariance", "conservativity"))
    assert found["model"] == "so3lr"
    assert (found["atoms"], found["accuracy"]["structures"]) == (24, 2)
    assert found["conservativity"]["scheme_is_conservative"] is False
    assert found["speed"]["eager_ms"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_check_loads_no_model_that_a_file_names(monkeypatch, so3lr_w8a8) -> None:
    """A checkpoint is a pickle: the file may name a pretrained model, only the user a checkpoint."""
    assert cli._original_name(so3lr_w8a8, None) == "so3lr"
    from dataclasses import replace

    monkeypatch.setattr(so3lr_w8a8, "report", replace(so3lr_w8a8.report, model="evil.pth"))
    assert cli._original_name(so3lr_w8a8, None) is None
    assert cli._original_name(so3lr_w8a8, "mine.pth") == "mine.pth"


def test_bench(capsys, tmp_path, frames, so3lr_file) -> None:
    path = tmp_path / "bench.json"
    argv = ("--frames", 1, "--runs", 2, "--warmup", 1, "--preload", "none", "--json", path)
    printed = success(capsys, "bench", so3lr_file, frames, *argv)
    assert "peak of the whole process" in printed
    found = check_report(path, tuple(REPORT_KEYS))
    assert found["speed"]["runs"] == 2
    memory = found["memory"]
    assert 0 < memory["compiled_growth_bytes"] < memory["compiled_peak_bytes"]
    assert 0 < memory["eager_growth_bytes"] < memory["eager_peak_bytes"]
    assert "w4" in failure(capsys, "bench", so3lr_file, frames, "--scheme", "w4")


@pytest.mark.slow
def test_quantize(capsys, tmp_path) -> None:
    pytest.importorskip("so3krates_torch")
    structures, out, report = tmp_path / "ethanol.xyz", tmp_path / "ethanol.gaq", tmp_path / "ethanol.json"
    write(structures, example_structures("ethanol")[:1])
    argv = ("--scheme", "w8a8", "--strict", "--json", report)
    printed = success(capsys, "quantize", "so3lr", structures, "-o", out, *argv)
    assert f"wrote {out}" in printed.replace("\n", "")
    found = check_report(report, tuple(REPORT_KEYS))
    assert (found["scheme"], found["atoms"], found["nodes"]["fallback"]) == ("w8a8", 9, [])
    assert "so3lr · w8a8 · tvm" in success(capsys, "inspect", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", "auto"), "max_force_error"),
        (("--scheme", "fp32", "--max-force-error", "5"), "rounded against"),
        (("--scheme", "auto", "--max-force-error", "-1"), "positive"),
    ],
)
def test_force_errors_that_cannot_be_kept(capsys, tmp_path, options, message) -> None:
    structures = tmp_path / "ethanol.xyz"
    write(structures, example_structures("ethanol")[:1])
    assert message in failure(capsys, "quantize", "so3lr", structures, "-o", tmp_path / "x.gaq", *options)


def test_own_warnings_are_told_and_others_are_not(capsys, monkeypatch) -> None:
    def app(**_: object) -> None:
        warnings.warn("the force error is too large", AccuracyWarning, stacklevel=1)
        warnings.warn("something will change", FutureWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", app)
    before = warnings.showwarning
    cli.main([])
    told = capsys.readouterr().err
    assert "warning: the force error is too large" in told and "change" not in told
    assert warnings.showwarning is before
