"""One exchange between a client and the finetune service: connecting, asking, asking again.

Like ``calls``, which builds the verbs on it, it is written as generators of (operation, argument)
pairs that ``client`` carries out: ``open`` a fresh socket, with the keys or without; ``send``
frames; ``wait`` at most so many seconds, answered by ``connected``, ``lost``, ``refused`` with why,
``message`` with its first frame, or ``nothing``; ``sleep`` seconds; ``call`` something that takes
its time; ``emit`` something to the caller.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import msgspec

from sglang_harli import errors
from sglang_harli.client.endpoints import check_endpoint
from sglang_harli.errors import ConfigError, HarliError, NotFoundError, NotReadyError, ProtocolError
from sglang_harli.protocol import accepted, public
from sglang_harli.protocol.public import BUSY, Reply, Request

CONNECT_TIMEOUT_S = 30.0  # how long a call tries to reach the service, also after it was lost
RECONNECT_TIMEOUT_S = 600.0  # the same for calls that follow a job, once the service has been reached
REPLY_TIMEOUT_S = 60.0
SLICE_S = 1.0
BUSY_FIRST_S, BUSY_LONGEST_S = 0.1, 5.0  # between two tries
UNCLEAR = 5  # handshakes in a row that end without a reason, before the key is said to be wrong

T = TypeVar("T")
Steps = Generator[tuple[str, Any], Any, T]

ERRORS: dict[str, type[HarliError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, HarliError) and kind is not HarliError
}
ERRORS |= {  # refusals with a code of their own
    "memory_budget": ConfigError,
    "idempotency_conflict": ConfigError,
    "unsupported_version": ProtocolError,
    "data_mismatch": ProtocolError,
    "upload_unknown": NotFoundError,
    BUSY: NotReadyError,
    "finetune_down": NotReadyError,
}


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


class Exchange:
    """One conversation with the service: requests, replies, retries and reconnections, without a
    socket.

    Args:
        endpoint: of the service; ``keys``: the folder of the CURVE keys in use, for messages.
        connect_timeout_s, reply_timeout_s, reconnect_timeout_s: seconds.
        notice: called when the connection of a patient call is lost, and when it is back.
    """

    def __init__(
        self,
        endpoint: str,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
        *,
        notice: Callable[[str], None] | None = None,
        keys: str | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.connect_timeout_s = connect_timeout_s
        self.reply_timeout_s = reply_timeout_s
        self.reconnect_timeout_s = reconnect_timeout_s
        self._notice = notice or (lambda _text: None)
        self._keys = keys
        self._seen = False  # it has been reached before

    def patience(self, *, ask_again: bool = True) -> Patience:
        return Patience(self.reconnect_timeout_s, self._notice, ask_again=ask_again)

    def connect(self, patience: Patience | None = None) -> Steps[None]:
        """A fresh connection.

        Raises:
            NotReadyError: nobody answers in time.
            ConfigError: the endpoint is no address, or the CURVE keys are missing or not the right
                ones.
        """
        check_endpoint(self.endpoint)
        yield "open", True
        patience = patience if self._seen else None
        limit_s = self.connect_timeout_s if patience is None else max(0.0, patience.left_s)
        begun = time.monotonic()
        unclear = 0  # handshakes in a row that ended so
        while (left := limit_s - (time.monotonic() - begun)) > 0:
            what, why = yield "wait", min(left, SLICE_S)
            if what == "connected":
                self._seen = True
                return
            if what == "refused":
                unclear = unclear + 1 if why == "unclear" else 0
                if why != "unclear":
                    raise self._wrong_keys(why)
                if self._keys is not None and unclear >= UNCLEAR:
                    # a service without keys that hangs up before its greeting is read looks the
                    # same
                    raise self._wrong_keys("mechanism" if (yield from self._open_to_all()) else why)
            if patience is not None and time.monotonic() - begun > SLICE_S:
                patience.lost()
        hangs_up = "; what listens there hangs up: it is something else, or asks for CURVE keys"
        raise NotReadyError(
            f"no finetune service answers at {self.endpoint} (tried for {limit_s:g} s): start the "
            f"server, or give its --harli-finetune-endpoint by --endpoint or HARLI_ENDPOINT"
            f"{hangs_up if unclear >= UNCLEAR else ''}",
            code="cannot_connect",
        )

    def _open_to_all(self) -> Steps[bool]:
        """Whether the service takes a connection without keys; nothing is sent on it."""
        yield "open", False
        end = time.monotonic() + SLICE_S
        while (left := end - time.monotonic()) > 0:
            what, _ = yield "wait", left
            if what in ("connected", "refused"):
                return bool(what == "connected")
        return False

    def _wrong_keys(self, why: str) -> ConfigError:
        where = f"the finetune service at {self.endpoint}"
        problem = {
            (
                True,
                "key",
            ): f"does not know the key in {self._keys}: have its client.key put into the folder clients/ "
            "of the server's --harli-curve-keys",
            (True, "mechanism"): "does not use CURVE keys: drop --curve-keys and HARLI_CURVE_KEYS",
            (True, "unclear"): f"has another key than server.key in {self._keys}: get its server.key",
        }.get(
            (self._keys is not None, why),
            "accepts clients with CURVE keys only: give their folder by --curve-keys or HARLI_CURVE_KEYS "
            "(harli make-keys makes some)",
        )
        return ConfigError(f"{where} {problem}", code="curve_keys", param="curve_keys")

    def request(
        self,
        verb: str,
        args: Any,
        kind: Any,
        data: Sequence[Any] = (),
        timeout_s: float | None = None,
        patience: Patience | None = None,
    ) -> Steps[Any]:
        """Send, and send again where the connection was lost or the service is busy; the answer as
        ``kind``."""
        timeout_s = timeout_s or self.reply_timeout_s
        end = time.monotonic() + timeout_s
        pause_s = BUSY_FIRST_S
        while True:
            try:
                return (yield from self._ask(verb, args, kind, data, timeout_s, patience))
            except NotReadyError as error:
                again = error.code == BUSY and time.monotonic() + pause_s < end
                if error.code == NotReadyError.code and patience is not None and patience.ask_again:
                    patience.lost()
                    again = patience.left_s > 0
                if not again:
                    raise
            yield "sleep", pause_s * random.uniform(0.5, 1.5)
            pause_s = min(2 * pause_s, BUSY_LONGEST_S)

    def _ask(
        self,
        verb: str,
        args: Any,
        kind: Any,
        data: Sequence[Any],
        timeout_s: float,
        patience: Patience | None,
    ) -> Steps[Any]:
        head = header(verb, args)
        frames = [public.encode(head), *data]
        yield from self.connect(patience)
        yield "send", frames
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            what, payload = yield "wait", min(left, SLICE_S)
            if what == "message":
                answer = reply(payload, head.id)
                if answer is not None:
                    found = result(answer, kind)
                    if patience is not None:
                        patience.back()
                    return found
            elif what == "lost":
                if patience is not None:
                    patience.lost()
                yield from self.connect(patience)
                yield "send", frames
                end = time.monotonic() + timeout_s
        raise NotReadyError(
            f"{self.endpoint} did not answer {verb!r} within {timeout_s:g} s: try again later"
        )


# ------------------------------------------------------------------ messages
def header(verb: str, args: Any) -> Request:
    """A request.

    Raises:
        ConfigError: one of its arguments is not accepted; the service says the same.
    """
    if isinstance(args, msgspec.Struct):
        accepted.check(args)
    return Request(v=public.VERSION, id=uuid.uuid4().hex, verb=verb, args=msgspec.to_builtins(args))


def reply(payload: bytes, request_id: str) -> Reply | None:
    """The reply in a frame, None if it answers another request."""
    found: Reply = public.decode(payload, Reply)
    return found if found.id == request_id or (not found.ok and not found.id) else None


def result(found: Reply, kind: Any) -> Any:
    """What a reply says, as ``kind``; a refusal is raised as its own type."""
    if not found.ok:
        raise error(found)
    try:
        return msgspec.convert(found.result, kind)
    except msgspec.ValidationError as trouble:
        raise ProtocolError(
            f"the server's answer is not understood (another version?): {trouble}"
        ) from trouble


def error(found: Reply) -> HarliError:
    body = found.error
    if body is None:
        return HarliError("the server refused the request and gave no reason")
    kind = ERRORS.get(body.code, HarliError)
    return kind(body.message, code=body.code, param=body.param, details=body.details)
