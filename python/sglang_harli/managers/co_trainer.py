"""Runs quanta, owns the run in progress, and answers the finetune service (design sections 2 and 5).

Everything here happens on the scheduler's thread, between its own steps: nothing blocks, touches a disk,
a tokenizer or JSON.  An error inside a quantum or a control message fails that run, gives its memory
back and leaves serving alone.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_harli.core import Decision, QuantumKind, QuantumOffer, SubState
from sglang_harli.errors import HarliError, TrainingError
from sglang_harli.managers import qos_policy
from sglang_harli.managers.active_run import ActiveRun
from sglang_harli.managers.quantum_clock import DeviceClock, HostClock
from sglang_harli.managers.quantum_costs import QuantumCosts
from sglang_harli.managers.service_link import ServiceLink
from sglang_harli.peft_trainer.frozen_base import FrozenBase
from sglang_harli.protocol import internal

if TYPE_CHECKING:  # it imports sglang, which a host without a server does not need
    from sglang_harli.managers.adapter_loader import AdapterLoader

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.5
PULSE_EVERY_S = 2.0
KNOWN_RUNS = 1024  # jobs whose newest attempt is remembered, to tell a late StartRun


class _Tick(internal.Message):
    """Not from the service: collect what the device has finished."""


_TICK = _Tick()


class CoTrainer:
    """The scheduler's trainer.

    Args:
        base: the served weights as a transformers module.
        limits: sent with the hello; the memory budget is checked again when a run starts.
        link: the ipc pair.
        loader: loads finished adapters into the serving side, slice by slice; None on a host that does not serve.
        costs: estimates of quanta.
        clock: measures quanta; on CUDA it also puts them on the stream of SGLang's forwards.
        quantum_rows: a fixed split, or None.
        set_options, status: what the scheduler does for ``harli set`` and ``harli status``.
    """

    def __init__(
        self,
        base: FrozenBase,
        limits: internal.ServedLimits,
        link: ServiceLink,
        loader: AdapterLoader | None,
        costs: QuantumCosts,
        clock: HostClock | DeviceClock,
        *,
        quantum_rows: int | None,
        set_options: Callable[[internal.SetOptions], internal.OptionsSet],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.base, self.limits, self.link, self.loader, self.costs = base, limits, link, loader, costs
        self.clock = clock
        self.quantum_rows = quantum_rows
        self.run: ActiveRun | None = None
        self.held = False  # /pause_generation pauses training too
        self._set_options, self._status = set_options, status
        self._sub_state = (SubState.TRAINING.value, "")
        self._told_at = 0.0
        self._pulse_at = 0.0
        self._attempts: dict[str, int] = {}  # the newest attempt of each job that was held here, or stopped
        self._held_back = 0
        self.quanta = 0
        self.train_s = 0.0
        self._handlers: dict[type, Callable[[Any, list[bytes]], None]] = {
            internal.StartRun: self._start,
            internal.MicroBatch: self._micro_batch,
            internal.SnapshotSlot: self._snapshot_slot,
            internal.SnapshotSaved: self._snapshot_saved,
            internal.StopRun: self._stop,
            internal.StatusRequest: self._status_request,
            internal.SetOptions: lambda m, _: self.link.send(self._set_options(m)),
            _Tick: lambda *_: self.run and self.run.send_metrics(),
        }

    # ---------------------------------------------------------------- the service's messages
    def poll(self) -> None:
        """Take what the service has sent; called once a loop turn."""
        arrived = self.link.poll()
        if self.run is not None and (now_s := time.monotonic()) - self._pulse_at >= PULSE_EVERY_S:
            self._pulse_at = now_s
            self.run.pulse()
        if self.run is not None and self.run.training.finished:
            arrived.append((_TICK, []))  # no quantum comes any more to collect the last metrics behind
        for message, frames in arrived:
            try:
                self._handlers[type(message)](message, frames)
            except Exception as error:  # boundary: the control handler in the scheduler
                logger.exception("harli: %s could not be handled", type(message).__name__)
                if isinstance(message, internal.StartRun) and self.run is None:
                    spec = message.spec
                    self._report_failure(spec.job, spec.attempt, message.step, message.step, error)
                elif not isinstance(message, internal.StatusRequest | internal.SetOptions):
                    self._fail(error)  # those two are no business of the run

    def _current(self, message: Any) -> ActiveRun | None:
        """The run a message is about; messages of another job or an older attempt are dropped."""
        run = self.run
        if run is None or (message.job, message.attempt) != (run.spec.job, run.spec.attempt):
            return None
        return run

    def _start(self, message: internal.StartRun, _frames: list[bytes]) -> None:
        spec = message.spec
        late = spec.attempt <= self._attempts.get(spec.job, 0)  # that run is held, or over
        if late or message.scheduler not in (0, os.getpid()):
            return
        self._note(spec.job, spec.attempt)
        if self.run is not None:
            self._release()  # the store wants another run
        self.run = ActiveRun(self.base, message, self.limits, self.link, self.quantum_rows)

    def _note(self, job: str, attempt: int) -> None:
        self._attempts[job] = max(attempt, self._attempts.pop(job, 0))
        if len(self._attempts) > KNOWN_RUNS:
            del self._attempts[next(iter(self._attempts))]

    def _micro_batch(self, message: internal.MicroBatch, frames: list[bytes]) -> None:
        run = self._current(message)
        if run is not None:
            ids, labels = (np.frombuffer(f, dtype=np.int32) for f in frames)
            run.training.feed(message, ids, labels)

    def _snapshot_slot(self, message: internal.SnapshotSlot, _frames: list[bytes]) -> None:
        run = self._current(message)
        if run is not None:
            run.take_slot(message.slot)

    def _snapshot_saved(self, message: internal.SnapshotSaved, _frames: list[bytes]) -> None:
        run = self._current(message)
        if run is not None and run.saved(message):
            self._release()

    def _stop(self, message: internal.StopRun, _frames: list[bytes]) -> None:
        run = self._current(message)
        if run is None:
            self._note(message.job, message.attempt)  # a StartRun that is late comes too late
            self.link.send(internal.RunStopped(job=message.job, attempt=message.attempt, step=0))
        elif run.stop(message.snapshot):
            self._release()

    def _status_request(self, message: internal.StatusRequest, _frames: list[bytes]) -> None:
        self.link.send(
            internal.StatusReport(request=message.request, serving=self._status(), training=self.status())
        )

    # ---------------------------------------------------------------- quanta
    @property
    def busy(self) -> bool:
        """Whether there is a run or an adapter to load at all (cheap: asked every loop turn)."""
        return self.run is not None or self._loading

    @property
    def _loading(self) -> bool:
        return self.loader is not None and self.loader.pending

    @property
    def saving(self) -> bool:
        """Whether the service is writing a snapshot on the cores that serving computes on."""
        return self.run is not None and self.run.saving and self.limits.device == "cpu"

    @property
    def training(self) -> bool:
        return self.run is not None

    def offer(self) -> QuantumOffer | None:
        """The next quantum and its price, or None when there is nothing to do now."""
        if self._loading:
            return self._single(QuantumKind.ADAPTER, 1)
        run = self.run
        if run is None:
            return None
        if self.held:
            self._enter(SubState.YIELDING, "generation is paused")
            return None
        if run.copying:
            return self._single(QuantumKind.COPY, 1)
        shape = run.next_shape()
        if shape is None:
            self._enter(*run.waiting_for())
            return None
        if shape.fixed:
            tokens = max(shape.rows * shape.row_tokens, 1)
            upper = self.costs.estimate(shape.kind, tokens).upper_s
            return QuantumOffer(shape.kind, ((shape.rows, upper),), True, self._held_back)
        sizes = [r for r in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 1024) if r < shape.rows]
        candidates = tuple(
            (r, self.costs.estimate(shape.kind, r * shape.row_tokens).upper_s) for r in (*sizes, shape.rows)
        )
        return QuantumOffer(shape.kind, candidates, False, self._held_back)

    def _single(self, kind: QuantumKind, tokens: int) -> QuantumOffer:
        return QuantumOffer(kind, ((1, self.costs.estimate(kind, tokens).upper_s),), True)

    def held_back(self, offer: QuantumOffer, decision: Decision, slack_s: float) -> None:
        """The policy said no: show why, and let an estimate that alone is to blame decay."""
        self._held_back += 1
        if decision.reason == qos_policy.TOO_LONG or (slack_s > 0 and self._held_back > 20):
            self.costs.relax(offer.kind, time.perf_counter())
        self._enter(SubState.YIELDING, decision.reason)

    def run_quantum(self, offer: QuantumOffer, decision: Decision) -> None:
        """Run (on CUDA: launch) the quantum that was decided."""
        begin = time.perf_counter()
        try:
            with self.clock.span():
                tokens, first = self._run(offer.kind, decision.rows)
        except Exception as error:  # boundary: the quantum
            logger.exception("harli: a training quantum (%s) failed", offer.kind.value)
            # Where it was another job's adapter, its loading has failed, not the run.
            if offer.kind is not QuantumKind.ADAPTER:
                self._fail(error)
            return
        upper_s = dict(offer.candidates).get(decision.rows, offer.candidates[-1][1])
        self.clock.close(offer.kind, tokens, first, upper_s)
        now_s = time.perf_counter()
        for done in self.clock.take():
            if done.tokens:
                self.costs.observe(
                    done.kind, done.tokens, done.seconds, now_s=now_s, first_of_shape=done.first_of_shape
                )
        self._held_back = 0
        self.quanta += 1
        self.train_s += now_s - begin
        if self.run is not None and not self.run.copying:
            self._enter(SubState.TRAINING, decision.reason)

    @property
    def queued_s(self) -> float:
        """Upper bound of the training that is launched and not finished, seconds."""
        return self.clock.queued_s

    def settle(self) -> None:
        """Idle: let the device catch up."""
        self.clock.settle()

    def _run(self, kind: QuantumKind, rows: int) -> tuple[int, bool]:
        if kind is QuantumKind.ADAPTER:
            assert self.loader is not None
            self.loader.run_slice()
            return 1, False
        run = self.run
        assert run is not None
        if run.copying:
            return min(run.copy_slice(), 1), False
        done = run.training.run(rows)
        if run.after_quantum():
            self._release()
        return max(done.tokens, 1), done.first_of_shape  # kinds that are not cut by rows count as one token

    # ---------------------------------------------------------------- ends of a run
    def _release(self) -> None:
        """Give the run's memory back."""
        run, self.run = self.run, None
        if run is not None:
            run.release()
            self._told_at = 0.0

    def _fail(self, error: Exception) -> None:
        run = self.run
        if run is None:
            return
        job, attempt, step = run.spec.job, run.spec.attempt, run.training.applied_step
        after = run.told_step
        self._release()
        self._report_failure(job, attempt, step, after, error)

    def _report_failure(self, job: str, attempt: int, step: int, after: int, error: Exception) -> None:
        code, text = describe(error)
        failed = internal.RunFailed(job=job, attempt=attempt, step=step, code=code, message=text, after=after)
        self.link.send(failed)
        error.__traceback__ = None  # its frames hold the run's tensors
        gc.collect()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def shutdown(self, limit_s: float) -> None:
        """Graceful end: save a step that is newer than the last checkpoint, if time allows."""
        run = self.run
        if run is None:
            return
        try:
            if not run.final_snapshot():
                return
        except HarliError as error:  # the run had failed, and the last metrics say so now
            self._fail(error)
            return
        deadline = time.monotonic() + limit_s
        while self.run is not None and time.monotonic() < deadline:
            self.link.socket.poll(50)
            self.poll()

    # ---------------------------------------------------------------- what is shown
    def _enter(self, sub_state: str, reason: str) -> None:
        run = self.run
        if run is None:
            return
        now_s = time.monotonic()
        if now_s - self._told_at < PROGRESS_EVERY_S:
            return
        self._told_at = now_s
        self._sub_state = (str(sub_state), reason)
        self.link.send(
            internal.Progress(
                job=run.spec.job,
                attempt=run.spec.attempt,
                step=run.training.applied_step,
                sub_state=str(sub_state),
                reason=reason,
                tokens=run.training.tokens,
            )
        )

    def status(self) -> dict[str, Any] | None:
        run = self.run
        if run is None:
            return None
        sub_state, reason = self._sub_state
        return {
            "job": run.spec.job,
            "attempt": run.spec.attempt,
            "step": run.training.applied_step,
            "total_steps": run.spec.total_steps,
            "sub_state": sub_state,
            "reason": reason,
            "idle_only": reason == qos_policy.TOO_LONG,
            "batches_ahead": run.training.batches_ahead,
            "quanta": self.quanta,
            "train_s": round(self.train_s, 3),
            "costs": self.costs.summary(),
        }


def describe(error: Exception) -> tuple[str, str]:
    """A stable code and a message with what to change, for whoever reads the job."""
    if isinstance(error, TrainingError | HarliError):
        return error.code, error.message
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out_of_memory", (
            f"training ran out of memory ({error}): lower batch_size, max_seq_length or lora_r, "
            "or give training more with --harli-max-train-mem"
        )
    return "internal", f"{type(error).__name__}: {error}"
