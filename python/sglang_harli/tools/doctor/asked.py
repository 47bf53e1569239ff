"""What ``harli doctor`` looks at: the run directory, the addresses and the keys of one server.

What is not given is the server's own default.  The run directory is that of the server that answers
at the endpoint, else ``./harli-runs``.
"""

from __future__ import annotations

import functools
import http.client
import os
import re
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_harli.config import CURVE_KEYS_ENV, DEFAULT_ENDPOINT, ENDPOINT_ENV, HarliOptions, ipc_path
from sglang_harli.errors import ConfigError, HarliError, NotReadyError, shown

DEFAULT_PORT = 30000  # SGLang's
LOOPBACK = "127.0.0.1"
CONNECT_S, REPLY_S = 5.0, 10.0
MAX_BODY = 1 << 16  # bytes of an HTTP answer that are read
_TCP = re.compile(r"tcp://(?:\[([^\]]*)\]|([^\[\]:/;\s]+)):([0-9]{1,5})\Z")


@dataclass(frozen=True, slots=True)
class Answer:
    """Of the finetune service: its status and the reason of the job that is next, or why none
    came."""

    status: dict[str, Any] | None = None
    waits: str | None = None
    error: HarliError | None = None


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """``code``: 0 where nothing answers; ``text``: the beginning of the body, or why."""

    code: int
    text: str


class Asked:
    """The server that is looked at.  ConfigError: a port or a URL that can be none.

    Args:
        run_dir, endpoint, http, port, curve_keys, api_key: None where they were not given.

    Attributes:
        endpoint: of the finetune service, as clients give it; port: of the HTTP server.
        http: its URL; curve_keys: the folder of keys, None: none.
        endpoint_given, http_given: a server is to be there.
    """

    def __init__(
        self,
        *,
        run_dir: str | None = None,
        endpoint: str | None = None,
        http: str | None = None,
        port: int | None = None,
        curve_keys: str | None = None,
        api_key: str | None = None,
    ) -> None:
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"--port {port} is not accepted: give 1 to 65535", param="--port")
        self._run_dir = run_dir
        self.endpoint = endpoint or os.environ.get(ENDPOINT_ENV) or DEFAULT_ENDPOINT
        self.endpoint_given = endpoint is not None
        self.http_host, url_port = (LOOPBACK, None) if http is None else _host_and_port(http)
        self.port = port or url_port or DEFAULT_PORT
        self.http = (http or f"http://{LOOPBACK}:{self.port}").rstrip("/")
        self.http_given = http is not None
        self.curve_keys = curve_keys or os.environ.get(CURVE_KEYS_ENV) or None
        self.api_key = api_key

    @property
    def tcp(self) -> tuple[str, int] | None:
        """Host and port of the endpoint; None of ``ipc://`` and of what is no address."""
        match = _TCP.match(self.endpoint)
        return None if match is None else (match[1] or match[2], int(match[3]))

    @functools.cached_property
    def run_dir(self) -> Path:
        if self._run_dir is None and (status := self.answer.status) is not None:
            theirs = status["service"].get("run_dir")
            if theirs and os.path.isdir(theirs):
                return Path(theirs)
        return Path(HarliOptions(run_dir=self._run_dir or HarliOptions.run_dir).absolute_run_dir)

    @functools.cached_property
    def answer(self) -> Answer:
        """Asked once, whatever looks at it."""
        try:
            return _ask(self)
        except HarliError as error:
            return Answer(error=error)
        except ImportError as error:
            return Answer(error=HarliError(f"the client cannot be imported ({error})", code="import"))

    def get(self, path: str, *, with_key: bool = True) -> HttpAnswer:
        """GET from the HTTP server, without proxies."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if with_key and self.api_key else {}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            request = urllib.request.Request(self.http + path, headers=headers)
            with opener.open(request, timeout=REPLY_S) as answer:
                return HttpAnswer(answer.status, answer.read(MAX_BODY).decode(errors="replace").strip())
        except urllib.error.HTTPError as error:
            return HttpAnswer(error.code, error.read(MAX_BODY).decode(errors="replace").strip())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return HttpAnswer(0, str(getattr(error, "reason", None) or error))


def _host_and_port(url: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--http {shown(url)} is not accepted: give http://HOST:PORT", param="--http")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


def _ask(asked: Asked) -> Answer:
    from sglang_harli.client.endpoints import check_endpoint

    check_endpoint(asked.endpoint)
    if not _listens(asked):
        raise NotReadyError(f"nothing listens at {asked.endpoint}", code="cannot_connect")

    import msgspec

    from sglang_harli.client.blocking_client import FinetuneClient

    with FinetuneClient(
        asked.endpoint,
        connect_timeout_s=CONNECT_S,
        reply_timeout_s=REPLY_S,
        curve_keys=client_keys(asked.curve_keys),
    ) as client:
        status = msgspec.to_builtins(client.status())
        waits = None
        if status["service"].get("state") != "down" and status["jobs"].get("queued"):
            queued = client.list(status="queued", limit=1)
            waits = queued[0].reason if queued else None
        return Answer(status=status, waits=waits)


def client_keys(folder: str | None) -> str | None:
    """The folder of a client's keys: the one given, or in it where it holds both sides' keys."""
    from sglang_harli.protocol.curve_keys import CLIENT_SECRET

    inner = None if folder is None else Path(folder).expanduser() / "client"
    return str(inner) if inner is not None and (inner / CLIENT_SECRET).exists() else folder


def _listens(asked: Asked) -> bool:
    """Whether anything takes a connection at the endpoint: ZMQ would try for seconds."""
    path, tcp = ipc_path(asked.endpoint), asked.tcp
    try:
        if path is not None:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        elif tcp is not None:
            socket.create_connection(tcp, timeout=CONNECT_S).close()
    except (OSError, UnicodeError):  # the latter of what can be no host's name
        return False
    return True
