"""Whether the finetune service can bind its endpoint, so that a bad address is one sentence."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time

import zmq

from sglang_harli.config import ipc_path
from sglang_harli.errors import StateError

# A server that has just been killed still holds its port for a moment.
PORT_GRACE_S = 5.0
_REASONS = {
    errno.ENODEV: "it is not an address of this host",
    errno.EADDRNOTAVAIL: "it is not an address of this host",
    errno.ENOENT: "its folder does not exist",
}


def check_endpoint_free(endpoint: str, grace_s: float = PORT_GRACE_S) -> None:
    """Bind the endpoint as the service will; StateError: in use for ``grace_s`` s or impossible."""
    deadline = time.monotonic() + grace_s
    while True:
        reason, passing = _trouble(endpoint)
        if reason is None:
            return
        if not passing or time.monotonic() > deadline:
            other = "ipc://PATH" if ipc_path(endpoint) else "tcp://127.0.0.1:PORT"
            raise StateError(
                f"--harli-finetune-endpoint {endpoint}: {reason}; give another {other}",
                code="endpoint_in_use",
            )
        time.sleep(0.1)


def _trouble(endpoint: str) -> tuple[str | None, bool]:
    """What is wrong with the endpoint (None: nothing), and whether it may pass."""
    path = ipc_path(endpoint)
    if path and not path.startswith("@"):  # one of the abstract name space has no file
        reason = _socket_trouble(path)
        if reason is not None:
            return reason, reason == os.strerror(errno.EADDRINUSE)
    context = zmq.Context()
    probe = context.socket(zmq.ROUTER)
    try:
        probe.setsockopt(zmq.IPV6, endpoint.startswith("tcp://["))
        probe.bind(endpoint)
    except zmq.ZMQError as error:
        number = error.errno or 0
        return _REASONS.get(number, os.strerror(number)), number == errno.EADDRINUSE
    finally:
        probe.close(0)
        context.term()
    if path and not path.startswith("@"):
        os.unlink(path)  # libzmq leaves it
    return None, False


def _socket_trouble(path: str) -> str | None:
    """A bind removes whatever file has the path: only a socket that nobody listens at may go."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror
    if not stat.S_ISSOCK(mode):
        return "there is a file or a folder of that name, which would be overwritten"
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):  # its server is gone
            return None
        except OSError as error:
            return error.strerror
    return os.strerror(errno.EADDRINUSE)
