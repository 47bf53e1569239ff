"""Imports run downwards only, and heavy libraries stay out of the modules that must load in
milliseconds."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support.project_files import PACKAGE, module_name, package_files, parse, relative

GROUND = {
    *("architectures", "core", "device_sizes", "errors", "failpoints", "names", "run_paths"),
    "train_memory",
}
BASE = GROUND | {"config", "protocol"}
APART = {"predictor", "mem_cache", "peft_trainer", "service"}
INSIDE = BASE | APART | {"managers", "server_args", "patches", "platforms", "sglang_versions"}

# Who may import whom: a top-level module or folder and the other folders that it may see.
ALLOWED: dict[str, set[str]] = {
    "": {"client"},  # `from sglang_harli import FinetuneClient`, resolved when asked for
    **{ground: set() for ground in GROUND - {"train_memory"}},
    "train_memory": {"core"},
    "config": {"core", "device_sizes", "errors", "run_paths"},
    "protocol": GROUND,
    **dict.fromkeys(APART, BASE),
    "mem_cache": BASE | {"sglang_versions"},
    "service": BASE | {"sglang_versions"},  # chat_fields, which is pure
    "platforms": {"errors"},
    "sglang_versions": {"errors"},
    "patches": BASE | {"platforms", "sglang_versions"},
    "server_args": BASE | {"platforms", "sglang_versions"},
    "managers": INSIDE,
    "client": BASE,
    "simulation": BASE | {"managers"},
    "plugin": INSIDE,
    "seams": INSIDE | {"plugin"},
    "tools": INSIDE | {"client", "seams"},
    "launch_server": INSIDE | {"tools", "plugin"},
    "cli": BASE | {"client", "simulation", "tools"},
}

# The modules and folders that lean on SGLang.  An upgrade begins with this list.
SGLANG = (
    "launch_server",
    "plugin",
    "server_args",
    "managers.http",
    "managers.scheduler.control",
    "managers.scheduler.scheduler",
    "managers.scheduler.memory.pool_setup",
    "managers.scheduler.training.adapter_loader",
    "mem_cache.kv",
    "patches",
    "peft_trainer.base.frozen_base",
    "platforms.cpu",
    "seams.called_checks",
    "seams.hooks_applied",
    "sglang_versions",
)

# Must import without torch, sglang or transformers: `harli --help` and the pure folders.
LIGHT = (
    "architectures",
    "core",
    "device_sizes",
    "failpoints",
    "names",
    "run_paths",
    "train_memory",
    "errors",
    "config",
    "client.blocking_client",
    "cli.main",
    "protocol.public",
    "protocol.internal",
    "protocol.shared_memory",
    "mem_cache.chunk_ledger",
    "mem_cache.geometry",
    "mem_cache.quota",
    "mem_cache.backing.intervals",
    "managers.scheduler.policy.qos_policy",
    "managers.scheduler.policy.slo_ledger",
    "managers.scheduler.policy.slotting",
    "managers.scheduler.step_timer",
    "managers.scheduler.policy.serving_state",
    "managers.scheduler.policy.waiting_prompts",
    "sglang_versions.supported",
    "sglang_versions.current",
    "predictor.latency_predictor",
    "predictor.line.fit",
    "predictor.profile.profile_table",
    "predictor.profile.sweep",
)
HEAVY = ("torch", "sglang", "transformers", "peft")


def imports(path: Path, *, top_only: bool = False, typing_too: bool = False) -> Iterator[tuple[str, int]]:
    """(absolute module, line) of each import; those under TYPE_CHECKING are no imports at run
    time."""
    package = ["sglang_harli", *path.relative_to(PACKAGE).parts[:-1]]

    def skipped(node: ast.AST) -> bool:
        if not typing_too and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return True
        return top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                yield module, child.lineno
                yield from ((f"{module}.{alias.name}", child.lineno) for alias in child.names)
            elif not skipped(child):
                yield from visit(child)

    return visit(parse(path))


def part_of(module: str) -> str:
    return module.split(".")[0]


def ours(path: Path, *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """The folders of our own package that a file imports, with the line."""
    for module, line in imports(path, top_only=top_only):
        if module.startswith("sglang_harli."):
            yield part_of(module.removeprefix("sglang_harli.")), line


def test_every_folder_has_a_place_in_the_layers():
    found = {part_of(module_name(p)) for p in package_files()}
    assert found <= set(ALLOWED), f"new folders need a line in ALLOWED: {sorted(found - set(ALLOWED))}"


def test_imports_run_downwards_only():
    wrong = []
    for path in package_files():
        mine = part_of(module_name(path))
        for other, line in ours(path):
            if other != mine and other in ALLOWED and other not in ALLOWED[mine]:
                wrong.append(f"{relative(path)}:{line}: {mine or '__init__'} must not import {other}")
    assert not wrong, "\n".join(wrong)


def graphs() -> dict[str, dict[str, set[str]]]:
    """By folder: which of its modules and sub-folders import which others of it, for types too."""
    files = {module_name(path): path for path in package_files() if path.name != "__init__.py"}
    found: dict[str, dict[str, set[str]]] = {}
    for module, path in files.items():
        for other, _line in imports(path, typing_too=True):
            other = other.removeprefix("sglang_harli.")
            if other not in files or other == module:
                continue
            mine, theirs = module.split("."), other.split(".")
            same = next(n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
            folder = found.setdefault(".".join(mine[:same]), {})
            folder.setdefault(mine[same], set()).add(theirs[same])
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names of one circle; none: there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_folder_has_no_circles():
    """Neither of its modules nor of its sub-folders."""
    wrong = [
        f"{folder or 'sglang_harli'}: {' -> '.join(way)}"
        for folder, g in graphs().items()
        if (way := circle(g))
    ]
    assert not wrong, "these import each other in a circle:\n" + "\n".join(wrong)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


def test_cli_imports_tools_inside_its_commands_only():
    wrong = [
        f"{relative(path)}:{line}"
        for path in (PACKAGE / "cli").glob("*.py")
        if path.name != "view.py"
        for other, line in ours(path, top_only=True)
        if other in ("tools", "simulation")
    ]
    assert not wrong, f"tools are imported at the top: {wrong}"


def test_sglang_is_imported_in_the_named_modules_only():
    wrong = [
        f"{relative(path)}:{line}"
        for path in package_files()
        if not f"{module_name(path)}.".startswith(tuple(f"{place}." for place in SGLANG))
        for module, line in imports(path)
        if part_of(module) == "sglang"
    ]
    assert not wrong, "import sglang outside the named modules:\n" + "\n".join(wrong)


def test_the_service_imports_neither_torch_nor_sglang():
    wrong = [
        f"{relative(path)}:{line}: {module}"
        for path in sorted((PACKAGE / "service").rglob("*.py"))
        for module, line in imports(path)
        if part_of(module) in ("torch", "sglang", "peft")
    ]
    assert not wrong, "\n".join(wrong)


def test_package_inits_are_empty():
    inits = [
        p
        for p in PACKAGE.rglob("__init__.py")
        if p.parent != PACKAGE and "platforms/cpu/" not in p.as_posix()
    ]
    filled = [relative(p) for p in inits if p.read_text().strip()]
    assert not filled, f"these must stay empty, so that importing one module imports one module: {filled}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module):
    code = f"import sys, sglang_harli.{module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"sglang_harli.{module} loads {done.stdout.strip()}"
