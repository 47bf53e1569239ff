"""What the guards look at: the project's files, parsed once."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "sglang_harli"
SKIPPED = {".git", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "build", "dist"}


def package_files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def code_files() -> list[Path]:
    """Every Python file of the project: package, tests, benchmarks and examples."""
    others = [p for folder in ("test", "benchmark", "examples") for p in (ROOT / folder).rglob("*.py")]
    return package_files() + sorted(p for p in others if "__pycache__" not in p.parts)


def project_files() -> list[Path]:
    """Every file that belongs to the project: git's view, or the tree where there is no git."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        return sorted(_walk())
    return sorted(ROOT / name for name in names if name and (ROOT / name).is_file())


def _walk() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            f for f in folders if f not in SKIPPED and not (Path(folder) / f / "pyvenv.cfg").exists()
        ]
        yield from (Path(folder) / f for f in files)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def marked_lines(path: Path, mark: str) -> dict[int, str]:
    """Lines with a comment ``# <mark>: text``, and the text."""
    with path.open(encoding="utf-8") as lines:
        comments = [t for t in tokenize.generate_tokens(lines.readline) if t.type == tokenize.COMMENT]
    found = {t.start[0]: re.match(rf"#\s*{mark}: (.+)", t.string) for t in comments}
    return {line: match[1] for line, match in found.items() if match}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """``python/sglang_harli/service/app.py`` as ``service.app``; the package's own ``__init__`` as
    ``""``."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its qualified name."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            else:
                yield from visit(child, prefix)

    return visit(tree, "")
