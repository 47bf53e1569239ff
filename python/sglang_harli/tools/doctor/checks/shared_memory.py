"""Whether /dev/shm has room for what a job needs, and what servers that are gone left in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sglang_harli import run_paths
from sglang_harli.config import show_size
from sglang_harli.tools.doctor import proc
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.finding import Finding, ok, problem, together, warning

FOLDER = Path("/dev/shm")
# Adapter and optimizer state of a job of default rank on a model of 8 billion parameters are about
# 0.7 GiB, and a published adapter comes beside it; a container has 64 MiB where nothing is said.
LEAST_BYTES = 1 << 30
GIVE_MORE = "give it more: `docker run --shm-size 4g`, or `mount -o remount,size=4g /dev/shm`"


def shared_memory(asked: Asked) -> Finding:
    return judge(FOLDER, largest_state(asked.run_dir), run_paths.shm_dir(str(asked.run_dir)).name)


def judge(folder: Path, state_bytes: int, own: str) -> Finding:
    """``state_bytes``: of the largest checkpoint in the run directory, 0: there is none; ``own``:
    name of the folder that the run directory's server has here."""
    if not folder.is_dir():
        return problem(f"there is no {folder}", f"mount a tmpfs there; {GIVE_MORE}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return problem(f"{folder} cannot be written by uid {os.getuid()}", f"chmod 1777 {folder} (as root)")
    found = [_room(folder, state_bytes)]
    place = folder / own
    if place.is_symlink() or (place.exists() and place.lstat().st_uid != os.getuid()):
        found.append(
            problem(f"{place} is a link, or another user's", f"have it removed by its owner or root: {place}")
        )
    found += [
        warning(f"{path} holds {show_size(size)} of a server that is gone", f"rm -r {path}")
        for path, size in leftovers(folder)
    ]
    return together(found)


def _room(folder: Path, state_bytes: int) -> Finding:
    disk = os.statvfs(folder)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    found = f"{folder} has {show_size(free)} free of {show_size(total)}"
    # A run's state goes through it in one piece, and an adapter that is published beside it.
    if state_bytes and free < 2 * state_bytes:
        return warning(f"{found}, and the largest job's state takes {show_size(state_bytes)}", GIVE_MORE)
    if total < LEAST_BYTES:
        return warning(f"{found}, less than {show_size(LEAST_BYTES)} in all", GIVE_MORE)
    return ok(found)


def largest_state(run_dir: Path) -> int:
    """Bytes of the largest checkpoint of a run directory."""
    sizes = (
        sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        for folder in run_dir.glob("ftjob-*/checkpoints/step-*")
    )
    try:
        return max(sizes, default=0)
    except OSError:  # another user's, or gone meanwhile
        return 0


def leftovers(folder: Path) -> Iterator[tuple[Path, int]]:
    """Folders of this user's servers whose sockets nobody has bound any more, with their bytes."""
    mine = f"harli-{os.getuid()}-"
    sockets = proc.unix_sockets()
    for path in sorted(folder.glob(f"{mine}*")):
        if path.is_symlink() or not path.is_dir():
            continue
        key = path.name.removeprefix(mine)
        if any(f"/harli-{os.getuid()}/{key}/" in name for name in sockets):
            continue
        try:
            size = sum(slot.stat().st_blocks * 512 for slot in path.iterdir())
        except OSError:
            continue
        if size:
            yield path, size
