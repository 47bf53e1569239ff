"""``python -m sglang_harli.managers.http.supervision.child_process PARENT_PID MODULE``: run MODULE,
and die with the parent.

The child asks for its parent-death signal itself, not by ``preexec_fn``, which would run Python
between fork and exec in a process full of threads.  Linux sends the signal when the *thread* that
forked ends, so that thread must outlive the child (supervisor.py).  Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process when its parent's forking thread ends.  SystemExit: the
    parent was gone before the request; OSError: the kernel refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != parent_pid:  # it died in between: no signal will come any more
        raise SystemExit(f"the server (pid {parent_pid}) ended before its child was up")


def main() -> None:
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    die_with_parent(parent_pid)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
