"""HTTP process: answers at the finetune endpoint when the service is given up.

A thread with the service's own socket (keys and limits included) refuses every verb with the code
``finetune_down`` and what to do; ``status`` says what happened.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zmq.asyncio

from sglang_harli.config import HarliOptions
from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.protocol import public

if TYPE_CHECKING:
    from sglang_harli.service.endpoint.verbs import Caller

logger = logging.getLogger(__name__)

CODE = "finetune_down"
REMEDY = "serving goes on; what was acknowledged is kept; restart the server to go on with finetuning"
BIND_AGAIN_S = 5.0  # while somebody else holds the endpoint


class UnavailableEndpoint:
    """The public socket of a server whose service was given up.  ``why``: what ended the service,
    one clause; ``jobs``: how many there were by status."""

    def __init__(self, options: HarliOptions, why: str, jobs: dict[str, int]) -> None:
        self._options = options
        self._why = why
        self._jobs = jobs
        self._ending = os.eventfd(0)  # readable from stop() on
        self._ended = False
        self._said = ""
        self._thread = threading.Thread(target=self._serve, name="harli-stand-in", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the endpoint is free."""
        os.eventfd_write(self._ending, 1)
        self._thread.join()
        os.close(self._ending)

    def _serve(self) -> None:
        while not self._ended:
            asyncio.run(self._answer())  # a loop for each try: what a failed one leaves behind goes with it

    async def _answer(self) -> None:
        from sglang_harli.service.endpoint.router import PublicRouter

        ending = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._ending, ending.set)
        context = zmq.asyncio.Context()
        try:
            router = PublicRouter(
                context, self._options.finetune_endpoint, self.handle, self._options.absolute_curve_keys
            )
            logger.info("harli: %s answers that finetuning is down", self._options.finetune_endpoint)
            answering = asyncio.ensure_future(router.run())
            await ending.wait()
            answering.cancel()
            await asyncio.wait([answering])
            router.close()
        except HarliError as error:
            if self._said != error.message:
                self._said = error.message
                logger.error("harli: nobody answers at the finetune endpoint: %s", error.message)
            await asyncio.wait([asyncio.ensure_future(ending.wait())], timeout=BIND_AGAIN_S)
        finally:
            context.destroy(linger=500)
            self._ended = ending.is_set()

    async def handle(self, caller: Caller, header: bytes, _frames: Sequence[bytes]) -> public.Reply:
        """The reply to one request."""
        try:
            request = public.decode(header, public.Request)
            if request.verb == "status":
                return public.Reply(id=caller.request, ok=True, result=self._status())
            raise NotReadyError(f"{self._why}: {REMEDY}", code=CODE)
        except HarliError as error:
            body = public.ErrorBody(code=error.code, message=error.message)
            return public.Reply(id=caller.request, ok=False, error=body)

    def _status(self) -> public.StatusAnswer:
        return public.StatusAnswer(
            service={
                "state": "down",
                "reason": self._why,
                "remedy": REMEDY,
                "endpoint": self._options.finetune_endpoint,
                "run_dir": self._options.absolute_run_dir,
                "pid": None,
            },
            serving=None,
            training=None,
            jobs=self._jobs,
            options={},
            revision=0,
        )
