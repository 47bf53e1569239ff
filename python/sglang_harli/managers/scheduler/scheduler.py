"""SGLang's scheduler with training quanta slotted in: glue only (design sections 5 and 8).

Leans on these names of SGLang 0.5.16 (sglang/srt/managers/scheduler.py): Scheduler.__init__,
init_request_dispatcher, get_init_info, process_input_requests, run_batch, process_batch_result, on_idle,
maybe_sleep_on_idle, handle_dumper_control, continue_generation, handle_shutdown, get_internal_state;
get_num_allocatable_reqs; running_batch, waiting_queue, max_prefill_tokens, chunked_prefill_size, chunked_req, idle_sleeper,
ipc_channels.recv_from_tokenizer, weight_updater.offload_tags, _engine_paused, forward_stream, tp_worker, max_running_requests, max_req_len, max_total_num_tokens, enable_overlap.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import zmq
from sglang.srt.managers.scheduler import Scheduler

from sglang_harli.core import StepLoad
from sglang_harli.managers.scheduler import control
from sglang_harli.managers.scheduler.metrics.parity_metrics import ParityMetrics
from sglang_harli.managers.scheduler.metrics.pool_metrics import PoolMetrics
from sglang_harli.managers.scheduler.metrics.predictor_metrics import PredictorMetrics
from sglang_harli.managers.scheduler.metrics.qos_metrics import QosMetrics
from sglang_harli.managers.scheduler.policy import slo_ledger, waiting_prompts
from sglang_harli.managers.scheduler.policy.serving_state import Boundary, ServingState
from sglang_harli.managers.scheduler.service_link import has_arrived
from sglang_harli.managers.scheduler.step_timer import BatchLoad, load_of, make_timer, with_adapters
from sglang_harli.managers.scheduler.trainer_setup import build

logger = logging.getLogger(__name__)

SHUTDOWN_S = 8.0  # SGLang kills the tree 15 s after it asked to shut down
IDLE_TURN_S = 0.02  # then the loop looks at its other sockets, the finetune service's among them
LOOK_AHEAD = 32  # prompts that wait, when it is estimated what the next prefill takes
SAMPLED = 8  # one batch in so many is measured while there is nothing to train
HOUSEKEEPING_S = 1.0  # how often SGLang's idle checks (leaks, metrics) run while training fills the time


class HarliScheduler(Scheduler):
    """Scheduler whose idle time and slack train; see point P in ``process_batch_result``."""

    _harli: Any = None  # the CoTrainer; None: not built yet, or finetuning is refused
    _harli_refusal: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ours: Any = self.server_args  # HarliServerArgs: the seam's other half
        self._harli_side = ServingState(ours.harli_options())
        self._harli_timer = make_timer(str(self.device), getattr(self, "forward_stream", None))
        self._harli_housekeeping_at = 0.0
        self._harli_unmeasured = 0
        self._harli_looked_s = (
            0.0  # when the sockets were last looked at, with a TTFT target and something to train
        )
        self._harli_measured: list[tuple[BatchLoad, float]] = []  # that nothing was learnt from yet
        self._harli_logged = ""  # what went wrong last, outside of a quantum
        self._harli_quanta = 0  # that had run before the latest batch
        self._harli, self._harli_refusal = build(self, self._harli_side)
        self._harli_metrics: tuple[Any, ...] = ()
        if self._harli is not None and self.server_args.enable_metrics:
            side = self._harli_side
            qos = QosMetrics(side, self._harli)
            parity = ParityMetrics(self._harli.parity)
            self._harli_metrics = (
                PoolMetrics(self._harli.pressure),
                PredictorMetrics(side.predictor),
                qos,
                parity,
            )
        socket = self._harli.link.socket if self._harli is not None else None
        if socket is not None and self.idle_sleeper is not None:
            self.idle_sleeper.poller.register(socket, zmq.POLLIN)

    def get_init_info(self) -> dict[str, Any]:
        """SGLang's, with the hello that proves to the main process that this class is in place."""
        return {**super().get_init_info(), "harli": {"rank": 0, "refusal": self._harli_refusal}}

    # ---------------------------------------------------------------- control
    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        control.guard_weight_updates(
            self._request_dispatcher,
            self._harli_training,
            self._harli_weights_updated,
            lambda: self.weight_updater.offload_tags,
        )
        control.follow_memory(self._request_dispatcher, self._harli_memory_changed)

    def _harli_memory_changed(self) -> None:
        if self._harli is not None:
            self._harli.memory_released(bool(self.weight_updater.offload_tags))

    def _harli_training(self) -> bool:
        return self._harli is not None and self._harli.training

    def _harli_weights_updated(self) -> None:
        if self._harli is not None:
            self._harli_guarded(self._harli.weights_updated)

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """Also takes what the finetune service has sent; runs every loop turn, paused or not."""
        known = len(self.waiting_queue)
        super().process_input_requests(recv_reqs)
        if self._harli is not None:
            self._harli_guarded(self._harli_take_messages, known)

    def _harli_take_messages(self, known: int) -> None:
        """``known``: how many prompts waited before those that have just come."""
        trainer = self._harli
        if trainer.busy and self._harli_side.targets.ttft_s is not None:
            waiting_prompts.note_arrivals(islice(self.waiting_queue, known, None), self._harli_looked_s)
            self._harli_looked_s = time.perf_counter()
        else:
            self._harli_looked_s = 0.0
        trainer.poll(serving=bool(self.waiting_queue) or not self.running_batch.is_empty())
        if self._engine_paused and trainer.busy:
            trainer.slotting.run_claimed(time.perf_counter() + IDLE_TURN_S)
        if trainer.run is not None and self.waiting_queue and trainer.pressure.lends:
            trainer.pressure.make_room(self._harli_coming())
        for metrics in self._harli_metrics:
            metrics.update(time.monotonic())

    def _harli_guarded(self, part: Callable[..., None], *args: Any) -> None:
        """Do a part of ours between two of SGLang's: where it goes wrong, the run in progress fails and serving goes on.

        Where there is no run to end, the same may go wrong with every batch, and is logged once.
        """
        try:
            part(*args)
        except Exception as error:  # boundary: a decision fails the run; the scheduler's loop goes on
            if self._harli.training or repr(error) != self._harli_logged:
                self._harli_logged = repr(error)
                logger.exception("harli: beside serving, this went wrong")
            self._harli.fail(error)

    def _harli_coming(self) -> int:
        """Slots that the next prefill may take: at most, for what of the prompts is cached is not known yet."""
        tokens = 0
        for req in () if self.running_batch.batch_is_full else islice(self.waiting_queue, LOOK_AHEAD):
            tokens += len(req.origin_input_ids) + len(req.output_ids) - len(req.prefix_indices)
            if tokens >= self.max_prefill_tokens:
                return self.max_prefill_tokens
        return tokens

    def handle_dumper_control(self, recv_req: Any) -> None:
        if control.is_ours(recv_req) and self._harli is not None:
            answer = control.answer(self._harli, recv_req, self._harli_profile)
            self.ipc_channels.send_to_tokenizer.send_output(answer, recv_req)
            return
        super().handle_dumper_control(recv_req)

    def continue_generation(self, recv_req: Any) -> Any:
        if self._harli is not None:
            self._harli.held = False
        return super().continue_generation(recv_req)

    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        if self._harli is not None:
            output.internal_state["harli"] = self._harli.whole_status()
        return output

    def _harli_profile(self) -> dict[str, Any]:
        """What `harli profile` needs: the loads that were measured, and how large they can be."""
        limits = {
            "requests": self.max_running_requests,
            "row_tokens": min(self._harli.limits.max_seq_length, self.max_req_len),
            "slots": self.max_total_num_tokens,
            "vocab": self._harli.limits.vocab_size,
            "sampled": SAMPLED,
        }
        profiled = self._harli_side.predictor.profiled
        return {"limits": limits, "profiled": profiled, **(self._harli_side.profile() or {})}

    def handle_shutdown(self, recv_req: Any) -> None:
        super().handle_shutdown(recv_req)
        if self._harli is not None:
            self._harli.shutdown(SHUTDOWN_S)

    # ---------------------------------------------------------------- quanta
    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._harli is None or not (self._harli.busy or self._harli_sampled()):
            return super().run_batch(batch, *args, **kwargs)
        quanta = self._harli.quanta
        load = load_of(batch, after_training=quanta != self._harli_quanta)
        self._harli_quanta = quanta
        self._harli_timer.begin()
        result = super().run_batch(batch, *args, **kwargs)
        self._harli_timer.end(load)
        return result

    def _harli_sampled(self) -> bool:
        """Whether a batch is measured although there is nothing to train: so the next job is not met unprepared."""
        self._harli_unmeasured = (self._harli_unmeasured + 1) % SAMPLED
        return not self._harli_unmeasured

    def process_batch_result(self, batch: Any, result: Any) -> None:
        """Point P: the batch's tokens are out; quanta that fit the slack go in here."""
        super().process_batch_result(batch, result)
        if self._harli is not None:
            self._harli_guarded(self._harli_after_batch, batch, result)
            self._harli_timer.turn()

    def _harli_after_batch(self, batch: Any, result: Any) -> None:
        trainer, side = self._harli, self._harli_side
        self._harli_measured += self._harli_timer.take()
        decoded = batch.forward_mode.is_decode()
        if not trainer.busy:
            self._harli_learn(side.learn)
            return
        finished = side.count_finished(batch.reqs) if decoded else 0
        if not decoded:
            trainer.slotting.prefilled()
        elif not trainer.slotting.decoded(finished=finished > 0):
            return
        now_s = time.perf_counter()
        self._harli_learn(lambda load, seconds: side.step(load, seconds, now_s))
        trainer.tick()
        if getattr(result, "delay_sample_func", None) is not None:
            return
        if decoded:
            self._harli_fill(batch.reqs, decoded=True)
        elif self._harli_prompts_wait():
            reqs = dict.fromkeys(
                [*self.running_batch.reqs, *batch.reqs]
            )  # with overlap the one holds the other already
            self._harli_fill(list(reqs), decoded=False)

    def _harli_learn(self, learn: Callable[[BatchLoad, float], None]) -> None:
        measured, self._harli_measured = self._harli_measured, []
        for load, seconds in measured:
            learn(load, seconds)

    def _harli_prompts_wait(self) -> bool:
        """Between two prefills: whether there may be time under the TTFT target before the next one."""
        if self._harli_side.targets.ttft_s is None:
            return False
        waiting = bool(self.waiting_queue) and not self.running_batch.batch_is_full
        return waiting or self.chunked_req is not None

    def _harli_backlog(self, reqs: list[Any], context: int, *, decoded: bool) -> slo_ledger.Backlog | None:
        """The prompts that wait, where their deadlines are known and leave training a chance; else None.

        A prompt that was left waiting when a decode step was chosen had no place: it starts no sooner than the first
        request ends.  Where something else keeps it (memory, an adapter's turn), or a place is free now, training stops.
        """
        side, waiting = self._harli_side, self.waiting_queue
        if side.targets.ttft_s is None or not (waiting or self.chunked_req is not None):
            return None
        slots_s: list[float] | None = None
        if decoded:
            full = self.running_batch.batch_is_full and self.chunked_req is None
            if not full or self.get_num_allocatable_reqs(len(reqs)) > 0 or any(r.finished() for r in reqs):
                return None
            steps = waiting_prompts.batch_seat_waits(reqs, min(len(waiting), waiting_prompts.MOST))
            longest = steps[-1] if steps else 0
            step_s = side.predictor.decode(
                len(reqs), context + longest * len(reqs), adapters=with_adapters(reqs), after_training=True
            ).upper_s
            slots_s = [count * step_s for count in steps]
        elif waiting and self.running_batch.batch_is_full:
            return None  # a chunked prefill goes on, and the prompts behind it have no place
        return waiting_prompts.backlog_of(
            side.predictor,
            waiting,
            self.chunked_req,
            chunk_tokens=self.chunked_prefill_size or self.max_prefill_tokens,
            in_flight=self.enable_overlap,
            slots_s=slots_s,
        )

    def _harli_arrived(self) -> int:
        return int(has_arrived(self.ipc_channels.recv_from_tokenizer))

    def _harli_waiting(self) -> int:
        return self._harli_arrived() + len(self.waiting_queue) + (self.chunked_req is not None)

    def _harli_fill(self, reqs: list[Any], *, decoded: bool) -> None:
        """Quanta between two steps."""
        side = self._harli_side
        context = side.context_tokens(reqs)
        backlog = self._harli_backlog(reqs, context, decoded=decoded)
        waiting = self._harli_waiting if backlog is None else self._harli_arrived
        self._harli.slotting.fill(
            Boundary(side, side.clocks(reqs), context, with_adapters(reqs), backlog, waiting)
        )

    def on_idle(self) -> None:
        """Quanta back to back while nothing runs, looking for arrivals between them."""
        self._harli_timer.drop()
        if self._harli is None or not self._harli.busy:
            super().on_idle()
            return
        begin_s = time.perf_counter()
        housekeeping = begin_s - self._harli_housekeeping_at > HOUSEKEEPING_S
        quanta = self._harli.quanta
        self._harli_guarded(self._harli_fill_idle, begin_s, housekeeping)
        if self._harli.quanta == quanta or housekeeping:
            self._harli_housekeeping_at = begin_s
            super().on_idle()

    def _harli_fill_idle(self, begin_s: float, housekeeping: bool) -> None:
        """``begin_s``: when the turn began; ``housekeeping``: training's memory has its turn too."""
        trainer, side = self._harli, self._harli_side
        trainer.tick(idle=housekeeping)

        def load() -> StepLoad:
            return StepLoad(waiting=self._harli_waiting())

        if trainer.slotting.fill_idle(load, side.targets, begin_s + IDLE_TURN_S):
            side.idle_s = time.perf_counter()

    def maybe_sleep_on_idle(self) -> None:
        """With --sleep-on-idle: not while there is something to train."""
        if self._harli is None or not self._harli.busy or self._harli.offer() is None:
            super().maybe_sleep_on_idle()
