"""Words of the field, in sentences whose subject is a thing of the code."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

from support.project_files import PACKAGE, ROOT, code_files, package_files, parse, relative

# Metaphors and turns that say less than the field's own word.
BANNED = (
    "whoever",
    "desk",
    "desks",
    "door",
    "doors",
    "wish",
    "wishes",
    "world",
    "worlds",
    "told",
    "what is said of",
)
WORDS = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmark" / "README.md"]


def comments_and_docstrings(path: Path) -> list[tuple[int, str]]:
    """(line, text) of each comment and of each string that is a docstring or spans lines."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.append((first.lineno, str(first.value.value)))
    return found


def test_no_metaphors():
    texts = [(p, line, text) for p in package_files() for line, text in comments_and_docstrings(p)]
    pages = [*PAGES, *sorted((ROOT / "docs").rglob("*.md"))]
    texts += [
        (page, number, line)
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    ]
    wrong = [
        f"{relative(path)}:{line}: {found[0]}" for path, line, text in texts if (found := WORDS.findall(text))
    ]
    assert not wrong, "say it in SGLang's, PyTorch's or the field's words:\n" + "\n".join(wrong)


def test_a_class_says_first_what_it_is():
    wrong = [
        f"{relative(path)}:{node.lineno}: {node.name}"
        for path in package_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
        and (ast.get_docstring(node) or "").startswith(("Args:", "Attributes:", "See "))
        and not node.name.startswith("_")
    ]
    assert not wrong, "the first sentence of a docstring says what the class is:\n" + "\n".join(wrong)


def test_no_figures_of_one_machine_in_the_code():
    wrong = [
        f"{relative(path)}:{line}"
        for path in package_files()
        for line, text in comments_and_docstrings(path)
        if "*measured*" in text
    ]
    assert not wrong, "figures stand in docs/ and benchmark/:\n" + "\n".join(wrong)
    assert PACKAGE.exists()


def test_no_metaphors_in_names():
    """``world_size`` is torch's own word, ``world_rank`` SGLang's."""
    banned = {word for word in BANNED if " " not in word and word != "told"} | {"rooms"}
    wrong = []
    for path in code_files():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.NAME and token.string not in ("world_size", "world_rank"):
                parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", token.string)}
                wrong += [f"{relative(path)}:{token.start[0]}: {token.string}"] if parts & banned else []
    assert not wrong, "name it in the field's words:\n" + "\n".join(wrong)


def test_comments_and_docstrings_wrap_at_100():
    """But rules between sections, and tables and drawings, whose columns stay as they are."""
    wrong = []
    for path in code_files():
        source = path.read_text(encoding="utf-8").splitlines()
        for line, text in comments_and_docstrings(path):
            for number in range(line, line + text.count("\n") + 1):
                shown = source[number - 1]
                whole = shown.strip().startswith("#") or not text.startswith("#")
                drawn = re.search(r"\S {3,}\S|─|\S  \S+, ", shown) or "# ---" in shown
                if len(shown) > 100 and whole and not drawn:
                    wrong.append(f"{relative(path)}:{number}: {len(shown)} columns")
    assert not wrong, "\n".join(wrong)
