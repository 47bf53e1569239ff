"""What the kernel says in /proc: who listens, who holds a lock, which file system a path is on.

Only read, so that a running server notices nothing.  What cannot be read is answered with None or
nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
_COMMAND = 120  # characters of a command line that are shown


# How the processes of a server are started, or call themselves.
_SERVERS = re.compile(
    r"\bsglang(_harli)?\.launch_server\b|\bsglang_harli\.service\.app\b|\bsglang serve\b|^sglang::"
)


@dataclass(frozen=True, slots=True)
class Process:
    """``command``: its command line, empty where it cannot be read."""

    pid: int
    command: str

    @property
    def is_server(self) -> bool:
        """Whether it is one of an SGLang server's."""
        return _SERVERS.search(self.command) is not None

    def __str__(self) -> str:
        shown = self.command if len(self.command) <= _COMMAND else f"{self.command[:_COMMAND]}..."
        return f"pid {self.pid} ({shown or 'command unknown'})"


def process(pid: int) -> Process:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        raw = b""
    return Process(pid, raw.replace(b"\0", b" ").decode(errors="replace").strip())


# ------------------------------------------------------------------ sockets
def listening(port: int) -> dict[str, int]:
    """Addresses on which a TCP port is listened at, with the inode of the socket."""
    found = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in _lines(f"/proc/net/{name}")[1:]:
            fields = line.split()
            address, _, number = fields[1].partition(":")
            if fields[3] == _LISTEN and int(number, 16) == port:
                found[socket.inet_ntop(family, _address(address))] = int(fields[9])
    return found


def _address(text: str) -> bytes:
    """The kernel writes an address as words in the host's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    return struct.pack(f"={len(words)}I", *words)


def listener(port: int) -> Process | None:
    """The process that listens at a TCP port; None: there is none, or it is another user's."""
    return _owner(set(listening(port).values()))


def unix_listener(path: str) -> Process | None:
    """The same of a Unix socket."""
    return _owner(set(unix_sockets().get(path, ())))


def unix_sockets() -> dict[str, list[int]]:
    """Paths of the Unix sockets that a process has bound, with their inodes; ``@``: abstract."""
    found: dict[str, list[int]] = {}
    for line in _lines("/proc/net/unix")[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:
            found.setdefault(fields[7], []).append(int(fields[6]))
    return found


def _owner(inodes: set[int]) -> Process | None:
    links = {f"socket:[{inode}]" for inode in inodes}
    for folder in Path("/proc").glob("[0-9]*/fd") if links else ():
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path) in links:
                        return process(int(folder.parts[2]))
    return None


# ------------------------------------------------------------------ files
def lock_holder(path: Path) -> Process | None:
    """The process that has a flock on a file; None: nobody on this host."""
    try:
        info = path.stat()
    except OSError:
        return None
    device = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    for line in _lines("/proc/locks"):
        fields = line.split()
        if "->" not in fields and len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == device:
            return process(int(fields[4]))
    return None


def file_system(path: Path) -> str | None:
    """The type of the file system of a path that exists, such as ext4."""
    try:
        info = path.stat()
    except OSError:
        return None
    device = f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}"
    mounts = [line.split() for line in _lines("/proc/self/mountinfo")]
    by_device = [fields for fields in mounts if fields[2] == device]
    real = os.path.realpath(path)
    # Some file systems give their files another device than their mount: then the longest mount.
    around = [m for m in by_device or mounts if _within(real, m[4].encode().decode("unicode_escape"))]
    if not around:
        return None
    fields = max(around, key=lambda fields: len(fields[4]))
    return fields[fields.index("-") + 1]


def _within(path: str, folder: str) -> bool:
    return folder == "/" or path == folder or path.startswith(folder + "/")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
