"""The house: what a newcomer reads first agrees with what is there."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from sglang_harli.sglang_versions import supported
from support.project_files import PACKAGE, ROOT, code_files, parse, project_files, relative

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CLASSES = ("unit", "sglang", "e2e", "gpu")
PAGES = sorted([ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")])
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "patches").glob("*.md"))
PAGES += [p for p in (ROOT / "benchmark" / "README.md",) if p.exists()]


def file_tree() -> str:
    """The README's annotated tree: its one code block with the package's folder in it."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", README, flags=re.DOTALL)
    (tree,) = [b for b in blocks if "python/sglang_harli/" in b and "qos_policy.py" in b]
    return tree


def test_first_command_stands_before_line_30():
    first = next(n for n, line in enumerate(README.splitlines(), 1) if re.match(r"\s*(\$ )?make \w+", line))
    assert first < 30, f"the README's first command is on line {first}"


def test_file_tree_names_every_folder_and_module():
    tree = file_tree()
    folders = {f.relative_to(PACKAGE).parts[0] for f in PACKAGE.rglob("*.py") if f.parent != PACKAGE}
    tops = {p.relative_to(ROOT).parts[0] for p in project_files() if p.parent != ROOT}
    modules = {p.name for p in PACKAGE.glob("*.py") if p.name != "__init__.py"}
    missing = [
        f"{name}/" for name in sorted(folders | tops) if not re.search(rf"\b{name}/|{re.escape(name)}/", tree)
    ]
    missing += [name for name in sorted(modules) if name not in tree]
    assert not missing, f"the README's file tree does not mention {missing}"


def test_file_tree_names_nothing_that_is_not_there():
    known = {p.name for p in project_files()} | {part for p in project_files() for part in p.parts}
    named = re.findall(r"[\w.-]+\.(?:py|md|toml|txt|diff)\b", file_tree())
    gone = sorted({n for n in named if n not in known and not n.startswith("NN-")})
    assert not gone, f"the README's file tree mentions what is not there: {gone}"


def test_reading_list_names_files_that_exist():
    section = README.split("Read these files in this order", 1)[1].split("\n## ", 1)[0]
    files = re.findall(r"`((?:python|docs|test)/[\w./-]+)`", section)
    assert len(files) >= 5
    missing = [f for f in files if not (ROOT / f).exists()]
    assert not missing


def named_paths(page: Path) -> set[str]:
    """Files and folders in backticks: from the root or, where a page speaks of the package, from
    there; of a command its arguments."""
    text = page.read_text(encoding="utf-8")
    words = {word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    return {
        word for word in words if re.fullmatch(r"[\w.]+(?:/[\w.-]+)+/?", word) and not word.startswith("/")
    }


def test_where_to_change_has_ten_tasks_and_names_what_is_there():
    page = ROOT / "docs" / "where-to-change.md"
    tasks = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(tasks) == 10
    assert all("\n1. `" in task and re.search(r"\nTest:\s`pytest ", task) for task in tasks)
    gone = sorted(path for path in named_paths(page) if not (ROOT / path).exists())
    assert not gone, f"docs/where-to-change.md names what is not there: {gone}"


def test_the_architecture_names_what_is_there():
    page = ROOT / "docs" / "architecture.md"
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 150
    paths = named_paths(page)
    gone = sorted(path for path in paths if not (ROOT / path).exists() and not (PACKAGE / path).exists())
    assert len(paths) > 25 and not gone, f"docs/architecture.md names what is not there: {gone}"


def test_pages_that_the_code_names_are_there():
    code = {p: p.read_text(encoding="utf-8") for p in code_files()}
    gone = [
        f"{relative(path)}: {page}"
        for path, text in code.items()
        for page in re.findall(r"\bdocs/[\w/-]+\.md", text)
        if not (ROOT / page).exists()
    ]
    assert not gone, f"pages that are not there: {gone}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_name_no_machine(page):
    found = re.findall(r"(?:/home|/root|/Users|/mnt|/opt)/[\w./-]*", page.read_text(encoding="utf-8"))
    assert not found, f"{relative(page)} names places of one machine: {found}"


def test_changelog_has_the_version():
    version = PYPROJECT["project"]["version"]
    assert re.search(
        rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )


def test_each_supported_sglang_has_its_constraints():
    files = {f"sglang-{version}.txt" for version in supported.SUPPORTED}
    assert {p.name for p in (ROOT / "constraints").iterdir()} == files
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^SUPPORTED := {' '.join(supported.SUPPORTED)}$", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("version", supported.SUPPORTED)
def test_constraints_are_exact_and_name_no_host(version):
    lines = (ROOT / "constraints" / f"sglang-{version}.txt").read_text().splitlines()
    assert f"sglang=={version}" in lines
    wrong = [line for line in lines if re.search(r"https?:|file:|@ |^-", line)]
    assert not wrong, f"names places: {wrong[:3]}"
    pins = [line for line in lines if line and not line.startswith("#")]
    inexact = [line for line in pins if not re.match(r"^[A-Za-z0-9._-]+==[^\s*]+( ; .+)?$", line)]
    assert not inexact, f"not exact: {inexact[:3]}"
    names = {re.split(r"==", line)[0].lower() for line in pins}
    wanted = [*PYPROJECT["project"]["dependencies"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    asked = {re.split(r"[\[<>=!~ ]", w)[0].lower() for w in wanted}
    assert asked <= names, f"run `make lock`: no exact version of {sorted(asked - names)}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken, f"{relative(page)}: {broken}"


def anchors(page: Path) -> set[str]:
    """The anchors that a rendered page gives its headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_test_file_belongs_to_one_class():
    tests = [p for p in project_files() if p.name.startswith("test_") and p.suffix == ".py"]
    stray = [
        relative(p) for p in tests if p.relative_to(ROOT).parts[:2] not in {("test", c) for c in CLASSES}
    ]
    assert not stray, f"move these to one of test/{{{','.join(CLASSES)}}}/: {stray}"
    twice = [name for name, count in Counter(p.name for p in tests).items() if count > 1]
    assert not twice, f"test files need names of their own (pytest imports them by name): {twice}"


def test_unit_tests_do_not_import_sglang():
    tests = [
        p for p in project_files() if p.relative_to(ROOT).parts[:2] == ("test", "unit") and p.suffix == ".py"
    ]
    wrong = [
        relative(p)
        for p in tests
        if re.search(r"^\s*(import|from) sglang\b(?!_)", p.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    assert not wrong, f"test/unit runs without sglang; test/sglang is for {wrong}"


def test_makefile_has_its_targets_and_ci_calls_them():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"install", "demo", "test", "test-long", "lint", "bench", "wheel", "lock"} <= targets
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert {"timed make lint", "timed make test", "timed make test-long"} <= set(lines)


def test_each_patch_has_its_page_its_diff_and_its_runtime_half():
    pages = {p.stem for p in (ROOT / "patches").glob("[0-9]*.md")}
    diffs = {p.stem for p in (ROOT / "patches").glob("*/[0-9]*.diff")}  # of each SGLang that needs it
    assert pages == diffs
    assert pages, "patches/ is empty"
    folder = PACKAGE / "patches"
    halves = {
        "-".join(p.relative_to(folder).with_suffix("").parts).replace("_", "-") for p in folder.rglob("*.py")
    }
    without = sorted(name for name in pages if name.split("-", 1)[1] not in halves)
    assert not without, f"no runtime half under sglang_harli/patches/ for {without}"


BUILDERS = (
    "managers/scheduler/trainer_setup.py",
    "managers/scheduler/profile_setup.py",
    "managers/scheduler/memory/pool_setup.py",
    "service/app.py",
)


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_make_whole_objects(name: str):
    """What an object needs goes through its constructor: a builder assigns no attribute of another
    object."""
    targets: list[ast.expr] = []
    for node in ast.walk(parse(PACKAGE / name)):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets.append(node.target)
    flat = [part for target in targets for part in getattr(target, "elts", [target])]
    others = [
        f"{name}:{part.lineno}: {ast.unparse(part)}"
        for part in flat
        if isinstance(part, ast.Attribute) and ast.unparse(part.value) != "self"
    ]
    assert not others, f"pass these to constructors: {others}"
