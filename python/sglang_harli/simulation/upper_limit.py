"""The upper limit: what a policy with perfect foresight could train at most, as a linear program.

**What it bounds.** Every policy that keeps the ledger's deadlines: token ``n`` of a request (the
first is 0) goes out by ``first token + n * T - KEPT_S``, with ``T`` the target after the ledger's
``KEPT_SHARE``; what the ledger keeps is not the policy's to spend. It may know all that is to come,
and true latencies. (A policy that lets tokens come late may train more; it is not bounded by this.)

**Why it is a bound.** Every run of such a policy gives a point of the program with the run's own
work as the objective, so the program's maximum is at least that work. Time is cut into periods. The
variables are, for each period and rung, how many steps ran (``K``, counted in parts where a step
spans two periods), how many tokens they gave out (``N``, the sum of their batches) and how many
context tokens they read (``X``), and for each period the idle time. The program holds because:

1. A step takes ``(c + beta * batch + kappa * context) * stretch``, which is linear: the period's
   steps at a rung take ``(c * K + beta * N + kappa * X) * stretch``. These times and the idle time
   fill the period. A step with training beside a part of it counts in parts, as one with training
   throughout and one without (stretch 1).
2. Let ``S(t)`` be the steps done by time ``t``, linear within a step. At the end of its n-th step
   after its first token (at ``f``) a request is on time, ``t <= f + n * T - KEPT_S``; both sides
   are linear in between, so from the end of the first step ``S(t) - S(f) >= (t - f + KEPT_S) / T``
   as long as it runs, and without ``KEPT_S`` before. ``f`` lies at most the longest step ``D``
   after the arrival ``a``, the first step ends at most ``2 * D`` after. A period's border ``u``
   after ``a + D`` has ``S(u) - S(f) <= (u - a) / s`` with ``s`` the shortest step, so at every
   border ``t`` at which the request surely still runs
   ``S(t) - S(u) >= (t - u) / T - (u - a) * (1 / s - 1 / T)``, and ``KEPT_S / T`` more after
   ``a + 2 * D``.
3. By time ``t`` a request has ``min(all, (t - a - D) / T)`` tokens at least and
   ``min(all, steps at the shortest time since a)`` at most, so all tokens and all context read by
   each border lie between two sums.
4. Which requests surely run during a period, and which may, follows from 3; that bounds the batch
   and the context of each of its steps from both sides, hence ``N`` and ``X`` by multiples of
   ``K``. The shortest step ``s`` of a period is that of the least load at the fastest rung. Less
   load makes shorter steps, which leave fewer requests surely running: the bounds are found by
   repeating from no load at all, and hold after each round.
5. While a request surely runs the device is not idle.

What is given away: steps and tokens in fractions, the load within a period spread over the rungs as
suits, bank of up to ``(u - a) / s`` steps for each new request.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from sglang_harli.managers.scheduler.policy.slo_ledger import KEPT_S, KEPT_SHARE, Targets
from sglang_harli.simulation.devices import Rung
from sglang_harli.simulation.engine import window_s
from sglang_harli.simulation.traces import Trace

ROUNDS = 12
CELLS = (
    5e6  # requests times periods: more would take gigabytes, so periods are longer and the limit is looser
)
STRETCHES = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5)  # of the target, where not even serving alone keeps it


@dataclass(frozen=True, slots=True)
class Limit:
    """The upper limit on a trace.

    Attributes:
        rate: work per second over the window, in the unit of the rates.
        tpot_s: time per token of its deadlines: the ledger's, or the least feasible above it.
    """

    rate: float
    tpot_s: float


@dataclass
class Bounds:
    """What all policies that keep the deadlines share: arrays by period, or by periods' ends.

    Attributes:
        least_batch, most_batch, least_context, most_context: of any step in the period.
        shortest_s, longest_s: bounds of any step in the period.
        tokens_late, tokens_early, context_late, context_early: given out, and read, by its end.
        surely: for each request, index of the last border at which it surely runs.
    """

    least_batch: np.ndarray
    most_batch: np.ndarray
    least_context: np.ndarray
    most_context: np.ndarray
    shortest_s: np.ndarray
    longest_s: float
    tokens_late: np.ndarray
    tokens_early: np.ndarray
    context_late: np.ndarray
    context_early: np.ndarray
    surely: np.ndarray


def bounds_of(trace: Trace, rungs: tuple[Rung, ...], step_s: float, period_s: float, periods: int) -> Bounds:
    """``step_s``: time per token of the deadlines."""
    arrival = np.array([request.arrival_s for request in trace.requests])
    steps = np.array([request.output_tokens - 1 for request in trace.requests], dtype=float)
    prompt = np.array([request.prompt_tokens for request in trace.requests], dtype=float)
    borders = period_s * np.arange(periods + 1)
    fastest = [(r.base_s * r.stretch, r.request_s * r.stretch, r.token_s * r.stretch) for r in rungs]

    def shortest(batch: np.ndarray, context: np.ndarray) -> np.ndarray:
        return np.min([c + b * batch + k * context for c, b, k in fastest], axis=0)

    def grown(done: np.ndarray) -> np.ndarray:
        return np.where(done > 0, prompt[:, None] * done + done * (done + 1) / 2, 0.0)

    longest_s, late = step_s, None
    for _ in range(
        ROUNDS
    ):  # the longest step follows from the load that late requests may make, and that from it
        late = np.clip((borders[None, :] - arrival[:, None] - longest_s) / step_s, 0.0, steps[:, None])
        may = (arrival[:, None] <= borders[None, 1:]) & (late[:, :-1] < steps[:, None])
        most_batch = may.sum(axis=0).astype(float)
        most_context = (may * (prompt + steps + 1)[:, None]).sum(axis=0)
        longest = max(rung.step_s(int(most_batch.max()), int(most_context.max())) for rung in rungs)
        if longest <= longest_s:
            break
        longest_s = longest
    assert late is not None
    shortest_s = shortest(np.ones(periods), np.zeros(periods))
    least_batch = least_context = np.zeros(periods)
    early = late
    for _ in range(ROUNDS):
        clock = np.concatenate([[0.0], np.cumsum(period_s / shortest_s)])  # steps by each border, at most
        since = np.interp(arrival, borders, clock)
        early = np.clip(clock[None, :] - since[:, None], 0.0, steps[:, None])
        runs = (arrival[:, None] + longest_s <= borders[None, :-1]) & (early[:, 1:] < steps[:, None])
        least_batch = runs.sum(axis=0).astype(float)
        least_context = (runs * (prompt[:, None] + 1 + late[:, :-1])).sum(axis=0)
        shortest_s = shortest(np.maximum(least_batch, 1.0), least_context)
    after = (arrival[:, None] <= borders[None, :]) & (early < steps[:, None])
    surely = np.where(after.any(axis=1), periods - np.argmax(after[:, ::-1], axis=1), -1)
    return Bounds(
        least_batch=least_batch,
        most_batch=most_batch,
        least_context=least_context,
        most_context=most_context,
        shortest_s=shortest_s,
        longest_s=longest_s,
        tokens_late=late[:, 1:].sum(axis=0),
        tokens_early=early[:, 1:].sum(axis=0),
        context_late=grown(late[:, 1:]).sum(axis=0),
        context_early=(grown(early[:, 1:]) + (early[:, 1:] > 0) / 8).sum(axis=0),
        surely=surely,
    )


def with_pauses(
    rungs: tuple[Rung, ...], rates: tuple[float, ...]
) -> tuple[tuple[Rung, ...], tuple[float, ...]]:
    """The rungs, and each rung's SMs without training unless others are never slower."""
    alone = [dataclasses.replace(rung, stretch=1.0) for rung in rungs]
    lines = [(rung.base_s, rung.request_s, rung.token_s) for rung in alone]
    best = [
        rung
        for rung, line in zip(alone, lines, strict=True)
        if not any(
            other != line and all(o <= own for o, own in zip(other, line, strict=True)) for other in lines
        )
    ]
    return (*rungs, *best), (*rates, *(0.0 for _ in best))


class _Program:
    """Rows of a sparse linear program, as they are written down."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.least: list[float] = []
        self.most: list[float] = []

    def row(self, terms: list[tuple[int, float]], least: float, most: float) -> None:
        """``least <= sum of value * variable <= most``."""
        at = len(self.least)
        for column, value in terms:
            self.rows.append(at)
            self.columns.append(column)
            self.values.append(value)
        self.least.append(least)
        self.most.append(most)

    def most_of(self, gain: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float | None:
        """The maximum of the gain over all variables within their bounds; None: infeasible."""
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import csr_array

        shape = (len(self.least), len(gain))
        matrix = csr_array((self.values, (self.rows, self.columns)), shape=shape)
        rows = LinearConstraint(matrix, np.array(self.least), np.array(self.most))  # pyright: ignore[reportArgumentType]
        found = milp(-gain, constraints=rows, bounds=(lower, upper))
        # the solver does not always say in so many words that nothing is feasible
        return float(-found.fun) if found.status == 0 else None


def limit(
    trace: Trace,
    rungs: tuple[Rung, ...],
    rates: tuple[float, ...],
    targets: Targets,
    *,
    gap_rate: float = 0.0,
    period_s: float = 0.25,
) -> Limit | None:
    """The most that can be trained on a decode-only device, per second of ``engine.window_s``.

    Args:
        rates: work per second at each rung; the highest (or ``gap_rate``) while nothing is served.
        gap_rate: work per second of training between steps, where decode and training take turns.
        period_s: shorter periods make a tighter limit and take longer.

    None where the load is so far beyond the device that there is no target to speak of.
    """
    rungs, rates = with_pauses(rungs, rates)
    over_s = window_s(trace, targets)
    period_s = max(period_s, over_s * len(trace.requests) / CELLS)
    for stretch in STRETCHES:
        step_s = targets.tpot_s * (1 - KEPT_SHARE) * stretch
        rate = _solve(trace, rungs, rates, over_s, step_s, gap_rate, period_s)
        if rate is not None:
            return Limit(rate, step_s)
    return None


def _solve(
    trace: Trace,
    rungs: tuple[Rung, ...],
    rates: tuple[float, ...],
    over_s: float,
    step_s: float,
    gap_rate: float,
    period_s: float,
) -> float | None:
    """The program's maximum over the window, per second; None: these deadlines are infeasible (a
    stretched target is then tried, which makes the limit looser, never too tight)."""
    periods = int(np.ceil(over_s / period_s))
    period_s = over_s / periods
    bounds = bounds_of(trace, rungs, step_s, period_s, periods)
    wide = 3 * len(rungs) + 2  # K, N, X of each rung, then idle time and training between steps
    sums = periods * wide  # behind: S, tokens and context by the end of each period
    gain = np.zeros(sums + 3 * periods)
    lower, upper = np.zeros_like(gain), np.full_like(gain, np.inf)
    program = _Program()
    idle_rate = max(*rates, gap_rate)
    for period in range(periods):
        base = period * wide
        filled: list[tuple[int, float]] = [(base + wide - 2, 1.0), (base + wide - 1, 1.0)]
        gain[base + wide - 2], gain[base + wide - 1] = idle_rate, gap_rate
        if bounds.least_batch[period] >= 1:
            upper[base + wide - 2] = 0.0
        if not gap_rate:
            upper[base + wide - 1] = 0.0
        for place, (rung, rate) in enumerate(zip(rungs, rates, strict=True)):
            steps, tokens, context = (base + 3 * place + kind for kind in range(3))
            for column, seconds in ((steps, rung.base_s), (tokens, rung.request_s), (context, rung.token_s)):
                filled.append((column, seconds * rung.stretch))
                gain[column] = rate * seconds * rung.stretch
            _load_rows(program, bounds, period, steps, tokens, context)
        program.row(filled, period_s, period_s)
        for kind, (late, early) in enumerate(
            (
                (None, None),
                (bounds.tokens_late, bounds.tokens_early),
                (bounds.context_late, bounds.context_early),
            )
        ):
            so_far = sums + 3 * period + kind
            terms = [(base + 3 * place + kind, 1.0) for place in range(len(rungs))]
            if period:
                terms.append((so_far - 3, 1.0))
            program.row([*terms, (so_far, -1.0)], 0.0, 0.0)
            if late is not None and early is not None:
                lower[so_far], upper[so_far] = late[period] - 1e-6, early[period] + 1e-6
    _pace_rows(program, trace, bounds, step_s, period_s, sums)
    most = program.most_of(gain, lower, upper)
    return None if most is None else most / over_s


def _load_rows(program: _Program, bounds: Bounds, period: int, steps: int, tokens: int, context: int) -> None:
    """Point 4: batch and context of each step of a period."""
    for column, least, most in (
        (tokens, max(bounds.least_batch[period], 1.0), bounds.most_batch[period]),
        (context, bounds.least_context[period], bounds.most_context[period]),
    ):
        program.row([(column, 1.0), (steps, -least)], 0.0, np.inf)
        program.row([(column, 1.0), (steps, -most)], -np.inf, 0.0)


def _pace_rows(
    program: _Program, trace: Trace, bounds: Bounds, step_s: float, period_s: float, sums: int
) -> None:
    """Point 2: what each request asks of the steps between two borders, the strictest of a pair."""
    strictest: dict[tuple[int, int], float] = {}
    clock = np.concatenate([[0.0], np.cumsum(period_s / bounds.shortest_s)])
    borders = period_s * np.arange(len(clock))
    for request, last in zip(trace.requests, bounds.surely, strict=True):
        first = int(np.ceil((request.arrival_s + bounds.longest_s) / period_s))
        if first >= last:
            continue
        since = float(clock[first] - np.interp(request.arrival_s, borders, clock))
        banked = since - (borders[first] - request.arrival_s) / step_s
        for border in range(first + 1, int(last) + 1):
            kept_s = KEPT_S if borders[border] >= request.arrival_s + 2 * bounds.longest_s else 0.0
            least = ((border - first) * period_s + kept_s) / step_s - banked
            if least > strictest.get((first, border), 0.0):
                strictest[first, border] = least
    for (first, border), least in strictest.items():
        terms = [(sums + 3 * (border - 1), 1.0)]
        if first:
            terms.append((sums + 3 * (first - 1), -1.0))
        program.row(terms, least, np.inf)
