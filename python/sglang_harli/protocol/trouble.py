"""Which errors are trouble of the environment, which ends by itself, and no verdict on a job."""

from __future__ import annotations

import errno

from sglang_harli.errors import NotReadyError

# Of files that are not there, or cannot be what was meant, and of what is larger than the whole
# device: the same the next time.  (Without a number it is an error of ours about a file's
# contents.)
_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EFBIG, errno.EINVAL, None),
)


FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0


def passes(error: BaseException) -> bool:
    """Whether it is worth while to try the same again later: a full disk, no file descriptor or
    memory left, an input or output error, a database that is locked."""
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return isinstance(error, MemoryError | NotReadyError)


def pause_s(troubles: int) -> float:
    """Seconds to wait before the next try, after so many troubles in a row, from 1 on."""
    return min(FIRST_PAUSE_S * 2 ** min(troubles - 1, 30), LONGEST_PAUSE_S)
