"""SGLang's features beside training: overlap scheduling, chunked prefill, streaming, aborts, sleeping when idle.

bf16, so requests are compared one at a time: the batch's composition alone may change the rounding.  SGLang's
own memory checks run on every busy turn of the loop.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from support.http import PROMPTS, generate, get, post
from support.models import make_model
from support.server import Server, start_server

LONG = " ".join(PROMPTS) * 3  # several chunks of prefill
ROWS = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(16)]
FLAGS = (
    *("--harli-overlap", "on", "--harli-tpot-slo-ms", "200", "--chunked-prefill-size", "64"),
    "--sleep-on-idle",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("model") / "tiny-llama", "llama", dtype="bfloat16")
    with start_server(model, *FLAGS, env={"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def alone(server: Server) -> list[list[int]]:
    return [generate(server.url, text) for text in [*PROMPTS, LONG]]


@pytest.fixture
def job(server: Server, alone: list[list[int]]) -> Iterator[tuple[FinetuneClient, str]]:
    """A job in training, for as long as the test takes."""
    with FinetuneClient(server.endpoint) as client:
        submitted = client.submit(ROWS, n_epochs=10_000, batch_size=4)
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


def test_answers_are_the_same_one_at_a_time(server, job, alone):
    client, name = job
    first = client.get(name).step
    assert [generate(server.url, text) for text in [*PROMPTS, LONG]] == alone
    until(lambda: client.get(name).step > first)


def test_a_streamed_answer_is_whole_and_an_abandoned_one_harms_nobody(server, job, alone):
    client, name = job
    *_, last = stream(server.url, PROMPTS[1], 24)
    assert last["output_ids"] == alone[1]
    cut = stream(server.url, PROMPTS[2], 400)
    next(cut)
    cut.close()  # the client goes away: SGLang aborts the request
    assert post(server.url, "/abort_request", {"rid": "", "abort_all": True})[0] == 200
    until(lambda: post(server.url, "/flush_cache", {})[0] == 200)  # idle again, with nothing leaked
    assert generate(server.url, LONG) == alone[-1]
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
