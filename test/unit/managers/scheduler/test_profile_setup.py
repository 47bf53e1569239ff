"""A start reads the profile of this server, and leaves another's aside with a sentence."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from sglang_harli.managers.scheduler.profile_setup import starting_priors
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.profile.priors import first_guess
from sglang_harli.predictor.profile.profile_table import DecodePoint, ProfileKey, ProfileTable
from sglang_harli.predictor.solo import Padding

KEY = ProfileKey("LlamaForCausalLM 512x8", "cpu", "bfloat16", "0.5.16", "attention=torch_native")
GUESS = first_guess()


def start(path: object, key: ProfileKey, caplog: pytest.LogCaptureFixture) -> tuple[LatencyPredictor, str]:
    with caplog.at_level(logging.INFO):
        priors = starting_priors(str(path), key, GUESS, Padding())
    return LatencyPredictor(priors), caplog.records[-1].getMessage()


def test_a_matching_profile_is_where_estimates_start(tmp_path, caplog):
    points = [DecodePoint(b, 100 * b, 0.02 + 0.01 * b) for b in (1, 2, 4, 8)]
    ProfileTable(KEY, points).save(tmp_path / "p.json")
    predictor, said = start(tmp_path / "p.json", KEY, caplog)
    assert predictor.profiled and predictor.known("decode") and not predictor.known("prefill")
    assert predictor.decode(4, 400).expected_s == pytest.approx(0.06, rel=0.05)
    assert "4 measured points" in said


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ProfileKey)])
def test_a_stale_or_foreign_one_is_left_aside(tmp_path, caplog, name):
    other = dataclasses.replace(KEY, **{name: "0.5.15"})
    ProfileTable(other, [DecodePoint(1, 100, 9.0)] * 4).save(tmp_path / "p.json")
    predictor, said = start(tmp_path / "p.json", KEY, caplog)
    assert not predictor.profiled and not predictor.known("decode")
    assert predictor.decode(1, 100) == LatencyPredictor(GUESS).decode(1, 100)
    assert "left aside" in said and "measured for another server" in said and f"{name} is" in said


def test_a_damaged_one_is_left_aside(tmp_path, caplog):
    (tmp_path / "p.json").write_text('{"format": "harli-latency-profile", "version": 1}')
    predictor, said = start(tmp_path / "p.json", KEY, caplog)
    assert not predictor.profiled and "cannot be read" in said
