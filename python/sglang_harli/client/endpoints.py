"""Whether an address can be the finetune service's: asked before a client tries for half a minute
to reach it."""

from __future__ import annotations

import ipaddress
import os
import re
import socket

from sglang_harli.errors import ConfigError, shown

FORMS = "tcp://127.0.0.1:PORT, tcp://[::1]:PORT or ipc://PATH"
MAX_IPC_PATH = 107  # bytes of a Unix socket's path
_BARE_IPV6 = re.compile(r"tcp://([0-9a-fA-F:.]*:[0-9a-fA-F:.]*):([0-9]{1,5})\Z")
# ZMQ takes SOURCE;HOST:PORT too.
_TCP = re.compile(
    r"tcp://(?:[^;/\s]*;)?(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^\[\]:/;\s]+)):(?P<port>[0-9]{1,5})\Z"
)


def check_endpoint(endpoint: str) -> None:
    """Raise ConfigError, with the form that is meant, for an address that can be no service's."""
    problem = _problem(endpoint)
    if problem is not None:
        raise ConfigError(f"endpoint {shown(endpoint)} is not accepted: give {problem}", param="endpoint")


def _problem(endpoint: str) -> str | None:
    """What to give in its place; None: it is one."""
    try:
        endpoint.encode()
    except UnicodeEncodeError:
        return f"{FORMS}, in UTF-8"
    if endpoint.startswith(("http://", "https://")):
        return f"the finetune endpoint, not the HTTP address: {FORMS}"
    if endpoint.startswith("ipc://"):
        size = len(os.fsencode(endpoint.removeprefix("ipc://")))
        if not 0 < size <= MAX_IPC_PATH or "\0" in endpoint:
            return f"a path of 1 to {MAX_IPC_PATH} bytes behind ipc:// (this one has {size})"
        return None
    bare = _BARE_IPV6.match(endpoint)
    if bare is not None:
        return f"tcp://[{bare[1]}]:{bare[2]} (an IPv6 address stands in brackets)"
    match = _TCP.match(endpoint)
    if match is None:
        meant = _TCP.match(f"tcp://{endpoint.removesuffix('/').rpartition('://')[2]}")
        return f"{meant[0]} or another of {FORMS}" if meant and _address(meant) is None else FORMS
    return _address(match)


def _address(match: re.Match[str]) -> str | None:
    if not 0 < int(match["port"]) < 65536:
        return "a port from 1 to 65535"
    if match["ipv6"] is not None:
        try:
            ipaddress.IPv6Address(match["ipv6"])
        except ValueError:
            return "an IPv6 address within the brackets"
    elif match["host"] == "*":
        return "the address of one host (* is for servers)"
    elif re.fullmatch(r"[0-9.]+", match["host"]):
        try:
            socket.inet_aton(match["host"])
        except OSError:
            return "an IPv4 address"
    return None
