"""CURVE at the public door: who has a key in the folder may connect, and nobody else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from sglang_harli.errors import ConfigError
from sglang_harli.protocol import curve_keys

logger = logging.getLogger(__name__)

DOMAIN = "harli"


class DoorKeys:
    """Answers libzmq's question about each client's key (ZAP); made inside the running event loop.

    Args:
        context: of the sockets that it guards.
        folder: ``--harli-curve-keys``; clients that are added or removed count from their next connection on.

    Raises:
        ConfigError: a key is missing, or its file is open to others.
    """

    def __init__(self, context: zmq.asyncio.Context, folder: str) -> None:
        self._folder = folder
        self._keys = curve_keys.load_server_keys(folder)
        self._allowed: tuple[int, frozenset[bytes]] = (0, frozenset())
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, credentials_provider=self)

    def apply(self, socket: Any) -> None:
        """Before it is bound."""
        socket.zap_domain = DOMAIN.encode()
        self._keys.apply(socket)

    def callback(self, _domain: str, key: bytes) -> bool:
        """zmq.auth's question: may the client with this public key (Z85) connect?"""
        try:
            changed = (Path(self._folder) / curve_keys.CLIENTS).stat().st_mtime_ns
            if changed != self._allowed[0]:
                self._allowed = (changed, curve_keys.load_client_list(self._folder))
        except (ConfigError, OSError) as error:
            logger.warning("nobody can connect to the finetune endpoint: %s", error)
            return False
        allowed = key in self._allowed[1]
        if not allowed:
            logger.warning("a client with the unknown key %s was refused", key.decode(errors="replace"))
        return allowed

    def close(self) -> None:
        self._authenticator.stop()
