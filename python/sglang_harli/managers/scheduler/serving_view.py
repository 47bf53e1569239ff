"""What SGLang's scheduler serves now, read on its thread: no copies, no wait for a device.

Leans on these names of SGLang's Scheduler: get_num_allocatable_reqs; running_batch, waiting_queue,
max_prefill_tokens, chunked_prefill_size, chunked_req, ipc_channels.recv_from_tokenizer, and those
of sglang_versions' decode_rounds; of its GenerationBatchResult: delay_sample_func.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sglang_harli.managers.scheduler.policy import waiting_prompts
from sglang_harli.managers.scheduler.policy.serving_state import Boundary, ServingState
from sglang_harli.managers.scheduler.policy.slo_ledger import Backlog
from sglang_harli.managers.scheduler.service_link import has_arrived
from sglang_harli.managers.scheduler.step_timer import BatchLoad, with_adapters
from sglang_harli.sglang_versions.current import decode_rounds, requests

LOOK_AHEAD = 32  # prompts that wait, when it is estimated what the next prefill takes


@dataclass(frozen=True, slots=True)
class InFlight:
    """The newest batch, which was launched with overlap before the tokens of the one before it were
    handed out.

    Attributes:
        prompts: requests of a prefill; none: it is a decode step.
    """

    result: Any
    load: BatchLoad
    prompts: Sequence[Any]

    @property
    def unsampled(self) -> bool:
        """Its tokens are sampled in a call of its own, behind the forward (a grammar needs the
        tokens before)."""
        return getattr(self.result, "delay_sample_func", None) is not None


class ServingView:
    """The requests of one of SGLang's schedulers; ``side``: targets and estimates."""

    joined_beside = False  # requests may join the batch in flight that the one before had not

    def __init__(self, scheduler: Any, side: ServingState) -> None:
        self._scheduler, self._side = scheduler, side

    @property
    def idle(self) -> bool:
        return not self._scheduler.waiting_queue and self._scheduler.running_batch.is_empty()

    @property
    def transferring(self) -> int:
        """Requests whose KV is to come from a prefill server; none here."""
        return 0

    @property
    def prompts(self) -> int:
        """Length of the waiting queue."""
        return len(self._scheduler.waiting_queue)

    def prompts_from(self, first: int) -> Any:
        """The waiting requests from this place in the queue on."""
        return islice(self._scheduler.waiting_queue, first, None)

    def arrived(self) -> int:
        """1 where a message of the tokenizer process waits to be read."""
        return int(has_arrived(self._scheduler.ipc_channels.recv_from_tokenizer))

    def waiting(self) -> int:
        """Prompts that wait, one in chunks and one that has just come included."""
        scheduler = self._scheduler
        return self.arrived() + len(scheduler.waiting_queue) + (scheduler.chunked_req is not None)

    def between_prefills(self) -> bool:
        """Whether there may be time under the TTFT target before the next prefill."""
        scheduler = self._scheduler
        if self._side.targets.ttft_s is None:
            return False
        waiting = bool(scheduler.waiting_queue) and not scheduler.running_batch.batch_is_full
        return waiting or scheduler.chunked_req is not None

    def prefill_slots(self) -> int:
        """Upper bound of the KV slots of the next prefill: cached prefixes are not known yet."""
        scheduler, tokens = self._scheduler, 0
        full = scheduler.running_batch.batch_is_full
        for req in () if full else islice(scheduler.waiting_queue, LOOK_AHEAD):
            tokens += len(req.origin_input_ids) + len(req.output_ids) - requests.cached(req)
            if tokens >= scheduler.max_prefill_tokens:
                return scheduler.max_prefill_tokens
        return tokens

    def behind(self, batch: Any, in_flight: InFlight | None = None, *, decoded: bool) -> Boundary:
        """The boundary behind a batch, where the next step of serving is to begin, or is
        ``in_flight`` already."""
        reqs = batch.reqs
        if (
            not decoded or self.joined_beside
        ):  # with overlap the running batch holds the prefilled requests already
            reqs = list(dict.fromkeys([*self._scheduler.running_batch.reqs, *reqs]))
        context = self._side.context_tokens(reqs)
        backlog = self._backlog(reqs, context, decoded=decoded)
        waiting = self.waiting if backlog is None else self.arrived
        ahead = None if in_flight is None or not in_flight.prompts else self._ahead(in_flight)
        clocks, unclocked = self._side.clocks(reqs)
        return Boundary(self._side, clocks, context, with_adapters(reqs), backlog, waiting, ahead, unclocked)

    def _ahead(self, in_flight: InFlight) -> Backlog:
        """The prompts of a prefill in flight: their first tokens, and what others wait for it."""
        load, chunked = in_flight.load, self._scheduler.chunked_req
        upper_s = self._side.predictor.prefill(load.new_tokens, load.pairs).upper_s
        first = [r for r in in_flight.prompts if not r.output_ids and r is not chunked]
        since_s = min(map(waiting_prompts.arrived_s, first), default=math.inf)
        return Backlog(len(in_flight.prompts), since_s, upper_s, admitted=True)

    def _backlog(self, reqs: list[Any], context: int, *, decoded: bool) -> Backlog | None:
        """The prompts that wait, where their deadlines are known and leave training a chance; else
        None.

        A prompt left waiting at a decode step had no place, and starts when the first request ends,
        or has to wait for more decode rounds (``--prefill-decode-interval``).  Where memory or an
        adapter's turn keeps it, or a place is free now, training stops.
        """
        scheduler, side, waiting = self._scheduler, self._side, self._scheduler.waiting_queue
        if side.targets.ttft_s is None or not (waiting or scheduler.chunked_req is not None):
            return None
        full = scheduler.running_batch.batch_is_full
        rounds = self._rounds(reqs, context)
        seats_s: list[float] | None = None
        if decoded and full and scheduler.chunked_req is None:
            if scheduler.get_num_allocatable_reqs(len(reqs)) > 0 or any(r.finished() for r in reqs):
                return None
            most = min(len(waiting), waiting_prompts.MOST)
            steps = rounds.spaced(waiting_prompts.batch_seat_waits(reqs, most))
            step_s = rounds.step_s(steps[-1] if steps else 0)
            seats_s = [count * step_s for count in steps]
        elif decoded and not rounds.left:
            return None
        elif waiting and full:
            return None  # a chunked prefill goes on, and the prompts behind it have no place
        return waiting_prompts.backlog_of(
            side.predictor,
            waiting,
            scheduler.chunked_req,
            chunk_tokens=scheduler.chunked_prefill_size or scheduler.max_prefill_tokens,
            slots_s=seats_s,
            rounds=rounds,
        )

    def _rounds(self, reqs: list[Any], context: int) -> waiting_prompts.DecodeRounds:
        """Decode rounds before and between prefills, with these requests."""

        def step_s(rounds: int) -> float:
            estimate = self._side.predictor.decode(
                len(reqs), context + rounds * len(reqs), adapters=with_adapters(reqs), after_training=True
            )
            return estimate.upper_s

        left, between = (count(self._scheduler) for count in (decode_rounds.left, decode_rounds.between))
        return waiting_prompts.DecodeRounds(left, between, step_s)
