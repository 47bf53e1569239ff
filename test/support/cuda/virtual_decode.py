"""SGLang's loops of a decode server of a pair on the fake device, in virtual time.

As ``virtual_server``, and besides: requests wait for their prefill server and for their KV, seconds
of virtual time in which SGLang looks at them once a turn, and join with their first token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from support.cuda.virtual_server import Batch, Prompt, VirtualServing, scheduler_class

RESERVED = 512


@dataclass(eq=False)
class Transfer:
    """Read as SGLang's DecodeRequest; its KV is here at ``there_s``."""

    req: Prompt
    there_s: float


class _Over(Exception):
    """The time is over."""


class VirtualDecode(VirtualServing):
    """What SGLang's decode loops call. ``transfer_s``: from a request's slots to its KV."""

    event_loop_overlap_disagg_decode: Callable[[], None]
    event_loop_normal_disagg_decode: Callable[[], None]

    def __init__(self, *args: Any, transfer_s: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transfer_s = transfer_s
        self.looks_s: list[float] = []  # when the transfers were looked at while there were some
        self.disagg_decode_prealloc_queue = SimpleNamespace(
            queue=[],
            retracted_queue=[],
            num_reserved_decode_tokens=RESERVED,
            prefetch_prefill_dp_rank_queries=lambda: None,
        )
        self.disagg_decode_transfer_queue = SimpleNamespace(queue=[])
        self.ngram_embedding_manager = SimpleNamespace(prepare_for_forward=lambda batch, chunked_req: batch)

    def serve(self, prompts: Sequence[Prompt], seconds: float) -> None:
        self.event_loop_overlap = self.event_loop_overlap_disagg_decode
        self.event_loop_normal = self.event_loop_normal_disagg_decode
        with suppress(_Over):
            super().serve(prompts, seconds)

    def receive(self) -> list[Prompt]:
        if self.gracefully_exit:
            raise _Over  # the loops of 0.5.16 do not look
        return super().receive()

    def process_input_requests(self, recv_reqs: list[Prompt]) -> None:
        for prompt in recv_reqs:
            prompt.time_stats.decode_prebuilt_finish_time = 0.0
            self.disagg_decode_prealloc_queue.queue.append(SimpleNamespace(req=prompt))

    def process_decode_queue(self) -> None:
        now_s, moving = self.gpu.clock.s, self.disagg_decode_transfer_queue
        asking = self.disagg_decode_prealloc_queue
        if asking.queue or moving.queue:
            self.looks_s.append(now_s)
        moving.queue += [Transfer(entry.req, now_s + self.transfer_s) for entry in asking.queue]
        asking.queue = []
        self.waiting_queue += [entry.req for entry in moving.queue if entry.there_s <= now_s]
        moving.queue = [entry for entry in moving.queue if entry.there_s > now_s]

    def get_new_prebuilt_batch(self, running_batch: Batch) -> Batch | None:
        reqs, self.waiting_queue = self.waiting_queue, []
        return Batch(self.modes.PREBUILT, reqs, [0] * len(reqs)) if reqs else None

    def get_next_disagg_decode_batch_to_run(self, running_batch: Batch) -> Any:
        """SGLang's own needs more of a batch than there is here."""
        joined = self.get_new_prebuilt_batch(running_batch)
        for req in joined.reqs if joined is not None else ():
            req.time_stats.decode_prebuilt_finish_time = self.gpu.clock.s
            req.output_ids.append(1)  # the prefill server's
            req.token_s.append(self.gpu.clock.s)
        reqs = [req for req in running_batch.reqs if not req.finished()]
        reqs += joined.reqs if joined is not None else []
        running = Batch(self.modes.DECODE, reqs)
        return SimpleNamespace(batch_to_run=running if reqs else None, running_batch=running)


@functools.cache
def decode_scheduler_class() -> type[Any]:
    """HarliScheduler over SGLang's scheduler with VirtualDecode's methods in between."""
    scheduler_class()  # SGLang is imported as on a CPU
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_harli.managers.scheduler.scheduler import HarliScheduler

    between = type("BetweenDecode", (VirtualDecode, Scheduler), {"modes": ForwardMode})
    return type("VirtualDecodeScheduler", (HarliScheduler, between), {"__init__": VirtualDecode.__init__})
