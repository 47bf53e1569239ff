"""HTTP process: what serving computes for one fixed prompt, to compare training with (``parity``).

One request to SGLang's TokenizerManager, as its HTTP routes make them, once the server is healthy
and other requests rest, and again after an update of the weights: the log-probabilities of 64
pseudo-random tokens.  It counts in no metrics of requests, samples nothing, and its prefix, 64
slots under a key of its own, is evicted like any other.  It gives way to what SGLang does only
while it serves nothing (``quiet``).

On a decode server of a pair its prefill server is asked, over HTTP.

Leans on disaggregation.utils.FAKE_BOOTSTRAP_HOST, TokenizerManager (server_status, is_pause,
tokenizer, generate_request, abort_request, rid_to_state, context_len, max_req_input_len) and
GenerateReqInput (input_ids, sampling_params, rid, return_logprob, logprob_start_len, log_metrics,
extra_key).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Collection
from typing import Any

from fastapi import HTTPException

from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.managers.http.prefill.prefill_servers import PrefillServers
from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.managers.http.start_up.startup_profile import StartupProfile

logger = logging.getLogger(__name__)

TOKENS = 64
SEED = 64
POLL_S = 0.1
REST_S = 10.0  # so long a moment without requests is waited for
ANSWER_S = 120.0
TAKE_BACK_S = 5.0
GIVE_WAY_S = 1.0  # its request may end by itself: it takes a prefill of 64 tokens
LOOK_AGAIN_S = 10.0  # whether there is something to measure: after an update, or where it failed
EXPECTED = (HarliError, OSError, ValueError, HTTPException)  # the last two are SGLang's refusals of a request


class ParityRequest:
    """A task of the HTTP process's loop; ``startup``, the profile at start-up, comes first."""

    def __init__(self, publisher: AdapterPublisher, manager: Any, startup: StartupProfile) -> None:
        self._publisher, self._manager, self._startup = publisher, manager, startup
        self._task: asyncio.Task[None] | None = None
        self._request: asyncio.Task[list[float]] | None = None  # with the server
        self._quiet = 0  # callers of ``quiet`` that are in it
        self._quieted = 0  # how many there were

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="harli-parity")
        self._task.add_done_callback(_log_failure)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @contextlib.asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """No request of ours runs within: for what SGLang does only while it serves nothing."""
        self._quiet += 1
        self._quieted += 1
        try:
            if self._request is not None:
                await asyncio.wait([self._request], timeout=GIVE_WAY_S)
            await self._end_request()
            yield
        finally:
            self._quiet -= 1

    async def _run(self) -> None:
        await self._startup.up()
        while not self._startup.done:
            await asyncio.sleep(POLL_S)
        while True:
            over = True
            try:
                over = not self._may() or await self._look()
            except Exception as error:  # boundary: one question fails; the next look asks again
                logger.warning(
                    "harli: the scheduler was not asked whether training is to be compared: %s", _said(error)
                )
            await asyncio.sleep(LOOK_AGAIN_S if over else POLL_S)

    def _may(self) -> bool:
        """Not while /pause_generation holds requests back, or what ``quiet`` is for is done."""
        return not self._manager.is_pause and not self._quiet

    async def _look(self) -> bool:
        """Measure, if the scheduler wants it; False: it had to give way, and is wanted still."""
        began = self._quieted
        asked = await self._ask({})
        if not asked["wanted"]:
            return True
        try:
            ids = self._prompt(asked)
            await self._rest()
            if not self._may() or began != self._quieted:
                return False  # what is wanted may be another thing now
            served = await self._serve(ids)
            if served is None:
                return False
            body = {"ids": ids, "served": served, "version": asked["version"]}
        except Exception as error:  # boundary: one measurement fails and says why; the next one comes
            if not isinstance(error, EXPECTED):
                logger.exception("harli: training could not be compared with serving")
            body = {"failed": _said(error)}
        await self._ask(body)
        return True

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._publisher.ask("harli/parity", body)

    def _prompt(self, asked: dict[str, Any]) -> list[int]:
        tokenizer = getattr(self._manager, "tokenizer", None)  # none with --skip-tokenizer-init
        special = {int(token) for token in getattr(tokenizer, "all_special_ids", ())}
        vocabulary = asked["vocab"] if tokenizer is None else min(asked["vocab"], len(tokenizer))
        longest = min(self._manager.context_len, self._manager.max_req_input_len) - 1
        return prompt(min(TOKENS, asked["positions"], longest), vocabulary, special)

    async def _rest(self) -> None:
        """Wait until no other request runs: it disturbs none, and none is batched with it."""
        until_s = time.monotonic() + REST_S
        while self._manager.rid_to_state and time.monotonic() < until_s:
            await asyncio.sleep(POLL_S)

    async def _serve(self, ids: list[int]) -> list[float] | None:
        """The log-probabilities of each token but the first; None: the request had to give way.

        Raises:
            NotReadyError: no answer in time, or another one than was asked for.
            ValueError: SGLang refuses the request.
        """
        task = asyncio.get_running_loop().create_task(self._logprobs(ids))
        self._request = task
        try:
            await asyncio.wait([task], timeout=ANSWER_S)
            late = not task.done()
        finally:  # also where this is cancelled
            await self._end_request()
        if late:
            raise NotReadyError(f"the server did not answer its prompt within {ANSWER_S:g} s")
        return None if task.cancelled() else task.result()

    async def _end_request(self) -> None:
        task = self._request
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])
        self._request = None

    async def _logprobs(self, ids: list[int]) -> list[float]:
        name = f"harli-parity-{uuid.uuid4().hex}"
        body = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "rid": name,
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": name,
        }
        pair = self._publisher.pair
        found = await (self._ask_here(body) if pair is None else self._ask_prefill(pair, body))
        entries = found.get("meta_info", {}).get("input_token_logprobs") or []  # none where it was aborted
        values = [entry[0] for entry in entries][1:]
        if len(values) != len(ids) - 1 or any(value is None for value in values):
            raise NotReadyError(f"the server gave {len(values)} log-probabilities of {len(ids)} tokens")
        return [float(value) for value in values]

    async def _ask_prefill(self, pair: PrefillServers, body: dict[str, Any]) -> dict[str, Any]:
        """A decode server computes no prompts: what its prefill server does is compared.  It sends
        the KV of this one nowhere (FAKE_BOOTSTRAP_HOST)."""
        from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

        nowhere = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0}
        return await pair.servers[0].generate(pair.session, body | nowhere)

    async def _ask_here(self, body: dict[str, Any]) -> dict[str, Any]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        name, request = body["rid"], GenerateReqInput(**body, log_metrics=False)
        found: dict[str, Any] = {}
        try:
            async for part in self._manager.generate_request(request, None):
                found = part
        finally:
            await self._forget(name)
        return found

    async def _forget(self, name: str) -> None:
        """Abort a request that is not over and forget it, even if it was never sent."""
        until_s = time.monotonic() + TAKE_BACK_S
        if name in self._manager.rid_to_state:
            self._manager.abort_request(name)
        while name in self._manager.rid_to_state and time.monotonic() < until_s:
            await asyncio.sleep(POLL_S / 10)
        self._manager.rid_to_state.pop(name, None)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("harli: training is not compared with serving any more", exc_info=task.exception())


def prompt(length: int, vocabulary: int, special: Collection[int]) -> list[int]:
    """Fixed pseudo-random ids, none of them special; NotReadyError: there are too few."""
    usual = [token for token in range(vocabulary) if token not in special]
    if length < 2 or not usual:
        raise NotReadyError(f"a prompt of {length} tokens out of {len(usual)} has no log-probabilities")
    return random.Random(SEED).choices(usual, k=length)
