"""Broad excepts stand at marked boundaries only, where one failure must not take the rest along."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from support.project_files import marked_lines, package_files, parse, relative

BROAD = {"Exception", "BaseException"}
MARK = "boundary"  # `# boundary: what fails there; what goes on`, on the line of the except or suppress


def names(node: ast.expr | None) -> set[str]:
    if node is None:
        return {"BaseException"}
    elements = node.elts if isinstance(node, ast.Tuple) else [node]
    return {
        e.attr if isinstance(e, ast.Attribute) else e.id
        for e in elements
        if isinstance(e, ast.Attribute | ast.Name)
    }


def re_raises(handler: ast.ExceptHandler) -> bool:
    """The handler cleans up and lets the very same exception go on."""
    return any(isinstance(n, ast.Raise) and n.exc is None for n in handler.body[-1:])


def broad(tree: ast.AST) -> Iterator[int]:
    """Lines of broad handlers and suppressions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and names(node.type) & BROAD and not re_raises(node):
            yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            yield from (node.lineno for argument in node.args if names(argument) & BROAD)


def test_broad_excepts_are_marked_boundaries():
    wrong = []
    for path in package_files():
        found, marks = set(broad(parse(path))), marked_lines(path, MARK)
        wrong += [f"{relative(path)}:{line}: a broad except" for line in sorted(found - set(marks))]
        wrong += [
            f"{relative(path)}:{line}: a mark, and no broad except" for line in sorted(set(marks) - found)
        ]
        wrong += [
            f"{relative(path)}:{line}: say what goes on" for line, why in marks.items() if len(why) < 20
        ]
    assert not wrong, (
        "catch the exceptions you expect by name; where one failure must not take the rest along, say "
        "`# boundary: what fails; what goes on`:\n" + "\n".join(wrong)
    )


def test_the_guard_sees():
    code = "try:\n    f()\nexcept Exception:\n    g()\nwith suppress(OSError, Exception):\n    f()"
    assert sorted(broad(ast.parse(code))) == [3, 5]
    cleaning = "try:\n    f()\nexcept BaseException:\n    g()\n    raise"
    assert not list(broad(ast.parse(cleaning)))
