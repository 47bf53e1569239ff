"""Refuses a release of the server's memory while a job trains: its weights and KV pool would vanish under it.

An AROUND hook in the HTTP process, because SGLang's answer from the scheduler has no room for a refusal
(sglang/srt/managers/tokenizer_control_mixin.py: release_memory_occupation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


async def refuse_while_training(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own release, unless a job trains: then a ValueError, which its route answers as HTTP 400."""
    from sglang.srt.managers.io_struct import DumperControlReqInput

    from sglang_harli.managers.control import REFUSAL

    answers = await manager.dumper_control(DumperControlReqInput(method="harli/training", body={}))
    if any(row.get("training") for answer in answers for row in answer.response):
        raise ValueError(f"memory cannot be released: {REFUSAL}")
    return await original(manager, *args, **kwargs)
