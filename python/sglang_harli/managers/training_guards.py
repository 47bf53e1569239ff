"""HTTP process: SGLang's own controls that training must follow, and that its scheduler does not hear of.

AROUND hooks on sglang/srt/managers: TokenizerControlMixin.release_memory_occupation (the scheduler's answer
has no room for a refusal) and TokenizerManager.pause_generation (in mode ``abort``, the default, only the
HTTP process holds requests back; ``continue_generation`` reaches the scheduler in every mode).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


async def refuse_while_training(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own release of memory, unless a job trains (its weights and its pool would vanish under it):
    then a ValueError, which SGLang's route answers as HTTP 400."""
    from sglang_harli.managers.control import REFUSAL

    if await _ask(manager, "harli/training", {}):
        raise ValueError(f"memory cannot be released: {REFUSAL}")
    return await original(manager, *args, **kwargs)


async def pause_training_too(original: Callable[..., Any], manager: Any, obj: Any) -> Any:
    """Training stops before SGLang holds requests back, and goes on with ``/continue_generation``."""
    await _ask(manager, "harli/hold", {})
    return await original(manager, obj)


async def _ask(manager: Any, method: str, body: dict[str, Any]) -> bool:
    from sglang.srt.managers.io_struct import DumperControlReqInput

    answers = await manager.dumper_control(DumperControlReqInput(method=method, body=body))
    return any(row.get("training") for answer in answers for row in answer.response)
