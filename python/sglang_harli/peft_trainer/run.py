"""One training run: micro-batches in, quanta out, the state as named tensors.

    COPY (adapter drawn or restored, layer by layer) -> for each optimizer step:
        for each micro-batch: EMBED FORWARD... HEAD... BACKWARD... [ACCUMULATE...]
        OPTIMIZER...
        where it is followed by an evaluation, for each of its micro-batches:
            EMBED FORWARD... HEAD_EVAL...

Between any two quanta training may rest for as long as it likes, and its memory may be asked for.
Nothing here waits for the device (``spill`` alone does), reads a file or touches torch's global
random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose, QuantumKind
from sglang_harli.errors import ConfigError, StateError, TrainingError
from sglang_harli.peft_trainer.adapter import Adapter
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.base.training_mode import training_mode
from sglang_harli.peft_trainer.evaluation import EvaluationMetrics, Evaluations
from sglang_harli.peft_trainer.evaluation_pass import EvaluationPass
from sglang_harli.peft_trainer.graphs.layer_graphs import LayerGraphs
from sglang_harli.peft_trainer.intake import Fed, Intake
from sglang_harli.peft_trainer.memory.activations import MicroBatchMemory
from sglang_harli.peft_trainer.memory.adapter_state import StateMemory
from sglang_harli.peft_trainer.memory.heap import HeapMemory
from sglang_harli.peft_trainer.memory.kept_activations import kept_for
from sglang_harli.peft_trainer.memory.working_set import QuantumBound, WorkingSet
from sglang_harli.peft_trainer.micro_batch_pass import MicroBatchPass, ModelPieces
from sglang_harli.peft_trainer.optimizer import SlicedAdamW, layer_slices
from sglang_harli.peft_trainer.records import MetricsRing, QuantumDone, QuantumShape, ShapesSeen, StepMetrics
from sglang_harli.peft_trainer.schedule import LearningRate
from sglang_harli.protocol.internal import (
    EVALUATION,
    BatchCursor,
    EvaluationState,
    MicroBatch,
    RunSpec,
    state_in,
)
from sglang_harli.train_memory import TrainMemory

MakeGraphs = Callable[..., LayerGraphs | None]  # (base), or (base, most bytes)


def _beside(
    base: FrozenBase, make: MakeGraphs, working_bytes: int | None
) -> tuple[LayerGraphs | None, int | None]:
    """A run's graphs, and what they leave of ``working_bytes`` for its quanta."""
    if working_bytes is None:
        return make(base), None
    graphs = make(base, working_bytes // 4)
    return graphs, working_bytes - (0 if graphs is None else graphs.most_bytes)


class TrainingRun:
    """A job in training on a frozen base.

    Args:
        base: stays as it is.
        logits_bytes: the largest logits tensor, bytes.
        quantum_rows: fixes the split (same weights to the bit whatever comes between); None: chosen
            at each quantum.
        memory: where everything sizeable lies, asked for at first need; None: torch's own.
        keep_activations: keep layers' activations where there is memory. Never with a fixed split,
            whose bits must not depend on memory.
        graphs: makes the graphs by which short quanta are launched, on ``base``; None, or where it
            gives None: none. Never with a fixed split, or with dropout, whose masks the host draws.
        working_bytes: most that a quantum may take beside ``memory``, estimated, graphs included
            (a quarter of it at most); None: no bound until one fails for want of memory
            (``shrink``). A fixed split has none.

    Attributes:
        needs_memory: why ``peek`` was None though there is work: purpose and missing bytes.

    Raises:
        ConfigError: target modules that the model lacks; one token's logits above ``logits_bytes``.
    """

    def __init__(
        self,
        base: FrozenBase,
        spec: RunSpec,
        *,
        logits_bytes: int,
        quantum_rows: int | None = None,
        memory: TrainMemory | None = None,
        keep_activations: bool = True,
        graphs: MakeGraphs | None = None,
        working_bytes: int | None = None,
    ) -> None:
        self.base, self.spec, self.quantum_rows = base, spec, quantum_rows
        hp = spec.hyperparameters
        vocabulary = base.model.lm_head.weight.shape[0]
        token_bytes = vocabulary * torch.promote_types(base.dtype, torch.float32).itemsize
        if token_bytes > logits_bytes:
            raise ConfigError(
                f"--harli-logits-mem {logits_bytes} bytes is less than the logits of one token of this model: "
                f"give at least {token_bytes} bytes",
                param="--harli-logits-mem",
            )
        head_tokens = logits_bytes // token_bytes
        memory = HeapMemory(base.device) if memory is None else memory
        self._micro_memory = MicroBatchMemory(base, memory, head_tokens, cuts=quantum_rows is None)
        self._kept = kept_for(base, memory) if keep_activations and quantum_rows is None else None
        with training_mode():
            self.graphs = None
            if graphs is not None and quantum_rows is None and not hp.lora_dropout:
                self.graphs, working_bytes = _beside(base, graphs, working_bytes)
            self._adapter = Adapter(base, hp)
            self._state = StateMemory(self._adapter.blocks, memory)
            self._bound = QuantumBound(WorkingSet(base, hp.lora_r), working_bytes)
            self._pieces = ModelPieces(
                base, self._adapter, self._micro_memory, self._kept, self._bound, self.graphs
            )
            self._optimizer = SlicedAdamW(self._adapter.blocks, hp, base.dtype, base.operators)
            self._step_loss = torch.zeros((), dtype=torch.float64, device=base.device)
            self._step_correct = torch.zeros_like(self._step_loss)
            self._evaluations = Evaluations(base.device, hp, spec.total_steps)
        self._rate = LearningRate(hp, spec.total_steps)
        self._accumulate_slices = layer_slices(self._adapter.blocks)
        self._intake = Intake(vocabulary, max(1, hp.gradient_accumulation_steps))
        self._metrics = MetricsRing(half=base.dtype == torch.float16)
        self._shapes = ShapesSeen()
        self._pass: MicroBatchPass | None = None
        self._stage: QuantumKind | None = QuantumKind.COPY  # None: the pass decides, or data is awaited
        self._position = 0  # slice within COPY, ACCUMULATE or OPTIMIZER
        self._source: Callable[[str], Tensor] | None = None
        self._restored_scale: tuple[float, float, float] | None = None
        self._index = 0  # micro-batches of the step under way that are in its gradients
        self._step_tokens = 0
        self._released = False
        self.needs_memory: tuple[MemoryPurpose, int] | None = None
        self._tried: tuple[int, bool] | None = None  # bytes of the latest quantum; whether less would do
        self.applied_step = 0
        self.tokens = 0

    # ---- data
    @property
    def batches_ahead(self) -> int:
        """Micro-batches fed and not begun."""
        return len(self._intake.queue) - (self._pass is not None)

    @property
    def bytes_ahead(self) -> int:
        """Of all micro-batches that were fed and are not done."""
        return self._intake.nbytes

    @property
    def taken(self) -> BatchCursor:
        """The first micro-batch that is not done: begun, waiting, or to be fed next."""
        queue = self._intake.queue
        return queue[0].batch.cursor if queue else self._intake.cursor

    @property
    def next_cursor(self) -> BatchCursor:
        """The micro-batch to feed next (``epoch`` is that of the last one fed)."""
        return self._intake.cursor

    def feed(self, batch: MicroBatch, ids: np.ndarray, places: np.ndarray, targets: np.ndarray) -> None:
        """Queue a micro-batch if it is the next one; one that came before, or that leaves a gap, is
        dropped.  Views are kept; the ids are looked at in the quantum that begins it.

        Args:
            ids, places, targets: int32, as ``protocol.micro_batches.Padded`` has them.

        Raises:
            TrainingError: rows that do not fit together.
        """
        self._intake.feed(batch, ids, places, targets)

    # ---- where the run stands
    @property
    def ready(self) -> bool:
        """The adapter is drawn, or restored from ``load_state``'s source, which may go now."""
        return self._stage != QuantumKind.COPY

    @property
    def finished(self) -> bool:
        """Nothing is left to train or evaluate: all steps are done, or an evaluation ended them."""
        done = self.applied_step >= self.spec.total_steps and not self.evaluating
        return done or self._evaluations.stopped

    @property
    def evaluating(self) -> bool:
        """The evaluation of ``applied_step`` is under way, or its result on its way to the host."""
        return self.settling or 0 < self.applied_step == self.taken.step

    @property
    def settling(self) -> bool:
        """An evaluation's result is on its way to the host (``take_evaluations``): no quantum comes
        before it."""
        return self._evaluations.settling

    @property
    def evaluation(self) -> EvaluationState:
        """What the evaluations have come to."""
        return self._evaluations.state

    @property
    def at_step_boundary(self) -> bool:
        """Every weight and moment is that of ``applied_step``."""
        return self._stage is None and self._pass is None and self._index == 0

    @property
    def state_consistent(self) -> bool:
        """The state tensors are those of ``applied_step``: also in mid-step, until its update."""
        return self.ready and not (self._stage == QuantumKind.OPTIMIZER and self._position)

    def peek(self) -> QuantumShape | None:
        """The next quantum, whose memory is held from now on; None: the run is finished or waits
        for data or memory (``needs_memory`` says for what)."""
        self.needs_memory = None
        shape = self._next()
        if shape is None:
            return None
        if not self._state.obtain() and not (self.drop_unused() and self._state.obtain()):
            self.needs_memory = (MemoryPurpose.STATE, self._state.nbytes)
            return None
        if self._state.spilled:
            return QuantumShape(QuantumKind.COPY, 1, 0, True)
        if shape.kind == QuantumKind.EMBED:
            rows = self._intake.queue[0].rows
            lacking = self._micro_memory.obtain(rows)
            if lacking and self.drop_unused():
                lacking = self._micro_memory.obtain(rows)
            if lacking:
                self.needs_memory = (MemoryPurpose.MICRO_BATCH, lacking)
                return None
            if self._kept is not None and not rows.evaluated:
                self._kept.prepare(rows.count, rows.width)
        elif self._kept is not None and shape.kind == QuantumKind.FORWARD and self._pass is not None:
            self._kept.prepare_more(self._pass.layer)
        return shape

    def _next(self) -> QuantumShape | None:
        """The next quantum, if its memory is there."""
        if self._stage is not None:
            return QuantumShape(self._stage, 1, 0, True)
        if self._pass is not None:
            return self._pass.shape(self._micro_memory.head_tokens, self.quantum_rows)
        if self.settling or self.finished or not self._intake.queue:
            return None
        rows = self._intake.queue[0].rows
        return QuantumShape(QuantumKind.EMBED, rows.count, rows.width, True)

    # ---- work
    def run(self, rows: int, *, idle: bool = False) -> QuantumDone:
        """One quantum of ``rows`` (as ``peek`` counts them). ``idle``: nothing is served and
        nothing waits, so that graphs may be captured.

        Raises:
            StateError: nothing to run, more rows than offered, or not the fixed number.
            TrainingError: the micro-batch that begins has ids outside the vocabulary.
        """
        shape = self.peek()
        if shape is None:
            waits = "memory" if self.needs_memory else "data"
            raise StateError(f"no quantum to run: the run waits for {waits} or is finished")
        if not 1 <= rows <= shape.rows or (shape.fixed and rows != shape.rows):
            raise StateError(f"{rows} rows asked of a {shape.kind} quantum that offers {shape.rows}")
        self._tried = None
        captured = 0 if self.graphs is None else self.graphs.begin(idle)
        with training_mode():
            tokens, width, misleads = 0, 0, self._pass is not None and self._pass.misleads
            first = self._shapes.add(shape.kind, *self._extent(shape, rows))
            if self._state.spilled:
                self._state.bring_back()
            elif self._stage is not None:
                self._run_stage()
            else:
                tokens, width = self._run_pass(shape, rows)
        misleads |= self.graphs is not None and self.graphs.captured != captured
        return QuantumDone(shape.kind, rows, tokens, width, first, misleads)

    def new_shapes(self, shape: QuantumShape, sizes: Iterable[int]) -> list[bool]:
        """Of each size (rows of ``shape``), whether no quantum of its extent has run lately."""
        return [not self._shapes.has(shape.kind, *self._extent(shape, rows)) for rows in sizes]

    def _count(self, shape: QuantumShape, rows: int) -> int:
        if self._pass is None or shape.kind != self._pass.HEAD:
            return rows
        return min(rows * shape.row_tokens, self._pass.left, self._micro_memory.head_tokens)

    def _extent(self, shape: QuantumShape, rows: int) -> tuple[int, int]:
        """Tokens of such a quantum, and its width; zeros for kinds that are not cut by rows."""
        if self._stage is not None or self._state.spilled:
            return 0, 0
        if self._pass is None:  # it begins with all rows
            return rows * shape.row_tokens, shape.row_tokens
        return self._pass.extent(self._count(shape, rows))

    def _run_pass(self, shape: QuantumShape, rows: int) -> tuple[int, int]:
        begins = self._pass is None
        if self._pass is None:
            self._pass = self._begin(self._intake.checked())
        count = self._count(shape, rows)
        self._tried = (self._pass.bytes_of(count), not begins and (rows > 1 or self._pass.divisible))
        result = self._pass.run(count)
        if self._pass.kind is None:
            if isinstance(self._pass, EvaluationPass):
                self._evaluations.add(self._intake.queue.popleft(), self._pass.loss, self._pass.correct)
                self._pass = None
            elif self._pass.overwrite:
                self._end_micro_batch()
            else:
                self._stage, self._position = QuantumKind.ACCUMULATE, 0
        return result

    def _begin(self, fed: Fed) -> MicroBatchPass:
        if fed.rows.evaluated:
            return EvaluationPass(self._pieces, fed.rows)
        return MicroBatchPass(
            self._pieces,
            fed.rows,
            step=fed.batch.cursor.step,
            divisor=fed.batch.step_target_tokens,
            scale=self._optimizer.scale if self._optimizer.scaled else None,
            overwrite=self._index == 0,
        )

    def _run_stage(self) -> None:
        """A slice of COPY, ACCUMULATE or OPTIMIZER."""
        position, self._position = self._position, self._position + 1
        if self._stage == QuantumKind.COPY:
            self._state.carve()
            with torch.no_grad():
                self._adapter.fill(position, self._source)
            if self._position == self._adapter.pieces:
                self._stage, self._source = None, None
        elif self._stage == QuantumKind.ACCUMULATE:
            with torch.no_grad():
                layers = self._accumulate_slices[position]
                blocks = self._adapter.blocks[layers.start : layers.stop]
                parts = [block.partial for block in blocks if block.partial is not None]
                self.base.operators.add_all([block.grad for block in blocks], parts)
            if self._position == len(self._accumulate_slices):
                self._end_micro_batch()
        else:
            with torch.no_grad():
                self._optimizer.run(position, self._rate.at(self.applied_step + 1), self._step_loss)
                if self._position == self._optimizer.operations:
                    self._end_step()

    def _end_micro_batch(self) -> None:
        """The gradients of the micro-batch are in the step's: it will not be run again."""
        assert self._pass is not None
        fed = self._intake.queue.popleft()
        for total, part in ((self._step_loss, self._pass.loss), (self._step_correct, self._pass.correct)):
            total.copy_(part) if self._index == 0 else total.add_(part)
        self._step_tokens += fed.rows.tokens
        self.tokens += fed.rows.tokens
        self._pass = None
        self._index += 1
        self._last = fed.batch
        self._stage = QuantumKind.OPTIMIZER if self._index == fed.batch.micro_batches else None
        self._position = 0

    def _end_step(self) -> None:
        self.applied_step += 1
        batch = self._last
        metrics = StepMetrics(
            step=self.applied_step,
            epoch=batch.cursor.epoch,
            loss=math.nan,
            learning_rate=self._rate.at(self.applied_step),
            grad_norm=math.nan,
            tokens=self._step_tokens,
            target_tokens=batch.step_target_tokens,
            accuracy=math.nan,
        )
        values = self._optimizer.finish(self._step_loss)
        self._metrics.put(metrics, torch.cat([values, self._step_correct[None]]))
        self._stage, self._index, self._step_tokens = None, 0, 0

    def take_metrics(self) -> list[StepMetrics]:
        """Metrics of finished steps that have reached the host; never waits.

        Raises:
            TrainingError: ``loss_not_finite``: that step's update was not applied.
        """
        return self._metrics.take()

    def take_evaluations(self) -> list[EvaluationMetrics]:
        """The evaluation that is over, once its result has reached the host; never waits."""
        return self._evaluations.take()

    # ---- memory that is asked back; each of these says whether something was given back
    def drop_unused(self) -> bool:
        """Spaces held from one micro-batch to the next."""
        spare = self._kept is not None and self._kept.give_back_spare()
        in_use = self._pass is not None and self._stage is None
        return (not in_use and self._micro_memory.give_back()) or spare

    def drop_kept(self, enough: Callable[[], bool] | None = None) -> bool:
        """Kept activations, until it is ``enough`` (None: all); they are recomputed."""
        return self._kept is not None and self._kept.drop(enough)

    def cut(self, kind: QuantumKind) -> bool:
        """The next quantum, if of ``kind``, is too long: recompute kept rows, or take one row in
        blocks of tokens. False: it is as small as it can be, or the split is fixed."""
        free = self._stage is None and self.quantum_rows is None
        return free and self._pass is not None and self._pass.kind == kind and self._pass.cut()

    def shrink(self) -> bool:
        """The device had no memory for the quantum that has just failed. From now on half as much
        is run at once, and the micro-batch begins again: what the quantum had done is in doubt.
        False: it cannot be smaller."""
        if self._tried is None or not self._tried[1] or self.quantum_rows is not None:
            return False
        self._bound.halve(self._tried[0])
        self._tried = self._pass = None
        self.drop_kept()
        return True

    def drop_micro_batch(self) -> bool:
        """All memory of activations. A micro-batch in flight starts again with the same dropout;
        the step's gradients so far stay, and a step that is being applied goes on."""
        if self._stage != QuantumKind.ACCUMULATE:
            self._pass = None
        kept = self.drop_kept()
        return self._micro_memory.give_back() or kept

    @property
    def spilled(self) -> bool:
        """State lies in host memory; it comes back, in COPY quanta, before anything else is run."""
        return self._state.spilled

    def spill(self) -> bool:
        """The state to host memory, exact, wherever in a step; it waits for the device."""
        self.drop_kept()  # kept graphs refer to the weights where they lie now
        with training_mode():
            return self._state.spill()

    # ---- state
    def state_tensors(self) -> list[tuple[str, Tensor]]:
        """The live state of ``applied_step`` by name, always in the same order; fp32.

        For each layer ``adapter/``, ``exp_avg/`` and ``exp_avg_sq/`` with PEFT's state-dict keys.
        The tensors hold it wherever it lies: their data moves when it is spilled or comes back.

        Raises:
            StateError: while the optimizer applies a step, or before the adapter is there.
        """
        if not self.state_consistent:
            raise StateError("the state cannot be taken while a step is being applied")
        return [named for block in self._adapter.blocks for named in block.state]

    def state_meta(self) -> dict[str, Any]:
        """The rest of the state as plain values, no random state: masks are keyed by the step."""
        meta: dict[str, Any] = {
            "version": 1,
            "step": self.applied_step,
            "epoch": self._intake.cursor.epoch,
            "tokens": self.tokens - self._step_tokens,  # a step under way begins again
            "seed": self.spec.hyperparameters.seed,
            "adam_steps": self.applied_step,
            EVALUATION: msgspec.to_builtins(self.evaluation),
        }
        if self._optimizer.scaled:
            newest = self._metrics.newest_scale() or self._restored_scale
            if newest is not None:
                meta["loss_scale"], meta["adam_steps"], meta["loss_scale_growth"] = newest
        return meta

    def load_state(
        self, get: Callable[[str], Tensor], meta: dict[str, Any], begin: BatchCursor | None = None
    ) -> None:
        """Go on from a saved state: the first COPY quanta call ``get(name)`` of each state tensor.

        Args:
            get: a tensor of the same shape, on any device; it may be a view into shared memory.
            meta: what ``state_meta`` gave.
            begin: the first micro-batch to come; None: of the next step. That of an evaluation of
                the saved step: it was not finished.

        Raises:
            StateError: the run has begun.
            TrainingError: ``bad_checkpoint``: not a state of this job.
        """
        if self._stage != QuantumKind.COPY or self._position:
            raise StateError("the run has begun: a state can only be loaded before its first quantum")
        if meta.get("version") != 1 or meta.get("seed") != self.spec.hyperparameters.seed:
            raise TrainingError(f"not a state of this job: {meta}", code="bad_checkpoint")
        self._source = get
        self.applied_step = int(meta["step"])
        self.tokens = int(meta["tokens"])
        self._evaluations.state = state_in(meta)
        if begin is None:
            self._intake.begin_at(int(meta["epoch"]), self.applied_step + 1)
        else:
            self._intake.begin_at(begin.epoch, begin.step, begin.index)
        scale = meta.get("loss_scale")
        adam_steps = float(meta["adam_steps"])
        growth = float(meta.get("loss_scale_growth", 0))
        self._restored_scale = None if scale is None else (float(scale), adam_steps, growth)
        with training_mode():
            self._optimizer.load(adam_steps=adam_steps, scale=scale, growth=growth)

    def release(self) -> None:
        """Let all memory go; only this may be called again after."""
        if self._released:
            return
        self._released = True
        self._pass = None
        if self.graphs is not None:
            self.graphs.clear()
        self.drop_unused()
        self.drop_kept()
        self._state.release()
        self._adapter.blocks.clear()  # the list is shared
        self._intake.queue.clear()
        del self._optimizer, self._pieces, self._pass, self._source
