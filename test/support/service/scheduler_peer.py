"""The scheduler's side of the finetune service's socket, with arithmetic instead of a model."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sglang_harli import run_paths
from sglang_harli.protocol import internal, shared_memory
from support.service.service_peers import Peer, limits

KEPT = (
    internal.RunStarted,
    internal.StepDone,
    internal.EvaluationDone,
    internal.SnapshotReady,
    internal.RunStopped,
    internal.RunFailed,
)

PULSE_EVERY_S = 0.5


class SchedulerPeer(Peer):
    """Trains by arithmetic: the state after a step is a function of the one before and of what was
    fed, so that two runs end equal only if they were fed the same rows in the same order.

    Attributes:
        step_s: how long a step takes; ``hold`` (an event) stops training altogether while it is
            cleared.
        fed: (job, attempt, epoch, step, index) of each micro-batch, in order of arrival.
        fail_at: the step at which the run fails, if any.
        valid_losses: by step what an evaluation of it finds; else 4 over the step.
        evaluated: (job, step, rows) of each evaluation, the rows as sets of token ids.
    """

    def __init__(self, run_dir: Path, *, step_s: float = 0.0, **changes: Any) -> None:
        super().__init__(run_paths.scheduler_endpoint(str(run_dir)), "service")
        self.step_s = step_s
        self.limits: internal.ServedLimits | None = limits(**changes)
        self.refusal: str | None = None
        self.fail_at: int | None = None
        self.hold_at: int | None = None  # no step is begun after this one
        self.valid_losses: dict[int, float] = {}
        self.evaluated: list[tuple[str, int, frozenset[tuple[int, ...]]]] = []
        self.trained: dict[str, set[tuple[int, ...]]] = {}  # by job the rows that were trained
        self.state_bytes = 4096  # what the state is said to need
        self.hold = threading.Event()
        self.hold.set()
        self.fed: list[tuple[Any, ...]] = []
        self.farthest_ahead = 0
        self.starts: list[internal.StartRun] = []
        self.ring: deque[internal.Message] = deque()
        self.options: dict[str, Any] = {"tpot_slo_ms": 50.0}
        self.revision = 0
        self.base: internal.BasePrint | None = None  # what it serves; None: it does not say
        self.updates = 0
        self.held = ""  # why no run is to start
        self.pid = os.getpid()
        self._drop()

    def can_save(self, job: str) -> bool:
        """Whether the job's run has a slot, and its last snapshot is acknowledged."""
        return self.spec is not None and self.spec.job == job and self._slot_free

    # ---- the run
    def _drop(self) -> None:
        self.spec: internal.RunSpec | None = None
        self.step = 0
        self.tokens = 0
        self.state = np.zeros(8, dtype=np.float32)
        self._batches: dict[tuple[int, int], tuple[internal.MicroBatch, list[bytes]]] = {}
        self._slot: internal.SlotRef | None = None
        self._slot_free = False
        self._in_hand = -1
        self._wanted: str | None = None
        self._stopping = False
        self._saved = 0
        self._evaluating: int | None = None  # the index of the evaluation's first micro-batch
        self.evaluation = internal.EvaluationState()
        self._next_at = self._pulse_at = 0.0

    def update_weights(self, base: internal.BasePrint | None) -> None:
        """As SGLang's update does, where no job trains; None: no print can be taken of them."""
        assert self.spec is None
        self.base, self.updates = base, self.updates + 1
        self._hello()

    def hold_runs(self, reason: str) -> None:
        self.held = reason
        self._hello()

    def restart(self, base: internal.BasePrint | None = None) -> None:
        """As if the scheduler process had died and come back, with ``base`` where one is given."""
        self._drop()
        self.base, self.updates = base or self.base, 0
        self.ring.clear()
        self.pid += 1
        self.service_pid = None

    def keep(self, message: internal.Message) -> None:
        self._seq += 1
        message.seq = self._seq
        self.ring.append(message)
        if self.service_pid is not None:
            self._send_now(message)

    def hello(self) -> internal.Hello:
        spec = self.spec
        return internal.Hello(
            pid=self.pid,
            rank=0,
            limits=self.limits,
            refusal=self.refusal,
            job=spec.job if spec else None,
            attempt=spec.attempt if spec else 0,
            step=self.step,
            next_cursor=self._next_cursor(),
            options=self.options,
            revision=self.revision,
            base=self.base,
            updates=self.updates,
            hold=self.held,
        )

    def _next_cursor(self) -> internal.BatchCursor | None:
        steps = list(self._batches)
        if self.spec is not None and not steps and self._evaluating is not None:
            return internal.BatchCursor(epoch=0, step=self.step, index=self._evaluating)
        if self.spec is None or not steps:
            return None
        step, index = max(steps)
        batch = self._batches[step, index][0]
        last = batch.last
        return internal.BatchCursor(
            epoch=batch.cursor.epoch, step=step + last, index=0 if last else index + 1
        )

    def _pulse(self) -> None:
        """What the scheduler says of its run by the clock: a service that was killed between an
        acknowledgement and its answer finds by it what is missing, the slot of the snapshots for
        one."""
        assert self.spec is not None
        self._pulse_at = time.monotonic()
        self._send(
            internal.Pulse(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                next_cursor=self._next_cursor() or internal.BatchCursor(epoch=0, step=self.step + 1, index=0),
                state_bytes=self.state_bytes,
                has_slot=self._slot is not None,
                snapshot=self._in_hand,
                stopping=self._stopping,
                taken=internal.BatchCursor(
                    epoch=0, step=self.step + (self._evaluating is None), index=self._evaluating or 0
                ),
            )
        )

    def take(self, message: Any, frames: list[bytes]) -> None:
        if isinstance(message, internal.Welcome):
            if message.pid != self.service_pid:
                self.service_pid = message.pid
                for kept in list(self.ring):
                    self._send_now(kept)
            if not message.answers:
                self._hello()
        elif isinstance(message, internal.Ack):
            self.ring = deque(kept for kept in self.ring if kept.seq not in message.seqs)
        elif isinstance(message, internal.StartRun):
            self._start(message)
        elif isinstance(message, internal.StatusRequest):
            report = internal.StatusReport(
                request=message.request, serving={"running": 0}, training={"step": self.step}
            )
            self._send(report)
        elif isinstance(message, internal.SetOptions):
            self._set(message)
        elif isinstance(message, internal.StopRun):
            self._stop(message)
        elif self.spec is not None and (message.job, message.attempt) == (self.spec.job, self.spec.attempt):
            self._of_run(message, frames)

    def _start(self, message: internal.StartRun) -> None:
        if self.spec is not None and (self.spec.job, self.spec.attempt) == (
            message.spec.job,
            message.spec.attempt,
        ):
            return  # said twice
        if message.scheduler != self.pid:
            return  # for the one before
        if self.held or message.updates != self.updates:
            self._hello()
            return
        self._drop()
        self.starts.append(message)
        self.spec, self.step, self._saved = message.spec, message.step, message.step
        self.evaluation = internal.state_in(message.meta)
        assert message.begin is not None
        self._evaluating = message.begin.index if message.begin.step == message.step > 0 else None
        if message.restore is not None:
            slot = shared_memory.SharedBuffer.open(message.restore)
            [ref] = [t for t in message.restore.tensors if t.name.startswith("adapter/")]
            self.state = np.frombuffer(slot.view(ref), dtype=np.float32).copy()
            self.tokens = message.meta["tokens"]
            slot.close()
        started = internal.RunStarted(
            job=self.spec.job, attempt=self.spec.attempt, step=self.step, state_bytes=self.state_bytes
        )
        self.keep(started)

    def _set(self, message: internal.SetOptions) -> None:
        stale = message.if_revision not in (None, self.revision)
        if not stale:
            self.options |= message.values
            self.revision += 1
        self._send(
            internal.OptionsSet(
                request=message.request,
                outcome="stale" if stale else "applied",
                revision=self.revision,
                effective=self.options,
            )
        )

    def _stop(self, message: internal.StopRun) -> None:
        if self.spec is None or message.job != self.spec.job:
            self.keep(internal.RunStopped(job=message.job, attempt=message.attempt, step=0))
            return
        self._stopping = True
        if message.snapshot and self.step > self._saved:
            self._wanted = "pause"
        else:
            self._stopped()

    def _stopped(self) -> None:
        assert self.spec is not None
        self.keep(internal.RunStopped(job=self.spec.job, attempt=self.spec.attempt, step=self.step))
        self._drop()

    def _of_run(self, message: Any, frames: list[bytes]) -> None:
        assert self.spec is not None
        if isinstance(message, internal.MicroBatch):
            cursor = message.cursor
            self.fed.append((message.job, message.attempt, cursor.epoch, cursor.step, cursor.index))
            self._batches[cursor.step, cursor.index] = (message, frames)
            self.farthest_ahead = max(self.farthest_ahead, cursor.step - self.step)
        elif isinstance(message, internal.SnapshotSlot):
            if self._slot is None:
                self._slot, self._slot_free = message.slot, True
        elif isinstance(message, internal.SnapshotSaved):
            self._slot_free, self._in_hand = True, -1
            if message.ok:
                self._saved = max(self._saved, message.step)
            if self._stopping:
                self._stopped()
            elif message.step == self.step and self._finished:
                self._drop()

    def turn(self) -> None:
        if self.spec is None:
            return
        if self.service_pid is not None and time.monotonic() - self._pulse_at > PULSE_EVERY_S:
            self._pulse()
        if self._wanted is not None:
            self._snapshot()
            return
        ready = self._batches.get((self.step + 1, 0))
        waiting = (
            self._stopping
            or not self.hold.is_set()
            or self.step == self.hold_at
            or time.monotonic() < self._next_at
        )
        if not waiting and self._evaluating is not None:
            self._evaluate(self._evaluating)
            return
        if waiting or ready is None or self._finished:
            return
        if all((self.step + 1, i) in self._batches for i in range(ready[0].micro_batches)):
            self._one_step(ready[0].micro_batches)

    @property
    def _finished(self) -> bool:
        assert self.spec is not None
        total = self.spec.total_steps
        stops = self.evaluation.stops(self.spec.hyperparameters.early_stopping_patience, total)
        return stops or (self.step >= total and self._evaluating is None)

    def _evaluate(self, first: int) -> None:
        assert self.spec is not None
        ready = self._batches.get((self.step, first))
        if ready is None:
            return
        behind = ready[0].evaluation
        assert behind is not None
        if not all((self.step, first + i) in self._batches for i in range(behind.count)):
            return
        rows: set[tuple[int, ...]] = set()
        for index in range(behind.count):
            rows |= _rows(*self._batches.pop((self.step, first + index)))
        self.evaluated.append((self.spec.job, self.step, frozenset(rows)))
        loss = self.valid_losses.get(self.step, 4.0 / self.step)
        self.evaluation = self.evaluation.after(
            self.step, loss, self.spec.hyperparameters.early_stopping_min_delta
        )
        self._evaluating = None
        self.keep(
            internal.EvaluationDone(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                epoch=1,
                valid_loss=loss,
                valid_mean_token_accuracy=0.5,
                rows=len(rows),
                target_tokens=len(rows),
                full_valid_loss=loss if behind.whole else None,
                full_valid_mean_token_accuracy=0.5 if behind.whole else None,
                state=self.evaluation,
                after=self.step,
            )
        )
        self._snapshot_due()

    def _one_step(self, count: int) -> None:
        assert self.spec is not None
        self.step += 1
        if self.step == self.fail_at:
            failed = internal.RunFailed(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                code="out_of_memory",
                message="training ran out of memory: lower batch_size",
            )
            self.keep(failed)
            self._drop()
            return
        targets, tokens, epoch = 0, 0, 0
        for index in range(count):
            batch, frames = self._batches.pop((self.step, index))
            self.trained.setdefault(self.spec.job, set()).update(_rows(batch, frames))
            self._evaluating = batch.micro_batches if batch.evaluation is not None else None
            flat, places, marks = (np.frombuffer(frame, dtype=np.int32) for frame in frames)
            assert len(flat) == len(batch.lengths) * batch.lengths[0] and len(places) == len(marks)
            targets += len(marks)
            tokens += sum(batch.lengths)
            epoch = batch.cursor.epoch
            weight = np.arange(1, len(flat) + 1) @ flat.astype(np.float64)
            self.state = (self.state * np.float32(0.9) + np.float32(weight % 1013)).astype(np.float32)
            assert batch.step_target_tokens > 0
        assert targets == batch.step_target_tokens
        self.tokens += tokens
        self._next_at = time.monotonic() + self.step_s
        self.keep(
            internal.StepDone(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                epoch=epoch,
                loss=4.0 / self.step,
                learning_rate=1e-3,
                grad_norm=1.0,
                tokens=tokens,
                target_tokens=targets,
                seconds=max(self.step_s, 1e-3),
                total_tokens=self.tokens,
                after=self.step - 1,
                evaluated=self.evaluation.step,
                train_mean_token_accuracy=0.25,
            )
        )
        if self._evaluating is None:
            self._snapshot_due()

    def _snapshot_due(self) -> None:
        assert self.spec is not None
        every = self.spec.hyperparameters.checkpoint_every
        if self._finished:
            self._wanted = "final"
        elif self.evaluation.best_step == self.step > 0:
            self._wanted = "best"
        elif every and self.step % every == 0 and self._slot_free:
            self._wanted = "every"

    def _snapshot(self) -> None:
        if not self._slot_free or self._slot is None or self.spec is None:
            return
        names = [f"{kind}/base_model.model.x.lora_A.weight" for kind in ("adapter", "exp_avg", "exp_avg_sq")]
        refs, _ = shared_memory.layout((name, "float32", (2, 4), 32) for name in names)
        slot = shared_memory.SharedBuffer.open(self._slot)
        for ref in refs:
            slot.view(ref)[:] = self.state.tobytes()
        slot.close()
        reason, self._wanted, self._slot_free = self._wanted or "every", None, False
        self._in_hand = self.step
        self.keep(
            internal.SnapshotReady(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.step,
                slot=internal.SlotRef(path=self._slot.path, nbytes=self._slot.nbytes, tensors=refs),
                meta={
                    "tokens": self.tokens,
                    "generator": b"\x00\xff",
                    "big": 2**60,
                    internal.EVALUATION: msgspec.to_builtins(self.evaluation),
                },
                reason=reason,
                evaluated=self.evaluation.step,
                train_loss=4.0 / self.step,
                train_mean_token_accuracy=0.25,
            )
        )


def _rows(batch: internal.MicroBatch, frames: list[bytes]) -> set[tuple[int, ...]]:
    """The token ids of each row."""
    ids = np.frombuffer(frames[0], dtype=np.int32).reshape(len(batch.lengths), -1)
    return {tuple(row[:length].tolist()) for row, length in zip(ids, batch.lengths, strict=True)}
