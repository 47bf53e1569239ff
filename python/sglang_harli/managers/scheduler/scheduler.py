"""SGLang's scheduler with training quanta slotted in: overrides alone (docs/internals/policy.md).

Leans on these names of SGLang (sglang/srt/managers/scheduler.py): Scheduler.__init__,
init_request_dispatcher, get_init_info, process_input_requests, run_batch, process_batch_result,
launch_batch_sample_if_needed, get_new_prebuilt_batch,
on_idle, maybe_sleep_on_idle, handle_dumper_control, continue_generation, handle_shutdown,
get_internal_state; waiting_queue, ipc_channels.send_to_tokenizer, weight_updater.offload_tags; and
on those of ``co_serving``.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler import Scheduler

from sglang_harli.errors import UnsupportedError
from sglang_harli.managers.scheduler import control
from sglang_harli.managers.scheduler.co_serving import CoServing
from sglang_harli.managers.scheduler.trainer_setup import build_trainer

SHUTDOWN_S = 8.0  # SGLang kills the tree 15 s after it asked to shut down


class HarliScheduler(Scheduler):
    """Scheduler whose idle time and slack train (``process_batch_result``, ``on_idle``)."""

    _harli: CoServing | None = None  # None: not built yet, or finetuning is refused
    _harli_refusal: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ours: Any = self.server_args  # HarliServerArgs: the seam's other half
        try:
            trainer, side = build_trainer(self, ours.harli_options())
            self._harli = CoServing(self, side, trainer)
        except UnsupportedError as error:
            self._harli_refusal = error.message

    def get_init_info(self) -> dict[str, Any]:
        """SGLang's, with the hello that proves to the main process that this class is in place."""
        return {**super().get_init_info(), "harli": {"rank": 0, "refusal": self._harli_refusal}}

    # ---------------------------------------------------------------- control
    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        control.guard_weight_updates(
            self._request_dispatcher,
            lambda: self._harli is not None and self._harli.trainer.training,
            self._harli_weights_updated,
            lambda: self.weight_updater.offload_tags,
        )
        control.follow_memory(self._request_dispatcher, self._harli_memory_changed)

    def _harli_memory_changed(self) -> None:
        if self._harli is not None:
            self._harli.memory_changed()

    def _harli_weights_updated(self) -> None:
        if self._harli is not None:
            self._harli.weights_updated()

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """Also takes what the finetune service has sent; runs every loop turn, paused or not."""
        known = len(self.waiting_queue)
        super().process_input_requests(recv_reqs)
        if self._harli is not None:
            self._harli.guarded(self._harli.take_messages, known)

    def handle_dumper_control(self, recv_req: Any) -> None:
        if control.is_ours(recv_req) and self._harli is not None:
            answer = control.answer(self._harli.trainer, recv_req, self._harli.profile)
            self.ipc_channels.send_to_tokenizer.send_output(answer, recv_req)
            return
        super().handle_dumper_control(recv_req)

    def continue_generation(self, recv_req: Any) -> Any:
        if self._harli is not None:
            self._harli.trainer.held = False
        return super().continue_generation(recv_req)

    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        if self._harli is not None:
            output.internal_state["harli"] = self._harli.trainer.whole_status()
        return output

    def handle_shutdown(self, recv_req: Any) -> None:
        super().handle_shutdown(recv_req)
        if self._harli is not None:
            self._harli.trainer.shutdown(SHUTDOWN_S)

    # ---------------------------------------------------------------- quanta
    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        load = self._harli.begin(batch) if self._harli is not None else None
        result = super().run_batch(batch, *args, **kwargs)
        if self._harli is not None:
            self._harli.end(batch, result, load)
        return result

    def process_batch_result(self, batch: Any, result: Any) -> None:
        """The batch's tokens are out: quanta that fit the slack go in behind it."""
        super().process_batch_result(batch, result)
        if self._harli is not None:
            self._harli.processed(batch, result)

    def get_new_prebuilt_batch(self, *args: Any, **kwargs: Any) -> Any:
        """On a decode server of a pair: requests whose KV has come join the running batch."""
        batch = super().get_new_prebuilt_batch(*args, **kwargs)
        if batch is not None and self._harli is not None:
            self._harli.joined(batch.reqs)
        return batch

    def launch_batch_sample_if_needed(self, batch_result: Any, *args: Any) -> Any:
        """With overlap and a grammar in the batch its sampling comes last in the loop's turn:
        quanta go in behind that."""
        found = super().launch_batch_sample_if_needed(batch_result, *args)
        if self._harli is not None and self._harli.unsampled:
            self._harli.sampled()
        return found

    def on_idle(self) -> None:
        """Quanta back to back while nothing runs."""
        if self._harli is None or self._harli.idle():
            super().on_idle()

    def maybe_sleep_on_idle(self) -> None:
        """With --sleep-on-idle: not while there is something to train."""
        if self._harli is None or self._harli.may_sleep:
            super().maybe_sleep_on_idle()
