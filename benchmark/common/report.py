"""Results that can be argued with: one JSON and one page per run, with the command, versions and
caveats."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("sglang-harli", "sglang", "torch", "triton", "transformers", "peft", "numpy", "pyzmq")


def meta_info() -> dict[str, Any]:
    """Versions, commit and machine: what a number depends on besides the code."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _gpu(),
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def commit() -> str | None:
    """Of the checkout, ``-dirty`` behind it where files have changed."""
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git there
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    names = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


@functools.cache
def _gpu() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def path_of(theme: str, device: str, folder: Path = RESULTS) -> Path:
    """The page that ``write`` writes this month."""
    return folder / f"{theme}_{device}_{datetime.datetime.now(datetime.UTC):%Y%m}.md"


def write(
    theme: str,
    device: str,
    *,
    question: str,
    settings: dict[str, Any],
    results: dict[str, Any],
    table: str,
    not_shown: str,
    folder: Path = RESULTS,
    picture: str | None = None,
    title: str | None = None,
) -> Path:
    """Write ``<theme>_<device>_<yyyymm>.json`` and ``.md``; returns the page.

    Args:
        settings: what was asked for (model, flags, sizes).
        results: every number, raw ones included, so that the table can be made again.
        table: the rendered table.
        not_shown: what these numbers do not say.
        picture: SVG, written beside the page and shown below the table.
        title: of the page; None: its file's name.
    """
    now = datetime.datetime.now(datetime.UTC)
    run_info = {
        "theme": theme,
        "finished_at": now.isoformat(timespec="seconds"),
        # Without the interpreter's path and the folders: they name the machine's places, not the
        # run.
        "command": shlex.join(["python", "benchmark/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings,
    }
    document = {"run_info": run_info, "results": results, "meta_info": meta_info()}
    folder.mkdir(parents=True, exist_ok=True)
    page = path_of(theme, device, folder)
    page.with_suffix(".json").write_text(json.dumps(document, indent=2, default=str) + "\n")
    if picture is not None:
        page.with_suffix(".svg").write_text(picture)
        table = f"{table}\n\n![{question}]({page.stem}.svg)"
    page.write_text(_page(document, question, table, not_shown, page.stem, title or page.stem))
    return page


def _page(document: dict[str, Any], question: str, table: str, not_shown: str, name: str, title: str) -> str:
    meta, run = document["meta_info"], document["run_info"]
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    machine = f"{meta['gpu'] or meta['cpu']}, {meta['cores']} cores, {meta['memory_gb']} GB"
    settings = "\n".join(f"- {k}: {v}" for k, v in run["settings"].items())
    return f"""# {title}

{question}

    {run["command"]}

{table}

**Does not show.** {not_shown}

**Settings**

{settings}

**Where.** {machine}; Python {meta["python"]}; {versions}; commit {meta["commit"]}; {run["finished_at"]}.
Every number behind the table is in `{name}.json`.
"""
