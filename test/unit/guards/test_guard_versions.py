"""What differs between SGLang's versions lies in one folder, in the same names for each."""

from __future__ import annotations

import ast
import re

import pytest

from sglang_harli.sglang_versions import supported
from support.project_files import PACKAGE, ROOT, package_files, parse, relative

FOLDER = PACKAGE / "sglang_versions"
# What else may ask which version it is, and why.
ASKS = {
    "plugin.py": "the gate: a version that is not supported is refused, or left alone",
    "managers/scheduler/profile_setup.py": "a profile is of one version",
    "managers/http/supervision/supervisor.py": "names it to the service, which cannot look",
    "seams/leans.py": "the seam check reads versions that are not installed",
    "seams/called_checks.py": "as above",
    "tools/seam_check.py": "as above",
    "tools/doctor/checks/installation.py": "names it to the user, and what to install",
    "tools/doctor/checks/plugin.py": "as above",
}
NAMES = {"is_supported", "installed", "folder", "FOLDERS", "SUPPORTED", "NEWEST", "PINNED"}


def asks(tree: ast.Module) -> list[int]:
    """Lines that ask for SGLang's version."""
    lines = []
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.ImportFrom | ast.Call) else ""
        of_ours = any(text == f"supported.{name}" for name in NAMES)
        imported = isinstance(node, ast.ImportFrom) and node.module in (
            "sglang.version",
            "sglang_harli.sglang_versions.supported",
        )
        distribution = text.endswith(("version('sglang')", "distribution('sglang')"))
        if of_ours or imported or distribution or "sglang.__version__" in text:
            lines.append(node.lineno)
    return lines


def test_no_other_file_asks_for_the_version():
    wrong = [
        f"{relative(path)}:{line}"
        for path in package_files()
        if FOLDER not in path.parents and path.relative_to(PACKAGE).as_posix() not in ASKS
        for line in asks(parse(path))
    ]
    assert not wrong, "ask sglang_versions.current for what differs:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "from sglang.version import __version__",
        "import sglang\nx = sglang.__version__ > '0.5.20'",
        "from importlib import metadata\nx = metadata.version('sglang')",
        "from sglang_harli.sglang_versions.supported import NEWEST",
        "from sglang_harli.sglang_versions import supported\nx = supported.folder()",
    ],
)
def test_asking_is_seen(text):
    assert asks(ast.parse(text))


def test_the_exceptions_ask():
    idle = [name for name in ASKS if not asks(parse(PACKAGE / name))]
    assert not idle, f"these ask no more: {idle}"


def public(folder: str) -> dict[str, dict[str, str]]:
    """By module: its public names, functions with their parameters."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((FOLDER / folder).glob("*.py")):
        names = found.setdefault(path.name, {})
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names[node.name] = f"({ast.unparse(node.args)})"
            elif isinstance(node, ast.ClassDef):
                names[node.name] = "class"
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {t.id: "" for t in targets if isinstance(t, ast.Name)}
        for name in [name for name in names if name.startswith("_")]:
            del names[name]
    return found


def test_each_version_has_the_same_names():
    newest, pinned = (public(supported.FOLDERS[v]) for v in (supported.NEWEST, supported.PINNED))
    assert newest.keys() == pinned.keys()
    assert newest == pinned


def test_each_module_is_known_to_the_type_checker():
    listed = (FOLDER / "current.py").read_text()
    missing = [
        name
        for name in public("newest")
        if name != "__init__.py" and f"import {name[:-3]} as {name[:-3]}" not in listed
    ]
    assert not missing, f"sglang_versions/current.py does not list {missing}"


def test_the_page_names_tests_that_are_there():
    page = (ROOT / "docs" / "sglang-versions.md").read_text()
    named = re.findall(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    for path, name in named:
        file = ROOT / path if path.startswith("test/") else ROOT / "test" / "sglang" / path
        assert file.is_file(), path
        assert f"def {name}(" in file.read_text() or not name, f"{path}::{name}"


def test_the_page_names_each_version_and_what_has_run_on_a_gpu():
    page = (ROOT / "docs" / "sglang-versions.md").read_text()
    for version in supported.SUPPORTED:
        pins = (ROOT / "constraints" / f"sglang-{version}.txt").read_text()
        torch, transformers = (
            re.search(rf"^{name}==(\S+)$", pins, re.MULTILINE) for name in ("torch", "transformers")
        )
        assert torch and transformers
        assert f"| {version} | {torch[1]}, {transformers[1]} |" in page
    assert "run on a GPU with this project" in page
