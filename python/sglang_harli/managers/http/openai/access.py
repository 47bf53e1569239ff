"""Who may use the routes for files, fine-tuning and the deletion of models.

A configured key closes all of them, reading included: ``--api-key`` opens them and so does the
admin key.  A model is deleted as SGLang unloads an adapter: where there is an admin key, with that
alone.  Without a key only processes of this machine may come.  A page in a browser of this
machine is not one of them: its ``Origin`` is foreign, or (DNS rebinding) the ``Host`` that it asks
for is.  SGLang lets every origin read what it answers, so this is checked before anything is done.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from sglang_harli.managers.http.openai.errors import Refusal

_HOST = re.compile(r"^(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?\Z")
# What a proxy adds: the peer's address says nothing about who asks.
_PROXIED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_HINT = "start the server with --api-key KEY and give the client that key"


@dataclass(frozen=True)
class Access:
    """The rule of one server; keys are those of --api-key and --admin-api-key."""

    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)

    def check(self, scope: Scope, *, admin: bool = False) -> None:
        """Let a request through; ``admin``: the admin key alone will do, where there is one.

        Raises:
            Refusal: 401, no key or a wrong one; 403, no key is set and it is not of this machine.
        """
        headers = Headers(scope=scope)
        if self.api_key or self.admin_api_key:
            self._check_key(headers, admin and bool(self.admin_api_key))
        else:
            _check_local(scope, headers)

    def _check_key(self, headers: Headers, admin: bool) -> None:
        given = headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        bearer = scheme.lower() == "bearer" and bool(token)
        # Each key is compared, so that the time says nothing; Starlette reads headers as latin-1.
        keys = [key for key in (None if admin else self.api_key, self.admin_api_key) if key]
        same = [secrets.compare_digest(token.encode("latin-1"), key.encode()) for key in keys]
        if bearer and any(same):
            return
        flag = "--api-key" if self.api_key and not admin else "--admin-api-key"
        wrong = "this is not the key that is needed" if bearer else "no key came"
        raise Refusal(
            f"{wrong}: send the key of the server's {flag} as 'Authorization: Bearer KEY' (api_key=KEY in the "
            "openai client)",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _check_local(scope: Scope, headers: Headers) -> None:
    peer = scope.get("client")
    if peer is None or not _is_loopback(peer[0]):
        raise _denied("this server has no key, so files and fine-tuning are open to its own machine only")
    if any(name in headers for name in _PROXIED):
        raise _denied(
            "this server has no key, so files and fine-tuning are not open to what a proxy passes on"
        )
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _is_local_host(hosts[0]):
        raise _denied(
            "this server has no key, so files and fine-tuning are open at a loopback address only, such as "
            "http://127.0.0.1:30000"
        )
    origins = headers.getlist("origin")
    foreign = any(not _is_own(origin, hosts[0]) for origin in origins)
    if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise _denied("this server has no key, so files and fine-tuning are not open to pages of other sites")


def _denied(why: str) -> Refusal:
    return Refusal(f"{why}: {_HINT}", status=403, code="key_required")


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_loopback


def _is_local_host(host: str) -> bool:
    """Whether a ``Host`` names this machine by a name that no one else can give an address."""
    match = _HOST.match(host)
    if match is None:
        return False
    name = match[1].strip("[]").lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return _is_loopback(name) or ipaddress.ip_address(name).is_unspecified  # 0.0.0.0: every address of it
    except ValueError:
        return False


def _is_own(origin: str, host: str) -> bool:
    """Whether a page of this very server asks."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower() and origin.startswith(("http://", "https://"))
    except ValueError:
        return False
