"""Whether an SGLang has everything that ours leans on: ``python -m sglang_harli.tools.seam_check``.

One line for each name, signature and assumption; exits with 1 when one does not hold.  Without
``--sglang`` it is the installed SGLang: read, and called.  An unpacked wheel is read only, never
imported.  ``--table`` compares several (docs/sglang-versions.md).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from sglang_harli.errors import ConfigError, HarliError
from sglang_harli.platforms.cpu.engine import CPU_ENGINE_ENV, STAND_IN
from sglang_harli.seams import read_checks
from sglang_harli.seams.assumptions import ASSUMPTIONS
from sglang_harli.seams.leans import leans
from sglang_harli.seams.source import SourceTree
from sglang_harli.sglang_versions import supported

Line = tuple[str, str | None]  # what, and why it does not hold


def read(folder: Path, against: str | None = None) -> list[Line]:
    """Of the SGLang whose package lies in ``folder``; ``against``: with the files for which
    supported version, by default its own or those of the one before it."""
    if not (folder / "sglang" / "srt").is_dir():
        raise ConfigError(
            f"{folder} holds no sglang/srt: give the folder of an unpacked wheel", param="--sglang"
        )
    tree, files = SourceTree(folder), files_for(against or version_of(folder))
    checked = read_checks.check(tree, leans(files))
    lines = [(f"{c.lean.what} {c.lean.name} ({c.lean.ours})", c.problem) for c in checked]
    return lines + [(f"assumption: {name}", holds(tree)) for name, holds in ASSUMPTIONS[files].items()]


def files_for(version: str) -> str:
    """Whose files a version is read against: its own, else those of the newest supported one before
    it, so that the lines are what has to change."""
    before = [known for known in supported.SUPPORTED if _parts(known) <= _parts(version)]
    return supported.FOLDERS[max(before, key=_parts, default=supported.NEWEST)]


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def call() -> list[Line]:
    """Of the installed SGLang, on its CPU engine.  What breaks is a problem and no traceback."""
    warnings.simplefilter("ignore")  # of libraries, that there is no accelerator
    os.environ[CPU_ENGINE_ENV] = "1"
    sys.path.insert(0, str(STAND_IN))
    lines: list[Line] = []
    from sglang_harli.seams.called_checks import CALLS

    for name, check in CALLS.items():
        try:
            lines.append((f"called: {name}", check()))
        except Exception as error:  # boundary: another SGLang may raise anything
            lines.append((f"called: {name}", f"{type(error).__name__}: {error}"))
    return lines


def version_of(folder: Path) -> str:
    """Of an unpacked wheel, by the name of its metadata; else that of the folder."""
    if folder == installed():
        return supported.installed()
    found = re.search(
        r"sglang-([\w.]+)\.dist-info", " ".join(p.name for p in folder.glob("sglang-*.dist-info"))
    )
    return found[1] if found else folder.name


def installed() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "no sglang is installed here: give --sglang FOLDER of an unpacked wheel", param="--sglang"
        )
    return Path(spec.origin).parents[1]


def table(folders: list[Path], against: str | None = None) -> str:
    """What does not hold in some of them, in Markdown: a row a seam, a column a version."""
    columns = {version_of(folder): dict(read(folder, against)) for folder in folders}
    rows = dict.fromkeys(name for column in columns.values() for name, problem in column.items() if problem)
    lines = ["| seam | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        lines.append(f"| {name} | {' | '.join(column.get(name) or '' for column in columns.values())} |")
    return "\n".join(lines) if rows else f"All seams hold in {', '.join(columns)}."


def main(
    sglang: Annotated[
        list[Path] | None, typer.Option(help="Folder of an unpacked wheel; may be repeated.")
    ] = None,
    problems: Annotated[bool, typer.Option("--problems", help="Show what does not hold alone.")] = False,
    against: Annotated[
        str | None, typer.Option(help="Read with our files for this supported version.")
    ] = None,
    as_table: Annotated[bool, typer.Option("--table", help="One table over all folders.")] = False,
) -> None:
    """Check what sglang-harli leans on in SGLang."""
    here = Path.cwd()  # which ``python -m`` looks in first: an unpacked wheel there is not the installed one
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    try:
        folders = sglang or [installed()]
        if against not in (None, *supported.SUPPORTED):
            accepted = ", ".join(supported.SUPPORTED)
            raise ConfigError(f"--against {against} is not accepted: {accepted}", param="--against")
        if as_table:
            print(table(folders, against))
            raise typer.Exit
        failed = 0
        for folder in folders:
            version = version_of(folder)
            lines = read(folder, against) + ([] if sglang else call())
            for name, problem in lines:
                if problem or not problems:
                    print(f"{'FAILS' if problem else 'ok   '} {name}{f': {problem}' if problem else ''}")
            bad = sum(problem is not None for _, problem in lines)
            print(f"sglang {version}: {len(lines) - bad} hold, {bad} do not")
            failed += bad
    except HarliError as error:
        print(f"error: {error.message}", file=sys.stderr)
        raise typer.Exit(2) from error
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
