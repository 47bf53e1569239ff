"""`harli doctor` on installations: this one, and others made of a few files on a path of their
own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from sglang_harli.service.tokenizer import hidden_torch
from sglang_harli.sglang_versions import supported
from sglang_harli.tools.doctor.checks import device, installation, plugin
from sglang_harli.tools.doctor.finding import Status, ok, problem, skipped, together, warning
from support.project_files import PACKAGE


def needed(*names: str) -> set[str]:
    """Top-level names of the modules of distributions, and of all that those need."""
    seen: set[str] = set()
    waiting, found = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        there = importlib.metadata.distribution(name)
        found |= {file.parts[0] for file in there.files or () if not file.parts[0].endswith("-info")}
        wanted = (Requirement(text) for text in there.requires or ())
        waiting += [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found - {"..", "bin"}


# ------------------------------------------------------------------ findings
def test_findings_of_one_check_are_one():
    assert together([ok("a"), ok("b")]) == ok("a; b")
    assert together([ok("a"), warning("b", "do"), problem("c", "do")]) == problem("b; c", "do")
    assert together([ok("a"), skipped("b", "give it")]).status is Status.SKIPPED


# ------------------------------------------------------------------ packages
def versions(**there: str) -> Any:
    return lambda name: there.get(name.replace("-", "_"))


def test_packages_in_and_out_of_range():
    wanted = ["peft>=0.18", "pyzmq>=26", 'pytest>=8; extra == "dev"', "sglang>=0.5"]
    whole = list(installation.judge(wanted, versions(peft="0.18.0", pyzmq="27.0")))
    assert whole == []
    old, gone = installation.judge(wanted, versions(peft="0.17.1"))
    assert (old.status, old.found) == (Status.PROBLEM, "peft 0.17.1 is not >=0.18")
    assert gone.found == "pyzmq is not installed" and gone.mend == "pip install 'pyzmq>=26'"
    build = list(installation.judge(["torch==2.14.1"], versions(torch="2.14.1+cu130")))
    assert build == [], "a build of a version is that version"
    assert not list(installation.judge(["flask==1", "torch"], versions(torch="2"), only=("torch",)))
    (vendors,) = installation.judge(["torch==2.14.1"], versions(torch="2.13"), only=("torch",))
    assert vendors.status is Status.WARNING


def test_the_environment():
    assert installation.judge_environment({}).status is Status.OK
    finding = installation.judge_environment({"HARLI_ON": "1", "HARLI_POOL_DEBUG": "1"})
    assert finding.status is Status.WARNING
    assert finding.mend == "unset HARLI_ON; unset HARLI_POOL_DEBUG"


@pytest.mark.parametrize(
    ("asked", "status"), [("", Status.OK), ("static", Status.OK), ("cuda", Status.PROBLEM)]
)
def test_a_backing_that_does_not_exist_is_named(asked, status):
    finding = installation.judge_environment({"HARLI_POOL_BACKING": asked})
    assert finding.status is status
    assert (status is Status.OK) or "set one of host, aliased, remapped, static, off" in finding.mend


def test_this_installation(monkeypatch):
    # As in a process that has a tokenizer.
    monkeypatch.setattr(importlib.util, "find_spec", hidden_torch._without_torch)
    assert installation.python(None).status is Status.OK
    assert installation.packages(None).status is Status.OK
    assert installation.sglang(None).status is Status.OK
    here = installation.harli(None)  # a checkout on the path before the installed one is a warning
    assert here.status in (Status.OK, Status.WARNING), here
    assert plugin.plugin(None).status in (Status.OK, Status.WARNING)


def entry(value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint("harli", value, plugin.GROUP)


def test_entry_points():
    assert plugin.judge_entry_points([entry(plugin.VALUE)]).status is Status.OK
    assert "finds no plugin" in plugin.judge_entry_points([]).found
    assert plugin.judge_entry_points([entry(plugin.VALUE), entry("other:it")]).status is Status.PROBLEM
    assert plugin.judge_filter({}).status is Status.OK
    assert plugin.judge_filter({"SGLANG_PLUGINS": "a, harli"}).status is Status.OK
    kept_out = plugin.judge_filter({"SGLANG_PLUGINS": "a,b"})
    assert kept_out.status is Status.WARNING and "SGLANG_PLUGINS=a,b,harli" in kept_out.mend


def test_seams_and_hooks():
    whole = {"seams": 9, "broken": {}, "hooks": 3, "refused": {}}
    assert plugin.judge_seams(whole).status is Status.OK
    assert plugin.judge_hooks(whole).status is Status.OK
    many = {f"name{i}": "is gone" for i in range(7)}
    broken = plugin.judge_seams(whole | {"broken": many})
    assert broken.status is Status.PROBLEM
    assert "2 seams hold, 7 do not: name0: is gone" in broken.found and "and 2 more" in broken.found
    assert "1 of 3 hooks" in plugin.judge_hooks(whole | {"refused": {"a.b": "no"}}).found


# ------------------------------------------------------------------ device
CPU = {"torch": "2.14.1", "cuda": None, "devices": []}
CUDA = {
    "torch": "2.14.1+cu130",
    "cuda": "13.0",
    "devices": [{"name": "H200", "bytes": 140 << 30, "capability": [9, 0]}],
    "no_remapping": None,
}
UNSEEN = CUDA | {"devices": []}


def judged(answer: dict[str, Any], *, nodes: int = 0, kernels: str | None = "k 1", **environ: str) -> Any:
    return device.judge(answer, environ, driver="580.1", nodes=nodes, kernels=kernels)


def test_a_gpu():
    well = judged(CUDA, nodes=1)
    assert well.status is Status.OK
    assert "H200 (140.0 GiB, compute capability 9.0)" in well.found and "can be remapped" in well.found
    fixed = judged(CUDA | {"no_remapping": "not supported"})
    assert fixed.status is Status.WARNING and fixed.mend == "export HARLI_POOL_BACKING=static"
    assert judged(CUDA | {"no_remapping": "no"}, HARLI_POOL_BACKING="static").status is Status.OK
    assert judged(CUDA, kernels=None).status is Status.PROBLEM
    assert judged(CUDA, SGLANG_USE_CPU_ENGINE="1").status is Status.WARNING


def test_no_gpu():
    well = judged(CPU)
    assert well.status is Status.OK
    assert "SGLang's CPU engine (SGLANG_USE_CPU_ENGINE=(not set))" in well.found
    assert "stand-in for sgl_kernel (the installed k 1 needs a GPU)" in well.found
    assert "SGLANG_USE_CPU_ENGINE=1" in judged(CPU, SGLANG_USE_CPU_ENGINE="1").found


@pytest.mark.parametrize(
    ("answer", "environ", "mend"),
    [
        (CPU, {}, "built for CPUs"),
        (UNSEEN, {"CUDA_VISIBLE_DEVICES": ""}, "unset it"),
        (UNSEEN, {}, "does not serve CUDA 13.0"),
    ],
)
def test_a_gpu_that_torch_does_not_see(answer: dict[str, Any], environ: dict[str, str], mend: str):
    finding = judged(answer, nodes=1, **environ)
    assert finding.status is Status.PROBLEM and mend in finding.mend


def test_what_the_kernel_says_of_gpus(tmp_path: Path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n"
    )
    assert device.driver_version(tmp_path / "version") == "580.65.06"
    assert device.driver_version(tmp_path / "none") is None
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert device.gpu_nodes(tmp_path) == 2


# ------------------------------------------------------------------ other installations
class Site:
    """A folder in the place of site-packages, with what ``harli`` needs to start and no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in needed("typer", "packaging"):
            place = next(p for p in map(Path, sys.path) if (p / name).exists())
            (folder / name).symlink_to(place / name)
        # The package alone: beside it lies what an editable installation has left.
        self.sources = folder.with_name(f"{folder.name}-sources")
        self.sources.mkdir()
        (self.sources / PACKAGE.name).symlink_to(PACKAGE)

    def add(self, package: str, text: str = "", **metadata: str) -> None:
        (self.folder / package).mkdir(exist_ok=True)
        (self.folder / package / "__init__.py").write_text(text)
        for name, version in metadata.items():
            info = self.folder / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def doctor(self, *checks: str) -> tuple[int, dict[str, dict[str, str]]]:
        """The exit code and the checks by name."""
        only = [word for check in checks for word in ("--only", check)]
        code = (
            "import sys\n"
            "sys.path = [p for p in sys.path if p and 'site-packages' not in p] + [sys.argv.pop(1)]\n"
            "from sglang_harli.cli.main import main\nmain()"
        )
        done = subprocess.run(
            [sys.executable, "-S", "-c", code, str(self.folder), "doctor", "--json", *only],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.sources), str(self.folder)])},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout, done.stderr
        return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)


def test_nothing_is_installed(site: Site):
    code, found = site.doctor(
        "harli", "sglang", "packages", "plugin", "device", "seams", "job-store", "finetune-service"
    )
    assert code == 1
    assert found["harli"]["status"] == "problem"
    assert "no sglang-harli is installed" in found["harli"]["found"]
    assert found["sglang"]["found"].startswith("sglang is not installed")
    assert found["sglang"]["mend"] == f"pip install sglang=={supported.NEWEST}"
    assert (found["packages"]["status"], found["seams"]["status"]) == ("skipped", "skipped")
    assert found["plugin"]["status"] == "problem"
    assert found["device"]["found"] == "torch is not installed"
    assert "the check itself failed: ModuleNotFoundError" in found["job-store"]["found"]


def test_another_sglang_and_a_broken_torch(site: Site):
    site.add("sglang", "", sglang="0.5.19")
    site.add("torch", "raise OSError('libcudart.so.13: cannot open shared object file')", torch="2.14.1")
    code, found = site.doctor("sglang", "device", "hooks")
    assert code == 1
    assert "sglang 0.5.19 is not supported" in found["sglang"]["found"]
    assert "libcudart.so.13" in found["device"]["found"]
    assert found["hooks"]["status"] == "skipped"


def test_where_torch_cannot_be_used_sglang_is_not_blamed(site: Site):
    site.add("sglang", "", sglang=supported.NEWEST)
    site.add("torch", "raise OSError('libcudart.so.13: cannot open shared object file')", torch="2.14.1")
    _, found = site.doctor("device", "seams", "hooks")
    assert "libcudart.so.13" in found["device"]["found"]
    for name in ("seams", "hooks"):
        assert (found[name]["status"], found[name]["mend"]) == ("skipped", "see the check device")


def test_two_installations_and_one_that_is_hidden(site: Site, tmp_path: Path):
    site.add("sglang", "", sglang=supported.NEWEST)
    assert site.doctor("sglang")[0] == 0
    (tmp_path / "other" / "sglang").mkdir(parents=True)
    (tmp_path / "other" / "sglang" / "__init__.py").touch()
    other, site.folder = site.folder, tmp_path / "other"
    hidden = Site(site.folder)
    hidden.folder.joinpath(f"sglang-{supported.NEWEST}.dist-info").symlink_to(
        other / f"sglang-{supported.NEWEST}.dist-info"
    )
    both = subprocess.run(
        [sys.executable, "-S", "-c", _PLACED, str(other), str(hidden.folder)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    first, second = both.stdout.splitlines()
    assert first.startswith("problem") and "installed 2 times" in first, both.stderr
    assert second.startswith("warning") and "which is not the installed sglang" in second


_PLACED = """
import sys
one, two = sys.argv[1:]
sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [one, two]
from sglang_harli.tools.doctor.checks.installation import placed
import shutil, pathlib
finding = placed('sglang', 'sglang')
print(finding.status, finding.found)
for info in pathlib.Path(two).glob('*.dist-info'):
    info.unlink()
sys.path[:] = [p for p in sys.path if p not in (one, two)] + [two, one]
finding = placed('sglang', 'sglang')
print(finding.status, finding.found)
"""
