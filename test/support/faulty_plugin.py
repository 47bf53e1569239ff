"""An SGLang plugin for a server under test: every decision about a training quantum fails while a file exists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PATH_ENV = "TEST_FAULTY_PLUGIN"  # the file
NAME = "faulty"


def activate() -> None:
    from sglang_harli.managers import qos_policy

    path, decide = Path(os.environ[PATH_ENV]), qos_policy.decide

    def faulty(*args: Any) -> Any:
        if path.exists():
            raise ZeroDivisionError("division by zero, on purpose")
        return decide(*args)

    qos_policy.decide = faulty


def environment(folder: Path) -> dict[str, str]:
    """What a server's environment needs for it; ``folder`` takes the plugin, and the file ``fault`` in it is the switch."""
    metadata = folder / "harli_test_faulty-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harli-test-faulty\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{NAME} = support.faulty_plugin:activate\n"
    )
    path = os.pathsep.join(
        [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return {"PYTHONPATH": path, "SGLANG_PLUGINS": f"harli,{NAME}", PATH_ENV: str(folder / "fault")}
