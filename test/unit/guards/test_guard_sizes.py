"""Small by default: a file is read in one sitting, a function on one screen, a folder at one
look."""

from __future__ import annotations

import warnings
from collections import Counter

from support.project_files import PACKAGE, code_files, functions, package_files, parse, relative

REPORTED_FILE_LINES = 400  # a warning names the file: split it by the question it answers when you are there
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_MODULES = 12  # of a folder of the package
REPORTED_MODULES = 20  # of a folder of tests, benchmarks or examples
SAME_PREFIX = 3  # modules with one first word are a folder that is missing

# Folder of the package -> why it may hold more modules.
WIDE = {
    f"python/sglang_harli/sglang_versions/{folder}": "one small module for each thing that differs"
    for folder in ("newest", "pinned")
}
# Path, or path::qualified name -> why it may be longer.
EXCEPTIONS: dict[str, str] = {}


def test_files_and_functions_are_small():
    too_long, large = {}, []
    for path in code_files():
        name = relative(path)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            too_long[name] = f"{lines} lines, at most {MAX_FILE_LINES}"
        elif lines > REPORTED_FILE_LINES:
            large.append(f"{name}: {lines} lines")
        for qualified, node in functions(parse(path)):
            span = (node.end_lineno or node.lineno) - node.lineno + 1
            if span > MAX_FUNCTION_LINES:
                too_long[f"{name}::{qualified}"] = f"{span} lines, at most {MAX_FUNCTION_LINES}"
    new = [f"{where}: {what}" for where, what in too_long.items() if where not in EXCEPTIONS]
    assert not new, "split these by the question they answer:\n" + "\n".join(new)
    gone = sorted(set(EXCEPTIONS) - set(too_long))
    assert not gone, f"no longer too long: take them off the list: {gone}"
    if large:
        warnings.warn(f"over {REPORTED_FILE_LINES} lines: {'; '.join(large)}", stacklevel=1)


def test_exceptions_have_reasons():
    assert all(len(reason) > 20 for reason in EXCEPTIONS.values())


def test_folders_are_taken_in_at_one_look():
    counts = Counter(path.parent for path in code_files() if path.name != "__init__.py")
    wide = [
        f"{relative(folder)}: {n} modules, at most {MAX_MODULES}"
        for folder, n in counts.items()
        if n > MAX_MODULES and folder.is_relative_to(PACKAGE) and relative(folder) not in WIDE
    ]
    assert not wide, "make folders by topic:\n" + "\n".join(wide)
    large = [f"{relative(folder)}: {n} modules" for folder, n in counts.items() if n > REPORTED_MODULES]
    words = Counter(
        (path.parent, path.stem.split("_")[0]) for path in package_files() if path.name != "__init__.py"
    )
    large += [f"{relative(f)}: {n} modules {word}_*" for (f, word), n in words.items() if n >= SAME_PREFIX]
    if large:
        warnings.warn(f"these want folders of their own: {'; '.join(large)}", stacklevel=1)
