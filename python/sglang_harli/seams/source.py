"""An SGLang on disk, read by ``ast`` and never imported: names, members, parameters."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
_DEPTH = 12  # re-exports and bases followed


@dataclass(frozen=True, slots=True)
class Found:
    """What a dotted path names: a class, a function, an assignment, or a module (``node`` None)."""

    module: str
    node: ast.AST | None


class SourceTree:
    """Python sources below ``folder``; a module that is missing or cannot be parsed is None."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            base = self.folder.joinpath(*name.split("."))
            paths = (base.with_suffix(".py"), base / "__init__.py")
            path = next((path for path in paths if path.is_file()), None)
            self._modules[name] = _parsed(path.resolve()) if path else None
        return self._modules[name]

    def is_package(self, name: str) -> bool:
        return self.folder.joinpath(*name.split(".")).is_dir()

    def find(self, dotted: str, depth: int = _DEPTH) -> Found | None:
        """Follows re-exports and inherited members; None: there is no such name."""
        parts = dotted.split(".")
        for cut in range(len(parts), 0, -1):
            name = ".".join(parts[:cut])
            if self.module(name) is None and not (cut == len(parts) and self.is_package(name)):
                continue
            found: Found | None = Found(name, None)
            for attribute in parts[cut:]:
                if found is None:
                    break
                found = self.attribute(found, attribute, depth)
            return found
        return None

    def attribute(self, found: Found, name: str, depth: int = _DEPTH) -> Found | None:
        """Of a module or a class."""
        if found.node is None:
            return self._global(found.module, name, depth)
        if isinstance(found.node, ast.ClassDef):
            return self.member(found, name, depth)
        return None

    def member(self, owner: Found, name: str, depth: int = _DEPTH) -> Found | None:
        """A method, a field, or what a method sets on self; of the class or of a base."""
        for place in self.lineage(owner, depth):
            assert isinstance(place.node, ast.ClassDef)
            node = _members(place.node).get(name)
            if node is not None:
                return Found(place.module, node)
        return None

    def lineage(self, owner: Found, depth: int = _DEPTH) -> Iterator[Found]:
        """The class and its bases, depth first, as far as they are of these sources."""
        if not isinstance(owner.node, ast.ClassDef) or depth <= 0:
            return
        yield owner
        for base in owner.node.bases:
            dotted = _dotted(base.value if isinstance(base, ast.Subscript) else base)
            first, _, rest = (dotted or "").partition(".")
            found = self._global(owner.module, first, depth - 1) if first else None
            for part in rest.split(".") if rest else ():
                found = self.attribute(found, part, depth - 1) if found is not None else None
            if found is not None:
                yield from self.lineage(found, depth - 1)

    def _global(self, module: str, name: str, depth: int) -> Found | None:
        tree = self.module(module)
        if depth <= 0:
            return None
        node = _globals(tree).get(name) if tree is not None else None
        if isinstance(node, ast.ImportFrom):
            source = self._source(module, node)
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self.find(f"{source}.{original}", depth - 1) or self._foreign(source, node)
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            found = self.find(alias.name if alias.asname else alias.name.split(".")[0], depth - 1)
            return found or Found(module, node)
        if node is not None:
            return Found(module, node)
        for star in _stars(tree) if tree is not None else ():
            found = self._global(self._source(module, star), name, depth - 1)
            if found is not None:
                return found
        inner = f"{module}.{name}"
        if self.module(inner) is not None or self.is_package(inner):
            return Found(inner, None)
        return None

    def _foreign(self, source: str, node: ast.ImportFrom) -> Found | None:
        """A name of another distribution is there, for all that these sources say."""
        return None if self.is_package(source.split(".")[0]) else Found(source, node)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        package = parts if self._is_init(module) else parts[:-1]
        kept = package[: len(package) - node.level + 1]
        return ".".join([*kept, *(node.module or "").split(".")] if node.module else kept)

    def _is_init(self, module: str) -> bool:
        return (self.folder.joinpath(*module.split(".")) / "__init__.py").is_file()


@functools.cache
def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError:  # of a newer Python
        return None


def is_super(node: ast.AST, name: str) -> bool:
    """Whether it is the call ``super().name(...)``."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"super().{name}"


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else None
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or a class, those in ``if``, ``try`` and ``with`` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.With | ast.Try):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement binds."""
    if isinstance(statement, Function | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):
                    yield node.id
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id
    elif isinstance(statement, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Import):
        yield from (alias.asname or alias.name.split(".")[0] for alias in statement.names)


@functools.cache
def _globals(tree: ast.Module) -> dict[str, ast.stmt]:
    """The first statement that binds each name."""
    found: dict[str, ast.stmt] = {}
    for statement in _statements(tree.body):
        for name in _bound(statement):
            found.setdefault(name, statement)
    return found


def _stars(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ImportFrom) and any(a.name == "*" for a in statement.names):
            yield statement


@functools.cache
def _members(node: ast.ClassDef) -> dict[str, ast.AST]:
    found: dict[str, ast.AST] = {}
    for statement in _statements(node.body):
        for name in _bound(statement):
            found.setdefault(name, statement)
    for inner in ast.walk(node):  # self.x = ...
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and _dotted(inner.value) == "self"
        ):
            found.setdefault(inner.attr, inner)
    return found
