"""The policies side by side on one trace, or on the committed ones, and the judgement on ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_harli.managers.scheduler.policy.slo_ledger import Targets
from sglang_harli.simulation import engine, policies, trace_files
from sglang_harli.simulation.devices import RATE_MODELS, SpatialDevice, finetune_rate
from sglang_harli.simulation.results import Outcome
from sglang_harli.simulation.traces import Trace
from sglang_harli.simulation.upper_limit import Limit, limit

TPOT_S = 0.040  # the published target; the ladder's thresholds are 30 and 40 ms
LEAST_VS_LADDER = 1.0
HEAVY_BATCH = 48.0
LEAST_VS_LADDER_HEAVY = 1.15
LEAST_VS_ORACLE = 0.9
KEEPS = 0.99  # of the ladder's attainment: what the best fixed rung must reach


@dataclass
class Row:
    """One trace under one rate model.

    Attributes:
        outcomes: by policy; ``serve only`` and the best fixed rung among them.
        oracle: the upper limit; None with prefill here, or with far too much load.
        simulated_s: simulated time of all of them.
    """

    trace: str
    mean_batch: float
    rate_model: str
    outcomes: list[Outcome]
    oracle: Limit | None
    simulated_s: float
    problems: list[str] = field(default_factory=list)

    def of(self, policy: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.policy == policy)

    @property
    def against_ladder(self) -> float | None:
        """None in temporal mode, where there is no ladder."""
        ladder = [outcome for outcome in self.outcomes if outcome.policy == "one-rung ladder"]
        return ratio(self.of("harli").rate, ladder[0].rate) if ladder else None

    @property
    def against_oracle(self) -> float | None:
        return None if self.oracle is None else ratio(self.of("harli").rate, self.oracle.rate)

    def as_dict(self) -> dict[str, Any]:
        return {
            "trace": self.trace,
            "mean_batch": round(self.mean_batch, 3),
            "rate_model": self.rate_model,
            "policies": [outcome.as_dict() for outcome in self.outcomes],
            "oracle": None if self.oracle is None else asdict(self.oracle),
            "harli_vs_ladder": self.against_ladder,
            "harli_vs_oracle": self.against_oracle,
            "problems": self.problems,
        }


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("inf") if part else 1.0


def judge(row: Row) -> list[str]:
    """What does not hold of our policy on this trace; empty: all does.  Pure."""
    ours, ladder = row.of("harli"), row.of("one-rung ladder")
    wanted = LEAST_VS_LADDER_HEAVY if row.mean_batch >= HEAVY_BATCH - 0.5 else LEAST_VS_LADDER
    problems = []
    gain = row.against_ladder
    if gain is not None and gain < wanted - 1e-9:
        problems.append(f"{gain:.3f} of the one-rung ladder's training, {wanted:g} is asked")
    if ours.attainment < ladder.attainment - 1e-9:
        problems.append(
            f"attainment {ours.attainment:.4f} below the one-rung ladder's {ladder.attainment:.4f}"
        )
    share = row.against_oracle
    if share is not None and share < LEAST_VS_ORACLE - 1e-9:
        problems.append(f"{share:.3f} of the upper limit, {LEAST_VS_ORACLE:g} is asked")
    return problems


def committed() -> list[Trace]:
    """The traces that come with the package, in the order of their names."""
    folder = resources.files("sglang_harli.simulation") / "trace_data"
    with resources.as_file(folder) as path:
        return [trace_files.read(file) for file in sorted(Path(path).glob("*.csv"))]


def compare(
    trace: Trace,
    device: SpatialDevice,
    targets: Targets,
    rate_models: Sequence[str] = RATE_MODELS,
) -> Iterator[Row]:
    """Every policy on one trace, a row for each rate model, which our policies alone look at."""
    margin = None if device.noise.exact else 1.1
    for rate_model in rate_models:
        rates = tuple(finetune_rate(rate_model, rung.split) for rung in device.rungs)

        def run(
            make: Callable[[SpatialDevice], policies.SpatialPolicy], rates: Sequence[float] = rates
        ) -> Outcome:
            fresh = again(device)
            return engine.run_spatial(trace, fresh, make(fresh), rates, targets)

        outcomes = [
            run(lambda fresh, rates=rates: policies.HarliSpatial(fresh, targets, rates, margin)),
            run(policies.OneRungLadder),
            run(policies.BatchThreshold),
        ]
        outcomes.append(_best_fixed(run, len(device.rungs), outcomes[1].attainment))
        outcomes.append(run(lambda fresh: policies.FixedRung(fresh, 0)))
        oracle = limit(trace, device.rungs, rates, targets) if device.decode_only else None
        simulated_s = sum(outcome.window_s for outcome in outcomes)
        row = Row(trace.name, trace.mean_batch(targets.tpot_s), rate_model, outcomes, oracle, simulated_s)
        row.problems = judge(row)
        yield row


def again(device: SpatialDevice) -> SpatialDevice:
    """The same device with its noise at the beginning."""
    return replace(device, noise=replace(device.noise))


def _best_fixed(run: Callable[..., Outcome], rungs: int, attainment: float) -> Outcome:
    """The fixed rung with the most training that keeps the ladder's attainment, in hindsight; the
    one with the most decode where none does."""
    outcome = None
    for rung in range(rungs - 1, 0, -1):
        outcome = run(lambda fresh, rung=rung: policies.FixedRung(fresh, rung))
        if outcome.attainment >= KEEPS * attainment:
            break
    assert outcome is not None
    return outcome
