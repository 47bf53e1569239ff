"""A subscription to a job's events: renewed while it is followed, and made anew after a loss."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import msgspec

from sglang_harli.client.exchange import SLICE_S, Exchange, Patience
from sglang_harli.protocol import public
from sglang_harli.protocol.calls import messages
from sglang_harli.protocol.public import Event

RENEW_S = 10.0  # a subscription ends when it is not renewed for 30 s
FINAL_EVENTS = ("succeeded", "failed", "cancelled")


class Events(msgspec.Struct):
    events: list[Event]


async def follow(exchange: Exchange, job: str, after: int, patience: Patience) -> AsyncGenerator[Event]:
    """Each event with an id above ``after`` once, until the job is over."""
    wire = exchange.wire
    head = messages.header("events", public.EventsArgs(job=job, after=after, follow=True))
    await exchange.connect(patience)
    renewed = heard = time.monotonic()
    wire.send([public.encode(head)])
    while True:
        what, payload = await wire.wait(SLICE_S)
        now = time.monotonic()
        if what == "lost" or now - heard > exchange.service.reply_timeout_s:
            patience.lost()
            await exchange.connect(patience)
            renewed, heard = 0.0, time.monotonic()
        elif what == "message" and (reply := messages.reply(payload, head.id)) is not None:
            heard = now
            patience.back()
            for event in _events(reply):
                if event.id > after:
                    after = event.id
                    yield event
                    if event.type in FINAL_EVENTS:
                        wire.send([public.encode(messages.header("unsubscribe", {"id": head.id}))])
                        return
        if time.monotonic() - renewed > RENEW_S:  # the same id: renews, and brings what was missed
            head.args["after"], renewed = after, time.monotonic()
            wire.send([public.encode(head)])


def _events(reply: public.Reply) -> list[Event]:
    """Those in a reply; none where the service asks to try again, as the next renewal does."""
    if reply.event is not None:
        return [reply.event]
    if reply.error is not None and reply.error.code in (public.BUSY, "not_ready"):
        return []
    return messages.result(reply, Events).events
