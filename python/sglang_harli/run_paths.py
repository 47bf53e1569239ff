"""Private folders of a run directory's sockets and shared memory, the same for all processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

MAX_SOCKET_PATH = 107  # bytes of a unix socket's path
_LONGEST_SOCKET = "scheduler.sock"  # of those in ``ipc_dir``


def run_key(run_dir: str) -> str:
    """A short word that is unique per run directory; names its sockets and shared memory."""
    return hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:16]


def private_tmp() -> Path:
    """This user's folder among temporary files, the same for all processes of a server: the first
    place with short paths for sockets that can be written and holds no such folder of another's."""
    places = [
        *(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP", "XDG_RUNTIME_DIR")),
        "/tmp",
        "/var/tmp",
    ]
    folders = [Path(os.path.abspath(place), f"harli-{os.getuid()}") for place in places if place]
    short = [folder for folder in folders if fits_socket(f"{folder}/{run_key('')}/{_LONGEST_SOCKET}")]
    return next((folder for folder in short if _can_be_ours(folder)), short[0])


def ipc_dir(run_dir: str) -> Path:
    """The private folder (mode 0700) of the sockets between a server's processes.  Not in the run
    directory itself: a unix socket's path is limited to 107 bytes."""
    return private_tmp() / run_key(run_dir)


def fits_socket(path: str) -> bool:
    """Whether a unix socket can have this path."""
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH


def _can_be_ours(folder: Path) -> bool:
    try:
        info = folder.lstat()
    except FileNotFoundError:
        return os.access(folder.parent, os.W_OK | os.X_OK)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()


def make_ipc_dir(run_dir: str) -> Path:
    """Create ``ipc_dir`` (0700); PermissionError: another user's, or a link; OSError: cannot."""
    path = ipc_dir(run_dir)
    for folder in (path.parent, path):
        os.close(open_private(folder, make=True))
    return path


def open_private(folder: Path, *, make: bool = False) -> int:
    """A descriptor of a folder that is this user's alone; ``make``: make it, with mode 0700.

    One of ours that is open to others (made under another umask) is closed to them.

    Raises:
        PermissionError: it belongs to another user, or is a link or a file.
        OSError: it is missing, or cannot be made.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        found = f"it belongs to uid {info.st_uid}" if stat.S_ISDIR(info.st_mode) else "it is a link or a file"
        raise PermissionError(f"{folder} must be a folder of uid {os.getuid()}, and {found}: have it removed")
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if info.st_uid != os.getuid():
            raise PermissionError(
                f"{folder} is not the folder any more that it was a moment ago: have it removed"
            )
        if info.st_mode & 0o077:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


def scheduler_endpoint(run_dir: str) -> str:
    """Where the service listens for the scheduler (the service binds, the scheduler connects)."""
    return f"ipc://{ipc_dir(run_dir)}/scheduler.sock"


def http_endpoint(run_dir: str) -> str:
    """Where the service binds, and the HTTP process connects."""
    return f"ipc://{ipc_dir(run_dir)}/http.sock"


def verbs_endpoint(run_dir: str) -> str:
    """Where the service answers the verbs of the HTTP process (the service binds)."""
    return f"ipc://{ipc_dir(run_dir)}/verbs.sock"


def shm_dir(run_dir: str) -> Path:
    """The folder in shared memory of this run directory's slots (checkpoints, adapters)."""
    return Path("/dev/shm") / f"harli-{os.getuid()}-{run_key(run_dir)}"
