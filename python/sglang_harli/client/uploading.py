"""Training data on its way to the service: in chunks, a few in flight, across lost connections."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, field

from sglang_harli.client.data_source import DataSource
from sglang_harli.client.exchange import BUSY_FIRST_S, BUSY_LONGEST_S, SLICE_S, Exchange, Patience
from sglang_harli.errors import NotReadyError
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import messages
from sglang_harli.protocol.public import BUSY

WINDOW = 4  # chunks in flight


@dataclass
class _Sending:
    """``known``: bytes that the service has, as it last said; ``sent``: bytes that were sent;
    ``asked``: ids of the chunks without an answer.  What comes out of order is not kept there, so
    after a gap the way goes on from ``known``, once nothing is in flight."""

    source: DataSource
    sha256: str
    upload: str = field(default_factory=lambda: uuid.uuid4().hex)
    known: int = 0
    sent: int = 0
    asked: set[str] = field(default_factory=set)

    def chunk(self) -> list[bytes]:
        """The frames of the next one."""
        head = messages.header(
            "upload",
            public.UploadArgs(
                upload=self.upload,
                filename=self.source.name[:1024],
                size=self.source.size,
                sha256=self.sha256,
                offset=self.sent,
            ),
        )
        data = self.source.read(self.sent, public.MAX_FRAME_BYTES)
        self.asked.add(head.id)
        self.sent += len(data)
        return [public.encode(head), data]

    def start_over(self) -> None:
        self.asked.clear()
        self.sent = self.known

    def take(self, reply: public.Reply) -> bool:
        """False: the service asks to wait; raises what else it refuses with."""
        self.asked.discard(reply.id)
        code = None if reply.error is None else reply.error.code
        if code == "upload_unknown":  # it was restarted, or the upload was forgotten
            self.known = 0
        elif code != BUSY:
            self.known = messages.result(reply, public.UploadAnswer).offset
        if not self.asked:
            self.sent = self.known
        return code != BUSY


async def upload(exchange: Exchange, source: DataSource, sha256: str, patience: Patience) -> str:
    """Bring all of ``source`` to the service; the id of the upload, to be named by ``submit``.

    Raises:
        NotReadyError: the service is away for too long, or stays busy.
    """
    wire, service = exchange.wire, exchange.service
    sending = _Sending(source, sha256)
    await exchange.connect(patience)
    pause_s = BUSY_FIRST_S
    heard = time.monotonic()
    while sending.known < source.size:
        while len(sending.asked) < WINDOW and sending.sent < source.size:
            wire.send(sending.chunk())
        what, payload = await wire.wait(SLICE_S)
        if what == "message":
            reply = public.decode(payload, public.Reply)
            if reply.id not in sending.asked:
                continue
            if sending.take(reply):
                heard, pause_s = time.monotonic(), BUSY_FIRST_S
                patience.back()
            elif not sending.asked:
                if time.monotonic() - heard > service.reconnect_timeout_s:
                    messages.result(reply, public.UploadAnswer)
                await wire.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(2 * pause_s, BUSY_LONGEST_S)
        elif what == "lost" or time.monotonic() - heard > service.reply_timeout_s:
            patience.lost()
            if patience.left_s <= 0:
                raise NotReadyError(f"{service.endpoint} does not take the data: try again later")
            await exchange.connect(patience)
            sending.start_over()
            heard = time.monotonic()
    return sending.upload
