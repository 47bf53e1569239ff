"""TTFT deadlines, explanation and metrics of a real server: more prompts than places, in chunks, beside a job."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from support.http import PROMPTS, generate, get
from support.models import make_model
from support.server import Server, start_server

TOKENS = 12
LONG = " ".join(PROMPTS)
TEXTS = [*PROMPTS[:8], LONG, LONG + LONG, *PROMPTS[8:16]]
FLAGS = (
    *("--harli-ttft-slo-ms", "20000", "--harli-tpot-slo-ms", "200", "--max-running-requests", "2"),
    *("--chunked-prefill-size", "64", "--enable-metrics"),
)
ROWS = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(16)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("model") / "tiny", dtype="bfloat16")
    with start_server(model, *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[FinetuneClient]:
    with FinetuneClient(server.endpoint) as made:
        job = made.submit(
            ROWS, n_epochs=10_000, batch_size=4, lora_r=4, max_seq_length=32, checkpoint_every=0
        )
        until(lambda: made.get(job.id).step > 0)
        yield made
        made.cancel(job.id)
        until(lambda: made.get(job.id).status is JobStatus.CANCELLED)


def until(what: Callable[[], Any], limit_s: float = 90.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)
    return value


def metrics(server: Server) -> dict[str, float]:
    _, text = get(server.url, "/metrics")
    return {name: float(value) for name, value in re.findall(r"^(harli_\S+) (\S+)$", text, re.MULTILINE)}


def burst(server: Server) -> None:
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        answers = pool.map(lambda text: generate(server.url, text, tokens=TOKENS), TEXTS)
        assert [len(answer) for answer in answers] == [TOKENS] * len(TEXTS)


def test_a_burst_beyond_the_places_is_answered_while_training_uses_the_time_it_has(server, client):
    before = client.status().training["busy_quanta"]
    until(lambda: (burst(server), client.status().training["busy_quanta"] - before >= 20)[1])


def test_status_and_metrics_explain_themselves(server, client):
    burst(server)
    status = client.status()
    assert status.training["why"].startswith("Training ") and status.training["why"].endswith(".")
    assert status.training["yield_s"] and status.serving["requests_finished"] > 0
    found = until(lambda: (m := metrics(server)).get('harli_quanta_total{load="busy"}') and m)
    assert found['harli_quanta_total{load="idle"}'] > 0 and found["harli_quanta_per_step"] >= 0
    assert any(name.startswith("harli_yield_seconds_total{") and value > 0 for name, value in found.items())
    assert found['harli_slo_requests_total{met="yes"}'] > 0 and 0 < found["harli_slo_attainment_ratio"] <= 1
    assert "harli_slack_seconds" in found and found['harli_impossible_target{target="tpot"}'] == 0.0
    assert "profile" not in get(server.url, "/server_info")[1]["internal_states"][0]["harli"]
    assert get(server.url, "/harli/profile")[1]["table"]["decode"]


def test_an_impossible_target_is_said_and_training_goes_on_in_idle_time(server, client):
    answer = client.set(tpot_slo_ms=0.001)
    assert answer.outcome == "applied" and "cannot be kept here" in (answer.message or "")
    status = client.status()
    assert "tpot-slo-ms=0.001 cannot be kept here" in status.serving["impossible_targets"][0]
    assert "idle time only" in server.log()
    assert until(lambda: metrics(server).get('harli_impossible_target{target="tpot"}')) == 1.0
    step = client.status().training["step"]
    burst(server)
    until(lambda: client.status().training["step"] > step)
    assert client.set(tpot_slo_ms=200.0).message in (None, "")
