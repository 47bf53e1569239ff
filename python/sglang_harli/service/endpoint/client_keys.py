"""CURVE at the public socket: only clients with a key in the folder may connect."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from sglang_harli.protocol import curve_keys

logger = logging.getLogger(__name__)

DOMAIN = "harli"


class ClientAuthenticator:
    """Answers libzmq's question about each client's key (ZAP); made inside the running event loop.

    A thread reads the clients' files at each connection: a file that is added, replaced or removed
    counts from the next one on, and a disk that hangs delays only new clients.  Raises ConfigError:
    the server's key is missing, or its file is open to others.
    """

    def __init__(self, context: zmq.asyncio.Context, folder: str) -> None:
        self._folder = folder
        self._keys = curve_keys.load_server_keys(folder)
        self._reader = ThreadPoolExecutor(1, "keys")
        self._logged = ""
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, credentials_provider=self)

    def apply(self, socket: Any) -> None:
        """Before it is bound."""
        socket.zap_domain = DOMAIN.encode()
        self._keys.apply(socket)

    async def callback(self, _domain: str, key: bytes) -> bool:
        """For zmq.auth: may the client with this public key (Z85) connect?"""
        allowed, trouble = await asyncio.get_running_loop().run_in_executor(self._reader, self._look, key)
        if trouble and trouble != self._logged:
            logger.warning("a client's key cannot be used, and admits nobody: %s", trouble)
        self._logged = trouble
        if not allowed:
            logger.warning("a client with the unknown key %s was refused", key.decode(errors="replace"))
        return allowed

    def _look(self, key: bytes) -> tuple[bool, str]:
        try:
            keys, refused = curve_keys.client_list(self._folder)
        except OSError as error:
            return False, str(error)
        return key in keys, "; ".join(error.message for error in refused)

    def close(self) -> None:
        self._authenticator.stop()
        self._reader.shutdown(wait=False, cancel_futures=True)
