"""What the scheduler tells the predictor of its batches, and what of its quality is shown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from sglang_harli.cli import view
from sglang_harli.config import HarliOptions
from sglang_harli.managers.scheduler.metrics import PredictorMetrics
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.step_timer import BatchLoad, load_of
from sglang_harli.predictor.latency_predictor import LatencyPredictor


def batch(lengths, *, decode, extend=None, known=True):
    reqs = [SimpleNamespace(origin_input_ids=[0] * (n - 1), output_ids=[0], lora_id=None) for n in lengths]
    mode = SimpleNamespace(is_decode=lambda: decode)
    seq_lens = torch.tensor(lengths) if known else None
    return SimpleNamespace(forward_mode=mode, reqs=reqs, seq_lens_cpu=seq_lens, extend_lens=extend)


@pytest.mark.parametrize("known", [True, False])
def test_the_load_of_a_batch(known):
    step = load_of(batch([10, 30], decode=True, extend=[5, 5], known=known))
    assert step == BatchLoad(is_decode=True, requests=2, context_tokens=40, new_tokens=2, pairs=40)
    adapted = batch([10, 30], decode=True, known=known)
    adapted.reqs[1].lora_id = "a"
    assert load_of(adapted).adapters and not step.adapters
    assert load_of(adapted, after_training=True).after_training and not step.after_training
    prefill = load_of(batch([10, 30], decode=False, extend=[10, 6], known=known))
    assert prefill == BatchLoad(False, 2, 40, 16, 10 * 10 + 6 * 30)


def test_slack_counts_what_the_context_takes():
    side = ServingState(HarliOptions())
    for n in range(200):
        tokens = 100 if n % 2 else 10_000
        side.step(BatchLoad(True, 1, tokens, 1, tokens), 0.005 + 1e-6 * tokens, 0.0)
    clock = SimpleNamespace(first_token_s=0.0, last_token_s=1.0, emitted=100)
    short, long = (side.slack([clock], tokens, 1.0, 0.0).seconds for tokens in (100, 10_000))  # type: ignore[list-item]
    assert short - long == pytest.approx(0.0099, rel=0.1)
    done = SimpleNamespace(finished=lambda: True, origin_input_ids=[1] * 50, output_ids=[1])
    goes_on = SimpleNamespace(finished=lambda: False, origin_input_ids=[1] * 50, output_ids=[1] * 7)
    assert side.context_tokens([done, goes_on]) == 57


def test_prefills_are_learnt_from_and_enter_the_reserve():
    side = ServingState(HarliOptions())
    for _ in range(50):
        side.step(BatchLoad(False, 1, 100, 100, 10_000), 0.03, 0.0)
    side.step(BatchLoad(True, 1, 101, 1, 101), 0.01, 1.0)
    assert side.predictor.prefill(100, 10_000).expected_s == pytest.approx(0.03, rel=0.02)
    assert side.reserve.seconds(1.0) == pytest.approx(1.5)


def test_status_and_the_command_line_show_error_coverage_and_margin():
    side = ServingState(HarliOptions())
    assert list(view.prediction_lines(side.status()["prediction"])) == []
    for _ in range(100):
        side.step(BatchLoad(True, 4, 400, 4, 400), 0.012, 0.0)
    status = side.status()
    assert status["decode_ms"] == pytest.approx(12.0, abs=0.2)
    assert status["decode_ms"] < status["decode_upper_ms"]
    head, line = view.prediction_lines(status["prediction"])
    assert "latest 200" in head
    assert line.split()[:2] == ["decode", "error"]
    assert "within the upper bound 100.0%" in line and "steps 99" in line


def test_metrics_by_phase():
    predictor, registry = LatencyPredictor(), CollectorRegistry()
    metrics = PredictorMetrics(predictor, registry=registry)
    metrics.update(1.0)
    for _ in range(10):
        predictor.observe_decode(1, 100, 0.01)
    metrics.update(1.5)  # not yet a second later
    metrics.update(2.5)
    predictor.observe_decode(1, 100, 0.01)
    metrics.update(4.0)
    text = generate_latest(registry).decode()
    assert 'harli_predictor_steps_total{phase="decode"} 10.0' in text
    assert 'harli_predictor_coverage_ratio{phase="decode"} 1.0' in text
    assert 'harli_predictor_mape_ratio{phase="decode"} 0.0' in text
    assert 'harli_predictor_upper_ratio{phase="decode"} 1.' in text
