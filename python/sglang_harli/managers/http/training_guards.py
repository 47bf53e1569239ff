"""HTTP process: SGLang's controls that training must follow, of which the scheduler hears late.

AROUND hooks on sglang/srt/managers: TokenizerControlMixin.release_memory_occupation (the
scheduler's answer has no field for a refusal) and flush_cache, and
TokenizerManager.pause_generation (in mode ``abort``, the default, only the HTTP process holds
requests back; ``continue_generation`` reaches the scheduler in every mode).  All three want a
server without requests, or end those there are: the parity request gives way.  AFTER hook on
tokenizer_manager.SignalHandler.sigterm_handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Any

from sglang_harli.core import Reason
from sglang_harli.managers.http.scheduler_call import call
from sglang_harli.managers.http.supervision import supervisor

SAVE_S = 8.0  # how long a state that is being saved is waited for


async def refuse_while_training(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own release of memory, but a ValueError (its route answers HTTP 400) while a job
    trains, which needs it.  No run starts from the answer on until the release has ended."""
    from sglang_harli.managers.scheduler.control import REFUSAL

    holder = f"release-{uuid.uuid4().hex}"
    async with _quiet(manager):
        try:
            held = {"by": holder, "reason": str(Reason.MEMORY_RELEASED)}
            if await _ask(manager, "harli/hold_runs", held):
                raise ValueError(f"memory cannot be released: {REFUSAL}")
            return await original(manager, *args, **kwargs)
        finally:
            await _ask(manager, "harli/hold_runs", {"by": holder, "reason": ""})


async def flush_while_idle(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own flush of its cache, which it refuses while a request runs."""
    async with _quiet(manager):
        return await original(manager, *args, **kwargs)


async def pause_training_too(original: Callable[..., Any], manager: Any, obj: Any) -> Any:
    """Training stops before SGLang holds requests back, and ``/continue_generation`` resumes it."""
    async with _quiet(manager):
        await _ask(manager, "harli/hold", {})
        return await original(manager, obj)


def _quiet(manager: Any) -> contextlib.AbstractAsyncContextManager[None]:
    parity = getattr(manager, "harli_parity", None)  # none with --harli-parity off
    return contextlib.nullcontext() if parity is None else parity.quiet()


def stop_training_to_end(_result: Any, handler: Any, *_args: Any, **_kwargs: Any) -> None:
    """Training stops at SIGTERM, so that its state is saved when the scheduler hears of the end:
    SGLang first waits for its requests, and looks for that every five seconds."""
    supervisor.graceful_end()
    task = asyncio.get_running_loop().create_task(_ask(handler.tokenizer_manager, "harli/end", {}))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def end_training(manager: Any, limit_s: float = SAVE_S) -> None:
    """The same where the app ends first, as by Ctrl-C, of which the scheduler hears nothing else.
    Returns when the state is saved, or after ``limit_s`` seconds; at once where the scheduler has
    ended already (SGLang 0.5.23 ends the app last after SIGTERM)."""

    async def ended() -> None:
        await _ask(manager, "harli/end", {})
        while await _ask(manager, "harli/training", {}):
            await asyncio.sleep(0.1)

    if supervisor.tree_ended():
        return
    supervisor.graceful_end()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ended(), limit_s)


_tasks: set[asyncio.Task[bool]] = set()  # the event loop keeps none


async def _ask(manager: Any, method: str, body: dict[str, Any]) -> bool:
    answers = await call(manager, method, body)
    return any(row.get("training") for answer in answers for row in answer.response)
