"""The run in progress: its training, its snapshots, and how it stops.

    StartRun ── draw or restore the adapter ── RunStarted ── train ─┬─ every N steps: snapshot ── train …
                                                                    ├─ StopRun: [snapshot] ── RunStopped
                                                                    └─ last step: final snapshot ── saved

A snapshot needs the slot, which belongs to the service while it writes: one that falls due then
waits for the next step boundary, except the last ones (pause, final), which wait for the slot.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_harli.config import show_size
from sglang_harli.core import QuantumKind, Reason, SubState
from sglang_harli.errors import ConfigError, TrainingError
from sglang_harli.failpoints import Failpoint, failpoint
from sglang_harli.managers.scheduler.policy import explanation
from sglang_harli.managers.scheduler.service_link import ServiceLink
from sglang_harli.managers.scheduler.training.state_copier import StateCopier, reader, state_layout
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.evaluation import EvaluationMetrics
from sglang_harli.peft_trainer.graphs.graph_check import graphs_of
from sglang_harli.peft_trainer.records import StepMetrics
from sglang_harli.peft_trainer.run import QuantumShape, TrainingRun
from sglang_harli.protocol import internal
from sglang_harli.protocol.shared_memory import SharedBuffer
from sglang_harli.train_memory import TrainMemory

TOLD_EVERY = 8  # micro-batches of a step; each one where fewer than that are ahead


class ActiveRun:
    """One job's run in the scheduler.

    Raises:
        ConfigError, TrainingError: the job does not fit the model, its memory or its checkpoint.
        OSError: the restore slot is gone.
    """

    def __init__(
        self,
        base: FrozenBase,
        start: internal.StartRun,
        limits: internal.ServedLimits,
        link: ServiceLink,
        quantum_rows: int | None,
        memory: TrainMemory,
        *,
        working_bytes: int | None = None,
    ) -> None:
        self.spec = start.spec
        self._link = link
        _check_memory(start.spec, limits)
        self.training = TrainingRun(
            base,
            start.spec,
            logits_bytes=limits.logits_bytes,
            quantum_rows=quantum_rows,
            memory=memory,
            working_bytes=working_bytes,
            graphs=graphs_of,
        )
        self._every = start.spec.hyperparameters.checkpoint_every
        self._saved_step = start.step
        self.reported_step = start.step  # of the last StepDone
        self.reported_evaluation = 0  # of the last EvaluationDone
        self._last: StepMetrics | None = None
        self._in_hand: internal.SnapshotReady | None = None  # in the slot, not written yet
        self._slot: SharedBuffer | None = None
        self._slot_free = False
        self._copier: StateCopier | None = None
        self._copied_last = False  # the latest quantum was a slice of a copy
        self._wanted: str | None = None  # why a snapshot is due: every, best, pause, final, shutdown
        self._best_asked = 0  # the step whose state was the best one, and was to be saved
        self._stopping = False  # pause or cancel: no training quantum any more
        self._save_first = False  # the stop is a pause
        self._stop_reason = ""  # of a stop that the service has not asked for
        self.stopped = False
        self._taken = (0, 0)  # the first micro-batch that was not done behind the latest quantum
        self._unreported = 0  # micro-batches that are done and of which the service has not heard
        self._last_step_at = time.monotonic()
        self._state_bytes = 0  # of a snapshot; 0 until the adapter is there
        self._restore: SharedBuffer | None = None
        if start.restore is not None:
            try:
                self._restore = SharedBuffer.open(start.restore)
                source = reader(self._restore, start.restore.tensors)
                self.training.load_state(source, start.meta, start.begin)
                self.reported_evaluation = self.training.evaluation.step
            except BaseException:
                self.training.release()  # its memory goes back
                raise
        self._total_tokens = self.training.tokens

    def _announce(self) -> None:
        """The adapter is drawn or restored: the run is there, and asks for its snapshot slot."""
        if self._restore is not None:
            self._restore.close()
            self._restore = None
        _, self._state_bytes = state_layout(self.training.state_tensors())
        self._link.send(
            internal.RunStarted(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.training.applied_step,
                state_bytes=self._state_bytes,
            )
        )

    # ---------------------------------------------------------------- what comes next
    @property
    def copying(self) -> bool:
        return self._copier is not None

    @property
    def copies_beside(self) -> bool:
        """Whether training goes on while a copy of the state is under way, up to the next step."""
        return self._copier is not None and self._copier.beside and not self.training.spilled

    @property
    def trains_next(self) -> bool:
        """Whether it is training's turn, where that goes on beside a copy: every other one, and
        those in which nothing has arrived."""
        return self.copies_beside and (self._copied_last or not self.copy_ready)

    @property
    def copy_ready(self) -> bool:
        """Whether a slice could be copied now."""
        return self._copier is not None and (not self.copies_beside or self._copier.ready)

    @property
    def saving(self) -> bool:
        """Whether a snapshot is on its way to the disk."""
        return self._in_hand is not None

    @property
    def _ending(self) -> bool:
        """Nothing is trained any more: it stops or is finished, and no step is half applied."""
        return self.training.state_consistent and (self._stopping or self.training.finished)

    @property
    def finishing(self) -> bool:
        """It is to stop, and the optimizer applies a step, whose slices come first."""
        return self._stopping and self.training.ready and not self.training.state_consistent

    def next_shape(self) -> QuantumShape | None:
        """The next training quantum, or None: waiting for memory, data, a slot or the end."""
        if self._ending:
            return None
        shape = self.training.peek()
        replaces = shape is not None and shape.kind is QuantumKind.OPTIMIZER
        if replaces and (self.copying or self._wanted == "best") and self.training.state_consistent:
            return None  # a state that is to be saved is copied before it is replaced
        return shape

    @property
    def lacks_memory(self) -> bool:
        """Whether it is memory that ``next_shape`` waits for."""
        return self.training.needs_memory is not None and not self._ending

    def waiting_for(self) -> tuple[str, str]:
        """Sub-state and reason of a run that waits, but not for memory."""
        if self._stopping or self.training.finished or self.copying or self._wanted == "best":
            return SubState.CHECKPOINTING, "waiting for the checkpoint to be written"
        if self.training.settling:
            return SubState.TRAINING, "waiting for the result of the evaluation"
        return SubState.WAITING_DATA, "waiting for the next micro-batch"

    def copy_slice(self) -> int:
        """One copy quantum; returns the bytes moved."""
        assert self._copier is not None
        self._copied_last = True
        moved = self._copier.run()
        if self._copier.done:
            self._copied()
        return moved

    def _copied(self) -> None:
        copier, self._copier = self._copier, None
        assert copier is not None
        reason, self._wanted = self._wanted or "every", None
        self._slot_free = False  # the service's until SnapshotSaved
        failpoint(Failpoint.SNAPSHOT_COPIED)
        known = self._last if self._last and self._last.step == self.training.applied_step else None
        self._in_hand = internal.SnapshotReady(
            job=self.spec.job,
            attempt=self.spec.attempt,
            step=self.training.applied_step,
            slot=copier.ref(),
            meta=self.training.state_meta(),
            reason=reason,
            after=self.reported_step,
            evaluated=self.reported_evaluation,
            train_loss=known.loss if known else None,
            train_mean_token_accuracy=known.accuracy if known else None,
        )
        self._link.send(self._in_hand)

    def after_quantum(self) -> bool:
        """Send what a step brought; start a due snapshot. True: the run is over, release it."""
        self._copied_last = False
        if not self._state_bytes and self.training.ready:
            self._announce()
        self.send_metrics()
        self._tell_taken()
        if not self.training.state_consistent:
            return False
        if self._stopping and not self._save_first:  # cancel waited for the optimizer's slices
            return self._stop_now()
        step = self.training.applied_step
        if self._stopping:
            self._wanted = "pause"
        elif self.training.finished:
            self._wanted = "final"
        elif self.training.evaluating or self._wanted == "best":
            pass  # a checkpoint has the evaluation of its step
        elif self._best_is_due:
            self._best_asked, self._wanted = step, "best"
        elif self._every and step // self._every > self._saved_step // self._every and self._slot_free:
            self._wanted = "every"
        self._begin_snapshot()
        return False

    @property
    def _best_is_due(self) -> bool:
        """Whether the state is the best one so far by its evaluation, and is not saved."""
        step, best = self.training.applied_step, self.training.evaluation.best_step
        in_hand = self._in_hand is not None and self._in_hand.step == step
        return step == best > max(self._saved_step, self._best_asked) and not in_hand

    def settled(self) -> bool:
        """Between quanta: take what has reached the host.  True: the run is over, release it."""
        waited = self.training.settling
        if waited and not self._ending:
            self.send_metrics()
            return not self.training.settling and self.after_quantum()
        self.send_metrics()
        return False

    def _tell_taken(self) -> None:
        """Tell the service that there is room for more; a StepDone tells it too."""
        taken = self.training.taken
        if (place := (taken.step, taken.index)) == self._taken:
            return
        self._taken = place
        self._unreported = self._unreported + 1 if taken.index else 0
        if self._unreported and (self._unreported >= TOLD_EVERY or self.training.batches_ahead < TOLD_EVERY):
            self._unreported = 0
            self._link.send(internal.BatchesTaken(job=self.spec.job, attempt=self.spec.attempt, cursor=taken))

    def send_metrics(self) -> None:
        """Report the steps whose metrics have reached the host.

        Raises:
            TrainingError: a step's loss was not finite.
        """
        for metrics in self.training.take_metrics():
            failpoint(Failpoint.STEP_APPLIED)
            now_s = time.monotonic()
            seconds, self._last_step_at = now_s - self._last_step_at, now_s
            after, self.reported_step, self._last = self.reported_step, metrics.step, metrics
            self._total_tokens += metrics.tokens
            self._link.send(
                internal.StepDone(
                    job=self.spec.job,
                    attempt=self.spec.attempt,
                    step=metrics.step,
                    epoch=metrics.epoch,
                    loss=metrics.loss,
                    learning_rate=metrics.learning_rate,
                    grad_norm=metrics.grad_norm,
                    tokens=metrics.tokens,
                    target_tokens=metrics.target_tokens,
                    seconds=seconds,
                    total_tokens=self._total_tokens,
                    after=after,
                    evaluated=self.reported_evaluation,
                    train_mean_token_accuracy=metrics.accuracy,
                )
            )
        for found in self.training.take_evaluations():
            self._send_evaluation(found)

    def _send_evaluation(self, found: EvaluationMetrics) -> None:
        failpoint(Failpoint.EVALUATED)
        self._last_step_at = time.monotonic()  # the next step's seconds are its own
        self.reported_evaluation = found.step
        self._link.send(
            internal.EvaluationDone(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=found.step,
                epoch=found.epoch,
                valid_loss=found.loss,
                valid_mean_token_accuracy=found.accuracy,
                rows=found.rows,
                target_tokens=found.target_tokens,
                full_valid_loss=found.full_loss,
                full_valid_mean_token_accuracy=found.full_accuracy,
                state=found.state,
                after=self.reported_step,
            )
        )

    def status(self, sub_state: str, reason: str, serving: dict[str, Any]) -> dict[str, Any]:
        """For ``harli status``; ``sub_state``, ``reason``: as sent last; ``serving``: shown too."""
        graphs = {} if self.training.graphs is None else {"graphs": self.training.graphs.status()}
        return {
            "job": self.spec.job,
            "attempt": self.spec.attempt,
            "step": self.training.applied_step,
            "total_steps": self.spec.total_steps,
            "sub_state": sub_state,
            "reason": reason,
            "why": explanation.why(sub_state, reason, serving),
            "idle_only": reason == Reason.TOO_LONG or bool(serving.get("impossible_targets")),
            "batches_ahead": self.training.batches_ahead,
            "bytes_ahead": self.training.bytes_ahead,
            "spilled": self.training.spilled,
            **graphs,
        }

    # ---------------------------------------------------------------- snapshots
    def take_slot(self, ref: internal.SlotRef) -> None:
        """Map the service's slot for snapshots; one that was named before changes nothing."""
        if self._slot is not None and self._slot.path == ref.path:
            return
        if ref.nbytes < self._state_bytes:
            raise TrainingError(
                f"the snapshot slot has {ref.nbytes} bytes, {self._state_bytes} are needed", code="internal"
            )
        if self._slot is not None:
            self._slot.close()
        self._slot, self._slot_free = SharedBuffer.open(ref), True
        self._begin_snapshot()

    def _begin_snapshot(self) -> None:
        """Start the copy that is wanted, once the slot is ours and no step is half applied."""
        if self._wanted is None or self._copier is not None or not self._slot_free or self._slot is None:
            return
        if not self.training.state_consistent:
            return
        if self.training.applied_step == self._saved_step and self._wanted != "final":
            self._wanted = None
            return
        tensors = self.training.state_tensors()
        refs, _ = state_layout(tensors)
        self._copier = StateCopier(tensors, self._slot, refs)

    def saved(self, message: internal.SnapshotSaved) -> bool:
        """The service has written a snapshot (or could not); True: the run is over, release it."""
        in_hand = self._in_hand is not None and self._in_hand.step == message.step
        if not in_hand and not message.ok:
            return False  # late: about a snapshot that was answered before
        if in_hand:
            self._in_hand, self._slot_free = None, True
        failpoint(Failpoint.ACKNOWLEDGED)
        if message.ok:
            self._saved_step = max(self._saved_step, message.step)
        behind = self.training.applied_step > self._saved_step
        if behind and (self._save_first or self.training.finished) and self.training.state_consistent:
            self._wanted = "pause" if self._save_first else "final"  # once more, until the service gives up
            self._begin_snapshot()
            return False
        if self._stopping and self.training.state_consistent and not self.copying:
            return self._stop_now()
        if self._wanted == "best":  # it waited for the slot
            self._begin_snapshot()
        return self.training.finished and not behind

    def pulse(self) -> None:
        """Say where the run stands, and once more what was taken over and then not answered."""
        in_hand = self._in_hand
        if in_hand is not None and not self._link.keeps(in_hand):
            self._link.send(in_hand)
        self._link.send(
            internal.Pulse(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.training.applied_step,
                next_cursor=self.training.next_cursor,
                state_bytes=self._state_bytes,
                has_slot=self._slot is not None,
                snapshot=-1 if in_hand is None else in_hand.step,
                stopping=self._stopping,
                taken=self.training.taken,
            )
        )

    def final_snapshot(self) -> bool:
        """Shutdown: copy the state out at once; True if the service has something to write."""
        training = self.training
        if not training.ready:
            return False
        self._stopping = self._save_first = True
        while not training.state_consistent:
            shape = training.peek()
            if shape is None:  # in mid-step, with the state in host memory and no way back now
                return False
            training.run(shape.rows)
        self.after_quantum()
        if self._copier is not None:
            self._wanted = "shutdown"
            self._copier.finish()
            self._copied()
        return not self._slot_free and self._slot is not None

    # ---------------------------------------------------------------- stopping
    def stop(self, snapshot: bool) -> bool:
        """Pause (with a snapshot) or cancel; True: stopped already, release it."""
        self._stopping, self._save_first = True, snapshot
        if not self.training.ready:
            return self._stop_now()  # nothing is applied; a checkpoint it came from is the state
        if not snapshot:
            self._abandon_copy()
        if not self.training.state_consistent and (snapshot or not self.training.spilled):
            return False  # the optimizer's slices are finished first
        self.training.drop_micro_batch()
        if not snapshot or self.training.applied_step == self._saved_step:
            return self._stop_now()
        self._wanted = "pause"
        self._begin_snapshot()
        return False

    def end(self, reason: str) -> bool:
        """Stop as for a pause, unasked (its job goes on later), unless only the last snapshot is
        left. True: stopped already, release it."""
        if self.training.finished:
            return False
        self._stop_reason = reason
        return self.stop(snapshot=True)

    def give_up(self, reason: str) -> None:
        """End unasked; the job goes on from the checkpoint: release the run."""
        self._stop_now(reason)

    def _stop_now(self, reason: str = "") -> bool:
        self.stopped = True
        self._link.send(
            internal.RunStopped(
                job=self.spec.job,
                attempt=self.spec.attempt,
                step=self.training.applied_step,
                after=self.reported_step,
                reason=reason or self._stop_reason,
                evaluated=self.reported_evaluation,
            )
        )
        return True

    def _abandon_copy(self) -> None:
        copier, self._copier = self._copier, None
        if copier is not None:
            copier.abandon()

    def release(self) -> None:
        """Return the memory; the slot's file is the service's to remove."""
        self._abandon_copy()
        self.training.release()
        if self._slot is not None:
            self._slot.close()
        if self._restore is not None:
            self._restore.close()


def _check_memory(spec: internal.RunSpec, limits: internal.ServedLimits) -> None:
    """The cap may have sunk since the service looked: a run that can never be had does not wait."""
    if spec.memory_bytes > limits.train_memory_bytes:
        raise ConfigError(
            f"the job needs up to {show_size(spec.memory_bytes)} of training memory and "
            f"{show_size(limits.train_memory_bytes)} can be had: lower batch_size, max_seq_length or lora_r, or raise "
            "it (harli set max-train-mem=SIZE)",
            code="memory_budget",
            param="batch_size",
        )
