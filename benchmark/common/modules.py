"""A module of the benchmarks as a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(module: str) -> list[str]:
    """``colocate.client``: what runs it."""
    return [sys.executable, "-m", module]


def found_in(environment: dict[str, str]) -> dict[str, str]:
    """The environment in which the benchmarks' modules are found."""
    path = filter(None, [str(ROOT), environment.get("PYTHONPATH")])
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}
