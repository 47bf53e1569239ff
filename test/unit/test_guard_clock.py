"""The wall clock is for stamps that people read; restarts, leases and time-outs go by the monotonic clock, for a
wall clock may jump."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from project_files import PACKAGE, functions, package_files, parse

WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime"}
NOW = ("datetime.now", "datetime.utcnow", "datetime.today", "date.today")

# (file in the package, function) -> which stamp it is.
STAMPS = {
    ("service/checkpoints.py", "_save_meta"): "created_at in a checkpoint's meta.json",
    ("service/desk.py", "JobDesk.__init__"): "finished_at of a job that was to be cancelled",
    ("service/desk.py", "JobDesk.apply"): "created_at of events",
    ("service/publication.py", "Publication._publish"): "finished_at of a job",
    ("service/publication.py", "Publication._give_up"): "finished_at of a job",
    ("service/run_driver.py", "_now"): "started_at and finished_at of a job; time-outs get the other clock",
    ("service/served_tokenizer.py", "today"): "the date that a chat template asks for",
    ("service/submission.py", "Submission._record"): "created_at of a job",
    ("service/verbs.py", "Verbs._cancel.ask"): "finished_at of a job",
    ("tools/job_view.py", "progress_line"): "the time in a line for people",
}


def _uses(node: ast.AST) -> Iterator[ast.AST]:
    """Uses of the wall clock in this function, inner functions left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.Attribute):
            name = ast.unparse(child)
            if name in WALL or name.endswith(NOW):
                yield child
        yield from _uses(child)


def _found(path: Path) -> Iterator[tuple[str, str]]:
    name, tree = path.relative_to(PACKAGE).as_posix(), parse(path)
    for qualified, node in functions(tree):
        yield from ((name, qualified) for _ in _uses(node))
    yield from ((name, "<module>") for _ in _uses(tree))


def test_the_wall_clock_is_read_for_stamps_only():
    found = Counter(place for path in package_files() for place in _found(path))
    assert set(found) <= set(STAMPS), (
        "time.monotonic() for whatever is waited for or measured; a stamp for people gets a row in STAMPS: "
        f"{sorted(set(found) - set(STAMPS))}"
    )
    assert set(STAMPS) <= set(found), f"take these off the list: {sorted(set(STAMPS) - set(found))}"


def test_the_clock_is_called_by_its_full_name():
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in package_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module == "time"
    ]
    assert not wrong, f"`import time`, so that the list above sees it: {wrong}"
