"""Training is compared with serving before a run starts: what is measured, what holds jobs back,
and until when."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_harli.cli.view import parity_lines
from sglang_harli.core import Claim, QuantumKind
from sglang_harli.errors import ConfigError
from sglang_harli.managers.scheduler.metrics import ParityMetrics
from sglang_harli.managers.scheduler.policy import slotting
from sglang_harli.managers.scheduler.training.parity import ACCEPTED, WAITS, Parity
from sglang_harli.managers.scheduler.training.quantum_timer import Work
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, from_transformers
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.protocol import internal
from support.trainer.co_trainer_host import Host, Peer, spec, temporary_run_dir, until
from support.trainer.trainer_oracle import EXTRA, one_thread, tiny_model

__all__ = ["one_thread"]  # a fixture

IDS = [token * 7 % 90 for token in range(40)]


def served(model: Any) -> list[float]:
    """As a server would say: logits in the model's dtype, their softmax in fp32."""
    ids = torch.tensor([IDS])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def compared(base: FrozenBase, values: list[float], mode: str = "refuse", rounds: str = "") -> Parity:
    """To its end, quantum by quantum."""
    parity = Parity(base, mode, head_tokens=8, rounds=rounds)
    parity.begin(IDS, values, 0)
    predictor = LatencyPredictor()
    while (offer := parity.offer(predictor)) is not None:
        assert offer.kind is QuantumKind.CHECK and offer.candidates[0][0] == 1 and parity.pending
        assert parity.run(1) == Work(QuantumKind.CHECK, len(IDS) - 1, len(IDS) - 1)
    assert not parity.pending
    return parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", EXTRA)
def test_the_same_model_agrees(arch: str, dtype: torch.dtype) -> None:
    model = tiny_model(arch, dtype)
    parity = compared(from_transformers(model), served(model))
    assert parity.state == "agrees" and parity.hold == ""
    if dtype is torch.float32:
        assert parity.difference < 1e-4 and parity.rounding == 0 and parity.accepted == ACCEPTED
    else:
        assert parity.rounding > 0 and parity.difference <= 2 * parity.rounding
        assert parity.accepted == max(ACCEPTED, 4 * parity.rounding)


@pytest.mark.parametrize("mode", ["refuse", "warn"])
def test_a_norm_that_is_served_with_other_weights_is_found(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", torch.float32)
    base = from_transformers(tiny_model("llama", torch.float32))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1.5)
    parity = compared(base, served(model), mode)
    assert parity.state == "differs" and parity.difference > 2 * ACCEPTED
    assert "training does not compute what is served" in caplog.text
    assert (parity.hold == "") == (mode == "warn")
    if mode == "refuse":
        assert parity.hold == parity.sentence() == parity.status()["why"]
        assert "differ by" in parity.hold and "--harli-parity warn" in parity.hold


def test_with_a_kv_cache_that_rounds_more_a_difference_is_only_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama", torch.float32)
    shifted = [value - 1.0 for value in served(model)]
    parity = compared(from_transformers(model), shifted, rounds="a KV cache in 8 bits")
    assert parity.state == "differs" and parity.hold == ""
    assert "a KV cache in 8 bits: jobs run all the same" in caplog.text


@pytest.mark.parametrize(("mode", "rounds"), [("warn", ""), ("refuse", "a KV cache in 8 bits")])
def test_where_a_difference_is_only_warned_of_no_job_waits_for_the_comparison_either(
    mode: str, rounds: str
) -> None:
    parity = Parity(from_transformers(tiny_model()), mode, head_tokens=8, rounds=rounds)
    assert parity.state == "waiting" and parity.hold == ""
    parity.begin(IDS, [0.0] * 39, 0)
    assert parity.pending and parity.hold == ""
    parity.fail("no memory left")
    assert parity.hold == "" and "jobs run all the same" in parity.sentence()


def test_the_status_says_in_words_how_far_the_comparison_is() -> None:
    model = tiny_model("llama", torch.float32)
    parity = Parity(from_transformers(model), "refuse", head_tokens=8)
    assert list(parity_lines(parity.status())) == [f"  parity: {WAITS}: the server answers one prompt"]
    parity.begin(IDS, served(model), 0)
    parity.run(2)
    assert "2 of 8 parts are computed" in parity.status()["why"] and parity.status()["difference"] is None
    while (offer := parity.offer(LatencyPredictor())) is not None:
        parity.run(offer.candidates[-1][0])
    (line,) = parity_lines(parity.status())
    assert "training computes what is served: over 39 tokens" in line and "at most 0.02 is accepted" in line


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_what_is_not_a_number_never_agrees(wrong: float) -> None:
    model = tiny_model("llama", torch.float32)
    parity = compared(from_transformers(model), [*served(model)[:-1], wrong])
    assert parity.state == "differs" and parity.difference == math.inf
    assert parity.status()["difference"] is None


def test_off_asks_for_nothing_and_holds_nothing() -> None:
    parity = Parity(from_transformers(tiny_model()), "off", head_tokens=8)
    assert not parity.wanted()["wanted"] and parity.hold == ""
    parity.begin(IDS, [0.0] * 39, 0)
    parity.fail("no")
    parity.weights_updated()
    assert parity.state == "off" and not parity.pending


def test_what_was_served_before_an_update_of_the_weights_counts_for_nothing() -> None:
    model = tiny_model("llama", torch.float32)
    parity = compared(from_transformers(model), served(model))
    assert parity.wanted() == {"wanted": False, "version": 0, "vocab": 90, "positions": 512}
    parity.weights_updated()
    assert parity.state == "waiting" and parity.hold == WAITS
    parity.begin(IDS, served(model), 0)
    assert parity.state == "waiting"
    parity.begin(IDS, served(model), parity.wanted()["version"])
    parity.weights_updated()  # while it computes
    assert not parity.pending and parity.offer(LatencyPredictor()) is None and parity.state == "waiting"


def test_nothing_is_asked_for_or_computed_while_the_memory_is_released() -> None:
    released = [False]
    model = tiny_model("llama", torch.float32)
    parity = Parity(from_transformers(model), "refuse", head_tokens=8, released=lambda: released[0])
    parity.begin(IDS, served(model), 0)
    assert parity.pending
    released[0] = True
    assert not parity.pending
    parity.weights_updated()
    assert parity.state == "waiting" and not parity.wanted()["wanted"]
    released[0] = False
    assert parity.wanted()["wanted"]


def test_a_failure_is_said_and_tried_again() -> None:
    parity = Parity(from_transformers(tiny_model()), "refuse", head_tokens=8)
    parity.fail("the server did not answer")
    assert "the server did not answer" in parity.hold and parity.wanted()["wanted"]
    assert "tried again" in parity.hold and "--harli-parity warn" in parity.hold
    with pytest.raises(ConfigError, match="3 log-probabilities of 40 tokens"):
        parity.begin(IDS, [0.0] * 3, 0)


def test_the_metrics_follow_the_comparison() -> None:
    from prometheus_client import CollectorRegistry

    model, registry = tiny_model("llama", torch.float32), CollectorRegistry()
    parity = Parity(from_transformers(model), "refuse", head_tokens=8)
    metrics = ParityMetrics(parity, registry=registry)

    def shown(now_s: float) -> list[float | None]:
        metrics.update(now_s)
        names = ("harli_parity_difference", "harli_parity_accepted", "harli_parity_ok")
        return [registry.get_sample_value(name) for name in names]

    assert shown(1.0) == [-1, -1, 0]
    parity.begin(IDS, served(model), 0)
    while (offer := parity.offer(LatencyPredictor())) is not None:
        parity.run(offer.candidates[-1][0])
    assert shown(3.0) == [parity.difference, ACCEPTED, 1]


# ------------------------------------------------------------------ in the scheduler's trainer
@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


def test_no_run_starts_before_training_agrees_with_serving(run_dir: str) -> None:
    peer, host = Peer(run_dir), Host(run_dir)
    parity = host.trainer.parity = Parity(host.base, "refuse", head_tokens=8)
    until(host, peer, lambda: [m.hold for m in peer.of(internal.Hello)] == [WAITS])
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: len(peer.of(internal.Hello)) == 2)  # the answer
    assert host.trainer.run is None and not host.trainer.busy
    values = served(host.base.model)
    parity.begin(IDS, [value + 1.0 for value in values], 0)
    assert host.trainer.busy
    until(host, peer, lambda: "differ by 1 on average" in peer.of(internal.Hello)[-1].hold)
    assert host.trainer.whole_status()["serving"]["parity"]["state"] == "differs"
    parity.weights_updated()  # as after an update that puts it right
    parity.begin(IDS, values, 1)
    until(host, peer, lambda: peer.of(internal.Hello)[-1].hold == "")
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    assert host.trainer.whole_status()["serving"]["parity"]["state"] == "agrees"
    host.link.close()
    peer.socket.close()


def test_a_comparison_that_breaks_is_said_and_ends_no_run(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, host = Peer(run_dir), Host(run_dir)
    until(host, peer, lambda: peer.of(internal.Hello))
    peer.send(internal.StartRun(spec=spec(1)))
    until(host, peer, lambda: peer.of(internal.RunStarted))
    parity = host.trainer.parity = Parity(host.base, "refuse", head_tokens=8)
    parity.begin(IDS, served(host.base.model), 0)

    def broken(quanta: int) -> Work:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(parity, "run", broken)
    until(host, peer, lambda: "no memory left" in host.trainer.hold)
    assert host.trainer.run is not None and not parity.pending
    host.link.close()
    peer.socket.close()


def test_the_comparison_ends_where_serving_never_leaves_it_time(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slotting, "SHARE", 1.0)  # as if that much time had passed
    host = Host(run_dir)
    trainer = host.trainer
    parity = trainer.parity = Parity(host.base, "refuse", head_tokens=8)
    parity.begin(IDS, served(host.base.model), 0)
    trainer.held = True  # /pause_generation
    trainer.slotting.prefilled()
    assert trainer.claimed() is None and parity.pending
    trainer.held = False
    offer = trainer.claimed()
    assert offer is not None and offer.kind is QuantumKind.CHECK and offer.claim is Claim.SHARE
    for _ in range(100):  # prefills, behind which further prompts wait
        trainer.slotting.prefilled()
    assert parity.state == "agrees" and trainer.hold == "" and trainer.quanta == 0
    host.link.close()
