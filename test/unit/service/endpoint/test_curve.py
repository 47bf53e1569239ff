"""CURVE keys: a client with the right ones is served, any other gets the reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sglang_harli.client import exchange
from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.client.sockets import Wire
from sglang_harli.config import HarliOptions
from sglang_harli.errors import ConfigError, NotReadyError
from sglang_harli.managers.http.supervision.endpoint_check import check_endpoint_free
from sglang_harli.protocol import curve_keys
from support.service.service_fixture import free_port, pairs, until
from support.service.service_peers import ServiceProcess


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    curve_keys.make_keys(str(folder))
    return folder


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, model, keys):
    """A service that asks for keys."""
    process = ServiceProcess(
        tmp_path_factory.mktemp("guarded") / "runs", model, free_port(), curve_keys=str(keys / "server")
    ).start()
    yield process
    process.kill()


def refused(endpoint: str, folder: Path | None) -> str:
    with (
        FinetuneClient(endpoint, curve_keys=folder, connect_timeout_s=20) as client,
        pytest.raises(ConfigError) as caught,
    ):
        client.status()
    assert caught.value.code == "curve_keys"
    return caught.value.message


def test_the_right_key_is_served(guarded, keys):
    with FinetuneClient(guarded.endpoint, curve_keys=keys / "client") as client:
        job = client.submit(pairs(3), suffix="secret")
        assert client.get(job.id).suffix == "secret"
        large = b'{"prompt": "a", "completion": "b"}' + b" " * (3 << 20) + b"\n"
        assert client.submit(large).data["bytes"] == len(large)


def test_everybody_else_is_told_why_not(guarded, keys, tmp_path):
    curve_keys.make_keys(str(tmp_path))
    stranger, stray = tmp_path / "client", tmp_path / "server"
    with FinetuneClient(guarded.endpoint, curve_keys=keys / "client") as client:
        client.status()  # it is up
    assert "accepts clients with CURVE keys only" in refused(guarded.endpoint, None)
    assert "has another key than server.key" in refused(guarded.endpoint, stranger)
    shutil.copy(keys / "client" / "server.key", stranger / "server.key")
    assert "does not know the key" in refused(guarded.endpoint, stranger)
    # a client that is added needs no restart, and one that is taken away is refused at its next
    # connection
    admitted = keys / "server" / "clients" / "stranger.key"
    shutil.copy(stranger / "client.key", admitted)
    with FinetuneClient(guarded.endpoint, curve_keys=stranger) as client:
        client.status()
    admitted.unlink()
    assert "does not know the key" in refused(guarded.endpoint, stranger)
    with pytest.raises(ConfigError, match=r"client\.key_secret"):
        FinetuneClient(guarded.endpoint, curve_keys=stray)
    assert guarded.alive


@pytest.fixture
def replaced(keys, tmp_path):
    """Two clients of the guarded service, and the file that may let one of them in."""
    clients = []
    for name in ("old", "new"):
        curve_keys.make_keys(str(tmp_path / name))
        shutil.copy(keys / "client" / "server.key", tmp_path / name / "client" / "server.key")
        clients.append(tmp_path / name / "client")
    yield *clients, keys / "server" / "clients" / "guest.key"
    (keys / "server" / "clients" / "guest.key").unlink(missing_ok=True)


def served(endpoint: str, folder: Path) -> None:
    with FinetuneClient(endpoint, curve_keys=folder) as client:
        client.status()


def copy_over(source: Path, target: Path) -> None:
    """As cp does, and with the time of the file before: the folder's own time stays too."""
    before = target.stat()
    shutil.copyfile(source, target)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


def rename_over(source: Path, target: Path) -> None:
    shutil.copyfile(source, target.with_suffix(".tmp"))
    target.with_suffix(".tmp").rename(target)


@pytest.mark.parametrize("replace", [copy_over, rename_over])
def test_a_key_that_was_replaced_counts_no_more(guarded, replaced, replace):
    old, new, guest = replaced
    shutil.copyfile(old / "client.key", guest)
    served(guarded.endpoint, old)
    replace(new / "client.key", guest)
    served(guarded.endpoint, new)
    assert "does not know the key" in refused(guarded.endpoint, old)


def test_keys_behind_links_that_move_as_a_whole(guarded, replaced, tmp_path):
    """As a Kubernetes secret is mounted: the file is a link, by way of a link that is renamed."""
    old, new, guest = replaced
    for version, client in (("v1", old), ("v2", new)):
        (tmp_path / version).mkdir()
        shutil.copyfile(client / "client.key", tmp_path / version / "guest.key")
    (tmp_path / "..data").symlink_to("v1")
    guest.symlink_to(tmp_path / "..data" / "guest.key")
    served(guarded.endpoint, old)
    (tmp_path / "..tmp").symlink_to("v2")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    served(guarded.endpoint, new)
    assert "does not know the key" in refused(guarded.endpoint, old)
    (tmp_path / "..data").unlink()
    assert "does not know the key" in refused(guarded.endpoint, new)


@pytest.mark.parametrize("content", [b"", b"    public-key", b'public-key = "short"', b"\xff\xfe"])
def test_a_file_that_cannot_be_used_admits_nobody_and_keeps_nobody_else_out(guarded, keys, replaced, content):
    old, _, guest = replaced
    guest.write_bytes(content)
    assert "does not know the key" in refused(guarded.endpoint, old)
    served(guarded.endpoint, keys / "client")
    assert "guest.key" in guarded.log.read_text()
    shutil.copyfile(old / "client.key", guest)
    served(guarded.endpoint, old)


def test_while_the_folder_is_away_nobody_new_is_let_in(guarded, keys):
    clients = keys / "server" / "clients"
    clients.rename(keys / "away")
    assert "does not know the key" in refused(guarded.endpoint, keys / "client")
    (keys / "away").rename(clients)
    served(guarded.endpoint, keys / "client")


def test_a_service_starts_again_beside_a_broken_key_which_a_first_start_refuses(tmp_path, model, keys):
    server = tmp_path / "server"
    shutil.copytree(keys / "server", server)
    (server / "clients" / "torn.key").write_text("public-key")
    with pytest.raises(ConfigError, match=r"clients/torn\.key cannot be used"):
        curve_keys.check_server_folder(str(server))
    service = ServiceProcess(tmp_path / "runs", model, free_port(), curve_keys=str(server)).start()
    try:
        served(service.endpoint, keys / "client")
    finally:
        service.kill()


def test_keys_where_none_are_asked_for(shared, keys):
    assert "does not use CURVE keys" in refused(shared.service.endpoint, keys / "client")


class ScriptedWire(Wire):
    """Opens no socket; each wait has the next answer, and nothing once there is none left."""

    def __init__(self, answers: list[tuple[str, str | None]]) -> None:
        self.answers, self.opened = iter(answers), []

    def open(self, *, with_keys: bool = True) -> None:
        self.opened.append(with_keys)

    async def wait(self, seconds: float) -> tuple[str, str | None]:
        return next(self.answers, ("nothing", None))


@pytest.mark.parametrize(
    ("without_keys", "reason"),
    [
        ([("nothing", None), ("connected", None)], "does not use CURVE keys"),
        ([("refused", "mechanism")], "has another key than server.key in mine"),
        ([("refused", "unclear")], "has another key than server.key in mine"),
        ([], "has another key than server.key in mine"),
    ],
)
def test_a_service_that_hangs_up_first_is_asked_without_keys(without_keys, reason, monkeypatch):
    """Whose greeting is read first is a race, and a connection that ends in it says no reason."""
    monkeypatch.setattr(exchange, "SLICE_S", 0.05)
    wire = ScriptedWire([*[("refused", "unclear")] * exchange.UNCLEAR, *without_keys])
    with pytest.raises(ConfigError, match=reason):
        asyncio.run(
            exchange.Exchange(
                wire, exchange.Service("tcp://127.0.0.1:1", "mine", 30, 60, 600, print)
            ).connect()
        )
    assert wire.opened == [True, False]


def test_what_hangs_up_at_once_is_told(keys):
    def hang_up() -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        answering = threading.Thread(target=hang_up)
        answering.start()
        endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with (
                FinetuneClient(endpoint, connect_timeout_s=2) as client,
                pytest.raises(NotReadyError, match="hangs up: it is something else, or asks for CURVE keys"),
            ):
                client.status()
            assert "has another key" in refused(endpoint, keys / "client")
        finally:
            done.set()
            answering.join()


def test_the_environment_names_the_keys(guarded, keys):
    done = subprocess.run(
        [sys.executable, "-m", "sglang_harli.cli", "--endpoint", guarded.endpoint, "list"],
        env=os.environ | {"HARLI_CURVE_KEYS": str(keys / "client")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    option = ["--curve-keys", str(keys / "client")]
    command = [sys.executable, "-m", "sglang_harli.cli", *option, "list", "--endpoint", guarded.endpoint]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_make_keys_makes_private_files_and_overwrites_none(tmp_path):
    command = [sys.executable, "-m", "sglang_harli.cli", "make-keys", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--harli-curve-keys" in done.stdout
    made = list((tmp_path / "new").rglob("*"))
    assert {path.name for path in made if path.is_file()} == {
        "server.key_secret",
        "server.key",
        "client.key_secret",
        "client.key",
    }
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr


def test_secret_files_that_others_may_read_are_refused(tmp_path):
    curve_keys.make_keys(str(tmp_path))
    (tmp_path / "server" / "server.key_secret").chmod(0o640)
    with pytest.raises(ConfigError, match=r"server\.key_secret is open to other users: chmod 600"):
        curve_keys.load_server_keys(str(tmp_path / "server"))
    (tmp_path / "client" / "client.key_secret").chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        FinetuneClient(curve_keys=tmp_path / "client")
    (tmp_path / "client" / "client.key_secret").write_text('curve\n public-key = "short"\n')
    with pytest.raises(ConfigError, match=r"client\.key_secret"):
        FinetuneClient(curve_keys=tmp_path / "client")
    (tmp_path / "server" / "server.key_secret").chmod(0o600)
    (tmp_path / "server" / "clients" / "client.key").unlink()
    with pytest.raises(ConfigError, match="nobody could connect"):
        curve_keys.check_server_folder(str(tmp_path / "server"))


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:30100", "tcp://*:30100", "tcp://host-1.example:30100"])
def test_other_addresses_need_keys_or_the_explicit_flag(address):
    with pytest.raises(ConfigError, match=r"loopback only.*--harli-curve-keys"):
        HarliOptions(finetune_endpoint=address)
    for values in ({"curve_keys": "keys"}, {"allow_insecure_endpoint": True}):
        assert HarliOptions(finetune_endpoint=address, **values).finetune_endpoint == address
        for wrong in ("tcp://0.0.0.0:70000", "udp://0.0.0.0:1", "tcp://:1", "tcp://a b:1"):
            with pytest.raises(ConfigError, match="finetune-endpoint"):
                HarliOptions(finetune_endpoint=wrong, **values)


def test_an_open_endpoint_says_so_and_works(tmp_path, model):
    port = free_port()
    check_endpoint_free(f"tcp://*:{port}")
    service = ServiceProcess(tmp_path / "runs", model, port, allow_insecure_endpoint=True)
    options = service.config.options.replace(finetune_endpoint=f"tcp://0.0.0.0:{port}")
    service.config = type(service.config)(**{**vars(service.config), "options": options})
    service.start()
    try:
        with FinetuneClient(f"tcp://127.0.0.1:{port}") as client:
            client.status()
        until(lambda: "is open: everyone who can reach it" in service.log.read_text(), "the warning")
        assert (tmp_path / "runs").is_dir()
    finally:
        service.kill()
