"""One real server: whatever a request says, the server lives, adapters can be unloaded and
published, and SIGTERM ends it."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from support.ends import assert_all_end, new_mark
from support.http import PROMPTS, chat, generate, get, post
from support.models import make_model
from support.server import Server, start_server

pytestmark = pytest.mark.long

ROWS = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(8)]
JOB = {"n_epochs": 2, "batch_size": 4, "lora_r": 4, "learning_rate": 1e-2}
A_MINUTE_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("model") / "tiny-llama")
    with start_server(model, env=new_mark()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[FinetuneClient]:
    with FinetuneClient(server.endpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def first(client: FinetuneClient) -> Any:
    """A job whose adapter answers."""
    return succeeded(client, "first")


def succeeded(client: FinetuneClient, suffix: str) -> Any:
    job = client.wait(client.submit(ROWS, suffix=suffix, **JOB).id, 2 * A_MINUTE_S)
    assert job.status is JobStatus.SUCCEEDED, job.error
    return job


def until(what: Callable[[], Any], limit_s: float = A_MINUTE_S) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)
    return value


def several(server: Server, model: str, *, n: int = 4) -> None:
    """Three chats and a batch of two prompts, n answers each."""
    body = {"model": model, "max_tokens": 4, "n": n}
    for number in range(3):
        status, answer = post(
            server.url,
            "/v1/chat/completions",
            {**body, "messages": [{"role": "user", "content": PROMPTS[number]}]},
        )
        assert status == 200 and len(answer["choices"]) == n, answer
    status, answer = post(server.url, "/v1/completions", {**body, "prompt": PROMPTS[:2]})
    assert status == 200 and len(answer["choices"]) == 2 * n, answer


# ------------------------------------------------------------------ what a request may say
def test_counters_stay_at_zero_and_the_server_lives_whatever_a_request_says(server, first):
    name = first.fine_tuned_model
    tokens = {"max_new_tokens": 2}
    alone = generate(server.url, PROMPTS[0], tokens=2, lora=name)
    status, answer = post(
        server.url,
        "/generate",
        {
            "text": PROMPTS[0],
            "lora_path": [name],
            "sampling_params": {**tokens, "temperature": 0, "ignore_eos": True},
        },
    )
    assert status == 200 and answer["output_ids"] == alone
    chat_body = {"model": "tiny-llama", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    assert post(server.url, "/v1/chat/completions", {**chat_body, "lora_path": [name]})[0] == 200
    two = {"text": ["a", "b"], "sampling_params": tokens}
    for request, message in (
        ({**two, "lora_path": [name]}, "1 entry and the request has 2 prompts"),
        ({**two, "lora_path": [name] * 3}, "3 entries and the request has 2 prompts"),
        ({"text": "a", "lora_path": []}, "0 entries and the request has 1 prompt"),
        ({"text": "a", "lora_path": [""]}, "is empty"),
        ({"text": "a", "lora_path": ["no-such"]}, "no-such"),
        ({"text": "a", "lora_path": name, "sampling_params": {"n": 0}}, "n is 0"),
        (
            {"text": "a", "lora_path": name, "return_logprob": True, "top_logprobs_num": 10**5},
            "top_logprobs_num",
        ),
        (
            {"text": "a", "lora_path": name, "return_logprob": True, "logprob_start_len": -7},
            "logprob_start_len",
        ),
        ({"text": "a", "lora_id": "guessed"}, "lora_id"),
        ({"input_ids": [10**6], "lora_path": name}, "input_ids"),
    ):
        status, answer = post(server.url, "/generate", request)
        assert status == 400 and message in json.dumps(answer), (request, status, answer)
    junk = {"lora_name": "x", "config_dict": {}, "serialized_tensors": "AAAA"}
    assert post(server.url, "/load_lora_adapter_from_tensors", junk)[0] == 400
    assert generate(server.url, PROMPTS[0], tokens=2, lora=name) == alone


def test_the_server_lives_whatever_an_operator_calls(server):
    for call in ("/resume_memory_occupation", "/release_memory_occupation"):
        status, answer = post(server.url, call, {"tags": ["kv_cache", "zzz"]})
        assert status == 400 and "tags has zzz" in answer["error"]["message"], answer
    assert post(server.url, "/resume_memory_occupation", {})[0] == 200
    tokens = {"max_new_tokens": 300, "ignore_eos": True}
    body = json.dumps({"text": PROMPTS[0], "stream": True, "sampling_params": tokens}).encode()
    request = urllib.request.Request(
        server.url + "/generate", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=A_MINUTE_S) as stream:
        assert stream.readline()  # it runs
        status, answer = post(server.url, "/release_memory_occupation", {})
        assert status == 400 and "requests are running or waiting" in answer["error"]["message"], answer
        assert b"[DONE]" in stream.read()
    assert post(server.url, "/resume_memory_occupation", {})[0] == 200
    assert len(generate(server.url, PROMPTS[0], tokens=4)) == 4


def test_counters_adapters_of_others_are_refused_by_name(server, first, tmp_path):
    folder = server.run_dir / first.id / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()

    def load(**changes: Any) -> tuple[int, Any]:
        copy = Path(tmp_path) / "copy"
        copy.mkdir(exist_ok=True)
        (copy / "adapter_model.safetensors").write_bytes(weights)
        (copy / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return post(server.url, "/load_lora_adapter", {"lora_name": "copy", "lora_path": str(copy)})

    for changes, message in (
        ({"r": 64}, "--max-lora-rank 64"),
        ({"r": "4"}, "r is '4'"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        status, answer = load(**changes)
        assert status == 400 and message in answer["error_message"], answer
    status, answer = load(r=4.0)
    assert status == 200, answer
    assert generate(server.url, "a", lora="copy") == generate(server.url, "a", lora=first.fine_tuned_model)
    assert post(server.url, "/unload_lora_adapter", {"lora_name": "copy"})[0] == 200


def test_counters_a_health_check_finds_a_sign_of_life_when_a_request_has_just_ended(server, client):
    job = client.submit(ROWS, n_epochs=10_000, checkpoint_every=0, batch_size=4, lora_r=4)
    try:
        until(lambda: client.get(job.id).step > 0)
        for _ in range(6):
            generate(server.url, "a", tokens=2)
            since = time.monotonic()
            assert get(server.url, "/health_generate")[0] == 200
            assert time.monotonic() - since < 15  # SGLang gives up after 20
    finally:
        client.cancel(job.id)
        until(lambda: client.get(job.id).status is JobStatus.CANCELLED)


# ------------------------------------------------------------------ what waits for them
def test_counters_let_an_adapter_be_unloaded_and_others_be_published_within_a_minute(server, client, first):
    name = first.fine_tuned_model
    several(server, name)
    since = time.monotonic()
    assert post(server.url, "/unload_lora_adapter", {"lora_name": name})[0] == 200
    assert time.monotonic() - since < A_MINUTE_S
    second = succeeded(client, "second")
    several(server, second.fine_tuned_model)
    assert chat(server.url, second.fine_tuned_model, "a")[0] == 200
    assert "harli default: --max-loaded-loras 16" in server.log()


def test_shutdown_after_several_answers_takes_less_than_a_minute(server, client):
    third = succeeded(client, "third")
    several(server, third.fine_tuned_model)
    several(server, "tiny-llama")
    with ThreadPoolExecutor(1) as pool:  # one that runs when the signal comes is answered
        running = pool.submit(generate, server.url, PROMPTS[1], tokens=100, lora=third.fine_tuned_model)
        time.sleep(0.2)
        since = time.monotonic()
        assert_all_end(server, signal.SIGTERM)
        assert time.monotonic() - since < A_MINUTE_S
        assert len(running.result()) == 100
    assert "Remaining number of requests 0" in server.log()
