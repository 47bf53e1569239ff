"""What a decode server of a prefill/decode pair serves: requests come with their first token.

    arrives ── preallocation queue ── slots taken ── transfer queue ── KV here ── waiting queue ── running

A request in the first two queues waits for its prefill server, not for this device: that time
trains. Its first token is the prefill server's, so no prompt is computed or promised here.

Leans on these names of SGLang's Scheduler: disagg_decode_prealloc_queue (queue, retracted_queue,
num_reserved_decode_tokens), disagg_decode_transfer_queue.queue, and on those of ``serving_view``;
of its DecodeRequest: req.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.policy.slo_ledger import Backlog
from sglang_harli.managers.scheduler.serving_view import LOOK_AHEAD, ServingView


class TransferView(ServingView):
    """The requests of a decode server's scheduler."""

    joined_beside = True  # with no prefill between: with overlap their first step is in flight

    @property
    def transferring(self) -> int:
        """Requests that wait for their prefill server or for slots."""
        scheduler = self._scheduler
        waiting = scheduler.disagg_decode_prealloc_queue
        return (
            len(waiting.queue)
            + len(waiting.retracted_queue)
            + len(scheduler.disagg_decode_transfer_queue.queue)
        )

    @property
    def idle(self) -> bool:
        return super().idle and not self.transferring

    @property
    def prompts(self) -> int:
        """Requests that wait for slots."""
        waiting = self._scheduler.disagg_decode_prealloc_queue
        return len(waiting.queue) + len(waiting.retracted_queue)

    def waiting(self) -> int:
        """1 where a message has just come: the prefill server waits for this one to take the
        request up."""
        return self.arrived()

    def status(self) -> dict[str, Any]:
        """For ``harli status``."""
        arriving = len(self._scheduler.disagg_decode_transfer_queue.queue)
        return {
            "mode": "decode",
            "waiting_for_slots": self.prompts,
            "transferring": arriving,
            "reserved_slots": reserved_slots(self._scheduler),
        }

    def between_prefills(self) -> bool:
        return False

    def prefill_slots(self) -> int:
        """Slots of the requests that wait for some: all of each is taken at once."""
        waiting = self._scheduler.disagg_decode_prealloc_queue
        reqs = chain(waiting.retracted_queue, (entry.req for entry in waiting.queue))
        return sum(
            len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0) for req in islice(reqs, LOOK_AHEAD)
        )

    def _backlog(self, reqs: list[Any], context: int, *, decoded: bool) -> Backlog | None:
        """None: requests whose KV is here and that have no place yet have no deadline yet."""
        return None


def reserved_slots(scheduler: Any) -> int:
    """Slots that SGLang keeps for what the admitted requests of a decode server are to decode; 0
    before it has its queues."""
    preallocation = getattr(scheduler, "disagg_decode_prealloc_queue", None)
    if preallocation is None:
        return 0
    admitted = (
        len(scheduler.running_batch.reqs)
        + len(scheduler.disagg_decode_transfer_queue.queue)
        + len(scheduler.waiting_queue)
    )
    return admitted * preallocation.num_reserved_decode_tokens


def view_of(scheduler: Any, side: ServingState) -> ServingView:
    """The view of this scheduler, by what it is in a pair."""
    if side.prefills:
        return ServingView(scheduler, side)
    view = TransferView(scheduler, side)
    side.pair = view.status
    return view
