"""The disk that a run directory takes, for ``status``: counted seldom, by a thread."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_harli.service.pacing import lower_priority

EVERY_S = 30.0  # a count is at least so long apart from the next, and 20 times as long as it took
FIRST_S = 1.0  # the first one is waited for so long
_PARTS = {"data": "data_bytes", "checkpoints": "checkpoint_bytes", "adapter": "adapter_bytes"}
_FOLDERS = _PARTS | {"adapters": "adapter_bytes"}


class DiskUsage:
    """Bytes on disk of a run directory, counted now and then."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, "space", initializer=lower_priority, initargs=(19,))
        self._counting: asyncio.Future[None] | None = None
        self._looker = ThreadPoolExecutor(1, "free space")
        self._looking: asyncio.Future[int] | None = None
        self._found: dict[str, int] | None = None
        self._next_at = 0.0

    async def report(self) -> dict[str, Any]:
        """The last count's bytes by kind and free bytes now; ``counting`` before a first count."""
        now = time.monotonic()
        if self._counting is None and now >= self._next_at:
            self._counting = asyncio.get_running_loop().run_in_executor(self._thread, self._count)
            self._counting.add_done_callback(self._counted)
        if self._found is None and self._counting is not None:
            await asyncio.wait({self._counting}, timeout=FIRST_S)
        return {"counting": True} if self._found is None else self._found | {"free_bytes": await self._free()}

    def _counted(self, _done: asyncio.Future[None]) -> None:
        self._counting = None

    def _count(self) -> None:
        begun = time.monotonic()
        self._found = count(self._run_dir)
        took = time.monotonic() - begun
        self._next_at = time.monotonic() + max(EVERY_S, 20 * took)

    async def _free(self) -> int:
        """0 where the disk does not say so within a second."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().run_in_executor(self._looker, _free, self._run_dir)
        looking = self._looking
        await asyncio.wait([looking], timeout=FIRST_S)
        return looking.result() if looking.done() else 0


def _free(run_dir: Path) -> int:
    try:
        return shutil.disk_usage(run_dir).free
    except OSError:
        return 0


def count(run_dir: Path) -> dict[str, int]:
    """Bytes on disk under ``run_dir``: of data, checkpoints, adapters, the job store, and in all. A
    file that two jobs share (one was continued) counts once; one that vanishes counts nothing."""
    found = dict.fromkeys((*_PARTS.values(), "store_bytes"), 0)
    total, seen = 0, set()
    stack: list[tuple[str, int, str | None]] = [(str(run_dir), 0, None)]  # folder, depth, its part
    while stack:
        folder, depth, part = stack.pop()
        for entry in _entries(folder):
            try:
                info = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
            except OSError:
                continue
            if is_folder:
                stack.append((entry.path, depth + 1, _FOLDERS.get(entry.name) if depth == 1 else part))
                continue
            if info.st_nlink > 1:
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
            size = info.st_blocks * 512
            total += size
            if part is not None:
                found[part] += size
            elif depth == 0 and entry.name.startswith("harli.db"):
                found["store_bytes"] += size
    return found | {"total_bytes": total}


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
