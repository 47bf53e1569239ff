"""One exchange between a client and the finetune service: connecting, asking, asking again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_harli.client.endpoints import check_endpoint
from sglang_harli.client.sockets import Wire
from sglang_harli.errors import ConfigError, NotReadyError
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import messages
from sglang_harli.protocol.public import BUSY

CONNECT_TIMEOUT_S = 30.0  # how long a call tries to reach the service, also after it was lost
RECONNECT_TIMEOUT_S = 600.0  # the same for calls that follow a job, once the service has been reached
REPLY_TIMEOUT_S = 60.0
SLICE_S = 1.0
BUSY_FIRST_S, BUSY_LONGEST_S = 0.1, 5.0  # between two tries
UNCLEAR = 5  # handshakes in a row that end without a reason, before the key is said to be wrong


class Patience:
    """Of a call that outlives a lost service: how long it waits, and what is called, once each way.

    Args:
        timeout_s: from the loss on.
        notice: gets ``"connection lost, trying again"`` and ``"connected again"``.
        ask_again: also where the service is there but not ready.
    """

    def __init__(self, timeout_s: float, notice: Callable[[str], None], *, ask_again: bool) -> None:
        self.timeout_s = timeout_s
        self.ask_again = ask_again
        self._notice = notice
        self._until: float | None = None

    def lost(self) -> None:
        if self._until is None:
            self._until = time.monotonic() + self.timeout_s
            self._notice("connection lost, trying again")

    def back(self) -> None:
        if self._until is not None:
            self._until = None
            self._notice("connected again")

    @property
    def left_s(self) -> float:
        return self.timeout_s if self._until is None else self._until - time.monotonic()


@dataclass
class Service:
    """The finetune service as a client knows it.

    Attributes:
        keys: folder of the CURVE keys in use, for messages; None: none are.
        connect_timeout_s, reply_timeout_s, reconnect_timeout_s: see ``FinetuneClient``.
        notice: called when the connection of a patient call is lost, and when it is back.
        seen: it has been reached before.
    """

    endpoint: str
    keys: str | None
    connect_timeout_s: float
    reply_timeout_s: float
    reconnect_timeout_s: float
    notice: Callable[[str], None]
    seen: bool = False


class Exchange:
    """The conversation of one call with the service, on a wire of its own."""

    def __init__(self, wire: Wire, service: Service) -> None:
        self.wire = wire
        self.service = service

    def patience(self, *, ask_again: bool = True) -> Patience:
        return Patience(self.service.reconnect_timeout_s, self.service.notice, ask_again=ask_again)

    async def connect(self, patience: Patience | None = None) -> None:
        """A fresh connection.

        Raises:
            NotReadyError: nobody answers in time.
            ConfigError: the endpoint is no address, or the CURVE keys are missing or wrong.
        """
        service = self.service
        check_endpoint(service.endpoint)
        self.wire.open()
        patience = patience if service.seen else None
        limit_s = service.connect_timeout_s if patience is None else max(0.0, patience.left_s)
        begun = time.monotonic()
        unclear = 0  # handshakes in a row that ended so
        while (left := limit_s - (time.monotonic() - begun)) > 0:
            what, why = await self.wire.wait(min(left, SLICE_S))
            if what == "connected":
                service.seen = True
                return
            if what == "refused":
                unclear = unclear + 1 if why == "unclear" else 0
                if why != "unclear":
                    raise self._wrong_keys(why)
                if service.keys is not None and unclear >= UNCLEAR:
                    # one without keys that hangs up before its greeting is read looks the same
                    raise self._wrong_keys("mechanism" if await self._open_to_all() else why)
            if patience is not None and time.monotonic() - begun > SLICE_S:
                patience.lost()
        hangs_up = "; what listens there hangs up: it is something else, or asks for CURVE keys"
        raise NotReadyError(
            f"no finetune service answers at {service.endpoint} (tried for {limit_s:g} s): start the "
            f"server, or give its --harli-finetune-endpoint by --endpoint or HARLI_ENDPOINT"
            f"{hangs_up if unclear >= UNCLEAR else ''}",
            code="cannot_connect",
        )

    async def _open_to_all(self) -> bool:
        """Whether the service takes a connection without keys; nothing is sent on it."""
        self.wire.open(with_keys=False)
        end = time.monotonic() + SLICE_S
        while (left := end - time.monotonic()) > 0:
            what, _ = await self.wire.wait(left)
            if what in ("connected", "refused"):
                return bool(what == "connected")
        return False

    def _wrong_keys(self, why: str) -> ConfigError:
        keys, where = self.service.keys, f"the finetune service at {self.service.endpoint}"
        if keys is None:
            problem = (
                "accepts clients with CURVE keys only: give their folder by --curve-keys or HARLI_CURVE_KEYS "
                "(harli make-keys makes some)"
            )
        else:
            problem = {
                "key": f"does not know the key in {keys}: have its client.key put into the folder clients/ of the "
                "server's --harli-curve-keys",
                "mechanism": "does not use CURVE keys: drop --curve-keys and HARLI_CURVE_KEYS",
                "unclear": f"has another key than server.key in {keys}: get its server.key",
            }[why]
        return ConfigError(f"{where} {problem}", code="curve_keys", param="curve_keys")

    async def request(
        self,
        verb: str,
        args: Any,
        kind: Any,
        timeout_s: float | None = None,
        patience: Patience | None = None,
        data: Sequence[bytes] = (),
    ) -> Any:
        """The answer as ``kind``, to a request with frames of ``data``; asks again where the
        connection was lost or the service is busy."""
        timeout_s = timeout_s or self.service.reply_timeout_s
        end = time.monotonic() + timeout_s
        pause_s = BUSY_FIRST_S
        while True:
            try:
                return await self._ask(verb, args, kind, timeout_s, patience, data)
            except NotReadyError as error:
                again = error.code == BUSY and time.monotonic() + pause_s < end
                if error.code == NotReadyError.code and patience is not None and patience.ask_again:
                    patience.lost()
                    again = patience.left_s > 0
                if not again:
                    raise
            await self.wire.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, BUSY_LONGEST_S)

    async def _ask(
        self,
        verb: str,
        args: Any,
        kind: Any,
        timeout_s: float,
        patience: Patience | None,
        data: Sequence[bytes],
    ) -> Any:
        head = messages.header(verb, args)
        frames = [public.encode(head), *data]
        await self.connect(patience)
        self.wire.send(frames)
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            what, payload = await self.wire.wait(min(left, SLICE_S))
            if what == "message":
                answer = messages.reply(payload, head.id)
                if answer is not None:
                    found = messages.result(answer, kind)
                    if patience is not None:
                        patience.back()
                    return found
            elif what == "lost":
                if patience is not None:
                    patience.lost()
                await self.connect(patience)
                self.wire.send(frames)
                end = time.monotonic() + timeout_s
        raise NotReadyError(
            f"{self.service.endpoint} did not answer {verb!r} within {timeout_s:g} s: try again later"
        )
