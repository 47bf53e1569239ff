"""CURVE keys of the public wire: files in the format of zmq.auth's certificates, in two folders.

    server/  server.key_secret, and clients/ with the public .key file of each client that may connect
    client/  client.key_secret, and the server's public server.key

Secret files must not be readable by others.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.auth import certs

from sglang_harli.errors import ConfigError

SERVER_SECRET, SERVER_PUBLIC = "server.key_secret", "server.key"
CLIENT_SECRET, CLIENT_PUBLIC = "client.key_secret", "client.key"
CLIENTS = "clients"


@dataclass(frozen=True, slots=True)
class ServerKeys:
    public: bytes
    secret: bytes = field(repr=False)

    def apply(self, socket: Any) -> None:
        """Before it is bound."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """``folder``: where they came from."""

    folder: str
    server: bytes
    public: bytes
    secret: bytes = field(repr=False)

    def apply(self, socket: Any) -> None:
        """Before it is connected."""
        socket.curve_serverkey = self.server
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


def load_server_keys(folder: str) -> ServerKeys:
    """Raises ConfigError naming the file at fault."""
    return ServerKeys(*_secret(Path(folder) / SERVER_SECRET, "--harli-curve-keys"))


def check_server_folder(folder: str) -> None:
    """The server's and all clients' keys are usable; ConfigError: a file at fault or no client."""
    load_server_keys(folder)
    keys, refused = client_list(folder)
    if refused:
        raise refused[0]
    if not keys:
        clients = Path(folder) / CLIENTS
        raise ConfigError(
            f"--harli-curve-keys {folder}: there is no .key file in {clients}, so nobody could connect: put the "
            "client.key of each client there (harli make-keys makes a first one)",
            param="--harli-curve-keys",
        )


def client_list(folder: str) -> tuple[frozenset[bytes], list[ConfigError]]:
    """The public keys (Z85) that may connect now, and the unusable files, which admit nobody.
    OSError: the folder cannot be read."""
    keys, refused = set(), []
    with os.scandir(Path(folder) / CLIENTS) as entries:
        paths = sorted(entry.path for entry in entries if entry.name.endswith(".key"))
    for path in map(Path, paths):
        try:
            if not path.is_dir():
                keys.add(_read(path, "--harli-curve-keys")[0])
        except ConfigError as error:
            refused.append(error)
    return frozenset(keys), refused


def load_client_keys(folder: str) -> ClientKeys:
    """Raises ConfigError naming the file at fault."""
    public, secret = _secret(Path(folder) / CLIENT_SECRET, "--curve-keys")
    return ClientKeys(folder, _read(Path(folder) / SERVER_PUBLIC, "--curve-keys")[0], public, secret)


def make_keys(folder: str) -> tuple[Path, Path]:
    """New keys of a server and a client, both folders; ConfigError: unwritable, or keys exist."""
    top = Path(folder)
    server, client = top / "server", top / "client"
    try:
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        for made in (server, server / CLIENTS, client):
            made.mkdir(mode=0o700)
        of_server, of_client = zmq.curve_keypair(), zmq.curve_keypair()
        _write(server / SERVER_SECRET, *of_server)
        _write(client / SERVER_PUBLIC, of_server[0])
        _write(client / CLIENT_SECRET, *of_client)
        _write(client / CLIENT_PUBLIC, of_client[0])
        _write(server / CLIENTS / CLIENT_PUBLIC, of_client[0])
    except FileExistsError as error:
        raise ConfigError(
            f"{error.filename} is there already: give a folder without keys, nothing is overwritten",
            param="folder",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{folder}: {error.strerror}; give a folder that can be written", param="folder"
        ) from error
    return server, client


def _write(path: Path, public: bytes, secret: bytes | None = None) -> None:
    text = f'metadata\ncurve\n    public-key = "{public.decode()}"\n'
    if secret is not None:
        text += f'    secret-key = "{secret.decode()}"\n'
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _secret(path: Path, option: str) -> tuple[bytes, bytes]:
    public, secret = _read(path, option)
    if secret is None:
        raise ConfigError(
            f"{option}: {path} holds no secret-key: give the file of the key's owner", param=option
        )
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{option}: {path} is open to other users: chmod 600 it, and make new keys if others may have read it",
            param=option,
        )
    return public, secret


def _read(path: Path, option: str) -> tuple[bytes, bytes | None]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a file")
        public, secret = certs.load_certificate(path)
    except (OSError, ValueError, IndexError) as error:  # IndexError: a line that is cut off
        raise ConfigError(
            f"{option}: {path} cannot be used ({error}): harli make-keys FOLDER makes a pair of folders",
            param=option,
        ) from error
    if any(len(key) != 40 for key in (public, secret) if key is not None):
        raise ConfigError(f"{option}: {path}: a key has 40 characters (Z85)", param=option)
    return public, secret
