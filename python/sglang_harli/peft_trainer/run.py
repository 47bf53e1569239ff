"""One training run: micro-batches in, quanta out, the state as named tensors.

    COPY (adapter drawn or restored, layer by layer) -> for each optimizer step:
        for each micro-batch: EMBED FORWARD... HEAD... BACKWARD... [ACCUMULATE...]
        OPTIMIZER...

Between any two quanta training may rest for as long as it likes.  Nothing here waits for the device,
reads a file or touches torch's global random state.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_harli.core import QuantumKind
from sglang_harli.errors import ConfigError, StateError, TrainingError
from sglang_harli.peft_trainer.adapter import Adapter
from sglang_harli.peft_trainer.frozen_base import FrozenBase
from sglang_harli.peft_trainer.optimizer import SlicedAdamW, layer_slices
from sglang_harli.peft_trainer.records import MetricsRing, QuantumDone, QuantumShape, StepMetrics
from sglang_harli.peft_trainer.schedule import LearningRate
from sglang_harli.peft_trainer.step import HEAD_BLOCK, IGNORED, MicroBatchPass, ModelPieces, Rows
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec


@dataclass(slots=True)
class _Fed:
    batch: MicroBatch
    rows: Rows


@contextlib.contextmanager
def _training_mode() -> Iterator[None]:
    """Gradients on inside SGLang's inference mode, and backward on this very thread (its thread-local
    contexts, such as memory pools, would not hold on autograd's)."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        yield


class TrainingRun:
    """A job in training on a frozen base.

    Args:
        base: takes the adapter's modules until ``release``; one run at a time.
        spec: the job's hyperparameters and number of optimizer steps.
        logits_bytes: the largest logits tensor, bytes.
        quantum_rows: fixes the split (same weights to the bit whatever comes between); None: chosen at
            each quantum.

    Raises:
        ConfigError: target modules that the model lacks; logits of one token above ``logits_bytes``.
    """

    def __init__(
        self, base: FrozenBase, spec: RunSpec, *, logits_bytes: int, quantum_rows: int | None = None
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
        self._vocabulary = vocabulary
        self._head_tokens = logits_bytes // token_bytes
        with _training_mode():
            self._adapter = Adapter(base, hp)
            self._pieces = ModelPieces(base, self._adapter)
            self._optimizer = SlicedAdamW(self._adapter.blocks, hp, base.dtype)
            self._step_loss = torch.zeros((), dtype=torch.float64, device=base.device)
        self._rate = LearningRate(hp, spec.total_steps)
        self._accumulate_slices = layer_slices(self._adapter.blocks)
        self._queue: deque[_Fed] = deque()
        self._metrics = MetricsRing(half=base.dtype == torch.float16)
        self._seen: set[tuple[QuantumKind, int, int]] = set()
        self._pass: MicroBatchPass | None = None
        self._stage: QuantumKind | None = QuantumKind.COPY  # None: the pass decides, or data is awaited
        self._position = 0  # slice within COPY, ACCUMULATE or OPTIMIZER
        self._source: Callable[[str], Tensor] | None = None
        self._restored_scale: tuple[float, float, float] | None = None
        self._index = 0  # micro-batches of the step under way that are in its gradients
        self._step_tokens = 0
        self._epoch = 1
        self._fed_cursor = (1, 0)  # (step, index) of the next batch to be fed
        self._released = False
        self.applied_step = 0
        self.tokens = 0

    # ---- data
    @property
    def batches_ahead(self) -> int:
        """Micro-batches fed and not begun."""
        return len(self._queue) - (self._pass is not None)

    @property
    def next_cursor(self) -> BatchCursor:
        """The micro-batch to feed next (``epoch`` is that of the last one fed)."""
        return BatchCursor(epoch=self._epoch, step=self._fed_cursor[0], index=self._fed_cursor[1])

    def feed(self, batch: MicroBatch, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Queue a micro-batch if it is the next one; one that came before, or that leaves a gap, is dropped.

        Args:
            input_ids, labels: int32 of ``sum(batch.lengths)``; -100 marks tokens that are not targets.

        Raises:
            TrainingError: ids outside the vocabulary, or rows that do not fit together.
        """
        cursor = batch.cursor
        if (cursor.step, cursor.index) != self._fed_cursor:
            return
        self._check(batch, input_ids, labels)
        self._queue.append(_Fed(batch, Rows.make(batch.lengths, batch.rows, input_ids, labels)))
        self._epoch = cursor.epoch
        last = cursor.index + 1 == batch.micro_batches
        self._fed_cursor = (cursor.step + 1, 0) if last else (cursor.step, cursor.index + 1)

    def _check(self, batch: MicroBatch, input_ids: np.ndarray, labels: np.ndarray) -> None:
        where = f"micro-batch {batch.cursor.index} of step {batch.cursor.step}"
        total = sum(batch.lengths)
        if not batch.lengths or min(batch.lengths) < 1 or not len(input_ids) == len(labels) == total:
            raise TrainingError(
                f"{where}: {len(input_ids)} ids and {len(labels)} labels for rows of {batch.lengths}",
                code="bad_data",
            )
        targets = labels[labels != IGNORED]
        for name, values in (("token", input_ids), ("label", targets)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self._vocabulary:
                raise TrainingError(
                    f"{where}: {name} ids must lie in 0..{self._vocabulary - 1}, "
                    f"found {int(values.min())}..{int(values.max())}: was the file made for another tokenizer?",
                    code="bad_data",
                )
        if batch.step_target_tokens < 1 or len(batch.rows) != len(batch.lengths):
            raise TrainingError(f"{where}: a step needs at least one target token", code="bad_data")
        if batch.micro_batches > max(1, self.spec.hyperparameters.gradient_accumulation_steps):
            raise TrainingError(
                f"{where}: more micro-batches than gradient_accumulation_steps", code="bad_data"
            )

    # ---- where the run stands
    @property
    def ready(self) -> bool:
        """The adapter is drawn, or restored: the source given to ``load_state`` is no longer needed."""
        return self._stage != QuantumKind.COPY

    @property
    def finished(self) -> bool:
        return self.applied_step >= self.spec.total_steps

    @property
    def at_step_boundary(self) -> bool:
        """Every weight and moment is that of ``applied_step``."""
        return self._stage is None and self._pass is None and self._index == 0

    @property
    def state_consistent(self) -> bool:
        """The state tensors are those of ``applied_step``: true in the middle of a step too, as long as the
        optimizer has not begun to apply it."""
        return self.ready and not (self._stage == QuantumKind.OPTIMIZER and self._position)

    def peek(self) -> QuantumShape | None:
        """The next quantum; None when it waits for data or the run is finished."""
        if self._stage is not None:
            return QuantumShape(self._stage, 1, 0, True)
        if self._pass is None:
            if self.finished or not self._queue:
                return None
            rows = self._queue[0].rows
            return QuantumShape(QuantumKind.EMBED, rows.count, rows.width, True)
        kind, left = self._pass.kind, self._pass.left
        assert kind is not None
        width = self._pass.rows.width
        if kind == QuantumKind.HEAD:
            most = min(left, self._head_tokens)
            if self.quantum_rows is not None:
                return QuantumShape(kind, 1, min(most, self.quantum_rows * width), True)
            block = min(HEAD_BLOCK, self._head_tokens)
            return QuantumShape(kind, max(1, math.ceil(most / block)), min(block, most), False)
        if self.quantum_rows is not None:
            return QuantumShape(kind, min(left, self.quantum_rows), width, True)
        return QuantumShape(kind, left, width, False)

    # ---- work
    def run(self, rows: int) -> QuantumDone:
        """One quantum of ``rows`` (as ``peek`` counts them).

        Raises:
            StateError: nothing to run, or more rows than offered, or another number where it is fixed.
        """
        shape = self.peek()
        if shape is None:
            raise StateError("no quantum to run: the run waits for data or is finished")
        if not 1 <= rows <= shape.rows or (shape.fixed and rows != shape.rows):
            raise StateError(f"{rows} rows asked of a {shape.kind} quantum that offers {shape.rows}")
        with _training_mode():
            if self._stage is not None:
                count, width = 1, 0
                self._run_stage()
            else:
                count, width = self._run_pass(shape, rows)
        key = (shape.kind, count, width)
        first = key not in self._seen
        self._seen.add(key)
        return QuantumDone(shape.kind, rows, count * width, first)

    def _run_pass(self, shape: QuantumShape, rows: int) -> tuple[int, int]:
        if self._pass is None:
            self._pass = self._begin(self._queue[0])
        count = rows
        if shape.kind == QuantumKind.HEAD:
            count = min(rows * shape.row_tokens, self._pass.left, self._head_tokens)
        result = self._pass.run(count)
        if self._pass.kind is None:
            if self._pass.overwrite:
                self._end_micro_batch()
            else:
                self._stage, self._position = QuantumKind.ACCUMULATE, 0
        return result

    def _begin(self, fed: _Fed) -> MicroBatchPass:
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
            self._copy(position)
            if self._position == len(self._adapter.blocks):
                self._stage, self._source = None, None
        elif self._stage == QuantumKind.ACCUMULATE:
            with torch.no_grad():
                for layer in self._accumulate_slices[position]:
                    block = self._adapter.blocks[layer]
                    assert block.partial is not None
                    block.grad.add_(block.partial)
            if self._position == len(self._accumulate_slices):
                self._end_micro_batch()
        else:
            with torch.no_grad():
                self._optimizer.run(position, self._rate.at(self.applied_step + 1), self._step_loss)
                if self._position == self._optimizer.operations:
                    self._end_step()

    def _copy(self, layer: int) -> None:
        block = self._adapter.blocks[layer]
        with torch.no_grad():
            if self._source is None:
                block.initialise(self._adapter.generator)
                return
            for name, tensor in self._adapter.tensors(layer):
                saved = self._source(name)
                if saved.shape != tensor.shape:
                    raise TrainingError(
                        f"the saved {name} has shape {tuple(saved.shape)}, this job's {tuple(tensor.shape)}",
                        code="bad_checkpoint",
                    )
                tensor.copy_(saved, non_blocking=True)
            block.refresh_compute()

    def _end_micro_batch(self) -> None:
        """The gradients of the micro-batch are in the step's: it will not be run again."""
        assert self._pass is not None
        fed = self._queue.popleft()
        self._step_loss.copy_(self._pass.loss) if self._index == 0 else self._step_loss.add_(self._pass.loss)
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
        )
        self._metrics.put(metrics, self._optimizer.finish(self._step_loss))
        self._stage, self._index, self._step_tokens = None, 0, 0

    def take_metrics(self) -> list[StepMetrics]:
        """Metrics of finished steps that have reached the host; never waits.

        Raises:
            TrainingError: ``loss_not_finite``: that step's update was not applied.
        """
        return self._metrics.take()

    def drop_micro_batch(self) -> None:
        """Give back the activations' memory.  A micro-batch in flight starts again from its beginning, with
        the same dropout; the gradients of those before it stay, and a step that is being applied goes on."""
        if self._stage != QuantumKind.ACCUMULATE:
            self._pass = None
        self._pieces.activations.release()

    # ---- state
    def state_tensors(self) -> list[tuple[str, Tensor]]:
        """Named views of the live state of ``applied_step``, always in the same order: for each layer
        ``adapter/``, ``exp_avg/`` and ``exp_avg_sq/`` with PEFT's state-dict keys; fp32.

        Raises:
            StateError: while the optimizer applies a step, or before the adapter is there.
        """
        if not self.state_consistent:
            raise StateError("the state cannot be taken while a step is being applied")
        return self._state_tensors()

    def _state_tensors(self) -> list[tuple[str, Tensor]]:
        layers = range(len(self._adapter.blocks))
        return [named for layer in layers for named in self._adapter.tensors(layer)]

    @property
    def state_bytes(self) -> int:
        """Of all state tensors together."""
        return sum(tensor.nbytes for _, tensor in self._state_tensors())

    def state_meta(self) -> dict[str, Any]:
        """The rest of the state as plain values.  Random state needs none: masks are keyed by the step."""
        meta: dict[str, Any] = {
            "version": 1,
            "step": self.applied_step,
            "epoch": self._epoch,
            "tokens": self.tokens - self._step_tokens,  # a step under way begins again
            "seed": self.spec.hyperparameters.seed,
            "adam_steps": self.applied_step,
        }
        if self._optimizer.scaled:
            newest = self._metrics.newest_scale() or self._restored_scale
            if newest is not None:
                meta["loss_scale"], meta["adam_steps"], meta["loss_scale_growth"] = newest
        return meta

    def load_state(self, get: Callable[[str], Tensor], meta: dict[str, Any]) -> None:
        """Go on from a saved state: instead of drawing an adapter, the COPY quanta that ``run`` begins with
        call ``get(name)`` for each of ``state_tensors``' names, layer by layer, until ``ready``.

        Args:
            get: a tensor of the same shape, on any device; it may be a view into shared memory.
            meta: what ``state_meta`` gave.

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
        self._epoch = int(meta["epoch"])
        self._fed_cursor = (self.applied_step + 1, 0)
        scale = meta.get("loss_scale")
        adam_steps = float(meta["adam_steps"])
        growth = float(meta.get("loss_scale_growth", 0))
        self._restored_scale = None if scale is None else (float(scale), adam_steps, growth)
        with _training_mode():
            self._optimizer.load(adam_steps=adam_steps, scale=scale, growth=growth)

    def release(self) -> None:
        """Take the adapter out of the base and let all memory go; only this may be called again after."""
        if self._released:
            return
        self._released = True
        self._adapter.remove()
        self._queue.clear()
        del self._optimizer, self._pieces, self._pass, self._source
