"""The discrete-event simulator: a trace, a device and a policy, from step to step."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_harli.managers.scheduler.policy.slo_ledger import Targets
from sglang_harli.simulation.batch import Batch
from sglang_harli.simulation.devices import SpatialDevice, TimeSharedDevice
from sglang_harli.simulation.policies import SpatialPolicy, TemporalPolicy
from sglang_harli.simulation.results import Outcome, Tally
from sglang_harli.simulation.traces import Trace

DRAIN = 3.0  # a run ends after this many windows, finished or not


def window_s(trace: Trace, targets: Targets) -> float:
    """The time in which training counts: until the last request would end exactly at its target,
    and a second.  It depends on no policy."""
    return 1.0 + max(request.arrival_s + request.output_tokens * targets.tpot_s for request in trace.requests)


def targets_of(tpot_s: float, max_itl_s: float | None = None) -> Targets:
    """Targets as the options' defaults make them."""
    busy_s = 2 * tpot_s if max_itl_s is None else min(2 * tpot_s, max_itl_s)
    return Targets(
        tpot_s=tpot_s, ttft_s=None, max_itl_s=max_itl_s, busy_quantum_s=busy_s, idle_quantum_s=0.25
    )


def run_spatial(
    trace: Trace,
    device: SpatialDevice,
    policy: SpatialPolicy,
    rates: Sequence[float],
    targets: Targets,
    *,
    max_running: int = 1024,
) -> Outcome:
    """Decode on the SMs of a rung, training on the others, a rung for each step.

    While nothing is served every policy trains at the highest of ``rates`` (throughput by rung).
    Changing the rung takes no time: decode graphs exist for each (Harli, QoS scheduler).
    """
    tally = Tally(window_s(trace, targets))
    batch = Batch(trace, max_running)
    now_s, last, idle_rate, tokens = 0.0, None, max(rates), 0
    while not batch.over and now_s < DRAIN * tally.window_s:
        batch.arrive(now_s)
        if batch.waiting and len(batch.running) < max_running:
            begun = batch.take(None if device.decode_only else device.max_prefill_tokens)
            if not device.decode_only:
                rung, train_s = policy.rung(now_s, batch.load(), batch.running)
                predicted_s = device.predicted_prefill_s(rung, sum(request.prompt for request in begun))
                end_s = now_s + device.noise.true(predicted_s)
                tally.serve(now_s, end_s, 0)
                tally.train(now_s, min(end_s, now_s + train_s), rates[rung])
                policy.stepped(end_s, predicted_s, end_s - now_s, prefill=bool(batch.running))
                now_s = end_s
            batch.start(begun, now_s)
            tokens += len(begun)
            if not device.decode_only:
                batch.arrive(now_s)
                if batch.waiting and len(batch.running) < max_running:
                    continue
        if not batch.running:
            if (arrival_s := batch.next_arrival_s) is not None:
                tally.train(now_s, arrival_s, idle_rate)
                now_s = max(now_s, arrival_s)
            continue
        load = batch.load()
        rung, train_s = policy.rung(now_s, load, batch.running)
        predicted_s = device.predicted_s(rung, load.running, load.context_tokens, train_s)
        end_s = now_s + device.noise.true(predicted_s)
        tally.serve(now_s, end_s, load.running)
        tally.train(now_s, min(end_s, now_s + train_s), rates[rung])
        tally.switches += last is not None and rung != last
        last = rung
        tokens += batch.step(end_s)
        policy.stepped(end_s, predicted_s, end_s - now_s, prefill=False)
        now_s = end_s
    tally.train(now_s, tally.window_s, idle_rate)
    return tally.outcome(policy.name, len(trace.requests), batch.finished, tokens, targets.tpot_s)


def run_temporal(
    trace: Trace,
    device: TimeSharedDevice,
    policy: TemporalPolicy,
    targets: Targets,
    *,
    max_running: int = 1024,
) -> Outcome:
    """Decode steps and training quanta by turns; an arrival waits for the end of what runs."""
    tally = Tally(window_s(trace, targets))
    batch = Batch(trace, max_running)
    now_s, tokens = 0.0, 0
    while not batch.over and now_s < DRAIN * tally.window_s:
        batch.arrive(now_s)
        if batch.waiting and len(batch.running) < max_running:
            begun = batch.take(None if device.decode_only else device.max_prefill_tokens)
            if not device.decode_only:
                seconds = device.noise.true(
                    device.predicted_prefill_s(sum(request.prompt for request in begun))
                )
                tally.serve(now_s, now_s + seconds, 0)
                now_s += seconds
                policy.stepped(now_s, seconds, prefill=bool(batch.running))
            batch.start(begun, now_s)
            tokens += len(begun)
            continue
        if batch.running:
            load = batch.load()
            seconds = device.noise.true(device.predicted_s(load.running, load.context_tokens))
            tally.serve(now_s, now_s + seconds, load.running)
            now_s += seconds
            ended = len(batch.finished)
            tokens += batch.step(now_s)
            policy.stepped(now_s, seconds, prefill=False, finished=len(batch.finished) - ended)
        elif not batch.waiting and batch.next_arrival_s is None:
            break
        now_s = _train(batch, device, policy, tally, now_s)
    while now_s < tally.window_s:
        idle_end_s = _train(batch, device, policy, tally, now_s)
        if idle_end_s == now_s:
            break
        now_s = idle_end_s
    return tally.outcome(policy.name, len(trace.requests), batch.finished, tokens, targets.tpot_s)


def _train(
    batch: Batch, device: TimeSharedDevice, policy: TemporalPolicy, tally: Tally, now_s: float
) -> float:
    """Quanta until the policy wants none or, with nothing served, one has run; returns when."""
    begin_s = now_s
    while True:
        batch.arrive(now_s)
        load = batch.load()
        rows = policy.rows(now_s, now_s - begin_s, load, batch.running)
        if not rows:
            break
        seconds = device.noise.true(device.predicted_quantum_s(rows))
        tally.train(now_s, now_s + seconds, rows * device.row_tokens / seconds)
        now_s += seconds
        if load.idle:
            return now_s
    if not batch.running and not batch.waiting and batch.next_arrival_s is not None:
        return max(now_s, batch.next_arrival_s)  # nothing to do until then
    return now_s
