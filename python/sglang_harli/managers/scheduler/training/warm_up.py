"""A tiny training run before the server is healthy, so that no request waits for first use.

On a GPU the first quantum of each kind loads kernels, has cuBLAS choose its own, takes device
memory and pins host memory: hundreds of milliseconds, between two tokens. So a run of two layers
goes through every kind of quantum once, on the stream that training uses, and is dropped. Its
leases are given back; random generators and data are its own, and neither the predictor nor the
shapes that a job has seen know of it.

Before that, what can be computed in two ways is compared with torch's own (``CHECKS``).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_harli.core import QuantumKind
from sglang_harli.managers.scheduler.training.failures import describe, forget
from sglang_harli.managers.scheduler.training.state_copier import StateCopier, state_layout
from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.base import kernel_checks
from sglang_harli.peft_trainer.base.first_layers import first_layers
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.graphs import graph_check
from sglang_harli.peft_trainer.records import QuantumShape
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, EvaluationBatches, MicroBatch, RunSpec
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.protocol.shared_memory import SharedBuffer
from sglang_harli.train_memory import TrainMemory

logger = logging.getLogger(__name__)

# Compares one way of computing with torch's own on this device; where they differ, or it does not
# run, switches it off and says so in one sentence. None: they agree, or it was off already.
Check = Callable[[FrozenBase], str | None]

# What is compared, in this order, before the tiny run uses it.
CHECKS: tuple[Check, ...] = (*kernel_checks.CHECKS, graph_check.check)

LAYERS, ROWS, STEPS = 2, 2, 2
WIDTHS = (128, 512)  # tokens of a row: of the micro-batches of a step, by turns
DROPOUT = 0.05  # of the run that recomputes
TRIES = 4  # for memory


@dataclass(slots=True)
class WarmUp:
    """What a warm-up did.

    Attributes:
        quanta: how many of each kind ran; seconds: all of it took.
        notes: a sentence for each check that switched something off.
        failure: why the tiny run did not come to its end; "": it did.
    """

    quanta: Counter[QuantumKind] = field(default_factory=Counter)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    failure: str = ""


def wanted(option: str, device: str) -> bool:
    """Whether a server on this kind of device warms up; ``option``: auto, on or off."""
    return option == "on" or (option == "auto" and device != "cpu")


def warm_up(
    base: FrozenBase,
    *,
    logits_bytes: int,
    slots: Path,
    memory: TrainMemory | None = None,
    stream: Any = None,
    checks: Sequence[Check] = CHECKS,
    widths: Sequence[int] = WIDTHS,
) -> WarmUp:
    """Compare, run, log how long it took; waits for the device. Nothing that fails here is raised:
    it is logged in one sentence, and serving goes on.

    Args:
        logits_bytes: the largest logits tensor, as runs have it.
        slots: folder of shared memory; one small slot is made there and removed.
        memory: training's, as runs have it; all of it is given back. None: torch's own.
        stream: that training uses; None: the current one.
        widths: tokens of the rows that are run.
    """
    done, began = WarmUp(), time.perf_counter()
    try:
        with _on(base.device, stream):
            done.notes = _compared(base, checks)
            for keep in (True, False):
                run = _make_run(base, logits_bytes, memory, len(widths), keep=keep)
                try:
                    _finish(run, base, widths, done.quanta)
                    _snapshot(run, slots)
                finally:
                    run.release()
    except Exception as error:  # boundary: the warm-up fails; the server starts all the same
        done.failure = describe(error)[1]
        logger.warning(
            "harli: training could not be warmed up (%s): its first quanta take longer", done.failure
        )
        forget(error, base.device)
    done.seconds = time.perf_counter() - began
    for note in done.notes:
        logger.warning("harli: %s", note)
    if not done.failure:
        logger.info("harli: training was warmed up in %.1f s (%d quanta)", done.seconds, done.quanta.total())
    return done


@contextlib.contextmanager
def _on(device: torch.device, stream: Any) -> Iterator[None]:
    """Work goes to ``stream``; the device has done it at the end, and what the pool edited on
    another stream."""
    if device.type != "cuda":
        yield
        return
    try:
        with device_calls.on_stream(stream):  # None: the current one
            yield
    finally:
        device_calls.synchronize(device)


def _compared(base: FrozenBase, checks: Sequence[Check]) -> list[str]:
    notes = []
    for check in checks:
        try:
            note = check(base)
        except Exception as error:  # boundary: a comparison fails; the other ones, and serving, go on
            note = f"{check.__name__} could not be compared with torch ({describe(error)[1]})"
            forget(error, base.device)
        notes += [] if note is None else [note]
    return notes


def _make_run(
    base: FrozenBase, logits_bytes: int, memory: TrainMemory | None, accumulation: int, *, keep: bool
) -> TrainingRun:
    """``keep``: activations are kept, else recomputed, under dropout."""
    hp = Hyperparameters(
        batch_size=ROWS, gradient_accumulation_steps=accumulation, lora_dropout=0.0 if keep else DROPOUT
    )
    spec = RunSpec(job="warm-up", attempt=1, hyperparameters=hp, total_steps=STEPS)
    return TrainingRun(
        first_layers(base, LAYERS), spec, logits_bytes=logits_bytes, memory=memory, keep_activations=keep
    )


def _finish(run: TrainingRun, base: FrozenBase, widths: Sequence[int], quanta: Counter[QuantumKind]) -> None:
    """Every quantum of the job; the rows of the first step of a run that recomputes in blocks."""
    for batch in _batches(base, widths):
        run.feed(*batch)
    cuts = run.spec.hyperparameters.lora_dropout > 0
    while (shape := _next(run, base.device)) is not None:
        if cuts and run.applied_step == 0 and run.cut(shape.kind):
            continue
        run.run(shape.rows)
        quanta[shape.kind] += 1


def _next(run: TrainingRun, device: torch.device) -> QuantumShape | None:
    """The quantum that comes next; None: the job is over.  MemoryError: there is no memory."""
    for _ in range(TRIES):
        shape = run.peek()
        if shape is not None or run.needs_memory is None:
            return shape
        if device.type == "cuda":  # what is free is counted there, and known a call later
            device_calls.synchronize(device)
    assert run.needs_memory is not None
    purpose, nbytes = run.needs_memory
    raise MemoryError(f"{nbytes} bytes for {purpose.text} are not available")


def _batches(base: FrozenBase, widths: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Two steps of rows of these widths, the last one evaluated."""
    longest = base.positions or base.config.max_position_embeddings
    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        last = step == STEPS
        for index in range(len(widths) + last):
            width = min(widths[index % len(widths)], longest)
            lengths = [width, max(2, width * 3 // 4)]
            ids = rng.integers(0, base.config.vocab_size, sum(lengths), dtype=np.int32)
            batch = MicroBatch(
                job="warm-up",
                attempt=1,
                cursor=BatchCursor(epoch=1, step=step, index=index),
                micro_batches=len(widths),
                lengths=lengths,
                rows=[0, 1],
                step_target_tokens=sum(lengths) - len(lengths),
                evaluation=EvaluationBatches(count=1, sampled=1, whole=True) if last else None,
            )
            yield padded(batch, ids, ids)


def _snapshot(run: TrainingRun, slots: Path) -> None:
    """The first tensor of the state through pinned memory into shared memory."""
    tensors = run.state_tensors()[:1]
    refs, nbytes = state_layout(tensors)
    slot = SharedBuffer.create(slots, nbytes)
    try:
        StateCopier(tensors, slot, refs).finish()
    finally:
        slot.unlink()
