"""What a training run says about its work, and the ring in which step metrics reach the host."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sglang_harli.core import QuantumKind
from sglang_harli.errors import TrainingError
from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.optimizer import SMALLEST_SCALE


@dataclass(frozen=True, slots=True)
class QuantumShape:
    """The quantum that comes next.

    Attributes:
        rows: the most that may be taken: rows left in the layer; for HEAD blocks of target tokens.
        row_tokens: tokens that one of them costs (padded); 0 where cost does not depend on tokens.
        fixed: exactly ``rows`` must be run.
        attended: tokens each attends to, if not ``row_tokens``: ``rows`` are blocks of a row.
    """

    kind: QuantumKind
    rows: int
    row_tokens: int
    fixed: bool
    attended: int = 0


@dataclass(frozen=True, slots=True)
class QuantumDone:
    """What was run: ``tokens`` computed, padding included, in rows (or of a row) of ``row_tokens``.
    ``first_of_shape``: memory and code paths were new; ``misleads``: its time says little."""

    kind: QuantumKind
    rows: int
    tokens: int
    row_tokens: int
    first_of_shape: bool
    misleads: bool = False


SHAPES_KEPT = 1024  # as many as oneDNN keeps compiled by default


class ShapesSeen:
    """The shapes that ran lately: kind, tokens and width; the least recently run are forgotten."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[QuantumKind, int, int], None] = OrderedDict()

    def has(self, kind: QuantumKind, tokens: int, width: int) -> bool:
        return (kind, tokens, width) in self._seen

    def add(self, kind: QuantumKind, tokens: int, width: int) -> bool:
        """Such a quantum runs; whether it is new."""
        key = (kind, tokens, width)
        new = key not in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > SHAPES_KEPT:
            self._seen.popitem(last=False)
        return new


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        loss: mean cross-entropy over all target tokens of the step, natural logarithm.
        grad_norm: global norm before clipping; inf where fp16 overflowed and the update was
            skipped.
        tokens: run through the model, without padding; target_tokens: counted by the loss.
        accuracy: share of the target tokens that were predicted right, given all tokens before.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    accuracy: float


class Arriving:
    """Values on their way to the host; ``values`` are theirs once ``ready``."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._arrived: Any = None  # CUDA event of the copy to the host; None: the values are there
        if values.is_cuda:
            self.values = device_calls.pinned(values.shape, values.dtype)
            self.values.copy_(values, non_blocking=True)
            self._arrived = device_calls.event()

    @property
    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()


@dataclass(slots=True)
class _Entry:
    metrics: StepMetrics
    arriving: Arriving


class MetricsRing:
    """Metrics of finished steps; reading them never waits for the device. ``half``: the base
    computes in fp16, where an overflow skips an update and is no failure."""

    def __init__(self, half: bool) -> None:
        self._half = half
        self._entries: deque[_Entry] = deque()
        self._newest: _Entry | None = None

    def put(self, metrics: StepMetrics, values: Tensor) -> None:
        """``metrics`` but for loss, gradient norm and accuracy; ``values``: as
        ``SlicedAdamW.finish`` gives them, and the step's correct predictions."""
        self._newest = _Entry(metrics, Arriving(values))
        self._entries.append(self._newest)

    def take(self) -> list[StepMetrics]:
        """Those that have arrived, in order.

        Raises:
            TrainingError: ``loss_not_finite``; the steps before are handed out first.
        """
        taken: list[StepMetrics] = []
        while self._entries and self._entries[0].arriving.ready:
            entry = self._entries[0]
            loss, norm, skipped, scale, *_, correct = entry.arriving.values.tolist()
            broken = not math.isfinite(loss) or (skipped and not self._half) or scale < SMALLEST_SCALE
            if broken:
                if taken:
                    return taken
                raise _not_finite(entry.metrics, loss)
            self._entries.popleft()
            accuracy = correct / entry.metrics.target_tokens
            taken.append(dataclasses.replace(entry.metrics, loss=loss, grad_norm=norm, accuracy=accuracy))
        return taken

    def newest_scale(self) -> tuple[float, float, float] | None:
        """(loss scale, Adam steps, growth) after the newest step; waits for it (fp16 snapshots)."""
        if self._newest is None:
            return None
        self._newest.arriving.wait()
        scale, adam_steps, growth, _ = self._newest.arriving.values.tolist()[3:]
        return scale, adam_steps, growth


def _not_finite(metrics: StepMetrics, loss: float) -> TrainingError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    return TrainingError(
        f"step {metrics.step}: {what}; its update was not applied. Lower learning_rate (now "
        f"{metrics.learning_rate:g}), raise warmup_ratio or set max_grad_norm (1.0 is usual), and look for "
        "odd rows in the data",
        code="loss_not_finite",
        param="learning_rate",
    )
