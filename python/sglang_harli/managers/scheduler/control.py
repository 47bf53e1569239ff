"""Control requests through SGLang's own channel, and what is refused in training.

``DumperControlReqInput`` is SGLang's generic call (a method name and a plain dict); ours begin with
``harli/`` and never raise: an exception in a handler would end the server. Leans on io_struct:
DumperControlReqOutput, ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput and those of
sglang_versions' weight_updates; and on srt.constants.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

import msgspec
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.managers import io_struct

from sglang_harli.errors import HarliError
from sglang_harli.protocol.internal import SlotRef
from sglang_harli.sglang_versions.current import weight_updates

logger = logging.getLogger(__name__)

PREFIX = "harli/"
REFUSAL = (
    "a finetune job is training on these weights: pause it first (harli pause JOB, or wait for it to end), "
    "then try again"
)


def follow_memory(dispatcher: Any, changed: Callable[[], None]) -> None:
    """``changed`` is called when SGLang has released its memory, or has it again."""
    mapping = dispatcher._mapping
    for request in (io_struct.ReleaseMemoryOccupationReqInput, io_struct.ResumeMemoryOccupationReqInput):
        mapping[request] = functools.partial(_follow, mapping[request], changed)


def _follow(handler: Callable[[Any], Any], changed: Callable[[], None], recv_req: Any) -> Any:
    try:
        return handler(recv_req)
    finally:
        changed()


def guard_weight_updates(
    dispatcher: Any,
    training: Callable[[], bool],
    updated: Callable[[], None],
    released: Callable[[], Collection[str]],
) -> None:
    """Refuse weight updates while a job trains (its base would change under it).

    Args:
        released: the kinds of memory that are released now.
        updated: called after each update that was tried, the begin and the end of one in several
            requests too, and after memory of weights came back (its contents are undefined then):
            they may be another base now.
    """
    mapping = dispatcher._mapping
    for request, output in weight_updates.ANSWERS.items():
        mapping[request] = functools.partial(_guard, mapping[request], output, training, updated)
    resume = mapping[io_struct.ResumeMemoryOccupationReqInput]

    def resumed(recv_req: Any) -> Any:
        before = GPU_MEMORY_TYPE_WEIGHTS in released()
        answer = resume(recv_req)
        if before and GPU_MEMORY_TYPE_WEIGHTS not in released():
            updated()
        return answer

    mapping[io_struct.ResumeMemoryOccupationReqInput] = resumed


def _guard(
    handler: Callable[[Any], Any],
    output: type[Any],
    training: Callable[[], bool],
    updated: Callable[[], None],
    recv_req: Any,
) -> Any:
    if training():
        return output(success=False, message=REFUSAL)
    answer = handler(recv_req)
    updated()  # one that failed half-way too
    return answer


def is_ours(recv_req: Any) -> bool:
    return recv_req.method.startswith(PREFIX)


def answer(trainer: Any, recv_req: Any, profile: Callable[[], dict[str, Any]] | None = None) -> Any:
    """Answer one ``harli/…`` call; ``profile`` (it takes a while) answers ``harli/profile``."""
    body = recv_req.body or {}
    methods = _METHODS if profile is None else {**_METHODS, "harli/profile": lambda *_: profile()}
    method = methods.get(recv_req.method)
    if method is None:
        return io_struct.DumperControlReqOutput(
            success=False, response=[], error=f"there is no method {recv_req.method!r}"
        )
    try:
        response = method(trainer, body)
    except Exception as error:  # boundary: one call gets an error; the scheduler's loop goes on
        logger.exception("harli: the call %s went wrong", recv_req.method)
        text = str(error) if isinstance(error, HarliError | OSError) else f"{type(error).__name__}: {error}"
        return io_struct.DumperControlReqOutput(success=False, response=[], error=text)
    return io_struct.DumperControlReqOutput(success=True, response=[response])


def _load_adapter(trainer: Any, body: dict[str, Any]) -> dict[str, Any]:
    slot = msgspec.convert(body["slot"], SlotRef)
    urgent = bool(body.get("urgent", True))
    trainer.loader.begin(body["lora_id"], body["lora_name"], body["config"], slot, urgent=urgent)
    return trainer.loader.status(body["lora_id"])


def _load_status(trainer: Any, body: dict[str, Any]) -> dict[str, Any]:
    if body.get("urgent"):
        trainer.loader.urge(body["lora_id"])
    return trainer.loader.status(body["lora_id"])


def _abandon_adapter(trainer: Any, body: dict[str, Any]) -> dict[str, Any]:
    trainer.loader.abandon(body["lora_id"])
    return trainer.loader.status(body["lora_id"])


def _hold(trainer: Any, _body: dict[str, Any]) -> dict[str, Any]:
    trainer.held = True
    return {"training": trainer.training}


def _hold_runs(trainer: Any, body: dict[str, Any]) -> dict[str, Any]:
    """No run starts from now on, unless there is one; with no ``reason`` runs may start again."""
    if not (body["reason"] and trainer.training):
        trainer.hold_runs(body["reason"], by=body["by"])
    return {"training": trainer.training}


def _parity(trainer: Any, body: dict[str, Any]) -> dict[str, Any]:
    """What the HTTP process measured, or why it could not; answers whether it is to measure."""
    if trainer.parity is None:
        return {"wanted": False}
    if "served" in body:
        trainer.parity.begin(body["ids"], body["served"], body["version"])
    elif "failed" in body:
        trainer.parity.fail(body["failed"])
    trainer.hold_changed()
    return trainer.parity.wanted()


_METHODS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "harli/load_adapter": _load_adapter,
    "harli/abandon_adapter": _abandon_adapter,
    "harli/load_status": _load_status,
    "harli/hold": _hold,
    "harli/hold_runs": _hold_runs,
    "harli/end": lambda trainer, _: {"ending": trainer.end_soon() is None},
    "harli/parity": _parity,
    "harli/training": lambda trainer, _: {"training": trainer.training},
}


def profile_fields() -> dict[str, Any]:
    """What a request of a profile has besides on a decode server: no KV is sent for it."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    return {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0}
