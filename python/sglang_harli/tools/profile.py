"""``harli profile``: has a server measure itself under a sweep of requests; writes a profile table.

The server, a running one or one that is started for it, computes each size of batch for a few
tokens, asked through SGLang's HTTP port.  Loads that are in the table already are left out, so that
a sweep goes on where the last one ended.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_harli.core import PROFILE_ROUTE
from sglang_harli.errors import ConfigError, HarliError, NotReadyError, UnsupportedError
from sglang_harli.predictor.profile import profile_table
from sglang_harli.predictor.profile.profile_table import Found, ProfileTable
from sglang_harli.predictor.profile.sweep import Load, bodies, grid, missing
from sglang_harli.tools.server_process import ServerProcess

TIMEOUT_S = 600.0
KEEP_EVERY_S = 15.0  # what has been measured is written this often
NOT_FOUND = "not_found"


@dataclass(frozen=True, slots=True)
class ServerPort:
    """A server's HTTP port; ``api_key``: its ``--api-key``, None where it has none."""

    url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """What a server says of itself.

    Attributes:
        path: where it looks for its profile when it starts.
        measured: the loads that it has measured since it started.
        limits: of loads: requests, row_tokens, slots, vocab; one batch in ``sampled`` is measured.
        fields: what each request is to have besides.
    """

    path: str
    measured: ProfileTable
    limits: dict[str, int]
    fields: dict[str, Any]


def ask(port: ServerPort) -> ServerProfile:
    """What the server at ``port`` has measured; NotReadyError: it is out of reach, ConfigError: it
    wants another API key, UnsupportedError: it has no finetuning."""
    none = (
        f"the server at {port.url} says nothing of latencies that this harli understands: give the --url of a server "
        "of the same version that runs with finetuning"
    )
    try:
        profile = _call(port, PROFILE_ROUTE, None)
        return ServerProfile(
            profile["path"], profile_table.parse(profile["table"]), profile["limits"], profile["fields"]
        )
    except HarliError as error:
        if error.code == NOT_FOUND:
            raise UnsupportedError(none) from error
        raise
    except (TypeError, LookupError, ValueError) as error:
        raise UnsupportedError(none) from error


def sweep(
    port: ServerPort,
    *,
    output: str | None,
    budget_s: float,
    progress: Callable[[list[Load]], Iterator[Load]],
) -> dict[str, Any]:
    """Measure what is missing, and write the table: at the end, and on the way.

    Args:
        output: the file; None: where the server looks for it.
        budget_s: no further load is begun after so many seconds.
        progress: shows the loads as they are taken.

    Returns path, points, measured loads, missing loads.  ConfigError: the server's folder is not on
    this machine, the file cannot be written, or the API key is wrong.
    """
    found = ask(port)
    path = _target(output, found.path)
    key = found.measured.key
    on_disk = profile_table.load(path, key)
    loads = grid(found.limits)
    todo = missing(loads, found.measured if on_disk.table is None else on_disk.table.joined(found.measured))
    measured, now_s = 0, time.monotonic()
    ends_s, keep_s = now_s + budget_s, now_s + KEEP_EVERY_S
    for load in progress(todo):
        if time.monotonic() >= ends_s:
            break
        _call(port, "/generate", bodies(load, found.limits["vocab"], found.fields))
        measured += 1
        if time.monotonic() >= keep_s:
            _keep(ask(port), found, on_disk, path)
            keep_s = time.monotonic() + KEEP_EVERY_S
    table = _keep(ask(port), found, on_disk, path)
    return {
        "path": str(path),
        "points": table.points,
        "measured": measured,
        "missing": len(missing(loads, table)),
        "was": on_disk.text,
    }


def _keep(now: ServerProfile, first: ServerProfile, on_disk: Found, path: Path) -> ProfileTable:
    if now.measured.key != first.measured.key:
        raise NotReadyError("the server was started again with other options: run harli profile again")
    table = now.measured if on_disk.table is None else on_disk.table.joined(now.measured)
    try:
        table.save(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): give --output", param="--output"
        ) from error
    return table


def sweep_new(
    model: str,
    flags: Sequence[str],
    *,
    output: str,
    budget_s: float,
    progress: Callable[[list[Load]], Iterator[Load]],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """``sweep`` on a server that is started for it, in a run directory of its own, and then ended.

    Args:
        model: as ``--model-path`` of the launcher.
        flags: further flags of the launcher; the table is good for a server with the same ones.
        report: gets a line before the server starts.

    HarliError: the server did not start; with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="harli-profile-") as folder:
        log = Path(folder) / "server.log"
        report(f"starting a server for {model}")
        with ServerProcess(Path(model), Path(folder) / "runs", log, *flags) as server:
            return sweep(ServerPort(server.url), output=output, budget_s=budget_s, progress=progress)


def _target(output: str | None, server_path: str) -> Path:
    if output is not None:
        return Path(output)
    path = Path(server_path)
    if not path.parent.is_dir():
        raise ConfigError(
            f"the server's folder {path.parent} is not on this machine: give --output FILE and copy it there",
            param="--output",
        )
    return path


def _call(port: ServerPort, path: str, body: dict[str, Any] | None) -> Any:
    url, data = port.url, None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if port.api_key:
        if not (port.api_key.isascii() and port.api_key.isprintable()):
            raise ConfigError(
                "the API key is not accepted: give printable ASCII characters", param="--api-key"
            )
        headers["Authorization"] = f"Bearer {port.api_key}"
    try:
        request = urllib.request.Request(url.rstrip("/") + path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ConfigError(
                f"the server at {url} wants an API key{' other than this one' if port.api_key else ''}: "
                "give --api-key, or HARLI_API_KEY in the environment",
                param="--api-key",
            ) from error
        text = error.read(500).decode(errors="replace")
        code = NOT_FOUND if error.code == 404 else "server_error"
        raise HarliError(f"{url}{path} answered {error.code}: {text}", code=code) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise NotReadyError(f"no server answers at {url} ({reason}): give --url of its HTTP port") from error
    except ValueError as error:
        raise ConfigError(
            f"{url} is not the address of a SGLang server ({error}): give --url http://HOST:PORT",
            param="--url",
        ) from error
