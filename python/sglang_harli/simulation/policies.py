"""The policies that are compared: ours, driven as the scheduler drives it, and known ones.

A spatial policy answers before each decode step with the index of a rung; a temporal one after each
step and each quantum, with the rows of the next quantum or 0.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from sglang_harli.core import Decision, QuantumKind, QuantumOffer, RungOffer, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import (
    IDLE_SEEN_S,
    PrefillReserve,
    QuietSteps,
    RequestProgress,
    Slack,
    Targets,
    batch_slack,
    expecting,
    spare,
)
from sglang_harli.managers.scheduler.policy.slotting import Slotting
from sglang_harli.simulation.devices import SpatialDevice, TimeSharedDevice

JOINS_SEEN = 0.02  # weight of the newest step in the running share of steps that bring a new request
WHOLE = math.inf  # training runs beside the whole step


class SpatialPolicy(Protocol):
    """Chooses rungs.  ``name`` is what tables call it."""

    name: str

    def rung(self, now_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> tuple[int, float]:
        """The rung of the next step, and the seconds of training launched beside it."""
        ...

    def stepped(self, now_s: float, predicted_s: float, seconds: float, *, prefill: bool) -> None:
        """A step, or a prefill, took ``seconds``."""
        ...


class RecentMargin:
    """Upper bound over expectation: 99th percentile of recent measured to predicted times."""

    def __init__(self, first: float, size: int = 200) -> None:
        self.ratio = first
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size

    def observe(self, predicted_s: float, seconds: float) -> None:
        ratio = seconds / predicted_s
        self._recent.append(ratio)
        bisect.insort(self._sorted, ratio)
        if len(self._recent) > self._size:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        if len(self._recent) >= self._size // 10:
            self.ratio = self._sorted[int(0.99 * len(self._sorted))]


class HarliSpatial:
    """``qos_policy.choose_rung`` on the ledger's slack; ``rates`` of training at each rung, and
    ``first_margin``, upper bound over expectation until measured (None: exact predictions)."""

    name = "harli"

    def __init__(
        self,
        device: SpatialDevice,
        targets: Targets,
        rates: Sequence[float],
        first_margin: float | None = None,
    ) -> None:
        self._device, self._targets, self._rates = device, targets, tuple(rates)
        self._margin = None if first_margin is None else RecentMargin(first_margin)
        self._reserve = PrefillReserve()
        self._current: int | None = None
        self._joins = 1 / qos_policy.QUIET_STEPS

    def rung(self, now_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> tuple[int, float]:
        joined = any(request.emitted == 1 for request in reversed(running))
        self._joins += JOINS_SEEN * (joined - self._joins)
        ratio = self._margin.ratio if self._margin else 1.0
        slack = batch_slack(
            running, self._targets, now_s=now_s, decode_upper_s=0.0, reserve_s=self._reserve.seconds(now_s)
        )
        choice = qos_policy.choose_rung(
            load,
            slack,
            self.offers(load, ratio),
            self._targets,
            quantum_s=self._device.quantum_s * ratio,
            current=self._current,
            steps_between_prefills=1 / max(self._joins, 1e-3),
        )
        self._current = choice.rung
        return choice.rung, choice.train_s / ratio

    def offers(self, load: StepLoad, ratio: float) -> list[RungOffer]:
        """Every rung at this load."""
        offers = []
        for rung, rate in zip(self._device.rungs, self._rates, strict=True):
            alone_s = rung.alone_s(load.running, load.context_tokens) * ratio
            offers.append(RungOffer(rung.split, alone_s, alone_s * rung.stretch, rate))
        return offers

    def stepped(self, now_s: float, predicted_s: float, seconds: float, *, prefill: bool) -> None:
        if prefill:
            self._reserve.prefill(seconds)
            return
        self._reserve.decode(now_s)
        if self._margin is not None:
            self._margin.observe(predicted_s, seconds)


class _Untaught:
    """Learns nothing from what it sees."""

    def stepped(self, now_s: float, predicted_s: float, seconds: float, *, prefill: bool) -> None:
        pass


class OneRungLadder(_Untaught):
    """The published prototype (Harli, QoS scheduler): before each step one rung toward decode if it
    predicts more than ``upper_s`` (40 ms online), toward training below ``lower_s`` (30 ms)."""

    name = "one-rung ladder"

    def __init__(self, device: SpatialDevice, lower_s: float = 0.030, upper_s: float = 0.040) -> None:
        self._device, self._lower_s, self._upper_s = device, lower_s, upper_s
        self._rung = 1  # the most decode; 0 lets training pause, which that ladder does not

    def rung(self, now_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> tuple[int, float]:
        predicted_s = self._device.predicted_s(self._rung, load.running, load.context_tokens)
        if predicted_s > self._upper_s:
            self._rung = max(self._rung - 1, 1)
        elif predicted_s < self._lower_s:
            self._rung = min(self._rung + 1, len(self._device.rungs) - 1)
        return self._rung, WHOLE


class FixedRung(_Untaught):
    """Always the same rung; 0 serves alone and trains while nothing is served."""

    def __init__(self, device: SpatialDevice, rung: int) -> None:
        split = device.rungs[rung].split
        self.name = "idle time only" if not split.finetune else f"fixed {split.decode}/{split.finetune}"
        self._rung = rung

    def rung(self, now_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> tuple[int, float]:
        return self._rung, WHOLE


class BatchThreshold(_Untaught):
    """SMs for decode in proportion to the batch, as in SGLang 0.5.16's PD multiplexing
    (``decode_bs_divisor`` 36): training has most at a batch of one, decode has most from 36 on."""

    name = "batch threshold"

    def __init__(self, device: SpatialDevice, divisor: int = 36) -> None:
        self._last, self._divisor = len(device.rungs) - 1, divisor

    def rung(self, now_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> tuple[int, float]:
        level = max(1, min(self._last, load.running * self._last // self._divisor))
        return self._last + 1 - level, WHOLE


# ------------------------------------------------------------------ temporal
class TemporalPolicy(Protocol):
    """Chooses quanta.  ``name`` is what tables call it."""

    name: str

    def rows(self, now_s: float, gap_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> int:
        """Rows of the next quantum, or 0; ``gap_s``: spent on quanta since the last step."""
        ...

    def stepped(self, now_s: float, seconds: float, *, prefill: bool, finished: int = 0) -> None:
        """A step, or a prefill, took ``seconds``; ``finished``: requests that ended with it."""
        ...


class _Quanta:
    """Always the same quantum to offer (``slotting.Training``).  The engine runs it."""

    queued_s, expected_queued_s, depth, saving, barred = 0.0, 0.0, 1, False, None

    def __init__(self, device: TimeSharedDevice, margin: float) -> None:
        candidates = tuple((rows, device.predicted_quantum_s(rows) * margin) for rows in device.sizes)
        self._offer = QuantumOffer(QuantumKind.BACKWARD, candidates)

    def offer(self) -> QuantumOffer:
        return self._offer

    def claimed(self) -> None: ...

    def cut(self, kind: QuantumKind) -> bool:
        return False

    def run_quantum(self, offer: QuantumOffer, decision: Decision) -> None: ...
    def settle(self, most_s: float | None = None) -> None: ...
    def relax(self, kind: QuantumKind, now_s: float) -> None: ...
    def yields(self, reason: str) -> None: ...


class HarliTemporal:
    """The scheduler's own ``Slotting`` on the ledger's slack; ``margin`` 1: exact predictions."""

    name = "harli"

    def __init__(self, device: TimeSharedDevice, targets: Targets, margin: float = 1.0) -> None:
        self.targets = targets
        self._device, self._margin = device, margin
        self._reserve, self._quiet = PrefillReserve(), QuietSteps()
        self._idle_s = -math.inf
        self._slotting = Slotting(_Quanta(device, margin), lambda: self._now_s)
        self._now_s, self._load = 0.0, StepLoad()
        self._clocks: Sequence[RequestProgress] = ()
        self._due = True

    def rows(self, now_s: float, gap_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> int:
        self._now_s, self._load, self._clocks = now_s, load, running
        if load.idle:
            self._idle_s = now_s
            chosen = self._slotting.next_idle(self.load, self.targets)
        elif gap_s or self._due:
            if not gap_s:
                self._slotting.begin(self)
            chosen = self._slotting.next(self)
        else:
            chosen = None
        return chosen[1].rows if chosen is not None else 0

    def stepped(self, now_s: float, seconds: float, *, prefill: bool, finished: int = 0) -> None:
        if prefill:
            self._reserve.prefill(seconds)
            self._quiet.prefill()
            self._slotting.prefilled()
        else:
            self._reserve.decode(now_s)
            self._quiet.decode()
            self._due = self._slotting.decoded(finished=finished > 0)

    # ---- slotting.Serving
    @property
    def running(self) -> int:
        return len(self._clocks)

    def load(self) -> StepLoad:
        return self._load

    def slack(self, now_s: float, queued_s: float, *, disturbed: bool) -> Slack:
        decode_s = self._device.predicted_s(self._load.running, self._load.context_tokens)
        slack = batch_slack(
            self._clocks,
            self.targets,
            now_s=now_s,
            decode_upper_s=decode_s * self._margin,
            reserve_s=self._reserve.seconds(now_s, spare(self.targets, decode_s)),
        )
        return expecting(
            slack,
            self.targets,
            decode_s=decode_s,
            steps_between_prefills=self._quiet.steps,
            decode_penalty_s=0.0,
            idle_comes=now_s - self._idle_s < IDLE_SEEN_S,
        )


class FixedQuantum:
    """One quantum of a fixed size after each step, and back to back while nothing is served."""

    def __init__(self, rows: int) -> None:
        self.name = f"fixed {rows} rows"
        self._rows = rows

    def rows(self, now_s: float, gap_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> int:
        return 0 if load.waiting or gap_s else self._rows

    def stepped(self, now_s: float, seconds: float, *, prefill: bool, finished: int = 0) -> None:
        pass


class QuantumBelowBatch(FixedQuantum):
    """A quantum of a fixed size after each step of a batch that is smaller than a threshold."""

    def __init__(self, rows: int, batch: int) -> None:
        super().__init__(rows)
        self.name = f"{rows} rows below {batch}"
        self._batch = batch

    def rows(self, now_s: float, gap_s: float, load: StepLoad, running: Sequence[RequestProgress]) -> int:
        return super().rows(now_s, gap_s, load, running) if load.running < self._batch else 0


class ServeOnly(FixedQuantum):
    """No training."""

    def __init__(self) -> None:
        super().__init__(0)
        self.name = "serve only"
