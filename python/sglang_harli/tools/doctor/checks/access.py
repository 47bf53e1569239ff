"""Who may use the server: its CURVE keys, and what is reachable from other hosts without a key."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from sglang_harli.errors import ConfigError
from sglang_harli.tools.doctor import proc
from sglang_harli.tools.doctor.asked import Asked
from sglang_harli.tools.doctor.checks.ports import beyond_loopback
from sglang_harli.tools.doctor.finding import Finding, ok, problem, skipped, together, warning

MAKE_KEYS = "harli make-keys FOLDER makes a new pair of folders"
REFUSED = (401, 403)


def curve_keys(asked: Asked) -> Finding:
    if asked.curve_keys is None:
        return skipped(
            "no keys are given",
            "give --curve-keys FOLDER: a server's or a client's, or the one in which harli make-keys made both",
        )
    return judge_keys(Path(asked.curve_keys).expanduser())


def judge_keys(folder: Path) -> Finding:
    """``folder``: a server's, a client's, or one that holds both, as ``server`` and ``client``."""
    from sglang_harli.protocol import curve_keys as keys

    server = next((f for f in (folder, folder / "server") if (f / keys.SERVER_SECRET).exists()), None)
    client = next((f for f in (folder, folder / "client") if (f / keys.CLIENT_SECRET).exists()), None)
    if server is None and client is None:
        return problem(f"{folder} holds neither {keys.SERVER_SECRET} nor {keys.CLIENT_SECRET}", MAKE_KEYS)
    found = []
    try:
        if server is not None:
            keys.check_server_folder(str(server))
            clients, _ = keys.client_list(str(server))
            found.append(ok(f"{server}: the server's keys, {len(clients)} client(s) may connect"))
        if client is not None:
            keys.load_client_keys(str(client))
            found.append(ok(f"{client}: a client's keys"))
        if server is not None and client is not None:
            found += _match(server, client)
    except ConfigError as error:
        return problem(error.message, MAKE_KEYS)
    except OSError as error:
        return problem(f"{error.filename}: {error.strerror}", MAKE_KEYS)
    return together(found)


def _match(server: Path, client: Path) -> list[Finding]:
    from sglang_harli.protocol import curve_keys as keys

    theirs, ours = keys.load_server_keys(str(server)), keys.load_client_keys(str(client))
    found = []
    if ours.server != theirs.public:
        copy = f"copy the public key of {server} to {client / keys.SERVER_PUBLIC}"
        found.append(problem(f"{client / keys.SERVER_PUBLIC} is another server's key", copy))
    if ours.public not in keys.client_list(str(server))[0]:
        clients = server / keys.CLIENTS
        copy = f"copy {client / keys.CLIENT_PUBLIC} to {clients}"
        found.append(problem(f"{clients} does not hold the key of {client}", copy))
    return found or [ok("they match")]


# ------------------------------------------------------------------ from other hosts
def access(asked: Asked) -> Finding:
    return together([judge_endpoint(asked), _http(asked)])


def judge_endpoint(asked: Asked) -> Finding:
    if not beyond_loopback(asked):
        return ok(f"{asked.endpoint} is for this host alone")
    if asked.curve_keys is not None:
        return ok(f"{asked.endpoint} is reachable from other hosts, with keys")
    return problem(
        f"{asked.endpoint} is reachable from other hosts without keys: everyone may submit jobs",
        "harli make-keys FOLDER, then start the server with --harli-curve-keys FOLDER/server, and give "
        "--curve-keys FOLDER/client here",
    )


def _http(asked: Asked) -> Finding:
    answer = asked.get("/v1/models", with_key=False)
    if answer.code == 0:
        return ok(f"no HTTP server answers at {asked.http}")
    return judge_http(answer.code in REFUSED, _reach(asked), asked.http)


def _reach(asked: Asked) -> list[str]:
    """The addresses beyond loopback at which the HTTP server listens."""
    if asked.http_given and not _is_loopback(asked.http_host):
        return [asked.http_host]
    return sorted(address for address in proc.listening(asked.port) if not _is_loopback(address))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def judge_http(protected: bool, addresses: list[str], url: str) -> Finding:
    """``protected``: it refuses who has no key; ``addresses``: those that other hosts reach."""
    if protected:
        return ok(f"{url} wants an API key")
    if not addresses:
        return ok(f"{url} is for this host alone")
    return warning(
        f"{url} listens at {', '.join(addresses)} and wants no API key: everyone who reaches it may use and change it",
        "start the server with --api-key and --admin-api-key, or with --host 127.0.0.1",
    )
