"""The facade: estimates as the scheduler asks for them, and what they are worth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.core import QuantumKind, QuantumOffer, StepLoad
from sglang_harli.managers.scheduler.policy import qos_policy
from sglang_harli.managers.scheduler.policy.slo_ledger import Slack, Targets
from sglang_harli.managers.scheduler.policy.waiting_pays import WaitingPays
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.line.recursive import Prior
from sglang_harli.predictor.profile.priors import Priors, first_guess
from sglang_harli.predictor.solo import WHOLE, Padding

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
Noise = Callable[[random.Random], float]


def decode_s(batch: int, context: int) -> float:
    return 7e-3 + 0.9e-3 * batch + 4e-7 * context


def serve(
    predictor: LatencyPredictor, rng: random.Random, steps: int, noise: Noise, speed: float = 1.0
) -> tuple[list[float], list[bool]]:
    """Errors and coverage of decode steps under a load that changes now and then, each judged
    before it is learnt."""
    errors, covered, batch = [], [], 1
    for _ in range(steps):
        if rng.random() < 0.05:
            batch = rng.choice((1, 2, 3, 4, 8, 16))
        context = batch * rng.randint(50, 1500)
        seconds = decode_s(batch, context) * speed * noise(rng)
        estimate = predictor.decode(batch, context)
        errors.append(abs(estimate.expected_s - seconds) / seconds)
        covered.append(seconds <= estimate.upper_s)
        predictor.observe_decode(batch, context, seconds)
    return errors, covered


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


# Scatter with little and much noise, and with accidents, as on a machine that does other things
# too.
NOISES: dict[str, Noise] = {
    "quiet": lambda rng: rng.gauss(1, 0.01),
    "usual": lambda rng: rng.lognormvariate(0, 0.06),
    "accidents": lambda rng: rng.gauss(1, 0.03) * (rng.uniform(1.5, 3) if rng.random() < 0.02 else 1),
}


@pytest.mark.parametrize("noise", NOISES)
def test_error_and_coverage_on_loads_not_seen_before(noise):
    predictor, rng = LatencyPredictor(), random.Random(11)
    serve(predictor, rng, 300, NOISES[noise])
    errors, covered = serve(predictor, rng, 4000, NOISES[noise])
    assert sum(errors) / len(errors) < 0.1
    assert share(covered) >= 0.98


@pytest.mark.parametrize("speed", [0.6, 1.3, 1.6, 3.0])
@pytest.mark.parametrize("noise", NOISES)
def test_coverage_is_back_within_200_steps_of_a_change_of_speed(noise, speed):
    predictor, rng = LatencyPredictor(), random.Random(5)
    serve(predictor, rng, 1000, NOISES[noise])
    serve(predictor, rng, 200, NOISES[noise], speed)
    errors, covered = serve(predictor, rng, 1000, NOISES[noise], speed)
    assert share(covered) >= 0.98
    assert sum(errors) / len(errors) < 0.1


@given(base=st.floats(1e-4, 1e-2), slope=st.floats(1e-6, 1e-3), seed=st.integers(0, 1000))
def test_quanta_are_learnt_and_bounded(base, slope, seed):
    rng, predictor = random.Random(seed), LatencyPredictor()
    kind = QuantumKind.BACKWARD
    for n in range(200):
        tokens = rng.choice((32, 64, 128, 256))
        seconds = (base + slope * tokens) * rng.uniform(0.95, 1.05)
        predictor.observe_quantum(kind, tokens, 32, seconds, first_of_shape=n < 2)
    for tokens in (32, 256):
        estimate, truth = predictor.quantum(kind, tokens, 32), base + slope * tokens
        assert 0.9 * truth < estimate.expected_s < 1.1 * truth
        assert estimate.upper_s >= truth


def test_attention_makes_long_rows_dearer_than_short_ones_of_the_same_tokens():
    predictor, rng = LatencyPredictor(), random.Random(0)
    for _ in range(500):
        rows, width = rng.choice((1, 2, 4)), rng.choice((64, 256, 1024))
        seconds = 1e-3 + 1e-5 * rows * width + 2e-8 * rows * width * width
        predictor.observe_quantum(QuantumKind.FORWARD, rows * width, width, seconds)
    long, short = (predictor.quantum(QuantumKind.FORWARD, 1024, w).expected_s for w in (1024, 64))
    assert long == pytest.approx(1e-3 + 1e-5 * 1024 + 2e-8 * 1024**2, rel=0.05)
    assert short == pytest.approx(1e-3 + 1e-5 * 1024 + 2e-8 * 1024 * 64, rel=0.1)


@given(
    observed=st.lists(st.tuples(st.sampled_from(SIZES), st.floats(1e-4, 1.0)), max_size=40),
    width=st.integers(0, 2048),
    kind=st.sampled_from(list(QuantumKind)),
)
def test_a_part_never_costs_more_than_the_whole(observed, width, kind):
    predictor = LatencyPredictor()
    for rows, seconds in observed:
        predictor.observe_quantum(kind, max(rows * width, 1), width, seconds)
    prices = predictor.prices(kind, SIZES, width)
    assert [rows for rows, _ in prices] == list(SIZES)
    bounds = [upper for _, upper in prices]
    assert bounds == sorted(bounds) and bounds[0] > 0
    tokens = max(32 * width, 32)
    assert bounds[-1] == pytest.approx(predictor.quantum(kind, tokens, width).upper_s)


def test_larger_quanta_are_tried_step_by_step():
    """Where only one row was ever run, the bound of many rows stands further off than that of
    one."""
    predictor = LatencyPredictor()
    for _ in range(200):
        predictor.observe_quantum(QuantumKind.FORWARD, 64, 64, 0.01)
    one, many = (predictor.quantum(QuantumKind.FORWARD, rows * 64, 64) for rows in (1, 32))
    assert one.upper_s / one.expected_s < 1.05
    assert many.upper_s / many.expected_s > 1.2


def observed(kind: QuantumKind, seconds: float = 0.02, count: int = 20) -> LatencyPredictor:
    predictor = LatencyPredictor()
    for _ in range(count):
        predictor.observe_quantum(kind, 100, 100, seconds)
    return predictor


def test_doubt_begins_with_the_first_refusal_whatever_the_clock_shows():
    """An hour after the last run, and on a machine that has been up for months."""
    kind = QuantumKind.FORWARD
    for predictor, now_s in ((LatencyPredictor(), 1e7), (observed(kind), 3600.0)):
        before = predictor.prices(kind, SIZES, 100)
        predictor.relax(kind, now_s)
        assert predictor.doubt(kind) == 1.0
        predictor.relax(kind, now_s + 0.02)
        assert predictor.doubt(kind) > 0.98
        assert predictor.prices(kind, SIZES, 100) == before, "no size is priced by it"


def test_a_measured_estimate_is_doubted_slowly_and_a_guess_fast_and_one_call_halves_it_at_most():
    kind = QuantumKind.FORWARD
    for predictor, half_life_s in ((observed(kind), 30.0), (LatencyPredictor(), 1.0)):
        for n in range(201):
            predictor.relax(kind, 50.0 + n * half_life_s / 100)
        assert predictor.doubt(kind) == pytest.approx(0.25)
        predictor.relax(kind, 1e9)  # nothing was held back meanwhile
        assert predictor.doubt(kind) == pytest.approx(0.125)
        assert predictor.doubt(QuantumKind.BACKWARD) == 1.0


@pytest.mark.parametrize(
    "run",
    [
        lambda predictor: predictor.observe_quantum(QuantumKind.FORWARD, 100, 100, 0.02),
        lambda predictor: predictor.observe_quantum(QuantumKind.FORWARD, 1, 1, 0.02, first_of_shape=True),
        lambda predictor: predictor.ran(QuantumKind.FORWARD),
    ],
)
def test_any_run_ends_the_doubt(run):
    kind = QuantumKind.FORWARD
    predictor = observed(kind)
    for n in range(10):
        predictor.relax(kind, n * 20.0)
    assert predictor.doubt(kind) < 0.1
    run(predictor)
    assert predictor.doubt(kind) == 1.0
    predictor.relax(kind, 1e6)
    assert predictor.doubt(kind) == 1.0, "its clock begins anew"


def test_first_runs_of_a_shape_do_not_enter_the_line_once_something_is_known():
    predictor, kind = LatencyPredictor(), QuantumKind.FORWARD
    predictor.observe_quantum(kind, 10, 10, 0.01, first_of_shape=True)
    level = predictor.quantum(kind, 10, 10)
    predictor.observe_quantum(kind, 10, 10, 5.0, first_of_shape=True)
    assert predictor.quantum(kind, 10, 10) == level
    assert level.expected_s == pytest.approx(0.01)


def test_first_runs_of_a_shape_have_a_bound_and_are_counted():
    """One of eight layers takes 1.3 to 1.7 times as long, for each new width."""
    predictor, kind, rng = LatencyPredictor(), QuantumKind.FORWARD, random.Random(0)
    misses = plain_misses = 0
    for n in range(1200):
        width, first = rng.randint(32, 512), n % 8 == 0
        seconds = (1e-3 + 2e-5 * width) * rng.gauss(1.5 if first else 1.0, 0.06 if first else 0.01)
        if n > 400 and first:
            ((_, upper),) = predictor.prices(kind, (1,), width, firsts=(True,))
            ((_, plain),) = predictor.prices(kind, (1,), width)
            misses += seconds > upper
            plain_misses += seconds > plain
            assert upper < 2.2 * plain, "a bound, no excuse"
        predictor.observe_quantum(kind, width, width, seconds, first_of_shape=first)
    assert misses <= 3 and plain_misses > 90
    shown = predictor.summary()
    assert shown["first_forward"]["steps"] == 149 and shown["first_forward"]["total_coverage"] > 0.95
    assert shown["forward"]["steps"] == 1050 and shown["first_forward"]["mape"] < 0.1


def with_slow_first_runs(kind: QuantumKind) -> LatencyPredictor:
    """A row of a token takes 10 ms, and the first run of a shape four times as long."""
    predictor = LatencyPredictor()
    for rows in (1, 2, 4, 8) * 30:
        predictor.observe_quantum(kind, rows, 1, 1e-2 * rows)
    for rows in (1, 2, 4, 8) * 30:
        predictor.observe_quantum(kind, rows, 1, 4e-2 * rows, first_of_shape=True)
    return predictor


FIRST_RUNS = with_slow_first_runs(QuantumKind.FORWARD)
UNDER_LOAD = StepLoad(running=1)


@given(firsts=st.lists(st.booleans(), min_size=1, max_size=len(SIZES)), slack_s=st.floats(0.0, 0.5))
def test_a_size_that_fits_is_never_refused_because_a_smaller_one_has_not_run_yet(firsts, slack_s):
    predictor, kind, sizes = FIRST_RUNS, QuantumKind.FORWARD, SIZES[: len(firsts)]
    own = {
        size: predictor.prices(kind, (size,), 1, firsts=(first,))[0][1]
        for size, first in zip(sizes, firsts, strict=True)
    }
    candidates = predictor.prices(kind, sizes, 1, firsts=firsts)
    rows, uppers = zip(*candidates, strict=True)
    assert list(rows) == sorted(rows) and list(uppers) == sorted(uppers) and rows[-1] == sizes[-1]
    plain = dict(predictor.prices(kind, sizes, 1))
    for size, upper in candidates:
        first_s = predictor.quantum(kind, size, 1).expected_s * 3.9 if firsts[sizes.index(size)] else 0.0
        assert upper >= max(plain[size], first_s)
    targets = Targets(0.05, None, None, busy_quantum_s=0.3, idle_quantum_s=0.3)
    offer, slack = QuantumOffer(kind, candidates), Slack(slack_s, "tpot")
    decision = qos_policy.decide(UNDER_LOAD, slack, offer, targets)
    fits = [size for size, upper in own.items() if upper <= min(slack_s, 0.3)]
    assert bool(decision.quanta) >= bool(fits) and decision.rows >= max(fits, default=0)
    assert not decision.quanta or dict(candidates)[decision.rows] <= slack_s
    waiting = WaitingPays()
    waiting.could(offer, slack, 0.3, 0.0)
    assert not fits or not waiting.pays  # it is counted as what could have run


def test_a_long_row_is_not_too_long_where_more_of_it_has_run_before():
    candidates = FIRST_RUNS.prices(QuantumKind.FORWARD, (1, 2, 4), 1, firsts=(True, False, False))
    targets = Targets(0.05, None, None, busy_quantum_s=0.035, idle_quantum_s=0.3)
    offer = QuantumOffer(QuantumKind.FORWARD, candidates)
    decision = qos_policy.decide(UNDER_LOAD, Slack(1.0, "tpot"), offer, targets)
    assert (decision.quanta, decision.rows) == (1, 2)


def test_batches_with_adapters_have_a_line_of_their_own():
    """Else a batch with an adapter now and then would look like scatter, and widen every bound."""
    predictor, rng = LatencyPredictor(), random.Random(4)
    serve(predictor, rng, 500, NOISES["quiet"])
    plain = predictor.decode(4, 2000)
    assert predictor.decode(4, 2000, adapters=True).expected_s == pytest.approx(1.6 * plain.expected_s)
    for _ in range(300):
        predictor.observe_decode(4, 2000, 2 * decode_s(4, 2000), adapters=True)
        predictor.observe_decode(4, 2000, decode_s(4, 2000))
    assert predictor.decode(4, 2000).expected_s == pytest.approx(decode_s(4, 2000), rel=0.02)
    assert predictor.decode(4, 2000).upper_s < 1.1 * decode_s(4, 2000)
    assert predictor.decode(4, 2000, adapters=True).expected_s == pytest.approx(
        2 * decode_s(4, 2000), rel=0.02
    )
    assert {"decode", "decode_adapters"} <= set(predictor.summary())


def test_the_step_after_training_is_slower_by_a_factor_that_is_learnt():
    predictor, rng = LatencyPredictor(), random.Random(5)

    def steps(count: int, factor: float, speed: float = 1.0) -> tuple[list[float], list[bool]]:
        errors, covered = [], []
        for _ in range(count):
            batch, after = rng.choice((1, 2, 4)), rng.random() < 0.6
            seconds = decode_s(batch, 100 * batch) * speed * (factor if after else 1) * rng.gauss(1, 0.02)
            estimate = predictor.decode(batch, 100 * batch, after_training=after)
            errors.append(abs(estimate.expected_s - seconds) / seconds)
            covered.append(seconds <= estimate.upper_s)
            predictor.observe_decode(batch, 100 * batch, seconds, after_training=after)
        return errors, covered

    steps(600, 1.15)
    errors, covered = steps(600, 1.15)
    assert sum(errors) / len(errors) < 0.03 and share(covered) >= 0.98
    alone, after = predictor.decode(2, 200), predictor.decode(2, 200, after_training=True)
    assert alone.expected_s == pytest.approx(decode_s(2, 200), rel=0.03)
    assert after.expected_s / alone.expected_s == pytest.approx(1.15, abs=0.03)
    steps(600, 1.15, speed=1.6)  # a slower machine is no larger factor
    after = predictor.decode(2, 200, after_training=True)
    assert after.expected_s / predictor.decode(2, 200).expected_s == pytest.approx(1.15, abs=0.04)
    steps(900, 0.9)
    assert predictor.decode(2, 200, after_training=True) == predictor.decode(2, 200), "never faster"


def test_errors_that_come_in_spells_are_followed():
    """As beside processes that are busy for a while: a bound for all times alike would be too wide
    or too narrow."""
    predictor, rng, spell = LatencyPredictor(), random.Random(6), 0.0
    errors, covered = [], []
    for _ in range(3000):
        spell = 0.93 * spell + rng.gauss(0, 0.03)
        batch = rng.choice((1, 2, 3))
        seconds = decode_s(batch, 100 * batch) * math.exp(spell) * rng.gauss(1, 0.02)
        estimate = predictor.decode(batch, 100 * batch)
        errors.append(abs(estimate.expected_s - seconds) / seconds)
        covered.append(seconds <= estimate.upper_s)
        predictor.observe_decode(batch, 100 * batch, seconds)
    late = errors[400:]
    assert sum(late) / len(late) < 0.05  # 0.055 where only the line follows
    assert share(covered[400:]) >= 0.98  # 0.976


def test_a_decode_step_is_padded_to_its_graph():
    predictor = LatencyPredictor(padding=Padding((1, 2, 4, 8)))
    assert predictor.decode(5, 100) == predictor.decode(8, 100)
    assert predictor.decode(9, 100).expected_s > predictor.decode(8, 100).expected_s
    assert [Padding()(n) for n in (0, 3, 1000)] == [0, 3, 1000]


def test_a_share_without_a_line_is_as_slow_as_the_next_smaller_one():
    lines = {16: Prior((0.03, 0.0, 0.0)), 64: Prior((0.02, 0.0, 0.0)), WHOLE: Prior((0.01, 0.0, 0.0))}
    guess = first_guess()
    predictor = LatencyPredictor(Priors(lines, guess.prefill, guess.quanta))
    found = {s: predictor.decode(1, 0, s).expected_s for s in (8, 16, 40, 64, 100, WHOLE)}
    assert found == {8: 0.06, 16: 0.03, 40: 0.03, 64: 0.02, 100: 0.02, WHOLE: 0.01}
    predictor.observe_decode(1, 0, 1.0, share=40)  # has no line of its own
    assert predictor.decode(1, 0, 16).expected_s == 0.03


def test_no_share_at_all_is_refused():
    guess = first_guess()
    with pytest.raises(ValueError, match="WHOLE"):
        LatencyPredictor(Priors({}, guess.prefill, guess.quanta))


def test_prefill_by_tokens_and_by_what_they_attend_to():
    predictor, rng = LatencyPredictor(), random.Random(0)
    for _ in range(300):
        tokens, cached = rng.randint(10, 2000), rng.choice((0, 0, 1000))
        pairs = tokens * (tokens + cached)
        predictor.observe_prefill(tokens, 5e-3 + 2e-5 * tokens + 1e-8 * pairs, pairs)
    assert predictor.prefill(1000).expected_s == pytest.approx(5e-3 + 2e-2 + 1e-2, rel=0.05)
    assert predictor.prefill(1000, 3_000_000).expected_s > predictor.prefill(1000).expected_s


def test_beside_training_a_step_is_slower_and_the_slowdown_is_learnt():
    predictor, rng = LatencyPredictor(), random.Random(2)
    for _ in range(500):
        predictor.observe_decode(4, 2000, decode_s(4, 2000) * rng.gauss(1, 0.02))
    kind, solo = QuantumKind.BACKWARD, predictor.decode(4, 2000)
    assert predictor.corun(4, 2000, WHOLE, 0, kind) == solo
    covered = []
    for n in range(1500):
        sms = rng.choice((24, 40, 56))
        seconds = decode_s(4, 2000) * (1 + 3e-3 * sms) * rng.gauss(1, 0.02)
        if n >= 300:
            covered.append(seconds <= predictor.corun(4, 2000, WHOLE, sms, kind).upper_s)
        predictor.observe_corun(4, 2000, WHOLE, sms, kind, seconds)
    beside = predictor.corun(4, 2000, WHOLE, 40, kind)
    assert beside.expected_s == pytest.approx(decode_s(4, 2000) * 1.12, rel=0.03)
    assert share(covered) >= 0.98
    other = predictor.corun(4, 2000, WHOLE, 40, QuantumKind.FORWARD)  # each kind by itself
    assert other.expected_s > beside.expected_s


def test_the_summary_says_how_good_each_phase_is():
    predictor = LatencyPredictor()
    assert predictor.summary() == {} and predictor.costs() == {}
    for _ in range(50):
        predictor.observe_decode(2, 100, 0.01)
        predictor.observe_quantum(QuantumKind.HEAD, 16, 1, 0.004)
    summary = predictor.summary()
    assert set(summary) == {"decode", "head"}
    assert summary["decode"]["steps"] == 49  # the first has nothing to be judged by
    assert summary["decode"]["mape"] < 0.01 and summary["decode"]["coverage"] == 1.0
    assert predictor.costs()["head"]["seen"] == 50
    assert all(math.isfinite(v) for phase in summary.values() for v in phase.values())
