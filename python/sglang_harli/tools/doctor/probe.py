"""``python -m sglang_harli.tools.doctor.probe torch|sglang``: heavy libraries, imported in a
process of their own, for they may be broken in ways that end one.  The last line is JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sglang_harli.errors import HarliError

TIMEOUT_S = 900.0  # an import takes half a minute, and many times that on a busy machine
NICENESS = 10  # a server may be running here


class ProbeError(HarliError):
    """The child ended without an answer: the last line that it wrote, or how it ended."""

    code = "probe"


class _Child:
    """One probe under way; its output goes to files, which never fill up as a pipe does."""

    def __init__(self, part: str) -> None:
        package = str(Path(__file__).parents[3])  # also where it is on the path without being installed
        path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the child)
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__, part],
            # Not the modules of the current folder.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*path, package]), "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
        )

    def lines(self) -> tuple[list[str], list[str]]:
        """What it wrote to stdout and stderr."""
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").strip().splitlines())
        return texts[0], texts[1]


_children: dict[str, _Child] = {}


def begin(part: str) -> None:
    """Start it now, so that other checks run meanwhile."""
    if part not in _children:
        _children[part] = _Child(part)


def end() -> None:
    """End those that nobody waits for any more."""
    for child in _children.values():
        if child.process.poll() is None:
            child.process.kill()
            child.process.wait()
    _children.clear()


def probe(part: str) -> dict[str, Any]:
    """The answer of a child, which is asked once; ProbeError: it gave none."""
    begin(part)
    child = _children[part]
    try:
        code = child.process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"importing {part} has not ended after {TIMEOUT_S:g} s") from error
    out, err = child.lines()
    if code == 0 and out:
        return json.loads(out[-1])
    if code < 0:
        raise ProbeError(f"importing {part} ended with signal {-code}")
    raise ProbeError(f"{part} cannot be used: {err[-1] if err else f'exit code {code}'}")


def look_at_torch() -> dict[str, Any]:
    """Its version and devices; no memory of a device is allocated."""
    import torch

    found: dict[str, Any] = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "devices": []}
    if torch.cuda.is_available():
        from sglang_harli.mem_cache.backing import cuda_driver

        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found["devices"].append(
                {
                    "name": device.name,
                    "bytes": device.total_memory,
                    "capability": [device.major, device.minor],
                }
            )
        found["no_remapping"] = cuda_driver.why_not(0)
    return found


def look_at_sglang() -> dict[str, Any]:
    """Which seams hold, read and called, and which hooks SGLang lets be applied."""
    from sglang_harli.seams import hooks_applied
    from sglang_harli.tools import seam_check

    # Called last: hooks that are in place are no seams of SGLang's own.
    lines = seam_check.read(seam_check.installed()) + seam_check.call()
    count, refused = hooks_applied.apply_all()
    return {
        "seams": len(lines),
        "broken": {name: why for name, why in lines if why},
        "hooks": count,
        "refused": refused,
    }


def main(part: str) -> None:
    os.nice(NICENESS)
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not the answer
    found = look_at_torch() if part == "torch" else look_at_sglang()
    os.write(answer, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
