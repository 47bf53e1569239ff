"""What the policy does, as metrics and in the status of a run in training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sglang_harli.core import Reason
from sglang_harli.managers.scheduler.metrics import QosMetrics
from sglang_harli.managers.scheduler.policy.slo_ledger import PlainProgress
from sglang_harli.managers.scheduler.step_timer import BatchLoad
from sglang_harli.protocol.internal import Hello, StartRun
from support.trainer.co_trainer_host import Host, Peer, batch, spec, temporary_run_dir, until


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[str]:
    yield from temporary_run_dir(tmp_path)


def test_metrics_and_status_of_a_run(run_dir):
    peer, host = Peer(run_dir), Host(run_dir)
    registry = CollectorRegistry()
    metrics = QosMetrics(host.side, host.trainer, registry=registry)
    metrics.update(1.0)
    until(host, peer, lambda: peer.of(Hello))
    peer.send(StartRun(spec=spec()))
    until(host, peer, lambda: host.trainer.run)
    peer.send(*batch(1))
    until(host, peer, lambda: host.trainer.quanta)
    host.side.step(BatchLoad(True, 1, 300, 1, 300), 0.01, 0.0)
    host.side.slack([PlainProgress(0.0, 1.0, 30)], 300, 1.0, 0.0)
    host.side.attainment.count(PlainProgress(0.0, 0.1, 11), 0.05)
    host.trainer.slotting.yielded.hold(Reason.PREFILL_WAITING, 1.0)
    host.trainer.slotting.yielded.end(3.5)
    metrics.update(1.5)  # not yet a second later
    metrics.update(2.5)
    text = generate_latest(registry).decode()
    assert 'harli_yield_seconds_total{reason="prompt"} 2.5' in text
    assert f'harli_quanta_total{{load="idle"}} {float(host.trainer.quanta)}' in text
    assert 'harli_slo_requests_total{met="yes"} 1.0' in text and "harli_slo_attainment_ratio 1.0" in text
    assert "harli_quanta_per_step 0.0" in text and "harli_slack_seconds 0.4" in text
    assert 'harli_impossible_target{target="tpot"} 0.0' in text
    shown = host.trainer.status(host.side.status())
    assert shown is not None and shown["why"].startswith("Training ") and shown["yield_s"]
    host.link.close()
    peer.socket.close()
