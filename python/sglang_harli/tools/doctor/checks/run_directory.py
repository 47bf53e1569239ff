"""Whether the run directory, and the folder of the sockets, are this user's, private and with room.
Nothing in them is made or changed."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from sglang_harli import run_paths
from sglang_harli.config import show_size
from sglang_harli.tools.doctor import proc
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.checks.shared_memory import largest_state
from sglang_harli.tools.doctor.finding import Finding, ok, problem, together, warning

OTHER = "give another --harli-run-dir"
# A file system -> why a run directory on it is in danger.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "fuse.sshfs")
VOLATILE = ("tmpfs", "ramfs")
LAYER = ("overlay", "aufs")
WARN_BYTES = 5 << 30  # an upload may have 16 GiB, and each job keeps data, checkpoints and an adapter
LEAST_BYTES = 256 << 20
LEAST_FILES = 1000
PRIVATE = ("harli.db*", "ftjob-*")


def run_directory(asked: Asked) -> Finding:
    return judge_run_directory(asked.run_dir)


def judge_run_directory(path: Path) -> Finding:
    """Owner, modes, file system and user of a run directory, which need not be there."""
    if not path.exists() and not path.is_symlink():
        return _can_be_made(path)
    if not path.is_dir():
        return problem(f"{path} is a file or a broken link", OTHER)
    info = path.stat()
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return problem(
            f"{path} belongs to uid {info.st_uid} and cannot be written by uid {os.getuid()}",
            f"run as uid {info.st_uid}, chown it, or {OTHER}",
        )
    findings = [ok(f"{path} is uid {info.st_uid}'s, mode {stat.S_IMODE(info.st_mode):04o}")]
    if info.st_uid != os.getuid():
        findings.append(
            warning(
                f"{path} belongs to uid {info.st_uid}, this is uid {os.getuid()}",
                "run as its owner, or chown it",
            )
        )
    findings += [*_modes(path, info.st_mode), _kind(path), _user(path)]
    return together(findings)


def _can_be_made(path: Path) -> Finding:
    parent = _existing(path)
    if not os.access(parent, os.W_OK | os.X_OK):
        return problem(f"{path} is not there, and {parent} cannot be written by uid {os.getuid()}", OTHER)
    return together([ok(f"{path} is not there yet, and will be made"), _kind(parent, path)])


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one around it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _modes(path: Path, mode: int) -> list[Finding]:
    if not mode & 0o077:
        return []
    inside = [p for pattern in PRIVATE for p in path.glob(pattern) if p.lstat().st_mode & 0o077]
    named = f", and so are {len(inside)} things in it, such as {inside[0].name}" if inside else ""
    return [warning(f"it is open to other users{named}", f"chmod -R go= {path}")]


def _kind(path: Path, shown: Path | None = None) -> Finding:
    kind = proc.file_system(path)
    return ok("on a file system of unknown kind") if kind is None else judge_file_system(kind, shown or path)


def judge_file_system(kind: str, path: Path) -> Finding:
    """``kind``: as the kernel names it."""
    if kind in NETWORK:
        return warning(
            f"{path} is on a network file system ({kind}), where locks and the job store's log may fail",
            "give a --harli-run-dir on a local disk",
        )
    if kind in VOLATILE:
        return warning(
            f"{path} is in memory ({kind}): jobs go with the machine", "give a --harli-run-dir on a disk"
        )
    if kind in LAYER:
        return warning(
            f"{path} is in the container's own layer ({kind}): jobs go with the container",
            "mount a volume, and give a --harli-run-dir in it",
        )
    return ok(f"on {kind}")


def _user(path: Path) -> Finding:
    holder = proc.lock_holder(path / "lock")
    return ok("no server uses it" if holder is None else f"used by the server with {holder}")


# ------------------------------------------------------------------ room
def disk(asked: Asked) -> Finding:
    folder = _existing(asked.run_dir)
    files = os.statvfs(folder)
    free_files = files.f_favail if files.f_files else None
    return judge_disk(folder, shutil.disk_usage(folder).free, largest_state(asked.run_dir), free_files)


def judge_disk(folder: Path, free: int, state_bytes: int, free_files: int | None) -> Finding:
    """``state_bytes``: of the largest checkpoint; ``free_files``: None: they have no limit."""
    found = f"{show_size(free)} free for {folder}"
    if free < max(LEAST_BYTES, 2 * state_bytes):
        need = f", and the next checkpoint takes {show_size(state_bytes)}" if state_bytes else ""
        return problem(f"{found}{need}", f"make room, remove folders of jobs that are over, or {OTHER}")
    if free_files is not None and free_files < LEAST_FILES:
        return problem(f"{folder} has room for {free_files} more files", f"make room, or {OTHER}")
    if free < WARN_BYTES:
        return warning(found, f"make room, or {OTHER}")
    return ok(found)


# ------------------------------------------------------------------ sockets between the processes
def sockets(asked: Asked) -> Finding:
    return judge_sockets(run_paths.ipc_dir(str(asked.run_dir)))


def judge_sockets(path: Path) -> Finding:
    """The private folder of a server's sockets, which need not be there."""
    longest = f"{path}/scheduler.sock"
    if not run_paths.fits_socket(longest):
        return problem(
            f"{longest} has more than {run_paths.MAX_SOCKET_PATH} bytes, which is what a Unix socket can have",
            "export TMPDIR=/tmp",
        )
    for folder in (path.parent, path):
        if not folder.exists() and not folder.is_symlink():
            around = _existing(folder)
            if os.access(around, os.W_OK | os.X_OK):
                return ok(f"{path} is not there yet, and will be made")
            return problem(
                f"{around} cannot be written", "export TMPDIR=FOLDER, a short path that can be written"
            )
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            whose = f"belongs to uid {info.st_uid}" if stat.S_ISDIR(info.st_mode) else "is a link or a file"
            return problem(f"{folder} {whose}, this is uid {os.getuid()}", f"have it removed: {folder}")
        if info.st_mode & 0o077:
            return warning(f"{folder} is open to other users", f"chmod 700 {folder}")
    return ok(f"{path} is this user's alone")
