"""Temporal policies side by side: decode and training by turns on one device."""

from __future__ import annotations

from dataclasses import replace

from sglang_harli.managers.scheduler.policy.slo_ledger import Targets
from sglang_harli.simulation import compare as compare_spatial
from sglang_harli.simulation import engine, policies
from sglang_harli.simulation.compare import Row
from sglang_harli.simulation.devices import TimeSharedDevice
from sglang_harli.simulation.results import Outcome
from sglang_harli.simulation.traces import Trace
from sglang_harli.simulation.upper_limit import limit

RATE = "tokens"
MOST_BATCH = 8  # of the committed traces: more is beyond the device that TimeSharedDevice describes


def compare(trace: Trace, device: TimeSharedDevice, targets: Targets) -> Row:
    """Our policy, fixed quanta, a threshold on the batch, and serving alone."""
    margin = 1.0 if device.noise.exact else 1.1

    def run(policy: policies.TemporalPolicy) -> Outcome:
        fresh = replace(device, noise=replace(device.noise))  # which begins anew
        return engine.run_temporal(trace, fresh, policy, targets)

    most = max(device.sizes)
    outcomes = [
        run(policies.HarliTemporal(device, targets, margin)),
        run(policies.FixedQuantum(min(device.sizes))),
        run(policies.FixedQuantum(most)),
        run(policies.QuantumBelowBatch(most, 8)),
        run(policies.ServeOnly()),
    ]
    oracle = (
        limit(trace, (device.solo,), (0.0,), targets, gap_rate=device.best_rate)
        if device.decode_only
        else None
    )
    simulated_s = sum(outcome.window_s for outcome in outcomes)
    row = Row(trace.name, trace.mean_batch(targets.tpot_s), RATE, outcomes, oracle, simulated_s)
    row.problems = judge(row)
    return row


def judge(row: Row) -> list[str]:
    """What does not hold of our policy on this trace.  Pure."""
    ours, *others, alone = row.outcomes
    problems = []
    if ours.attainment < compare_spatial.KEEPS * alone.attainment:
        problems.append(f"attainment {ours.attainment:.4f}, serving alone has {alone.attainment:.4f}")
    for other in others:
        if other.attainment >= compare_spatial.KEEPS * alone.attainment and other.rate > ours.rate:
            problems.append(f"{other.policy} trains {other.rate:.1f} tokens/s on time, ours {ours.rate:.1f}")
    return problems
