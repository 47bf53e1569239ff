"""Who may read the run directory: this user alone.

The umask closes what the service makes.  A run directory that was there before (a volume, ``mkdir
runs``) keeps its mode, which may be meant: what lies in it is closed, and the log says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

UMASK = 0o077
_OTHERS = 0o077
_PATTERNS = ("harli.db*", "ftjob-*", "lock")  # the job store, and the folders of jobs


def close_to_others(run_dir: Path) -> None:
    """Close what an earlier version left open in a run directory that others may enter; log it."""
    mode = stat.S_IMODE(run_dir.stat().st_mode)
    if not mode & _OTHERS:
        return
    for pattern in _PATTERNS:
        for path in run_dir.glob(pattern):
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                found = path.lstat()
                if not stat.S_ISLNK(found.st_mode) and found.st_mode & _OTHERS:
                    path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
    replace = bool(mode & 0o022) and not mode & stat.S_ISVTX
    logger.warning(
        "%s is open to other users (mode %04o): they cannot read the jobs in it, but %s: chmod 700 %s",
        *(run_dir, mode, "replace them" if replace else "see their names", run_dir),
    )
