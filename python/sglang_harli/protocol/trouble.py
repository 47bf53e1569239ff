"""Which errors are trouble of the environment, which ends by itself, and no verdict on a job."""

from __future__ import annotations

import errno

from sglang_harli.errors import NotReadyError

# Missing or wrong files, and what is larger than the device: the same the next time.  (Without a
# number it is our own error about a file's contents.)
_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EFBIG, errno.EINVAL, None),
)


FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0


def passes(error: BaseException) -> bool:
    """Whether to try again later: a full disk, no file descriptor or memory left, an input or
    output error, a locked database."""
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return isinstance(error, MemoryError | NotReadyError)


def pause_s(troubles: int) -> float:
    """Seconds to wait before the next try, after so many troubles in a row, from 1 on."""
    return min(FIRST_PAUSE_S * 2 ** min(troubles - 1, 30), LONGEST_PAUSE_S)
