"""The service's end of the pair to the scheduler: hello, acknowledgements, questions, answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

import zmq.asyncio

from sglang_harli.protocol import internal
from sglang_harli.protocol.internal import ServedLimits
from sglang_harli.service.links.peer_link import PeerLink

logger = logging.getLogger(__name__)

# A scheduler that knows no service says hello within a second, one that knew another waits for a
# Welcome: it is sent after this time.
WELCOME_AFTER_S = 1.5


class SchedulerLink:
    """The service's end of the ipc pair to the scheduler; ``hello``: its latest, or None."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self.peer = PeerLink(context, endpoint, "scheduler")
        self._acks: list[int] = []
        self._requests = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.hello: internal.Hello | None = None

    @property
    def limits(self) -> ServedLimits | None:
        return self.hello.limits if self.hello else None

    @property
    def refusal(self) -> str | None:
        """Why this server cannot train; None where it can, or where it is not known yet."""
        if self.hello is None or self.hello.limits is not None:
            return None
        return self.hello.refusal or "the scheduler gives no reason"

    def send(self, message: internal.Message, *frames: Any) -> bool:
        return self.peer.send(message, *frames)

    async def run(
        self, on_hello: Callable[[internal.Hello], None], on_run_message: Callable[[Any], None]
    ) -> None:
        """Receive until cancelled.

        ``on_hello`` gets each hello that was welcomed, ``on_run_message`` messages about a run;
        what of them is taken over durably goes to ``acknowledge``.
        """

        def receive(message: Any, _frames: list[bytes]) -> None:
            if isinstance(message, internal.Hello):
                if self._welcome(message):
                    on_hello(message)
            elif isinstance(message, internal.StatusReport | internal.OptionsSet):
                answer = self._answers.get(message.request)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            else:
                on_run_message(message)

        await self.peer.run(receive, self._greet)

    # ---- coming in
    def _greet(self) -> None:
        asyncio.get_running_loop().call_later(WELCOME_AFTER_S, self._welcome_unread)

    def _welcome_unread(self) -> None:
        """Until a hello is read: it, or this, may be lost with an earlier connection."""
        if self.hello is None and self.peer.connected:
            self.ask_hello()
            self._greet()

    def ask_hello(self) -> None:
        """Have the scheduler say hello (again)."""
        self.send(internal.Welcome(pid=os.getpid(), answers=0))

    def _welcome(self, hello: internal.Hello) -> bool:
        """Answer a hello; whether it is the latest."""
        if self.hello is None or self.hello.pid != hello.pid:
            logger.info(
                "hello of the scheduler, pid %d: %s", hello.pid, hello.refusal or "finetuning is possible"
            )
        self.send(internal.Welcome(pid=os.getpid(), answers=hello.seq))
        if self.hello is not None and hello.seq < self.hello.seq:  # of a scheduler before, or doubled
            return False
        self.hello = hello
        return True

    def acknowledge(self, seq: int) -> None:
        """A message is taken over; one Ack for all that became durable together."""
        if not self._acks:
            asyncio.get_running_loop().call_soon(self._ack)
        self._acks.append(seq)

    def _ack(self) -> None:
        seqs, self._acks = self._acks, []
        self.send(internal.Ack(seqs=seqs))  # where it is lost the messages come again, and then this

    # ---- questions
    async def ask_status(self, timeout_s: float) -> internal.StatusReport | None:
        """The scheduler's view of serving and training; None where it does not answer in time."""
        return await self._ask(lambda number: internal.StatusRequest(request=number), timeout_s)

    async def ask_set(
        self, values: dict[str, float | str | None], if_revision: int | None, timeout_s: float
    ) -> internal.OptionsSet | None:
        """Change live options; None where the scheduler does not answer in time."""
        return await self._ask(
            lambda number: internal.SetOptions(request=number, values=values, if_revision=if_revision),
            timeout_s,
        )

    async def _ask(self, make: Callable[[int], internal.Message], timeout_s: float) -> Any:
        if self.hello is None:
            return None
        number = next(self._requests)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            if not self.send(make(number)):
                return None
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            return None
        finally:
            del self._answers[number]
