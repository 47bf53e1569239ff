"""Whether this machine has what a server takes: descriptors, cores, memory and a clock."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_harli.config import show_size
from sglang_harli.platforms.cpu.defaults import host_memory_bytes
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.finding import Finding, ok, problem, warning

LEAST_FILES = 4096
LEAST_CORES = 2  # the scheduler and the HTTP process are busy at once
LEAST_MEMORY = 4 << 30  # SGLang's processes alone take about three
CLOCK_SLACK_S = 120.0
EARLIEST = datetime(2025, 1, 1, tzinfo=UTC).timestamp()  # no release of ours is older
_CGROUP_USE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def open_files(_asked: Any) -> Finding:
    return judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judge_open_files(soft: int, hard: int) -> Finding:
    """Limits of open files; SGLang raises the soft one as far as the hard one lets it."""
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        return warning(
            f"a process may open {most} files, less than {LEAST_FILES}",
            "raise the hard limit: `docker run --ulimit nofile=65535`, or nofile in /etc/security/limits.conf",
        )
    return ok(f"a process may open {soft} files, and raise that to {most}")


def cores(_asked: Any) -> Finding:
    return judge_cores(len(os.sched_getaffinity(0)))


def judge_cores(count: int) -> Finding:
    """``count``: what this process may run on."""
    if count < LEAST_CORES:
        return warning(
            f"{count} core: requests wait for whatever else the server does",
            f"give it {LEAST_CORES} or more (`docker run --cpus`, taskset)",
        )
    return ok(f"{count} cores")


def memory(_asked: Any) -> Finding:
    return judge_memory(host_memory_bytes(), available_memory())


def judge_memory(total: int, available: int) -> Finding:
    """Bytes that this process may use in all, and those that are free now."""
    found = f"{show_size(available)} of {show_size(total)} memory is available"
    if available < LEAST_MEMORY:
        return warning(
            found, f"have {show_size(LEAST_MEMORY)} for SGLang's processes, and the model's weights on a CPU"
        )
    return ok(found)


def available_memory() -> int:
    """Bytes that could be used now: the host's, or less where a control group limits it."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    free = values.get("MemAvailable", values["MemFree"])
    for path in _CGROUP_USE:
        try:
            free = min(free, max(0, host_memory_bytes() - int(Path(path).read_text())))
        except (OSError, ValueError):
            continue
    return free


def clock(asked: Asked) -> Finding:
    now = time.time()  # stamp: of the doctor's look, against those of files
    written = (asked.run_dir / name for name in ("lock", "harli.db", "harli.db-wal"))
    return judge_clock(now, _times(written))


def _times(paths: Iterable[Path]) -> list[float]:
    return [path.stat().st_mtime for path in paths if path.exists()]


def judge_clock(now: float, written: list[float]) -> Finding:
    """Unix times: now, and those at which files of the run directory were written."""
    shown = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    mend = "set the clock (timedatectl set-ntp true)"
    if now < EARLIEST:
        return problem(f"it is {shown} by this machine's clock", mend)
    ahead = max(written, default=now) - now
    if ahead > CLOCK_SLACK_S:
        return warning(
            f"it is {shown} by this machine's clock, and files were written {ahead:.0f} s later", mend
        )
    return ok(shown)
