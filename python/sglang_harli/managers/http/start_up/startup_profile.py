"""HTTP process: a quick profile of a server that has none, before it is healthy
(``--harli-profile-budget-s``).

The sweep's requests go to SGLang's TokenizerManager, as those of its HTTP routes do.  The scheduler
learns from what it measures at once, and writes it to the profile for the next start.  Leans on
TokenizerManager (server_status, generate_request, abort_request), ServerStatus and
GenerateReqInput.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

from sglang_harli.errors import HarliError
from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.predictor.profile import profile_table, sweep

logger = logging.getLogger(__name__)

POLL_S = 0.1


class StartupProfile:
    """Runs once, as a task of the HTTP process's loop, for ``budget_s`` seconds (0: not at all);
    ``done``, with or without success: serving does not depend on it."""

    def __init__(self, publisher: AdapterPublisher, manager: Any, budget_s: float) -> None:
        self._publisher, self._manager, self._budget_s = publisher, manager, budget_s
        self.done = budget_s <= 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if not self.done:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            await self.up()
            logger.info("harli: %s", await self._measure())
        except (HarliError, OSError, ValueError, KeyError) as error:
            logger.warning(
                "harli: no latency profile was measured (%s); the server learns while it serves", error
            )
        finally:
            self.done = True

    async def up(self) -> None:
        """SGLang's own warm-up is over, and the finetune service is there or given up."""
        from sglang.srt.managers.tokenizer_manager import ServerStatus

        while self._manager.server_status != ServerStatus.Up or not (
            self._publisher.was_ready or self._publisher.down is not None
        ):
            await asyncio.sleep(POLL_S)

    async def _measure(self) -> str:
        """What came of it, as a sentence."""
        found = await self._publisher.ask("harli/profile", {})
        if found["profiled"]:
            return "the latency profile is there: none is measured"
        began_s, limits, measured = time.monotonic(), found["limits"], 0
        loads = sweep.missing(sweep.grid(limits), None)
        for load in loads:
            left_s = began_s + self._budget_s - time.monotonic()
            if left_s <= 0 or not await self._compute(
                sweep.bodies(load, limits["vocab"], found["fields"]), left_s
            ):
                break
            measured += 1
        found = await self._publisher.ask("harli/profile", {})
        table = profile_table.parse(found["table"])
        if not table.points:
            return f"no latency profile: {self._budget_s:g} s were too few for one load"
        await asyncio.to_thread(table.save, found["path"])
        took_s = time.monotonic() - began_s
        return (
            f"latency profile {found['path']}: {measured} of {len(loads)} loads measured in {took_s:.1f} s; "
            "`harli profile` measures the others"
        )

    async def _compute(self, body: dict[str, Any], limit_s: float) -> bool:
        """Whether the load was over within ``limit_s``; else it is taken back."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        names = [f"harli-profile-{uuid.uuid4().hex}" for _ in body["input_ids"]]
        request = GenerateReqInput(**body, rid=names)

        async def consume() -> None:
            async for _ in self._manager.generate_request(request, None):
                pass

        try:
            await asyncio.wait_for(consume(), limit_s)
        except TimeoutError:
            for name in names:
                self._manager.abort_request(name)
            return False
        return True
