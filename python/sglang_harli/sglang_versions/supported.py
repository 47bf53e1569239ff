"""Which versions of SGLang are supported, and which one is installed.

The only place that asks for the version: what differs lies in ``newest`` and ``pinned``, the same
names in both, and is imported through ``current``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
from typing import Any

NEWEST = "0.5.23"
PINNED = "0.5.16"  # for hosts with torch 2.11
SUPPORTED = (NEWEST, PINNED)
# The version, for processes that cannot look: the finetune service hides torch from itself, and the
# seam check reads other versions.
VERSION_ENV = "HARLI_SGLANG_VERSION"
FOLDERS = {NEWEST: "newest", PINNED: "pinned"}  # of each version's own files


def installed() -> str:
    """As ``sglang.version`` says it, whose import takes ten seconds: read beside it where it can
    be."""
    if given := os.environ.get(VERSION_ENV):
        return given
    loaded = sys.modules.get("sglang.version")
    if loaded is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version("sglang")
        loaded = importlib.import_module("sglang.version")  # a source tree on the path
    return str(loaded.__version__)


def is_supported() -> bool:
    """A build of a supported version (``0.5.23+cu130``) is that version."""
    return public(installed()) in SUPPORTED


def public(version: str) -> str:
    """Without the label of a build (PEP 440)."""
    return version.partition("+")[0]


def folder() -> str:
    """Of the installed version's own files; a version that is not supported has the newest's."""
    return FOLDERS.get(public(installed()), FOLDERS[NEWEST])


def only(name: str, rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows of a table that hold for one of the two alone (``FOLDERS``); for the other, none."""
    return rows if folder() == name else ()
