"""Who may use the routes of files and fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_harli.managers.http.openai.access import Access
from sglang_harli.managers.http.openai.errors import Refusal

OPEN, ONE, ADMIN, BOTH = Access(), Access("key", None), Access(None, "admin"), Access("key", "admin")


def scope(client: Any = ("127.0.0.1", 5), host: str | None = "127.0.0.1:30000", **headers: str) -> Any:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    if host is not None:
        raw.append((b"host", host.encode("latin-1")))
    return {"type": "http", "client": client, "headers": raw, "path": "/v1/files"}


def status(access: Access, found: Any) -> int:
    try:
        access.check(found)
    except Refusal as error:
        assert "--api-key" in error.message or "--admin-api-key" in error.message
        return error.status
    return 200


# ------------------------------------------------------------------ with a key
@pytest.mark.parametrize(
    ("access", "key", "admin"),
    [(ONE, 200, 401), (ADMIN, 401, 200), (BOTH, 200, 200)],
    ids=["one", "admin", "both"],
)
def test_each_configured_key_opens_and_closes(access: Access, key: int, admin: int) -> None:
    far = {"client": ("10.0.0.7", 5), "host": "gpu.example:30000", "origin": "https://ui.example"}
    assert status(access, scope(**far)) == 401
    assert status(access, scope()) == 401  # also from the same machine
    assert status(access, scope(**far, authorization="Bearer key")) == key
    assert status(access, scope(**far, authorization="bearer admin")) == admin


@pytest.mark.parametrize(
    "given",
    [
        "",
        "key",
        "Bearer",
        "Bearer ",
        "Bearer  key",
        "Basic key",
        "Bearer key ",
        "Bearer kex",
        "Bearer k\xe9y",
    ],
)
def test_anything_else_is_no_key(given: str) -> None:
    assert status(BOTH, scope(authorization=given)) == 401


def test_two_headers_are_no_key() -> None:
    twice = scope(authorization="Bearer key")
    twice["headers"].append((b"authorization", b"Bearer key"))
    assert status(ONE, twice) == 401


def test_a_key_may_hold_any_characters() -> None:
    sent = "schlüssel".encode().decode("latin-1")  # as bytes come through ASGI
    assert status(Access("schlüssel"), scope(authorization=f"Bearer {sent}")) == 200


def test_the_refusal_says_which_flag_has_the_key() -> None:
    for access, flag in ((ONE, "--api-key"), (ADMIN, "--admin-api-key"), (BOTH, "--api-key")):
        with pytest.raises(Refusal, match=f"server's {flag} ") as caught:
            access.check(scope())
        assert caught.value.headers["WWW-Authenticate"] == "Bearer"


# ------------------------------------------------------------------ without one
@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:30000", "localhost:30000", "LOCALHOST", "[::1]:30000", "0.0.0.0:30000"),
        *("app.localhost:1", "localhost."),
    ],
)
def test_without_a_key_this_machine_may_come(peer: str, host: str) -> None:
    assert status(OPEN, scope(client=(peer, 5), host=host)) == 200


@pytest.mark.parametrize(
    "peer", ["10.0.0.7", "2001:db8::1", "::ffff:10.0.0.7", "0.0.0.0", "", "testclient", "unix:"]
)
def test_without_a_key_another_machine_may_not(peer: str) -> None:
    assert status(OPEN, scope(client=(peer, 5))) == 403
    assert status(OPEN, scope(client=None)) == 403


@pytest.mark.parametrize(
    "host",
    [
        *(None, "", "evil.example", "evil.example:30000", "127.0.0.1.evil.example", "localhost.evil.example"),
        *(
            "10.0.0.1:30000",
            "127.0.0.1@evil.example",
            "127.0.0.1:x",
            "[::1",
            "notlocalhost",
            "127.0.0.1 evil",
        ),
    ],
)
def test_without_a_key_a_name_that_is_rebound_is_refused(host: str | None) -> None:
    assert status(OPEN, scope(host=host)) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1:8000"},  # another server of this machine
        {"origin": "http://localhost:30000"},
        {"origin": "http://[::1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"x_forwarded_for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"via": "1.1 proxy"},
    ],
)
def test_without_a_key_no_foreign_page_and_no_proxy_may_come(headers: dict[str, str]) -> None:
    assert status(OPEN, scope(**headers)) == 403


def test_a_page_of_the_server_itself_may_come() -> None:
    assert status(OPEN, scope(origin="http://127.0.0.1:30000", sec_fetch_site="same-origin")) == 200


def test_two_hosts_are_none() -> None:
    twice = scope()
    twice["headers"].append((b"host", b"127.0.0.1"))
    assert status(OPEN, twice) == 403


def test_keys_are_not_shown() -> None:
    assert repr(BOTH) == "Access()"
