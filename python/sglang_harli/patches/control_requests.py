"""Runtime half of ``patches/15-control-requests``: a control request at a wrong moment is an error.

Leans on: ``srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager`` (its
requests' handlers, ``offload_tags``),
``srt.managers.communicator.FanOutCommunicator.__call__``, ``srt.managers.io_struct`` (the outputs;
``BaseReq.rid``) and ``srt.constants``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from sglang_harli.sglang_versions import current, supported

logger = logging.getLogger(__name__)

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_BUSY = "requests are running or waiting: wait until they end, or abort them (/abort_request), and try again"
_UPDATES = {
    "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
    "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
}
# Where the end of a session fails, it is open.  (Where one cannot begin, nothing says what the
# weights are: SGLang ends, as without ours.)
_SESSION_END = ("end_weight_update", "EndWeightUpdateReqOutput")


# ------------------------------------------------------------------ the scheduler
def _update(output: str, original: Callable[..., Any], updater: Any, request: Any) -> Any:
    """An update flushes the cache, which a running request forbids: found before weights change."""
    from sglang.srt.managers import io_struct

    answer = getattr(io_struct, output)
    if getattr(request, "flush_cache", False) and not current.weight_updates.is_idle(updater):
        return answer(success=False, message=f"the weights were not updated: {_BUSY}")
    try:
        return original(updater, request)
    except Exception as error:  # boundary: one update is answered with an error; the scheduler's loop goes on
        logger.exception("a weight update failed")
        return answer(success=False, message=f"the update failed: {type(error).__name__}: {error}")


def _release(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

    tags, wrong = _tags(request)
    if not wrong and not current.weight_updates.is_idle(updater):
        wrong = f"memory was not released: {_BUSY}"
    wrong = wrong or current.weight_updates.refused_release(updater, tags)
    request.tags = [tag for tag in tags if tag not in updater.offload_tags]
    if wrong or not request.tags:  # none left: it was released before
        return ReleaseMemoryOccupationReqOutput(rid=wrong)
    moved = _Moved(updater)
    try:
        with moved:
            return original(updater, request)
    except Exception as error:  # boundary: one release is an error; the scheduler's loop goes on
        if current.weight_updates.is_released(error):
            return ReleaseMemoryOccupationReqOutput()
        logger.exception("release_memory_occupation failed")
        updater.offload_tags.difference_update(set(request.tags) - set(moved.tags))  # never paused
        return ReleaseMemoryOccupationReqOutput(rid=f"the release failed: {type(error).__name__}: {error}")


def _resume(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    tags, wrong = _tags(request)
    request.tags = [tag for tag in tags if tag in updater.offload_tags]
    if wrong or not request.tags:  # none left: it is there
        return ResumeMemoryOccupationReqOutput(rid=wrong)
    moved = _Moved(updater)
    try:
        with moved:
            return original(updater, request)
    except Exception as error:  # boundary: one resume is an error; the scheduler's loop goes on
        if moved.failed is None:  # memory is mapped and its content is not restored: fatal, as in SGLang
            raise
        logger.exception("resume_memory_occupation failed")
        updater.offload_tags.update(set(request.tags) - set(moved.tags))  # still paused
        return ResumeMemoryOccupationReqOutput(rid=f"the return failed: {type(error).__name__}: {error}")


class _Moved:
    """A proxy of SGLang's memory saver that records which tags one call has paused or resumed.

    Attributes:
        tags: paused or resumed so far; failed: the tag whose pause or resume raised, else None.
    """

    def __init__(self, updater: Any) -> None:
        self._updater, self._saver = updater, updater.memory_saver_adapter
        self.tags: list[str] = []
        self.failed: str | None = None

    def __enter__(self) -> None:
        self._updater.memory_saver_adapter = self

    def __exit__(self, *error: object) -> None:
        self._updater.memory_saver_adapter = self._saver

    def pause(self, tag: str) -> None:
        self._move(self._saver.pause, tag)

    def resume(self, tag: str) -> None:
        self._move(self._saver.resume, tag)

    def _move(self, move: Callable[[str], None], tag: str) -> None:
        self.failed = tag
        move(tag)
        self.failed = None
        self.tags.append(tag)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._saver, name)


def _tags(request: Any) -> tuple[list[str], str | None]:
    """Each kind of memory once, and what is wrong with those asked for."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

    tags = list(dict.fromkeys(request.tags or GPU_MEMORY_ALL_TYPES))
    unknown = [tag for tag in tags if tag not in GPU_MEMORY_ALL_TYPES]
    if unknown:
        return tags, f"tags has {', '.join(unknown):.100}; accepted: {', '.join(GPU_MEMORY_ALL_TYPES)}"
    return tags, None


# ------------------------------------------------------------------ the HTTP process
async def _raise_refusals(original: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """A refused release or return as an error: their answers have no field for it but ``rid``."""
    from sglang.srt.managers import io_struct

    answers = await original(*args, **kwargs)
    kinds = (io_struct.ReleaseMemoryOccupationReqOutput, io_struct.ResumeMemoryOccupationReqOutput)
    for answer in answers:
        if isinstance(answer, kinds) and answer.rid:
            raise ValueError(answer.rid)
    return answers


HOOKS = (
    *(
        (f"{_UPDATER}.{method}", functools.partial(_update, output), "around")
        for method, output in (*_UPDATES.items(), *supported.only("newest", (_SESSION_END,)))
    ),
    (f"{_UPDATER}.release_memory_occupation", _release, "around"),
    (f"{_UPDATER}.resume_memory_occupation", _resume, "around"),
    ("sglang.srt.managers.communicator.FanOutCommunicator.__call__", _raise_refusals, "around"),
)
