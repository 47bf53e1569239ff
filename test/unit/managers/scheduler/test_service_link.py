"""The scheduler's link to the service: what cannot be opened is tried again, and ends nothing."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: no descriptor is left when the link is made, some are later.
SCRIPT = """
import logging, os, resource, sys, time
import zmq
from sglang_harli.managers.scheduler.service_link import ServiceLink
from sglang_harli.protocol import internal

logging.basicConfig(stream=sys.stdout, format="%(message)s")
endpoint = "ipc://" + sys.argv[1]
bound = zmq.Context().socket(zmq.DEALER)
bound.bind(endpoint)
lowest = os.dup(1)
os.close(lowest)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
link = ServiceLink(endpoint, lambda: internal.Hello(pid=7, rank=0, limits=None))
assert link.socket is None
assert link.poll() == []
link.wait(0.01)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
end = time.monotonic() + 20
while not bound.poll(10):
    link.poll()
    assert time.monotonic() < end
print(internal.decode(bound.recv_multipart()[0], "scheduler").pid)
link.close()
"""


def test_a_link_that_cannot_be_opened_now_is_opened_later(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "s")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    said, pid = done.stdout.splitlines()
    assert "no link to the finetune service (Too many open files): serving goes on without it" in said
    assert pid == "7"
