"""Hundreds of clients and thousands of jobs at the public endpoint of the real service."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from sglang_harli.errors import NotReadyError
from sglang_harli.protocol import public
from sglang_harli.service.endpoint.router import PublicRouter
from support.service.service_fixture import dealer, pairs, request, until

pytestmark = pytest.mark.long

CLIENTS, EACH = 200, 6
DATA = b'{"prompt": "a", "completion": "b"}\n'
TURN_S = 5.0  # generous: a verb that answers within it is not locked out


def submit_args(key: str) -> dict[str, Any]:
    return {
        "filename": "f",
        "size": len(DATA),
        "sha256": hashlib.sha256(DATA).hexdigest(),
        "idempotency_key": key,
    }


class Caller:
    """One client socket among many of a context."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    async def ask(self, verb: str, args: Any, *frames: bytes) -> Any:
        while True:
            await self.socket.send_multipart([request(verb, args), *frames])
            reply = public.decode(await self.socket.recv(), public.Reply)
            if reply.ok:
                return reply.result
            assert reply.error is not None and reply.error.code == public.BUSY, reply.error
            await asyncio.sleep(0.1)


def test_hundreds_of_clients_submit_at_once(own):
    rig = own(peers=False)
    rig.client.submit(pairs(1))  # the service is up
    acknowledged: list[str] = []
    turns: list[float] = []
    done = asyncio.Event()

    async def submit_some(caller: Caller, number: int) -> None:
        for turn in range(EACH):
            job = await caller.ask("submit", submit_args(f"{number}-{turn}"), DATA)
            acknowledged.append(job["id"])

    async def look_around(caller: Caller) -> None:
        while not done.is_set():
            for verb, args in (("list", {"limit": 5}), ("status", {})):
                begun = time.monotonic()
                await caller.ask(verb, args)
                turns.append(time.monotonic() - begun)

    async def run() -> None:
        context = zmq.asyncio.Context()
        context.max_sockets = 2000
        callers = [Caller(context, rig.service.endpoint) for _ in range(CLIENTS + 1)]
        looking = asyncio.create_task(look_around(callers[-1]))
        await asyncio.gather(*(submit_some(caller, number) for number, caller in enumerate(callers[:-1])))
        done.set()
        await looking
        for caller in callers:
            caller.socket.close()
        context.term()

    begun = time.monotonic()
    asyncio.run(asyncio.wait_for(run(), 120))
    seconds = time.monotonic() - begun
    print(
        f"{len(acknowledged)} jobs in {seconds:.1f} s, {len(turns)} other answers, the slowest {max(turns):.2f} s"
    )
    assert len(turns) > 2 and max(turns) < TURN_S
    jobs = rig.client.list(limit=10_000)
    assert len(acknowledged) == len(set(acknowledged)) == CLIENTS * EACH
    assert {job.id for job in jobs} >= set(acknowledged) and len(jobs) == CLIENTS * EACH + 1
    # Newest first is the order in which they were acknowledged, across a restart too.
    rig.restart()
    again = rig.client.list(limit=10_000)
    assert [job.id for job in again] == [job.id for job in jobs]
    times = [job.created_at for job in jobs]
    assert times == sorted(times, reverse=True)
    begun = time.monotonic()
    rig.client.list(limit=1000)
    rig.client.status()
    assert time.monotonic() - begun < TURN_S


def test_followers_that_do_not_read_or_are_gone_slow_nobody(own):
    rig = own()
    rig.scheduler.hold.clear()
    job = rig.client.submit(pairs(), n_epochs=200, checkpoint_every=0)
    idle = [dealer(rig, RCVHWM=1, RCVBUF=1024) for _ in range(20)]
    for number, (_, socket) in enumerate(idle):
        for turn in range(5):
            socket.send(request("events", {"job": job.id, "follow": True}, f"{number}-{turn}"))
    until(lambda: rig.client.status().service["followers"] == 100, "the followers")
    for context, socket in idle[:10]:  # these vanish, the others do not read
        socket.close()
        context.term()
    rig.scheduler.hold.set()
    events = list(rig.client.events(job.id, follow=True))
    assert events[-1].type == "succeeded"
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    until(lambda: rig.client.status().service["followers"] <= 50, "forgetting those that are gone")
    for context, socket in idle[10:]:
        socket.close()
        context.term()


def test_submits_in_work_do_not_lock_other_verbs_out_and_the_limit_is_named(tmp_path):
    """The router alone: what is in work never ends until the test says so."""

    async def run() -> None:
        context = zmq.asyncio.Context()
        let_go = asyncio.Event()

        async def handle(caller, header, frames):
            if b"submit" in header:
                await let_go.wait()
            return public.Reply(id=caller.request, ok=True, result={})

        endpoint = f"ipc://{tmp_path}/endpoint"
        router = PublicRouter(context, endpoint, handle)
        serving = asyncio.create_task(router.run())
        caller = Caller(context, endpoint)
        refused: set[str] = set()
        for number in range(2100):
            await caller.socket.send_multipart([request("submit", {}, str(number)), DATA])
        await caller.socket.send(request("list", {}, "list"))
        while True:
            reply = msgspec.convert(
                msgspec.json.decode(await asyncio.wait_for(caller.socket.recv(), 20)), public.Reply
            )
            if reply.id == "list":
                assert reply.ok
                break
            assert reply.error is not None and reply.error.code == public.BUSY
            assert "at most 2048" in reply.error.message and "submits" in reply.error.message
            refused.add(reply.id)
        assert refused == {str(number) for number in range(2048, 2100)}
        let_go.set()
        answered = {
            public.decode(await asyncio.wait_for(caller.socket.recv(), 20), public.Reply).id
            for _ in range(2048)
        }
        assert answered == {str(number) for number in range(2048)}
        serving.cancel()
        caller.socket.close()
        router.close()
        context.term()

    asyncio.run(run())


def test_a_room_is_bounded_by_bytes_too():
    from sglang_harli.service.endpoint.router import _InFlightLimit

    room = _InFlightLimit("chunks", 10, 100)
    room.enter(1000)  # one that is larger than the room comes in alone
    with pytest.raises(NotReadyError, match="at most 10 of 100 bytes"):
        room.enter(1)
    room.leave(1000)
    room.enter(60)
    room.enter(40)
    with pytest.raises(NotReadyError, match="2 chunks of 100 bytes"):
        room.enter(1)
