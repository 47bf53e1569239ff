"""Lines through measured points, and the published constants as a test of shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_constants import BETA_MS, C_MS, KAPPA_MS, LADDER, RHO, SHARES, corun_s, solo_s

from sglang_harli.core import QuantumKind
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.line.fit import line, measured_prior
from sglang_harli.predictor.line.recursive import Prior
from sglang_harli.predictor.profile.priors import first_guess, from_table
from sglang_harli.predictor.profile.profile_table import (
    CorunPoint,
    DecodePoint,
    PrefillPoint,
    ProfileKey,
    ProfileTable,
    QuantumPoint,
)

KEY = ProfileKey("m", "cuda", "bfloat16", "0.5.16", "")
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64)
LENGTHS = (128, 512, 1024, 2048, 4096)
KIND = QuantumKind.BACKWARD


def grid(rng: np.random.Generator, *, noise: float, outliers: float) -> ProfileTable:
    """The prototype's profiling grid with noise and preempted steps."""

    def measured(seconds: float) -> float:
        accident = rng.uniform(2, 10) if rng.random() < outliers else 1.0
        return seconds * float(rng.lognormal(0, noise)) * accident

    decode = [
        DecodePoint(b, b * n, measured(solo_s(s, b, b * n)), s)
        for s in SHARES
        for b in BATCHES
        for n in LENGTHS
    ]
    corun = [
        CorunPoint(b, b * n, s, f, KIND, measured(corun_s(s, f, b, b * n)))
        for s, f in LADDER
        for b in BATCHES
        for n in LENGTHS
    ]
    return ProfileTable(KEY, decode=decode, corun=corun)


def test_the_published_shape_decode_is_flat_from_28_sms_and_the_penalty_saturates():
    table = grid(np.random.default_rng(0), noise=0.0, outliers=0.0)
    predictor = LatencyPredictor(from_table(table, first_guess()))
    for batch, context in ((8, 8192), (32, 32768)):
        whole = predictor.decode(batch, context, 142).expected_s
        times = {s: predictor.decode(batch, context, s).expected_s / whole for s in SHARES}
        assert times[16] > 1.4
        assert all(times[s] < 1.2 for s in SHARES if s >= 28)
        solo = {s: predictor.decode(batch, context, s).expected_s for s, _ in LADDER}
        penalty = {f: predictor.corun(batch, context, s, f, KIND).expected_s / solo[s] for s, f in LADDER}
        assert penalty[8] < 1.07
        assert all(1.2 < penalty[f] < 1.3 for f in (40, 56, 68, 84, 96, 112))


def test_the_fit_recovers_the_constants_from_noise_and_outliers():
    table = grid(np.random.default_rng(1), noise=0.02, outliers=0.1)
    priors = from_table(table, first_guess())
    for at, share in enumerate(SHARES):
        terms = np.array(priors.decode[share].terms) * 1e3
        assert terms[0] == pytest.approx(C_MS[at], rel=0.05)
        assert terms[1] == pytest.approx(BETA_MS[at], rel=0.5)  # a few percent of a step
        assert terms[2] == pytest.approx(KAPPA_MS[at], rel=0.1)
        for batch, length in ((1, 128), (32, 1024), (64, 2048)):
            found = terms @ (1, batch, batch * length) / 1e3
            assert found == pytest.approx(solo_s(share, batch, batch * length), rel=0.02)
    for share, _ in LADDER:
        assert priors.corun[share, KIND] == pytest.approx(RHO[SHARES.index(share)], rel=0.25, abs=5e-4)


@given(
    terms=st.tuples(st.floats(1e-3, 1e-1), st.floats(0, 1e-2), st.floats(0, 1e-5)),
    seed=st.integers(0, 500),
)
def test_outliers_and_noise_move_the_line_little(terms, seed):
    rng = np.random.default_rng(seed)
    batch = rng.integers(1, 64, 200)
    features = np.column_stack([np.ones(200), batch, batch * rng.integers(50, 4000, 200)])
    seconds = features @ terms * rng.lognormal(0, 0.02, 200)
    seconds[:30] *= rng.uniform(2, 20, 30)
    found = line(features, seconds)
    assert (found >= 0).all()
    truth = features @ terms
    assert np.median(np.abs(features @ found / truth - 1)) < 0.02


def test_no_term_is_negative_and_one_that_is_not_there_is_zero():
    features = np.column_stack([np.ones(20), np.arange(20), np.arange(20) ** 2])
    found = line(features, 2.0 - 0.01 * np.arange(20))
    assert (found >= 0).all() and found[1] == found[2] == 0.0


@pytest.mark.parametrize(
    ("features", "seconds"),
    [
        (np.ones((0, 3)), np.ones(0)),
        (np.ones((2, 3)), np.array([1.0, 0.0])),
        (np.ones((2, 3)), np.array([1.0, np.nan])),
        (np.full((2, 3), np.inf), np.ones(2)),
        (np.ones((2, 3)), np.ones(3)),
    ],
)
def test_points_that_are_none_are_refused(features, seconds):
    with pytest.raises(ValueError, match="a line needs"):
        line(features, seconds)


def test_one_load_gives_the_height_and_keeps_the_guess_of_the_shape():
    first = Prior((0.01, 0.001, 0.0))
    found = measured_prior([4, 4, 4], [0, 0, 0], [0.028, 0.028, 0.029], first)
    assert found.terms == pytest.approx((0.02, 0.002, 0.0), rel=0.05)
    assert found.height < first.height


def test_a_table_starts_prefills_and_quanta_too():
    table = ProfileTable(
        KEY,
        prefill=[PrefillPoint(n, n * n, 5e-3 + 1e-5 * n) for n in (16, 64, 256, 1024)],
        quanta=[
            QuantumPoint(kind, rows * 256, 256, 1e-3 + 2e-5 * rows * 256)
            for kind in (QuantumKind.FORWARD, QuantumKind.HEAD)
            for rows in (1, 2, 4)
        ],
    )
    guess = first_guess()
    predictor = LatencyPredictor(from_table(table, guess))
    assert predictor.prefill(512).expected_s == pytest.approx(5e-3 + 512e-5, rel=0.05)
    for kind in (QuantumKind.FORWARD, QuantumKind.HEAD):
        assert predictor.quantum(kind, 768, 256).expected_s == pytest.approx(1e-3 + 768 * 2e-5, rel=0.05)
    untouched = LatencyPredictor(guess)
    assert predictor.decode(4, 100) == untouched.decode(4, 100)
    assert predictor.quantum(QuantumKind.EMBED, 64, 64) == untouched.quantum(QuantumKind.EMBED, 64, 64)
