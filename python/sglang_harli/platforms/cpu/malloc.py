"""Has glibc keep what training frees, instead of giving large temporaries back to the kernel.

By default glibc maps each allocation from 128 KiB (a limit that grows to 32 MiB) of its own, unmaps
it when it is freed, and gives the heap's free end back: a training step then faults in the same
megabytes for every layer (benchmark/README.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# A free end of the heap up to this, and freed allocations up to this, stay with the process.
KEPT_BYTES = 2**30
GROWTH_BYTES = 64 * 2**20  # by which the heap grows at least

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Ask glibc for it in this process, for what is allocated from now on; whether it was done.

    The process then stays near its peak of memory, also when a job is over
    (docs/internals/seam.md).  Not done with another C library, nor where ``environ`` holds the
    operator's own setting of glibc's malloc (``MALLOC_*_``, ``GLIBC_TUNABLES``).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {_M_MMAP_THRESHOLD: KEPT_BYTES, _M_TRIM_THRESHOLD: KEPT_BYTES, _M_TOP_PAD: GROWTH_BYTES}
    done = [libc.mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings.items()]
    return all(done)
