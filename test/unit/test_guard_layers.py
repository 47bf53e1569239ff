"""Imports run downwards only, and heavy libraries stay out of the modules that must load in milliseconds."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project_files import PACKAGE, module_name, package_files, parse, relative

BASE = {"core", "errors", "fault_points", "config", "protocol"}
ROOMS = {"predictor", "mem_cache", "peft_trainer", "service"}
INSIDE = BASE | ROOMS | {"managers", "server_args", "patches", "platforms"}

# Who may import whom: a room (top-level module or folder) and the other rooms that it may see.
ALLOWED: dict[str, set[str]] = {
    "": {"client"},  # `from sglang_harli import FinetuneClient`, resolved when asked for
    "core": set(),
    "errors": set(),
    "fault_points": set(),
    "config": {"core", "errors"},
    "protocol": {"core", "errors", "fault_points"},
    **dict.fromkeys(ROOMS, BASE),
    "platforms": {"errors"},
    "patches": BASE | {"platforms"},
    "server_args": BASE | {"platforms"},
    "managers": INSIDE,
    "client": BASE,
    "tools": INSIDE | {"client"},
    "plugin": INSIDE | {"tools"},
    "launch_server": INSIDE | {"tools", "plugin"},
    "cli": BASE | {"client", "tools"},
}

# The files that lean on SGLang.  An upgrade begins with this list.
SGLANG_FILES = {
    "launch_server.py",
    "managers/adapter_loader.py",
    "managers/control.py",
    "managers/http_app.py",
    "managers/training_guards.py",
    "managers/model_names.py",
    "managers/parity_request.py",
    "managers/pool_setup.py",
    "managers/publisher.py",
    "managers/scheduler.py",
    "managers/scheduler_call.py",
    "managers/startup_profile.py",
    "managers/supervisor.py",
    "managers/tokenizer_handover.py",
    "mem_cache/kv_pool.py",
    "mem_cache/prefix_eviction.py",
    "mem_cache/slot_allocator.py",
    "peft_trainer/frozen_base.py",
    "plugin.py",
    "server_args.py",
}
SGLANG_FOLDERS = ("patches/", "platforms/cpu/")

# Must import without torch, sglang or transformers: `harli --help` and the pure rooms.
LIGHT = (
    "core",
    "fault_points",
    "errors",
    "config",
    "client",
    "cli.main",
    "protocol.public",
    "protocol.internal",
    "protocol.shared_memory",
    "mem_cache.chunk_ledger",
    "mem_cache.geometry",
    "mem_cache.quota",
    "mem_cache.train_window",
    "managers.qos_policy",
    "managers.slo_ledger",
    "managers.slotting",
    "managers.step_timer",
    "managers.serving_side",
    "predictor.latency_predictor",
    "predictor.fit",
    "predictor.profile_table",
    "predictor.sweep",
)
HEAVY = ("torch", "sglang", "transformers", "peft")


def imports(path: Path, *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """(absolute module, line) of each import; those under TYPE_CHECKING are not imports at run time."""
    package = ["sglang_harli", *path.relative_to(PACKAGE).parts[:-1]]

    def skipped(node: ast.AST) -> bool:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
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


def room(module: str) -> str:
    return module.split(".")[0]


def ours(path: Path, *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """The rooms of our own package that a file imports, with the line."""
    for module, line in imports(path, top_only=top_only):
        if module.startswith("sglang_harli."):
            yield room(module.removeprefix("sglang_harli.")), line


def test_every_room_has_a_place_in_the_layers():
    rooms = {room(module_name(p)) for p in package_files()}
    assert rooms <= set(ALLOWED), f"new rooms need a line in ALLOWED: {sorted(rooms - set(ALLOWED))}"


def test_imports_run_downwards_only():
    wrong = []
    for path in package_files():
        mine = room(module_name(path))
        for other, line in ours(path):
            if other != mine and other in ALLOWED and other not in ALLOWED[mine]:
                wrong.append(f"{relative(path)}:{line}: {mine or '__init__'} must not import {other}")
    assert not wrong, "\n".join(wrong)


def test_cli_imports_tools_inside_its_commands_only():
    wrong = [
        f"{relative(path)}:{line}"
        for path in (PACKAGE / "cli").glob("*.py")
        for other, line in ours(path, top_only=True)
        if other == "tools"
    ]
    assert not wrong, f"tools are imported at the top: {wrong}"


def test_sglang_is_imported_in_the_named_files_only():
    wrong = []
    for path in package_files():
        name = path.relative_to(PACKAGE).as_posix()
        if name in SGLANG_FILES or name.startswith(SGLANG_FOLDERS):
            continue
        wrong += [f"{relative(path)}:{line}" for module, line in imports(path) if room(module) == "sglang"]
    assert not wrong, "import sglang outside the named files:\n" + "\n".join(wrong)


def test_the_service_imports_neither_torch_nor_sglang():
    wrong = [
        f"{relative(path)}:{line}: {module}"
        for path in sorted((PACKAGE / "service").rglob("*.py"))
        for module, line in imports(path)
        if room(module) in ("torch", "sglang", "peft")
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
