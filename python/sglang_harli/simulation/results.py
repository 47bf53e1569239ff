"""What one simulated run came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sglang_harli.simulation.batch import SimulatedRequest


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy on one trace.

    Attributes:
        requests: in the trace; ``finished`` of them came to an end.
        tokens: given out, first tokens included.
        attainment: share of the requests whose mean time per output token met the target.
        tpot_p50_s, tpot_p99_s: over requests.
        itl_p99_s: 99th percentile over requests of their longest gap.
        rate: training throughput over the window, in the device's unit of work per second.
        busy_s: time in decode steps and prefills, within the window.
        mean_batch: over decode steps, weighted by their time.
        switches: changes of rung, per second (spatial).
        window_s: the time over which work is counted; the same for every policy on a trace.
    """

    policy: str
    requests: int
    finished: int
    tokens: int
    attainment: float
    tpot_p50_s: float
    tpot_p99_s: float
    itl_p99_s: float
    rate: float
    busy_s: float
    mean_batch: float
    switches: float
    window_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tally:
    """Sums while a run goes on; work after ``window_s`` does not count."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self.work = self.busy_s = self.batch_s = self.decode_s = 0.0
        self.switches = 0

    def inside(self, begin_s: float, end_s: float) -> float:
        """How much of a span lies in the window, seconds."""
        return max(0.0, min(end_s, self.window_s) - begin_s)

    def train(self, begin_s: float, end_s: float, rate: float) -> None:
        self.work += rate * self.inside(begin_s, end_s)

    def serve(self, begin_s: float, end_s: float, batch: int) -> None:
        """A decode step, or a prefill with ``batch`` 0."""
        seconds = self.inside(begin_s, end_s)
        self.busy_s += seconds
        if batch:
            self.decode_s += seconds
            self.batch_s += batch * seconds

    def outcome(
        self, policy: str, requests: int, done: list[SimulatedRequest], tokens: int, tpot_s: float
    ) -> Outcome:
        """Requests that did not finish count as late."""
        times = sorted(request.tpot_s for request in done)
        gaps = sorted(request.longest_gap_s for request in done)
        met = sum(time <= tpot_s * (1 + 1e-9) for time in times)
        return Outcome(
            policy=policy,
            requests=requests,
            finished=len(done),
            tokens=tokens,
            attainment=met / requests,
            tpot_p50_s=quantile(times, 0.5),
            tpot_p99_s=quantile(times, 0.99),
            itl_p99_s=quantile(gaps, 0.99),
            rate=self.work / self.window_s,
            busy_s=self.busy_s,
            mean_batch=self.batch_s / self.decode_s if self.decode_s else 0.0,
            switches=self.switches / self.window_s,
            window_s=self.window_s,
        )


def quantile(rising: list[float], share: float) -> float:
    """Of sorted values; 0 of none."""
    return rising[min(int(share * len(rising)), len(rising) - 1)] if rising else 0.0
