"""SGLang's scheduler with training quanta slotted in: glue only (design sections 5 and 8).

Leans on these names of SGLang 0.5.16 (sglang/srt/managers/scheduler.py): Scheduler.__init__,
init_request_dispatcher, get_init_info, process_input_requests, run_batch, process_batch_result, on_idle,
maybe_sleep_on_idle, handle_dumper_control, continue_generation, handle_shutdown, get_internal_state;
running_batch, waiting_queue, chunked_req, idle_sleeper, ipc_channels.recv_from_tokenizer, forward_stream, tp_worker.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import zmq
from sglang.srt.managers.scheduler import Scheduler

from sglang_harli.core import StepLoad
from sglang_harli.managers import control, qos_policy, slo_ledger
from sglang_harli.managers.service_link import has_arrived
from sglang_harli.managers.serving_side import ServingSide
from sglang_harli.managers.step_timer import make_timer
from sglang_harli.managers.trainer_setup import build

logger = logging.getLogger(__name__)

SHUTDOWN_S = 8.0  # SGLang kills the tree 15 s after it asked to shut down
IDLE_TURN_S = 0.02  # then the loop looks at its other sockets, the finetune service's among them
HOUSEKEEPING_S = 1.0  # how often SGLang's idle checks (leaks, metrics) run while training fills the time


class HarliScheduler(Scheduler):
    """Scheduler whose idle time and slack train; see point P in ``process_batch_result``."""

    _harli: Any = None  # the CoTrainer; None: not built yet, or finetuning is refused
    _harli_refusal: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ours: Any = self.server_args  # HarliServerArgs: the seam's other half
        self._harli_side = ServingSide(ours.harli_options())
        self._harli_timer = make_timer(str(self.device), getattr(self, "forward_stream", None))
        self._harli_housekeeping_at = 0.0
        self._harli, self._harli_refusal = build(self, self._harli_side)
        if self._harli is not None and self.idle_sleeper is not None:
            self.idle_sleeper.poller.register(self._harli.link.socket, zmq.POLLIN)

    def get_init_info(self) -> dict[str, Any]:
        """SGLang's, with the hello that proves to the main process that this class is in place."""
        return {**super().get_init_info(), "harli": {"rank": 0, "refusal": self._harli_refusal}}

    # ---------------------------------------------------------------- control
    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        control.guard_weight_updates(self._request_dispatcher, self._harli_training)

    def _harli_training(self) -> bool:
        return self._harli is not None and self._harli.training

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """Also takes what the finetune service has sent; runs every loop turn, paused or not."""
        super().process_input_requests(recv_reqs)
        if self._harli is not None:
            self._harli.poll()

    def handle_dumper_control(self, recv_req: Any) -> None:
        if control.is_ours(recv_req) and self._harli is not None:
            self.ipc_channels.send_to_tokenizer.send_output(control.answer(self._harli, recv_req), recv_req)
            return
        super().handle_dumper_control(recv_req)

    def continue_generation(self, recv_req: Any) -> Any:
        if self._harli is not None:
            self._harli.held = False
        return super().continue_generation(recv_req)

    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        if self._harli is not None:
            output.internal_state["harli"] = {
                "serving": self._harli_side.status(),
                "training": self._harli.status(),
            }
        return output

    def handle_shutdown(self, recv_req: Any) -> None:
        super().handle_shutdown(recv_req)
        if self._harli is not None:
            self._harli.shutdown(SHUTDOWN_S)

    # ---------------------------------------------------------------- quanta
    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._harli is None or not self._harli.busy:
            return super().run_batch(batch, *args, **kwargs)
        mode = batch.forward_mode
        size = batch.batch_size()
        self._harli_timer.begin()
        result = super().run_batch(batch, *args, **kwargs)
        self._harli_timer.end(mode.is_decode(), size)
        return result

    def process_batch_result(self, batch: Any, result: Any) -> None:
        """Point P: the batch's tokens are out; quanta that fit the slack go in here."""
        super().process_batch_result(batch, result)
        trainer = self._harli
        if trainer is None or not trainer.busy:
            return
        now_s = time.perf_counter()
        side = self._harli_side
        for is_decode, size, seconds in self._harli_timer.take():
            side.step(is_decode, size, seconds, now_s)
        if not batch.forward_mode.is_decode() or getattr(result, "delay_sample_func", None) is not None:
            return
        side.count_finished(batch.reqs)
        self._harli_fill(batch.reqs)

    def _harli_load(self, running: int) -> StepLoad:
        arrived = has_arrived(self.ipc_channels.recv_from_tokenizer)
        waiting = len(self.waiting_queue) + (self.chunked_req is not None) + arrived
        return StepLoad(running=running, waiting=waiting)

    def _harli_fill(self, reqs: list[Any]) -> None:
        """Quanta between two decode steps, one decision each.

        A request may have banked seconds (a job that begins under a long answer): what is spent between two
        tokens stays under the bound of one quantum all the same, so that no gap is felt as a stall.
        """
        trainer, side = self._harli, self._harli_side
        clocks = side.clocks(reqs)
        begin_s = time.perf_counter()
        ran = False
        while (offer := trainer.offer()) is not None:
            load = self._harli_load(len(clocks))
            now_s, queued_s = time.perf_counter(), trainer.queued_s
            slack = side.slack(clocks, now_s, queued_s, disturbed=trainer.saving)
            room_s = side.targets.busy_quantum_s - (now_s - begin_s) - queued_s
            slack = slo_ledger.Slack(min(slack.seconds, room_s), slack.bound)
            decision = qos_policy.decide(load, slack, offer, side.targets)
            if not decision.quanta:
                if not ran:
                    trainer.held_back(offer, decision, slack.seconds)
                return
            trainer.run_quantum(offer, decision)
            ran = True
            if load.idle:  # the batch's last request has finished: the loop must see to what comes next
                return

    def on_idle(self) -> None:
        """Quanta back to back while nothing runs, looking for arrivals between them."""
        trainer = self._harli
        if trainer is None or not trainer.busy:
            super().on_idle()
            return
        self._harli_timer.drop()
        begin_s = time.monotonic()
        ran = False
        while time.monotonic() - begin_s < IDLE_TURN_S and (offer := trainer.offer()) is not None:
            load = self._harli_load(0)
            decision = qos_policy.decide(load, slo_ledger.UNBOUNDED, offer, self._harli_side.targets)
            if not decision.quanta:
                break
            trainer.run_quantum(offer, decision)
            trainer.settle()
            ran = True
        if not ran or begin_s - self._harli_housekeeping_at > HOUSEKEEPING_S:
            self._harli_housekeeping_at = begin_s
            super().on_idle()

    def maybe_sleep_on_idle(self) -> None:
        """With --sleep-on-idle: not while there is something to train."""
        if self._harli is None or not self._harli.busy or self._harli.offer() is None:
            super().maybe_sleep_on_idle()
