"""Whether an SGLang on disk has what ours leans on, by reading: names, and parameters that fit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from sglang_harli.seams.leans import PACKAGE, Lean
from sglang_harli.seams.source import Function, SourceTree, is_super

FIELDS = "sglang.srt.arg_groups.fields"  # where ServerArgs is assembled from, since 0.5.20
SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


@dataclass(frozen=True, slots=True)
class Checked:
    """``problem``: why it does not hold; None: it does."""

    lean: Lean
    problem: str | None


def check(tree: SourceTree, leans: list[Lean]) -> list[Checked]:
    ours = SourceTree(PACKAGE.parent)
    return [Checked(lean, _problem(tree, ours, lean)) for lean in leans]


def _problem(tree: SourceTree, ours: SourceTree, lean: Lean) -> str | None:
    found = tree.find(lean.name)
    if found is None:
        owner, _, name = lean.name.rpartition(".")
        return None if owner == SERVER_ARGS and _is_field(tree, name) else "is gone"
    if not lean.hook:
        return None
    hook = ours.find(lean.hook.replace(":", "."))
    if hook is None:
        return f"{lean.hook} is not in the package"
    if not isinstance(hook.node, Function) or not isinstance(found.node, Function):
        return None  # a class in the place of a class: its overrides are checked one by one
    return _misfit(found.node, hook.node, lean)


def _is_field(tree: SourceTree, name: str) -> bool:
    folder = tree.folder.joinpath(*FIELDS.split("."))
    modules = (tree.module(f"{FIELDS}.{path.stem}") for path in sorted(folder.glob("*.py")))
    return any(
        isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name
        for module in modules
        if module is not None
        for node in ast.walk(module)
    )


def _misfit(target: Function, hook: Function, lean: Lean) -> str | None:
    """Why calls of ``target`` do not fit ours, or calls by ours do not fit the target."""
    takes = _Parameters.of(hook.args, skip=lean.given + (lean.kind in ("around", "after")))
    has = _Parameters.of(target.args)
    missing = [name for name in has.keywords if name not in takes.names and not takes.any_keyword]
    if len(takes.required) > len(has.positional) and not has.any_positional:
        return f"takes {len(has.positional)} arguments, ours asks for {len(takes.required)}"
    if len(has.positional) > len(takes.positional) and not takes.any_positional:
        return f"has more parameters than ours takes: {', '.join(has.positional[len(takes.positional) :])}"
    if missing:
        return f"has keyword parameters that ours does not take: {', '.join(missing)}"
    for call in _calls(hook, lean):
        problem = has.refuses(call, bound=lean.what == "override")
        if problem:
            return f"is called by ours {problem}"
    return None


def _calls(hook: Function, lean: Lean) -> Iterator[ast.Call]:
    """Where ours calls SGLang's own: ``original(...)`` or ``super().name(...)``."""
    names = [arg.arg for arg in hook.args.args]
    original = names[lean.given] if lean.kind == "around" else None
    for node in ast.walk(hook):
        if isinstance(node, ast.Call) and (
            (isinstance(node.func, ast.Name) and node.func.id == original) or is_super(node, hook.name)
        ):
            yield node


@dataclass(frozen=True, slots=True)
class _Parameters:
    positional: list[str]
    required: list[str]  # of the positional ones
    keywords: list[str]  # by keyword only
    required_keywords: list[str]
    any_positional: bool
    any_keyword: bool

    @property
    def names(self) -> set[str]:
        return {*self.positional, *self.keywords}

    @classmethod
    def of(cls, args: ast.arguments, *, skip: int = 0) -> _Parameters:
        positional = [arg.arg for arg in (*args.posonlyargs, *args.args)][skip:]
        required = positional[: max(0, len(positional) - len(args.defaults))]
        keywords = [arg.arg for arg in args.kwonlyargs]
        defaults = zip(keywords, args.kw_defaults, strict=True)
        needed = [name for name, default in defaults if default is None]
        return cls(positional, required, keywords, needed, args.vararg is not None, args.kwarg is not None)

    def refuses(self, call: ast.Call, *, bound: bool) -> str | None:
        """Why a call does not fit; ``bound``: the first parameter is given already."""
        if any(isinstance(arg, ast.Starred) for arg in call.args):
            return None
        given = len(call.args) + bound
        named = {keyword.arg for keyword in call.keywords}
        if given > len(self.positional) and not self.any_positional:
            return f"with {given} arguments, of which it takes {len(self.positional)}"
        if None in named:  # **kwargs
            return None
        unknown = [str(name) for name in named if name not in self.names]
        if unknown and not self.any_keyword:
            return f"with {', '.join(unknown)}, which it does not take"
        short = [n for n in (*self.required[given:], *self.required_keywords) if n not in named]
        return f"without {', '.join(short)}" if short else None
