"""Puts the stand-in for ``sgl_kernel`` on the path of the processes that run SGLang's CPU engine.

SGLang's children import ``sgl_kernel`` before they load plugins: it goes first on ``sys.path``
(which multiprocessing hands to spawned children) and on PYTHONPATH.  Standard library only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# SGLang's own switch of its CPU engine.
CPU_ENGINE_ENV = "SGLANG_USE_CPU_ENGINE"
STAND_IN = Path(__file__).resolve().parent / "stand_in"


def is_on(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SGLang in this process is, or will be, its CPU engine."""
    return environ.get(CPU_ENGINE_ENV, "0") == "1"


def turn_on(environ: MutableMapping[str, str] = os.environ, path: list[str] | None = None) -> None:
    """Select the CPU engine in this process and its children; call it before importing sglang.
    ``environ`` and ``path`` (default: ``sys.path``) are changed in place."""
    path = sys.path if path is None else path
    environ[CPU_ENGINE_ENV] = "1"
    # Where there is a CUDA device after all, SGLang would see it and mix both engines.
    environ["CUDA_VISIBLE_DEVICES"] = ""
    folder = str(STAND_IN)
    others = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != folder]
    environ["PYTHONPATH"] = os.pathsep.join([folder, *others])
    if not path or path[0] != folder:
        path.insert(0, folder)


def without_stand_in(environ: Mapping[str, str]) -> dict[str, str]:
    """A copy of ``environ`` for a child that does not run the CPU engine."""
    child = dict(environ)
    rest = [
        entry for entry in child.pop("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(STAND_IN)
    ]
    if rest:
        child["PYTHONPATH"] = os.pathsep.join(rest)
    return child
