"""Which shipped files answer for a processor, and that they are found and usable where the package is."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import gaq_compile
from gaq_compile.backends.tvm import database
from gaq_compile.backends.tvm.build import tvm_version
from gaq_compile.backends.tvm.database import KernelKey, packaged
from gaq_compile.backends.tvm.target_family import target_families
from gaq_compile.backends.tvm.tune_space import FAMILIES

ROOT = Path(gaq_compile.__file__).parent
SHIPPED = sorted((ROOT / "data" / "tuning").glob("*.jsonl"))
KEY = KernelKey("linear", '{"spec": "x"}', 64, json.dumps({"kind": "llvm", "mcpu": "znver5"}))


def cpu(name: str, **more: Any) -> str:
    return json.dumps({"kind": "llvm", "mcpu": name, **more})


@pytest.mark.parametrize(
    ("name", "families"),
    [
        ("znver4", ("znver4", "x86-64-v4")),
        ("znver5", ("znver5", "znver4", "x86-64-v4")),
        ("cascadelake", ("cascadelake", "skylake-avx512", "x86-64-v4")),
        ("sapphirerapids", ("sapphirerapids", "icelake-server", "x86-64-v4")),
        ("haswell", ("haswell", "skylake", "x86-64-v3")),
        ("x86-64-v3", ("x86-64-v3",)),
        ("x86-64", ("x86-64",)),
        ("neoverse-n1", ("neoverse-n1",)),
    ],
)
def test_a_processor_is_answered_by_its_own_file_then_by_its_relatives(
    name: str, families: tuple[str, ...]
) -> None:
    assert target_families(cpu(name)) == families


def test_features_and_cores_do_not_make_another_family() -> None:
    assert target_families(cpu("znver4", mattr=["+avx512f"], **{"num-cores": 8})) == (
        target_families(cpu("znver4"))
    )


@pytest.mark.parametrize("target", [{"kind": "llvm"}, {"kind": "cuda", "arch": "sm_80"}, {}])
def test_what_nothing_is_known_of_has_no_files(target: dict[str, str]) -> None:
    assert packaged(json.dumps(target)) == ()
    assert database.choice(KernelKey("linear", "{}", 64, json.dumps(target))) is None


def test_nearer_files_are_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(database.resources, "files", lambda _: tmp_path)
    folder = tmp_path / "data" / "tuning"
    folder.mkdir(parents=True)
    for name in ("x86-64-v4", "znver4", "znver5"):
        found = database.choice(KEY)
        line = KEY.record("choice", 1, schedule={"of": name})
        (folder / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
        assert found is None or found["schedule"] != {"of": name}
        assert database.choice(KEY)["schedule"] == {"of": name}  # type: ignore[index]
    database.append(KEY.target, KEY.record("choice", 1, schedule={"of": "user"}))
    assert database.choice(KEY)["schedule"] == {"of": "user"}  # type: ignore[index]


def test_shipped_files_are_package_data(tmp_path: Path) -> None:
    data = [
        l for l in (ROOT.parent / "pyproject.toml").read_text().splitlines() if l.startswith("gaq_compile =")
    ]
    assert SHIPPED and '"data/tuning/*.jsonl"' in data[0]


def test_an_installed_package_finds_its_files(tmp_path: Path) -> None:
    """Laid out as a wheel unpacks: package data and code in another folder."""
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in ROOT.rglob("*"):
            if path.suffix in (".py", ".jsonl") and path.is_file():
                made.write(path, Path("gaq_compile") / path.relative_to(ROOT))
    site = tmp_path / "site"
    with zipfile.ZipFile(archive) as made:
        made.extractall(site)
    name = SHIPPED[0].stem
    code = (
        "from gaq_compile.backends.tvm.database import packaged, choice, KernelKey, problem_text\n"
        "import json, sys\n"
        f"target = json.dumps({{'kind': 'llvm', 'mcpu': {name!r}}})\n"
        "path = packaged(target)[0]\n"
        "line = json.loads(path.read_text().splitlines()[0])\n"
        "key = KernelKey(line['family'], problem_text(line['problem']), line['rows'], target)\n"
        "print(path); print(choice(key)['schedule'] == line['schedule'])"
    )
    environment = {"PYTHONPATH": str(site), "GAQ_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.splitlines()[-2:]
    assert Path(where).is_relative_to(site) and found == "True"


@pytest.mark.parametrize("path", SHIPPED, ids=[p.stem for p in SHIPPED])
def test_every_shipped_line_is_a_choice_that_a_kernel_can_run_with(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines and path.stat().st_size < 200_000
    assert len(lines) == len({(r["family"], str(r["problem"]), r["rows"], r["threads"]) for r in lines})
    for record in lines:
        assert record["kind"] == "choice" and record["changed"]
        assert record["tvm"] == tvm_version(), "made with another TVM: tune again"
        target = json.dumps({"kind": "llvm", "mcpu": path.stem})
        key = KernelKey(record["family"], database.problem_text(record["problem"]), record["rows"], target)
        family = FAMILIES[key.family]
        assert record["schedule"].keys() == family.default(key).keys()
        assert family.text(key, record["schedule"], record["threads"])[0]
