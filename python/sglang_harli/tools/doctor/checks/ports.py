"""Whether the server could bind its addresses, or which process has them.  Nothing listens for it,
and no file is made or removed."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from sglang_harli.config import HarliOptions, ipc_path, is_loopback
from sglang_harli.errors import ConfigError
from sglang_harli.tools.doctor import proc
from sglang_harli.tools.doctor.asked import LOOPBACK, Asked
from sglang_harli.tools.doctor.finding import Finding, ok, problem, skipped, together, warning

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
NEEDED_PORTS = 1000  # of those for outgoing connections: what a busy server has open at once


def http_port(asked: Asked) -> Finding:
    if asked.http_given and not _is_here(asked.http_host):
        return skipped(f"{asked.http} is on another host", "run harli doctor there")
    return _tcp(LOOPBACK, asked.port, f"HTTP port {asked.port}", "another --port")


def finetune_endpoint(asked: Asked) -> Finding:
    path = ipc_path(asked.endpoint)
    try:  # keys are looked at by themselves
        HarliOptions(finetune_endpoint=asked.endpoint, allow_insecure_endpoint=True)
    except ConfigError as error:
        return problem(error.message, "give --endpoint as the server's --harli-finetune-endpoint has it")
    if path is not None:
        return _unix(path)
    assert asked.tcp is not None  # HarliOptions has accepted it
    host, port = asked.tcp
    host = LOOPBACK if host == "localhost" else "0.0.0.0" if host == "*" else host
    if not _is_here(host):
        return skipped(f"{asked.endpoint} is on another host", "run harli doctor there")
    return _tcp(host, port, f"finetune endpoint {asked.endpoint}", "another --harli-finetune-endpoint")


def ephemeral_ports(asked: Asked) -> Finding:
    ports = [asked.port] + ([asked.tcp[1]] if asked.tcp else [])
    try:
        low, high = map(int, RANGE.read_text().split())
        reserved = parse_ranges(RESERVED.read_text())
    except (OSError, ValueError) as error:
        return skipped(
            f"the range of outgoing ports cannot be read ({error})", "look at net.ipv4.ip_local_port_range"
        )
    return judge_range(ports, low, high, reserved)


def judge_range(ports: list[int], low: int, high: int, reserved: list[range]) -> Finding:
    """``low`` to ``high``: the ports that outgoing connections get, but for ``reserved``."""
    found = [ok(f"outgoing connections have ports {low} to {high}")]
    if high - low + 1 < NEEDED_PORTS:
        found.append(
            warning(
                f"outgoing connections have {high - low + 1} ports, {low} to {high}",
                "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
            )
        )
    for port in ports:
        if low <= port <= high and not any(port in r for r in reserved):
            found.append(
                warning(
                    f"port {port} is one of those that outgoing connections get ({low} to {high}), and may be taken "
                    "when the server starts",
                    f"give a port below {low}, or sysctl -w net.ipv4.ip_local_reserved_ports={port}",
                )
            )
    return together(found)


def parse_ranges(text: str) -> list[range]:
    """``8080,30000-30010`` as the kernel writes it."""
    parts = [part.partition("-") for part in text.strip().split(",") if part]
    return [range(int(first), int(last or first) + 1) for first, _, last in parts]


# ------------------------------------------------------------------ one address
def _is_here(host: str) -> bool:
    """Whether an address is one of this host."""
    try:
        places = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter of what can be no host's name
        return False
    return any(_bind_error(family, address) is None for family, _, _, _, address in places)


def _bind_error(family: int, address: object) -> int | None:
    """The errno of a bind like the server's, which does not mind connections that are closing."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)  # type: ignore[arg-type]
    except OSError as error:
        return error.errno or errno.EINVAL
    return None


def _tcp(host: str, port: int, what: str, other: str) -> Finding:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    number = _bind_error(family, address)
    if number is None:
        return ok(f"{what} is free")
    if number != errno.EADDRINUSE:
        return problem(f"{what} cannot be bound: {os.strerror(number)}", f"give {other}")
    return _held(what, proc.listener(port), other)


def _held(what: str, holder: proc.Process | None, other: str) -> Finding:
    if holder is None:
        return problem(
            f"{what} is in use by a process that this user may not see",
            f"give {other}, or end what has it (as root: ss -tlnp)",
        )
    if holder.is_server:
        return ok(f"{what} is a running server's: {holder}")
    return problem(f"{what} is in use by {holder}", f"give {other}, or end that process")


def _unix(path: str) -> Finding:
    what, other = f"finetune endpoint ipc://{path}", "another ipc://PATH"
    name = path if path.startswith("@") else os.path.abspath(path)
    if path in proc.unix_sockets() or name in proc.unix_sockets():
        return _held(what, proc.unix_listener(path) or proc.unix_listener(name), other)
    if path.startswith("@"):
        return ok(f"{what} is free")
    folder = os.path.dirname(name)
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        return problem(f"{what}: {error.strerror}", f"give {other}")
    if mode is not None and not stat.S_ISSOCK(mode):
        return problem(f"{what}: there is a file or a folder of that name", f"give {other}, or remove it")
    if not os.path.isdir(folder):
        return problem(f"{what}: its folder does not exist", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return problem(
            f"{what}: its folder cannot be written", f"give {other} in a folder that can be written"
        )
    return ok(f"{what} is free")


def beyond_loopback(asked: Asked) -> bool:
    """Whether other hosts reach the endpoint."""
    return not is_loopback(asked.endpoint)
