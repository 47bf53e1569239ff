"""The seam check: this SGLang has what ours leans on, and a copy with one seam broken has not."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harli.seams import assumptions, read_checks
from sglang_harli.seams.leans import Lean, leans
from sglang_harli.seams.source import SourceTree
from sglang_harli.sglang_versions import supported
from sglang_harli.tools import seam_check

SGLANG = seam_check.installed()
FILES = supported.folder()
ASSUMED_HERE = assumptions.ASSUMPTIONS[FILES]


def broken(folder: Path, file: str, old: str, new: str, *, regex: bool = False) -> SourceTree:
    """The installed SGLang by symbolic links, but for one file."""
    place, here = folder, SGLANG
    *parents, name = ("sglang", *file.split("/"))
    for part in [*parents, None]:
        place.mkdir(exist_ok=True)
        for path in here.iterdir() if here != SGLANG else [here / "sglang"]:
            if path.name not in (part, name if part is None else None):
                (place / path.name).symlink_to(path)
        if part is not None:
            place, here = place / part, here / part
    text = (here / name).read_text()
    changed = re.sub(old, new, text) if regex else text.replace(old, new)
    assert changed != text
    (place / name).write_text(changed)
    return SourceTree(folder)


def problems(tree: SourceTree) -> dict[str, str]:
    found = {checked.lean.name: checked.problem for checked in read_checks.check(tree, leans(FILES))}
    found |= {name: holds(tree) for name, holds in ASSUMED_HERE.items()}
    return {name: problem for name, problem in found.items() if problem}


def test_the_installed_sglang_has_every_seam():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sglang_harli.tools.seam_check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"sglang [\w.]+: \d+ hold, 0 do not", lines[-1])
    kinds = {line.split()[1] for line in lines[:-1]}
    assert kinds == {"import", "hook", "override", "member", "assumption:", "called:"} and len(lines) > 200


@pytest.mark.long
@pytest.mark.skipif(supported.folder() == "pinned", reason="a version after it is read as the newest")
def test_an_installed_sglang_that_is_not_supported_is_read_and_called(tmp_path):
    """Also beside an unpacked wheel."""
    (tmp_path / "here" / "sglang" / "srt").mkdir(parents=True)
    version = f"{supported.NEWEST}.post9"
    metadata = tmp_path / "path" / f"sglang-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    path = os.pathsep.join([str(metadata.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sglang_harli.tools.seam_check", "--problems"],
        env=dict(os.environ) | {"PYTHONPATH": path},
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(rf"sglang {version}: \d\d\d hold, 0 do not\n", done.stdout)


SCHEDULER = "srt/managers/scheduler.py"
BREAKS = [
    # a name that ours imports
    (
        "srt/lora/lora_registry.py",
        r"\bLoRARef\b",
        "LoRAReference",
        "sglang.srt.lora.lora_registry.LoRARef",
        "is gone",
    ),
    # a method that ours hooks, gone and with another parameter
    (
        "srt/entrypoints/engine.py",
        r"def _launch_subprocesses\(",
        "def _start_subprocesses(",
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        "is gone",
    ),
    (
        "srt/managers/io_struct.py",
        r"def _normalize_rid\(self, \w+",
        "def _normalize_rid(self",
        "sglang.srt.managers.io_struct.GenerateReqInput._normalize_rid",
        "takes 1 arguments, ours asks for 2",
    ),
    # a method that ours overrides
    (
        SCHEDULER,
        r"def on_idle\(self",
        "def when_idle(self",
        "sglang.srt.managers.scheduler.Scheduler.on_idle",
        "is gone",
    ),
    (
        SCHEDULER,
        r"def maybe_sleep_on_idle\(self",
        "def maybe_sleep_on_idle(self, *, forced",
        "sglang.srt.managers.scheduler.Scheduler.maybe_sleep_on_idle",
        "has keyword parameters that ours does not take: forced",
    ),
    # what ours reads by attribute
    (
        SCHEDULER,
        r"\b_engine_paused\b",
        "_paused",
        "sglang.srt.managers.scheduler.Scheduler._engine_paused",
        "is gone",
    ),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "name", "problem"), BREAKS, ids=[b[3].split(".")[-1] for b in BREAKS]
)
def test_a_broken_seam_is_named(tmp_path, file, old, new, name, problem):
    found = problems(broken(tmp_path / "copy", file, old, new, regex=True))
    assert problem in found[name]


NEWEST = FILES == "newest"
ASSUMED = [
    (
        "srt/entrypoints/http_server.py",
        '"/health_generate"',
        '"/alive"',
        "readiness is /ready and /health_generate" if NEWEST else "readiness is /health_generate",
    ),
    (
        "srt/managers/io_struct.py",
        "class CheckWeightsReqInput",
        "class SwapWeightsReqInput",
        "requests that change weights are guarded",
    ),
    (
        "srt/mem_cache/registry.py",
        "return create_unified_radix_cache(" if NEWEST else "return RadixCache(",
        "return AnotherRadixCache(",
        f"the default prefix cache is {'UnifiedRadixCache' if NEWEST else 'RadixCache'}",
    ),
]


@pytest.mark.parametrize(("file", "old", "new", "name"), ASSUMED, ids=[a[3] for a in ASSUMED])
def test_an_assumption_that_no_longer_holds_is_named(tmp_path, file, old, new, name):
    assert name in problems(broken(tmp_path / "copy", file, old, new))


# Sources in which a name is there whose absence is assumed.
PRESENT = {
    "ServerArgs() resolves its values": (
        "srt/server_args.py",
        "class ServerArgs:\n    def resolve_once(self): ...",
    ),
    "the paged allocator's frees are release_pages": (
        "srt/mem_cache/allocator.py",
        "class PagedTokenToKVPoolAllocator:\n    num_staged_pages = 0",
    ),
    "the HTTP server is Python's": ("srt/environ.py", "class Envs:\n    SGLANG_RUST_SERVER = False"),
    "a prefill may follow each decode step": (
        "srt/arg_groups/fields/schedule.py",
        "class Fields:\n    prefill_decode_interval: int = 1",
    ),
}


def test_another_way_to_free_slots_is_named(tmp_path):
    path = tmp_path / "sglang/srt/mem_cache/allocator.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "class BaseTokenToKVPoolAllocator:\n    def free(self): ...\n    def free_all(self): ...\n"
    )
    [name] = [name for name in ASSUMED_HERE if name.startswith("KV slots are freed")]
    assert "free_all free too" in str(ASSUMED_HERE[name](SourceTree(tmp_path)))


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (supported.PINNED, "pinned"),
        (f"{supported.PINNED}.post1", "pinned"),
        ("0.5.22.post1", "pinned"),
        (supported.NEWEST, "newest"),
        (f"{supported.NEWEST}.post1", "newest"),
        ("0.6.0", "newest"),
        ("0.5.9", "newest"),
    ],
)
def test_a_version_is_read_against_the_supported_one_before_it(version, files):
    assert seam_check.files_for(version) == files


def test_every_assumption_can_fail(tmp_path):
    """Those of a name that is there fail without any sources, the others with the name."""
    nothing = SourceTree(tmp_path / "nothing")
    silent = {name for name, holds in ASSUMED_HERE.items() if holds(nothing) is None}
    assert silent == PRESENT.keys() & ASSUMED_HERE.keys()
    for number, (name, (file, text)) in enumerate((name, PRESENT[name]) for name in sorted(silent)):
        path = tmp_path / str(number) / "sglang" / file
        path.parent.mkdir(parents=True)
        path.write_text(text + "\n")
        assert ASSUMED_HERE[name](SourceTree(tmp_path / str(number))), name


def test_the_command_reads_an_unpacked_wheel_and_says_what_is_none(tmp_path, capsys):
    broken(
        tmp_path / "copy",
        "srt/entrypoints/engine.py",
        "def _launch_subprocesses(",
        "def _start_subprocesses(",
    )
    (tmp_path / "copy" / "sglang-9.9.9.dist-info").mkdir()
    assert seam_check.version_of(tmp_path / "copy") == "9.9.9"
    page = seam_check.table([tmp_path / "copy", SGLANG])
    assert "| seam | 9.9.9 |" in page and "Engine._launch_subprocesses (plugin.py) | is gone |  |" in page
    assert seam_check.table([SGLANG]) == f"All seams hold in {seam_check.version_of(SGLANG)}."
    with pytest.raises(Exception, match="holds no sglang/srt"):
        seam_check.read(tmp_path)


# ------------------------------------------------------------------ reading
@pytest.fixture
def small(tmp_path: Path) -> SourceTree:
    files = {
        "pkg/__init__.py": "from pkg.inner import *\nfrom pkg.other import Made as Renamed\nfrom numpy import array\n",
        "pkg/inner/__init__.py": "from .base import Base\n",
        "pkg/inner/base.py": "class Base:\n    field: int = 0\n    def method(self, a, *, b=1): self.set_here = a\n",
        "pkg/other.py": "import pkg.inner.base as base\ntry:\n    class Made(base.Base):\n        pass\nexcept Exception:\n    pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return SourceTree(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pkg.Base", ast.ClassDef),
        ("pkg.Renamed", ast.ClassDef),
        ("pkg.Renamed.method", ast.FunctionDef),
        ("pkg.other.Made.field", ast.AnnAssign),
        ("pkg.Renamed.set_here", ast.Attribute),
        ("pkg.array", ast.ImportFrom),
        ("pkg.inner.base", type(None)),
    ],
)
def test_names_are_followed(small, name, kind):
    found = small.find(name)
    assert found is not None and isinstance(found.node, kind)


def test_a_module_that_cannot_be_parsed_has_no_names(small):
    (small.folder / "pkg" / "newer.py").write_text("match = type X = int\n")
    assert small.find("pkg.newer.X") is None


@pytest.mark.parametrize("name", ["pkg.Nobody", "pkg.Renamed.nothing", "pkg.nowhere.Base", "missing.x"])
def test_names_that_are_not_there(small, name):
    assert small.find(name) is None


@pytest.mark.parametrize(
    ("target", "hook", "kind", "says"),
    [
        ("def f(self, a): ...", "def f(original, self, a): return original(self, a)", "around", None),
        ("def f(self, a): ...", "def f(original, *args, **kw): return original(*args, **kw)", "around", None),
        ("def f(self, a, b): ...", "def f(original, self, a): return original(self, a)", "around", "has more parameters"),
        ("def f(self): ...", "def f(self, a): ...", "before", "takes 1 arguments, ours asks for 2"),
        ("def f(self, *, a): ...", "def f(self): ...", "before", "has keyword parameters"),
        ("def f(self, a): ...", "def f(result, self, a): ...", "after", None),
        ("def f(self, a): ...", "def f(original, *args): return original(a=1, c=2)", "around", "with c, which it does not"),
        ("def f(self, a): ...", "def f(original, self, a): return original(self)", "around", "without a"),
        ("def f(self): ...", "def f(original, self): return original(self, 1)", "around", "with 2 arguments"),
    ],
)  # fmt: skip
def test_what_fits(target, hook, kind, says):
    [theirs], [ours] = (ast.parse(text).body for text in (target, hook))
    lean = Lean("x.f", "hook", "plugin.py", kind, "y:f")
    found = read_checks._misfit(theirs, ours, lean)  # type: ignore[arg-type]
    assert found is None if says is None else says in (found or "")
