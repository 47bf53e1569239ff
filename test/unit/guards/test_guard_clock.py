"""The wall clock is for stamps that people read; restarts, leases and time-outs go by the monotonic
clock, for a wall clock may jump."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from support.project_files import PACKAGE, marked_lines, package_files, parse, relative

WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime"}
NOW = ("datetime.now", "datetime.utcnow", "datetime.today", "date.today")
MARK = "stamp"  # `# stamp: which one it is`, on the line that reads the clock


def uses(tree: ast.AST) -> Iterator[int]:
    """Lines that read the wall clock."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in WALL or name.endswith(NOW):
                yield node.lineno


def test_the_wall_clock_is_read_for_stamps_only():
    wrong = []
    for path in package_files():
        found, marked = set(uses(parse(path))), set(marked_lines(path, MARK))
        wrong += [f"{relative(path)}:{line}: reads the wall clock" for line in sorted(found - marked)]
        wrong += [f"{relative(path)}:{line}: a mark, and no clock" for line in sorted(marked - found)]
    assert not wrong, (
        "time.monotonic() for whatever is waited for or measured; a stamp for people says `# stamp: ...`:\n"
        + "\n".join(wrong)
    )


def test_the_clock_is_called_by_its_full_name():
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in package_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module == "time"
    ]
    assert not wrong, f"`import time`, so that the test above sees it: {wrong}"
