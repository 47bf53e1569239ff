"""What is done beside SGLang's scheduler at each step: measure, learn, take messages, train.

Leans on these names of SGLang's Scheduler: device, server_args.enable_metrics, idle_sleeper,
weight_updater.offload_tags, _engine_paused, max_running_requests, max_req_len,
max_total_num_tokens; and on those of ``serving_view``, ``step_timer`` and of sglang_versions'
weight_updates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import zmq

from sglang_harli.core import StepLoad
from sglang_harli.managers.scheduler.control import profile_fields
from sglang_harli.managers.scheduler.metrics import ParityMetrics, PoolMetrics, PredictorMetrics, QosMetrics
from sglang_harli.managers.scheduler.policy import waiting_prompts
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.serving_view import InFlight
from sglang_harli.managers.scheduler.step_timer import BatchLoad, load_of, make_timer, stream_of
from sglang_harli.managers.scheduler.training.co_trainer import CoTrainer
from sglang_harli.managers.scheduler.transfer_view import view_of
from sglang_harli.sglang_versions.current import arguments, weight_updates

logger = logging.getLogger(__name__)

IDLE_TURN_S = 0.02  # then the loop looks at its other sockets, the finetune service's among them
SAMPLED = 8  # one batch in so many is measured while there is nothing to train
HOUSEKEEPING_S = 1.0  # how often SGLang's idle checks (leaks, metrics) run while training fills the time


class CoServing:
    """One scheduler's training, at its hooks; lives on its thread.

    ``clock``: seconds, that of the requests' times.
    """

    def __init__(
        self,
        scheduler: Any,
        side: ServingState,
        trainer: CoTrainer,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.side, self.trainer, self._clock = side, trainer, clock
        self._scheduler, self._view = scheduler, view_of(scheduler, side)
        device = str(scheduler.device)
        self._timer = make_timer(device, None if device == "cpu" else stream_of(scheduler))
        self._measured: list[tuple[BatchLoad, float]] = []  # that nothing was learnt from yet
        self._unmeasured = 0  # batches since the latest one that was measured
        self._quanta = 0  # that had run before the latest batch
        self._last_poll_s = 0.0  # of the sockets, with a TTFT target and something to train
        self._housekeeping_at = 0.0
        self._busy = False  # as the trainer was when this turn of the loop began
        self._in_flight: InFlight | None = None  # the newest batch, until its tokens are out
        self.unsampled: tuple[Any, bool, bool] | None = None  # see ``_train_behind``: put off for a sampling
        self._served = True  # since the last turn without a batch
        self._logged = ""  # what a hook raised last, outside of a quantum
        self._metrics: tuple[Any, ...] = ()
        if arguments.in_force(scheduler.server_args).enable_metrics:
            self._metrics = (
                PoolMetrics(trainer.pressure),
                PredictorMetrics(side.predictor),
                QosMetrics(side, trainer),
                ParityMetrics(trainer.parity),
            )
        socket = trainer.link.socket
        if socket is not None and scheduler.idle_sleeper is not None:
            scheduler.idle_sleeper.poller.register(socket, zmq.POLLIN)

    def guarded(self, hook: Callable[..., None], *args: Any) -> None:
        """Call a hook between SGLang's steps; an error fails the run, or is logged once."""
        try:
            hook(*args)
        except Exception as error:  # boundary: a decision fails the run; the scheduler's loop goes on
            if self.trainer.training or repr(error) != self._logged:
                self._logged = repr(error)
                logger.exception("harli: a training hook raised; the run was failed, serving continues")
            self.trainer.fail(error)

    # ---------------------------------------------------------------- messages
    def take_messages(self, known: int) -> None:
        """Take the service's messages each turn; ``known``: queue length before new prompts."""
        trainer, view = self.trainer, self._view
        if self._busy and self.side.targets.ttft_s is not None:
            waiting_prompts.note_arrivals(view.prompts_from(known), self._last_poll_s)
            self._last_poll_s = self._clock()
        else:
            self._last_poll_s = 0.0
        trainer.poll(serving=trainer.run is not None and not view.idle)
        self._busy = trainer.busy
        if self._scheduler._engine_paused and self._busy:
            trainer.slotting.run_claimed(self._clock() + IDLE_TURN_S)
        if trainer.run is not None and view.prompts and trainer.pressure.lends:
            trainer.pressure.make_room(view.prefill_slots())
        if self._metrics:
            now_s = time.monotonic()
            for metrics in self._metrics:
                metrics.update(now_s)

    def memory_changed(self) -> None:
        """SGLang has released memory, or has it again."""
        self.trainer.memory_released(bool(self._scheduler.weight_updater.offload_tags))

    def weights_updated(self) -> None:
        """SGLang has written to the served weights, or has begun to."""
        unfinished = weight_updates.unfinished(self._scheduler.weight_updater)
        self.guarded(self.trainer.weights_change if unfinished else self.trainer.weights_updated)

    # ---------------------------------------------------------------- a batch
    def begin(self, batch: Any) -> BatchLoad | None:
        """Before a batch: its load; None: it is not measured."""
        if not self._busy:  # a sample, so that the next job is not met unprepared
            self._unmeasured = (self._unmeasured + 1) % SAMPLED
            if self._unmeasured:
                return None
        quanta = self.trainer.quanta
        load = load_of(batch, after_training=quanta != self._quanta)
        self._quanta = quanta
        self._timer.begin()
        return load

    def end(self, batch: Any, result: Any, load: BatchLoad | None) -> None:
        """Behind a batch; ``load``: of ``begin``."""
        if load is None:
            self._in_flight = None
            return
        self._timer.end(load)
        self._in_flight = InFlight(result, load, () if load.is_decode else batch.reqs)

    def joined(self, reqs: Iterable[Any]) -> None:
        """Requests of a decode server whose KV has come begin to run."""
        self.side.joined(reqs)

    def processed(self, batch: Any, result: Any) -> None:
        """The batch's tokens are out."""
        self._served, self.unsampled = True, None
        if self._in_flight is not None and self._in_flight.result is result:
            self._in_flight = None  # no overlap, or nothing was launched since
        if self._busy or self._timer.pending:
            self.guarded(self._after_batch, batch)
        self._timer.turn()

    def sampled(self) -> None:
        """The sampling of the batch in flight is launched: what was put off until then."""
        behind, self.unsampled = self.unsampled, None
        if behind is not None:
            self.guarded(self._train_behind, *behind)
            self._timer.turn()

    def _after_batch(self, batch: Any) -> None:
        side = self.side
        self._measured += self._timer.take()
        if not self._busy:
            self._learn(side.learn)
            return
        decoded = batch.forward_mode.is_decode()
        finished = side.count_finished(batch.reqs) if decoded else 0
        if self._in_flight is not None and self._in_flight.unsampled:
            self.unsampled = batch, decoded, finished > 0
            return
        self._train_behind(batch, decoded, finished > 0)

    def _train_behind(self, batch: Any, decoded: bool, finished: bool) -> None:
        """Quanta until the loop's next turn; ``finished``: requests of ``batch`` have."""
        trainer, side = self.trainer, self.side
        if not decoded:
            trainer.slotting.prefilled()
        elif not trainer.slotting.decoded(finished=finished):
            return
        now_s = self._clock()
        self._learn(lambda load, seconds: side.step(load, seconds, now_s))
        trainer.tick()
        if decoded or self._view.between_prefills():
            trainer.slotting.fill(self._view.behind(batch, self._in_flight, decoded=decoded))

    def _learn(self, learn: Callable[[BatchLoad, float], None]) -> None:
        measured, self._measured = self._measured, []
        for load, seconds in measured:
            learn(load, seconds)

    # ---------------------------------------------------------------- while nothing is served
    def idle(self) -> bool:
        """A turn without a batch: quanta back to back. Returns whether SGLang's own part is due: at
        once behind a batch (it publishes that nothing is running), then ``HOUSEKEEPING_S``
        apart."""
        self._timer.drop()
        served, self._served = self._served, False
        if served or not self.trainer.busy:
            return True
        begin_s, quanta = self._clock(), self.trainer.quanta
        housekeeping = begin_s - self._housekeeping_at > HOUSEKEEPING_S
        self.guarded(self._fill_idle, begin_s, housekeeping)
        if self.trainer.quanta != quanta and not housekeeping:
            return False
        self._housekeeping_at = begin_s
        return True

    def _fill_idle(self, begin_s: float, housekeeping: bool) -> None:
        """``begin_s``: of the turn; ``housekeeping``: training's memory has its turn too."""
        trainer = self.trainer
        trainer.tick(idle=housekeeping)

        def load() -> StepLoad:
            return StepLoad(waiting=self._view.waiting())

        targets, transferring = self.side.targets, self._view.transferring > 0
        if transferring:  # SGLang looks at transfers once a turn: it gets no longer than between two tokens
            targets = replace(targets, idle_quantum_s=targets.busy_quantum_s)
        if trainer.slotting.fill_idle(load, targets, begin_s + IDLE_TURN_S, one=transferring):
            self.side.idle_s = self._clock()

    @property
    def may_sleep(self) -> bool:
        """With --sleep-on-idle: not while there is something to train."""
        return not self.trainer.busy or self.trainer.offer() is None

    # ---------------------------------------------------------------- harli profile
    def profile(self) -> dict[str, Any]:
        """The loads that were measured, and how large they can be."""
        scheduler, limits = self._scheduler, self.trainer.limits
        found = {
            "requests": scheduler.max_running_requests,
            "row_tokens": min(limits.max_seq_length, scheduler.max_req_len),
            "slots": scheduler.max_total_num_tokens,
            "vocab": limits.vocab_size,
            "sampled": SAMPLED,
        }
        profiled = self.side.predictor.profiled
        fields = {} if self.side.prefills else profile_fields()
        return {"limits": found, "fields": fields, "profiled": profiled, **(self.side.profile() or {})}
