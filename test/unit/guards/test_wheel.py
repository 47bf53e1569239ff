"""The wheel holds what runs: install it elsewhere, without this checkout, and import from it."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from sglang_harli.sglang_versions import supported
from support.project_files import PACKAGE, ROOT

PARTS = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout gets no build folders."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "python" / "sglang_harli", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_module_and_the_typing_mark(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = PACKAGE.parent
    expected = {
        p.relative_to(package).as_posix() for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts
    }
    assert expected <= names, f"not in the wheel: {sorted(expected - names)}"
    assert "sglang_harli/py.typed" in names
    for folder in ("patches", "platforms/cpu"):
        inside = [
            n for n in names if n.startswith(f"sglang_harli/{folder}/") and not n.endswith("__init__.py")
        ]
        assert inside, f"the wheel holds nothing of {folder}"
    assert any(n.startswith("sglang_harli/platforms/cpu/") and "/sgl_kernel/" in n for n in names)


def test_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"sglang_harli"}


def test_wheel_names_its_entry_points_and_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert entries["sglang.srt.plugins"]["harli"] == "sglang_harli.plugin:activate"
    assert entries["console_scripts"]["harli"] == "sglang_harli.cli.main:main"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert any(n.startswith(f"{info}/licenses/") and n.endswith("LICENSE") for n in archive.namelist())


def test_the_metadata_accepts_the_supported_versions_of_sglang_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = {n for n in archive.namelist() if n.endswith(".dist-info/METADATA")}
    (needed,) = re.findall(r"^Requires-Dist: sglang([^;\n]*)$", archive.read(path).decode(), re.MULTILINE)
    accepts = SpecifierSet(needed)
    for version in supported.SUPPORTED:
        assert version in accepts
    between = {f"0.5.{number}" for number in range(10, 30)} - set(supported.SUPPORTED)
    refused = [*between, "0.5.15.post1", "0.5.22.post1", "0.5.23.post1", "0.5.24rc1", "0.6.0", "1.0"]
    assert [version for version in refused if version in accepts] == []


def test_beside_a_supported_sglang_the_wheel_brings_none_and_no_torch(wheel, tmp_path):
    report = tmp_path / "report.json"
    run(
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet"),
        *("--disable-pip-version-check", "--report", str(report), str(wheel)),
        cwd=tmp_path,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},  # a machine may constrain what is there
    )
    listed = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    assert listed <= {"sglang-harli"}
    assert supported.is_supported()


def test_installed_wheel_runs_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"),
        *("--disable-pip-version-check", "--target", str(target), str(wheel)),
        cwd=tmp_path,
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    code = (
        "import sglang_harli, sglang_harli.client.blocking_client, sglang_harli.config, sglang_harli.protocol.public\n"
        "import sglang_harli.service.jobs.transitions\n"
        "from sglang_harli import AsyncFinetuneClient, FinetuneClient\n"
        "print(sglang_harli.__file__)"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path, env=env).strip().startswith(str(target))
    assert "submit" in run(sys.executable, "-m", "sglang_harli.cli", "--help", cwd=tmp_path, env=env)
