"""SGLang's features beside training: its own launcher, pages of 16 slots, overlap scheduling,
chunked prefill, streaming, aborts, sleeping when idle.

bf16, so requests are compared one at a time: the batch's composition alone may change the rounding.
SGLang's own memory checks run on every busy turn of the loop, and memory is poisoned on its way to
training.  (On the CPU engine SGLang alone cannot serve pages: its allocator needs Triton.)
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from support.ends import assert_all_end, new_mark
from support.http import PROMPTS, generate, get, post
from support.models import make_model
from support.server import Server, start_server

LONG = " ".join(PROMPTS) * 3  # several chunks of prefill
SLOTS, PAGE = 4096, 16
ROWS = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(16)]
# The pool of this tiny model has 1 MiB: a job that fits while most of it is lent.
JOB = {"batch_size": 4, "lora_r": 4, "max_seq_length": 32}
FLAGS = (
    *("--harli-overlap", "on", "--harli-tpot-slo-ms", "200", "--chunked-prefill-size", "256"),
    *("--page-size", str(PAGE), "--max-total-tokens", str(SLOTS), "--harli-prefix-keep", "0.2"),
    "--sleep-on-idle",
)
CHECKS = {
    "HARLI_POOL_DEBUG": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    model = make_model(folder, "llama", dtype="bfloat16", max_position_embeddings=2 * SLOTS)
    with start_server(model, *FLAGS, launcher="sglang", env=CHECKS | new_mark()) as running:
        yield running


@pytest.fixture(scope="module")
def alone(server: Server) -> list[list[int]]:
    return answers(server.url)


def answers(url: str) -> list[list[int]]:
    """One request at a time: short and long prompts, and between them some that need nearly all
    slots."""
    return [
        *(generate(url, text) for text in [*PROMPTS, LONG]),
        *(fill(url, number) for number in range(2)),
    ]


def fill(url: str, number: int) -> list[int]:
    prompt = [10 + (7 * n + number * n * n) % 200 for n in range(int(0.9 * SLOTS))]
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": 2 * PAGE + 3, "ignore_eos": True},
    }
    status, answer = post(url, "/generate", body)
    assert status == 200, answer
    return answer["output_ids"]


@pytest.fixture
def job(server: Server, alone: list[list[int]]) -> Iterator[tuple[FinetuneClient, str]]:
    """A job in training, for as long as the test takes."""
    with FinetuneClient(server.endpoint) as client:
        submitted = client.submit(ROWS, n_epochs=10_000, checkpoint_every=0, **JOB)
        try:
            until(lambda: client.get(submitted.id).step > 0)
            yield client, submitted.id
        finally:
            client.cancel(submitted.id)
            until(lambda: client.get(submitted.id).status is JobStatus.CANCELLED)


def until(what: Callable[[], Any], limit_s: float = 90.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)
    return value


def stream(url: str, text: str, tokens: int) -> Iterator[dict[str, Any]]:
    body = {
        "text": text,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "stream": True,
    }
    request = urllib.request.Request(
        url + "/generate", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with contextlib.closing(urllib.request.urlopen(request, timeout=120)) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def test_sglangs_own_launcher_with_an_option_of_ours_serves_as_our_launcher_does(server):
    status, info = get(server.url, "/server_info")
    assert status == 200 and info["harli_tpot_slo_ms"] == 200.0
    assert info["enable_lora"] is True
    assert info["page_size"] == PAGE and info["max_total_num_tokens"] == SLOTS
    assert re.findall(r"^sglang-harli: .*$", server.log(), re.MULTILINE) == []
    assert server.log().count("harli options: finetune='on', tpot_slo_ms=200.0") == 1
    assert (server.run_dir / "lock").read_text().strip() == str(server.pid)
    assert server.find("sglang_harli.service.app").is_running()


def test_answers_are_the_same_one_at_a_time(server, job, alone):
    client, name = job
    pool = client.status().pool
    assert pool is not None and pool["backing"] == "host" and pool["train_bytes"] > 0
    first = client.get(name).step
    assert answers(server.url) == alone
    assert client.status().pool["moves"]["to_kv"] > pool["moves"]["to_kv"]
    until(lambda: client.get(name).step > first)
    assert answers(server.url) == alone  # of what a cached prefix holds too


def test_a_streamed_answer_is_whole_and_an_abandoned_one_harms_nobody(server, job, alone):
    client, name = job
    *_, last = stream(server.url, PROMPTS[1], 24)
    assert last["output_ids"] == alone[1]
    cut = stream(server.url, PROMPTS[2], 400)
    next(cut)
    cut.close()  # the client goes away: SGLang aborts the request
    assert post(server.url, "/abort_request", {"rid": "", "abort_all": True})[0] == 200
    until(lambda: post(server.url, "/flush_cache", {})[0] == 200)  # idle again, with nothing leaked
    assert generate(server.url, LONG) == alone[len(PROMPTS)]
    step = client.get(name).step
    until(lambda: client.get(name).step > step)


def test_training_goes_on_while_requests_run_and_the_status_says_why(server, job, alone):
    client, name = job
    step = client.get(name).step
    for answer in stream(server.url, PROMPTS[3], 300):
        assert answer
    assert client.get(name).step > step
    status = client.status()
    assert status.training is not None and status.training["job"] == name and status.training["reason"]
    assert status.serving is not None and status.serving["requests_finished"] > 0
    assert get(server.url, "/health")[0] == 200


def test_the_capacity_is_sglangs_when_the_job_is_over(server, job, alone):
    client, name = job
    client.cancel(name)
    until(lambda: client.get(name).status is JobStatus.CANCELLED)
    until(lambda: client.status().pool["train_bytes"] == 0)
    assert post(server.url, "/flush_cache", {})[0] == 200
    assert get(server.url, "/server_info")[1]["max_total_num_tokens"] == SLOTS
    assert generate(server.url, PROMPTS[0]) == alone[0]


def test_nothing_outlives_sglangs_launcher_that_is_told_to_end(server):
    with FinetuneClient(server.endpoint) as client:
        job = client.submit(ROWS, n_epochs=10_000, **JOB)
        until(lambda: client.get(job.id).step > 0)
    assert_all_end(server, signal.SIGTERM)
