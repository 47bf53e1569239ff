"""A server in time that is simulated, for tests of a policy on arrivals of any kind: in steps, in
time, or by what has finished (clients that ask again)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from sglang_harli.core import SmSplit, StepLoad
from sglang_harli.managers.scheduler.policy.slo_ledger import Targets
from sglang_harli.simulation.devices import Rung, TimeSharedDevice
from sglang_harli.simulation.policies import TemporalPolicy

PROMPT = 100
T = TypeVar("T")


@dataclass
class Request:
    """One request; the ledger reads ``first_token_s``, ``last_token_s`` and ``emitted``."""

    at_s: float
    tokens: int
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    emitted: int = 0

    def late(self, targets: Targets) -> bool:
        took_s = self.last_token_s - self.first_token_s
        return took_s > (self.emitted - 1) * targets.tpot_s * (1 + 1e-9)


class Arrivals(Protocol):
    """Who comes when."""

    def come(self, now_s: float, step: int, finished: int) -> list[Request]:
        """Those that have come since the call before; ``finished``: requests that ended
        meanwhile."""
        ...

    @property
    def next_s(self) -> float | None:
        """When the next one comes if nothing is served until then; None: never."""
        ...


@dataclass
class EverySteps:
    """One with so many ``tokens`` every ``steps`` decode steps."""

    steps: int
    tokens: int
    next_s: float | None = None
    _step: int = -1

    def come(self, now_s: float, step: int, finished: int) -> list[Request]:
        if step == self._step or step % self.steps:
            return []
        self._step = step
        return [Request(now_s, self.tokens)]


@dataclass
class InTime:
    """``gaps_s``: seconds between two; ``tokens``: how many each gets."""

    gaps_s: Iterator[float]
    tokens: Iterator[int]
    next_s: float = 0.0

    def come(self, now_s: float, step: int, finished: int) -> list[Request]:
        found = []
        while self.next_s <= now_s:
            found.append(Request(self.next_s, next(self.tokens)))
            self.next_s += next(self.gaps_s)
        return found


@dataclass
class Clients:
    """Each asks again some time after its answer has ended."""

    count: int
    think_s: Iterator[float]
    tokens: Iterator[int]
    _due: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._due = [next(self.think_s) for _ in range(self.count)]

    @property
    def next_s(self) -> float | None:
        return min(self._due, default=None)

    def come(self, now_s: float, step: int, finished: int) -> list[Request]:
        self._due += [now_s + next(self.think_s) for _ in range(finished)]
        now = sorted(at for at in self._due if at <= now_s)
        self._due = [at for at in self._due if at > now_s]
        return [Request(at, next(self.tokens)) for at in now]


def drawn(seed: int, draw: Callable[[random.Random], T]) -> Iterator[T]:
    rng = random.Random(seed)
    while True:
        yield draw(rng)


@dataclass
class Served:
    """What came of it; ``rows``: when each quantum ended, and its rows."""

    rows: list[tuple[float, int]]
    finished: list[Request]

    def trained(self, begin_s: float = 0.0, end_s: float = float("inf")) -> int:
        return sum(rows for at_s, rows in self.rows if begin_s <= at_s < end_s)


def device(decode_s: float, quantum_s: float, row_s: float, prefill_s: float = 0.0) -> TimeSharedDevice:
    return TimeSharedDevice(
        solo=Rung(SmSplit(1, 0), decode_s, 0.0, 0.0, 1.0),
        prefill_s=prefill_s,
        prefill_token_s=0.0,
        quantum_s=quantum_s,
        quantum_token_s=row_s / 256,
    )


def serve(rig: TimeSharedDevice, policy: TemporalPolicy, arrivals: Arrivals, seconds: float) -> Served:
    """Prompts first, then decode steps with quanta between them; predictions hold exactly."""
    now_s, step, ended = 0.0, 0, 0
    waiting: list[Request] = []
    running: list[Request] = []
    out = Served([], [])

    def look() -> None:
        nonlocal ended
        waiting.extend(arrivals.come(now_s, step, ended))
        ended = 0

    def train() -> None:
        nonlocal now_s
        begin_s = now_s
        while True:
            look()
            load = StepLoad(len(running), sum(PROMPT + r.emitted for r in running), len(waiting))
            rows = policy.rows(now_s, now_s - begin_s, load, running)
            if not rows:
                return
            now_s += rig.predicted_quantum_s(rows)
            out.rows.append((now_s, rows))
            if load.idle:
                return

    while now_s < seconds:
        look()
        if waiting:
            now_s += (prefill_s := rig.predicted_prefill_s(PROMPT * len(waiting)))
            policy.stepped(now_s, prefill_s, prefill=bool(running))
            for one in waiting:
                one.first_token_s, one.last_token_s, one.emitted = now_s, now_s, 1
            running += waiting
            waiting.clear()
        elif running:
            now_s += (decode_s := rig.predicted_s(len(running), sum(PROMPT + r.emitted for r in running)))
            step += 1
            for one in running:
                one.last_token_s, one.emitted = now_s, one.emitted + 1
            done = [one for one in running if one.emitted >= one.tokens]
            running = [one for one in running if one.emitted < one.tokens]
            out.finished += done
            ended += len(done)
            policy.stepped(now_s, decode_s, prefill=False, finished=len(done))
            train()
        else:
            idle_s = now_s
            train()
            if now_s == idle_s:
                if arrivals.next_s is None:
                    break
                now_s = max(now_s, arrivals.next_s)
    return out
