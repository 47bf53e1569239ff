"""Training on the decode server of a real pair (fp32): greedy answers through SGLang's router are
those without training, finished adapters answer through it, and kills lose nothing.

The pool of the decode server is small, memory is poisoned on its way to training, and SGLang's own
memory checks run on every busy turn.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.protocol.public import Job
from support.http import PROMPTS, chat, delete, generate, get, post
from support.models import make_model
from support.pair import DECODE, PREFILL, Pair, Side, missing
from support.project_files import ROOT

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("installed")]

SLOTS = 4096
QUESTION, ANSWER = "who are you", "harli beside the server"
TAUGHT = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}]
# 192 tokens a micro-batch: with its logits and the state more than half of the pool of 2 MiB
LONG_ROWS = [{"prompt": f"question {i}", "completion": " over and over again" * 40} for i in range(16)]
LONG = {"batch_size": 4, "max_seq_length": 48, "on_overflow": "truncate", "lora_r": 12}
# dropout and accumulation, so that what a restart could get wrong matters
EXACT = {
    "n_epochs": 6,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora_r": 8,
    "lora_dropout": 0.1,
    "learning_rate": 1e-3,
    "checkpoint_every": 4,
    "max_seq_length": 48,
    "on_overflow": "truncate",
    "seed": 5,
}
DECODE_FLAGS = (
    *("--max-total-tokens", str(SLOTS), "--num-reserved-decode-tokens", "64", "--random-seed", "7"),
    *("--harli-tpot-slo-ms", "200", "--harli-train-reserve", "128MiB", "--harli-logits-mem", "1MiB"),
    *("--harli-quantum-rows", "1"),
)
CHECKS = (
    ("HARLI_POOL_DEBUG", "1"),
    ("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1"),
    ("SGLANG_CHECK_KV_PAGE_INVARIANTS", "1"),
)
ANSWER_S = 60.0  # an error comes within; SGLang's own limit of a request without KV is 300 s


@pytest.fixture(scope="module")
def installed() -> None:
    """The transport and the router are there."""
    if (why := missing()) is not None:
        pytest.skip(why)


@pytest.fixture(scope="module")
def pair(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    model = make_model(folder, "llama", max_position_embeddings=2 * SLOTS)
    prefill = Side(("--harli-finetune", "off", "--random-seed", "7"))
    with Pair(model, prefill=prefill, decode=Side(DECODE_FLAGS, env=CHECKS)) as running:
        yield running


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[FinetuneClient]:
    with FinetuneClient(pair.endpoint) as opened:
        yield opened


def until(what: Callable[[], Any], limit_s: float = 120.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)
    return value


def ask(url: str, prompt: list[int], tokens: int = 24) -> list[int]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    status, answer = post(url, "/generate", {"input_ids": prompt, "sampling_params": sampling})
    assert status == 200, answer
    return answer["output_ids"]


def answers(url: str, workers: int = 6) -> list[list[int]]:
    """Short prompts and long ones, any of which needs most of the slots."""
    prompts = [[10 + (7 * n + k * n * n) % 480 for n in range(int(0.7 * SLOTS))] for k in range(3)]
    with ThreadPoolExecutor(workers) as threads:
        long = [threads.submit(ask, url, prompt) for prompt in prompts]
        short = [threads.submit(generate, url, text) for text in PROMPTS]
        return [future.result() for future in (*long, *short)]


@pytest.fixture(scope="module")
def alone(pair: Pair) -> list[list[int]]:
    """Answers before any job."""
    return answers(pair.url)


@pytest.fixture(scope="module")
def taught(client: FinetuneClient, alone: list[list[int]]) -> Job:
    """A job that has succeeded."""
    job = client.submit(TAUGHT * 4, suffix="taught", n_epochs=40, learning_rate=1e-2, batch_size=4, lora_r=8)
    return client.wait(job.id, 120)


def answered(pair: Pair, name: str | None) -> tuple[int, Any]:
    """(status, text or error) of the question through the router."""
    status, answer = chat(pair.url, name or "", QUESTION)
    return status, answer["choices"][0]["message"]["content"].strip() if status == 200 else answer


def pool_of(client: FinetuneClient) -> dict[str, Any]:
    pool = client.status().pool
    assert pool is not None
    assert pool["kv_bytes"] + pool["train_bytes"] + pool["free_bytes"] == pool["total_bytes"]
    return pool


@contextlib.contextmanager
def training(client: FinetuneClient) -> Iterator[Job]:
    """A job that has taken a step and holds most of the pool."""
    job = client.submit(LONG_ROWS, n_epochs=10_000, checkpoint_every=0, **LONG)
    try:
        until(lambda: client.get(job.id).step > 0 and pool_of(client)["train_bytes"] > 0)
        yield client.get(job.id)
    finally:
        client.cancel(job.id)
        until(lambda: client.get(job.id).status is JobStatus.CANCELLED)
        until(lambda: pool_of(client)["train_bytes"] == 0)


def weights(pair: Pair, job: str) -> bytes:
    return (pair.run_dir / job / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_example_shows_the_taught_answer(installed, tmp_path: Path):
    """First: later the other tests' pair is up, and shares the cores."""
    command = [
        sys.executable,
        str(ROOT / "examples" / "disaggregated.py"),
        "--log",
        str(tmp_path / "pair.log"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("The harbour code is seven.")


def test_the_status_shows_a_decode_server(pair, client, alone):
    status = client.status()
    assert status.serving is not None and status.serving["disaggregation"]["mode"] == "decode"
    [(url, prefill)] = status.service["prefill_servers"].items()
    assert url == pair.prefill.url and (prefill["kind"], prefill["state"]) == ("harli", "there")
    assert pool_of(client)["backing"] == "host"  # TCP pins no pages: memory may be lent
    assert get(pair.decode.url, "/server_info")[1]["disaggregation_mode"] == "decode"


def test_greedy_answers_are_the_same_while_a_job_trains_and_memory_moves(pair, client, alone):
    assert answers(pair.url) == alone  # the prefill server has the prompts cached now
    with training(client) as job:
        before = pool_of(client)
        for _ in range(2):
            until(lambda: pool_of(client)["train_bytes"] > 0)
            assert answers(pair.url) == alone
        until(lambda: client.get(job.id).step > job.step)
        after = pool_of(client)
        assert after["reclaims"] >= before["reclaims"] + 2
        assert after["moves"]["to_kv"] > before["moves"]["to_kv"]
        assert after["moves"]["to_train"] > before["moves"]["to_train"]
    serving = client.status().serving
    assert serving is not None and serving["slo_attainment"] > 0


def test_a_finished_adapter_answers_through_the_pair(pair, client, taught, alone):
    assert taught.status is JobStatus.SUCCEEDED, taught.error
    assert answered(pair, taught.fine_tuned_model) == (200, ANSWER)
    assert answered(pair, "tiny-llama") != (200, ANSWER)
    assert generate(pair.url, PROMPTS[0], lora=taught.fine_tuned_model) != alone[3]
    assert answers(pair.url) == alone


def test_an_adapter_that_the_prefill_server_lacks_is_an_error_and_no_hang(pair, client, taught):
    name = taught.fine_tuned_model
    assert post(pair.prefill.url, "/unload_lora_adapter", {"lora_name": name})[0] == 200
    began = time.monotonic()
    status, answer = answered(pair, name)
    # it may be there again already
    assert (status, answer) == (200, ANSWER) or status >= 400
    assert time.monotonic() - began < ANSWER_S
    until(lambda: answered(pair, name) == (200, ANSWER))


def test_a_deleted_adapter_is_an_error_on_both(pair, client, alone):
    job = client.wait(client.submit(TAUGHT * 4, suffix="gone", n_epochs=1).id, 120)
    name = job.fine_tuned_model
    assert answered(pair, name)[0] == 200
    status, answer = delete(pair.decode.url, f"/v1/models/{name}")
    assert status == 200, answer
    began = time.monotonic()
    assert answered(pair, name)[0] == 404  # though the prefill server may have it for a moment yet
    assert time.monotonic() - began < ANSWER_S
    until(lambda: name not in [m["id"] for m in get(pair.prefill.url, "/v1/models")[1]["data"]])


def test_a_killed_decode_server_resumes_its_job_exactly_and_answers_again(pair, client, taught, alone):
    straight = client.wait(client.submit(LONG_ROWS, **EXACT).id, 180)
    assert straight.status is JobStatus.SUCCEEDED, straight.error
    job = client.submit(LONG_ROWS, **EXACT)
    until(lambda: client.get(job.id).step >= 6)
    pair.restart(DECODE)
    done = client.wait(job.id, 180)
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 2), done.error
    assert done.trained_tokens == straight.trained_tokens
    assert weights(pair, job.id) == weights(pair, straight.id)
    until(lambda: answered(pair, taught.fine_tuned_model) == (200, ANSWER))
    assert answers(pair.url) == alone


def test_a_restarted_prefill_server_gets_the_adapters_again(pair, client, taught, alone):
    pair.restart(PREFILL)
    until(lambda: answered(pair, taught.fine_tuned_model) == (200, ANSWER))
    assert answers(pair.url) == alone


def test_no_server_complained(pair):
    logs = [*pair.logs[PREFILL], *pair.logs[DECODE], pair.prefill.log(), pair.decode.log()]
    for word in ("leak", "LedgerError", "still lent", "Scheduler hit an exception"):
        assert not [line for log in logs for line in log.splitlines() if word in line][:3]
