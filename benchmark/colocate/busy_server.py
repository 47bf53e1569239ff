"""Plain SGLang whose only plugin adds up busy turns (``busy.py``)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from colocate import busy
from sglang_harli.platforms.cpu import engine


def environment(folder: Path, written: Path, device: str) -> dict[str, str]:
    """Variables of such a server.

    Args:
        folder: takes the plugin.
        written: the file that the scheduler writes.
    """
    metadata = folder / "harli_bench_busy-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    shutil.copy(busy.__file__, folder / "colocate_busy.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harli-bench-busy\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nbusy = colocate_busy:activate\n")
    first = [str(engine.STAND_IN)] if device == "cpu" else []
    path = [*first, str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "SGLANG_PLUGINS": "busy",
        "PYTHONPATH": os.pathsep.join(path),
        busy.PATH_ENV: str(written),
    }
