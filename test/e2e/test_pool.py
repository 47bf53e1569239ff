"""One pool of memory on a real server: it moves to training and back, and serving never notices
(fp32).

Memory is poisoned on its way to training, and SGLang's own memory checks run on every busy turn.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus, SubState
from sglang_harli.errors import HarliError
from sglang_harli.protocol.public import Job
from support.ends import assert_all_end, new_mark
from support.http import PROMPTS, generate, get, post
from support.models import make_model
from support.server import Server, start_server

SLOTS = 4096
VOCAB = 509
# 192 tokens a micro-batch: with its logits and the state 1.2 MB, more than half of the pool of 2
# MiB.
ROWS = [{"prompt": f"question {i}", "completion": " over and over again" * 40} for i in range(16)]
SETTINGS = {"batch_size": 4, "max_seq_length": 48, "on_overflow": "truncate", "lora_r": 12}
FLAGS = (
    *("--max-total-tokens", str(SLOTS), "--harli-tpot-slo-ms", "200", "--harli-prefix-keep", "0.2"),
    *("--harli-train-reserve", "128MiB", "--harli-logits-mem", "1MiB"),
)
CHECKS = {
    "HARLI_POOL_DEBUG": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    model = make_model(folder, "llama", max_position_embeddings=2 * SLOTS, vocab_size=VOCAB)
    with start_server(model, *FLAGS, env=CHECKS | new_mark()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[FinetuneClient]:
    with FinetuneClient(server.endpoint) as opened:
        yield opened


def long_prompts() -> list[list[int]]:
    """Four prompts, any of which needs nearly all slots."""
    return [[10 + (7 * n + k * n * n) % 480 for n in range(int(0.9 * SLOTS))] for k in range(4)]


def ask(url: str, prompt: list[int], tokens: int = 24) -> list[int]:
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }
    status, answer = post(url, "/generate", body)
    assert status == 200, answer
    return answer["output_ids"]


def answers(url: str, workers: int = 6) -> list[list[int]]:
    """Long and short prompts at once: together they need the pool several times over."""
    with ThreadPoolExecutor(workers) as threads:
        long = [threads.submit(ask, url, prompt) for prompt in long_prompts()]
        short = [threads.submit(generate, url, text) for text in PROMPTS]
        return [future.result() for future in (*long, *short)]


@pytest.fixture(scope="module")
def alone(server: Server) -> list[list[int]]:
    """Answers before any job."""
    return answers(server.url)


def until(what: Callable[[], Any], limit_s: float = 120.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.02)
    return value


def pool_of(client: FinetuneClient) -> dict[str, Any]:
    """The pool's figures; whatever happens, its parts give its total."""
    pool = client.status().pool
    assert pool is not None
    assert pool["kv_bytes"] + pool["train_bytes"] + pool["free_bytes"] == pool["total_bytes"]
    assert sum(pool["by_owner"].values()) == pool["total_bytes"]
    return pool


def harli(server: Server, *args: str) -> tuple[int, Any]:
    """(exit code, JSON) of the command line."""
    command = [sys.executable, "-m", "sglang_harli.cli", *args, "--endpoint", server.endpoint, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(done.stdout or "null")


@contextlib.contextmanager
def training(client: FinetuneClient, **settings: Any) -> Iterator[Job]:
    """A job that has taken a step and holds memory."""
    job = client.submit(ROWS, n_epochs=10_000, checkpoint_every=0, **SETTINGS | settings)
    try:
        until(lambda: client.get(job.id).step > 0 and pool_of(client)["train_bytes"] > 0)
        yield client.get(job.id)
    finally:
        client.cancel(job.id)
        until(lambda: client.get(job.id).status is JobStatus.CANCELLED)
        until(lambda: pool_of(client)["train_bytes"] == 0)


def goes_on(client: FinetuneClient, job: Job) -> bool:
    step = client.get(job.id).step
    return until(lambda: client.get(job.id).step > step)


def test_the_status_shows_a_pool_whose_parts_sum(server, client, alone):
    code, answer = harli(server, "status")
    assert code == 0
    pool = answer["pool"]
    assert pool["kv_bytes"] + pool["train_bytes"] + pool["free_bytes"] == pool["total_bytes"]
    assert pool["train_bytes"] == 0 and pool["backing"] == "host"
    # 2 layers, K and V, 2 heads of 16, fp32; and SGLang's padded page
    assert pool["total_bytes"] == (SLOTS + 1) * 2 * 2 * 2 * 16 * 4
    status, info = get(server.url, "/server_info")
    assert status == 200 and info["max_total_num_tokens"] == SLOTS


def test_prompts_that_need_the_whole_pool_get_it_and_training_goes_on(server, client, alone):
    with training(client) as job:
        before = pool_of(client)
        assert answers(server.url) == alone
        after = pool_of(client)
        assert after["reclaims"] > before["reclaims"]
        assert after["moves"]["to_kv"] > before["moves"]["to_kv"]
        assert after["reclaim_ms"]["max"] >= after["reclaim_ms"]["p50"] > 0
        assert goes_on(client, job)
        assert answers(server.url) == alone
        assert client.get(job.id).status is JobStatus.RUNNING


def test_the_cache_is_flushed_while_a_job_holds_leases(server, client, alone):
    with training(client) as job:
        until(lambda: post(server.url, "/flush_cache", {})[0] == 200)
        pool = pool_of(client)
        assert pool["kv_bytes"] < pool["total_bytes"] // 64
        assert goes_on(client, job)
        assert answers(server.url) == alone


def test_aborted_prompts_leave_nothing_behind(server, client, alone):
    with training(client) as job, ThreadPoolExecutor(4) as threads:
        body = {"sampling_params": {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}}
        sent = [
            threads.submit(post, server.url, "/generate", body | {"input_ids": p}) for p in long_prompts()
        ]
        until(lambda: pool_of(client)["kv_bytes"] > pool_of(client)["total_bytes"] // 2)
        assert post(server.url, "/abort_request", {"rid": "", "abort_all": True})[0] == 200
        for future in sent:
            future.result()
        until(lambda: post(server.url, "/flush_cache", {})[0] == 200)  # idle, and SGLang's check has passed
        assert answers(server.url) == alone
        assert goes_on(client, job)


def test_a_job_waits_for_memory_and_goes_on_when_it_is_there(server, client, alone):
    holding = [prompt[: int(0.8 * SLOTS)] for prompt in long_prompts()]  # one after the other fits
    with ThreadPoolExecutor(4) as threads:
        sent = [threads.submit(ask, server.url, prompt, int(0.17 * SLOTS)) for prompt in holding]
        until(lambda: pool_of(client)["free_bytes"] < 0.2 * pool_of(client)["total_bytes"])
        job = client.submit(ROWS, n_epochs=1, **SETTINGS)
        waiting = until(lambda: (j := client.get(job.id)).sub_state == SubState.WAITING_MEMORY and j)
        assert waiting.reason and waiting.step == 0
        assert all(len(future.result()) == int(0.17 * SLOTS) for future in sent)
    done = client.wait(job.id, 180)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert done.step == done.total_steps == 4
    until(lambda: pool_of(client)["train_bytes"] == 0)
    assert answers(server.url) == alone


def test_a_micro_batch_that_never_fits_is_refused_with_the_largest_that_does(server, client, alone):
    with pytest.raises(HarliError, match="batch_size") as caught:
        client.submit(ROWS * 16, **SETTINGS | {"batch_size": 256})
    assert caught.value.code == "memory_budget"
    found = re.search(r"batch_size (\d+) or less fits", caught.value.message)
    assert found is not None, caught.value.message
    largest = int(found[1])
    with pytest.raises(HarliError, match="batch_size"):
        client.submit(ROWS, **SETTINGS | {"batch_size": largest + 1})
    post(server.url, "/flush_cache", {})  # training alone has all that can be lent
    done = client.wait(client.submit(ROWS, n_epochs=1, **SETTINGS | {"batch_size": largest}).id, 180)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert answers(server.url) == alone


def test_the_cap_is_set_while_a_job_runs(server, client, alone):
    post(server.url, "/flush_cache", {})
    with training(client) as job:
        most = pool_of(client)["lendable_bytes"]
        revision = client.status().revision
        code, answer = harli(server, "set", f"max-train-mem={most}")
        assert code == 0 and answer["outcome"] in ("applied", "deferred")
        assert answer["revision"] == revision + 1
        code, answer = harli(server, "set", "max-train-mem=none", "--if-revision", str(revision))
        assert code == 5 and answer["outcome"] == "stale"
        with pytest.raises(HarliError, match=r"max_train_mem|max-train-mem"):
            client.set(max_train_mem="many")
        for refused in ("1MiB", str(2 * most)):  # less than the job needs, and more than the pool can lend
            code, answer = harli(server, "set", f"max-train-mem={refused}")
            assert code == 5 and answer["outcome"] == "conflict" and answer["message"]
        code, answer = harli(server, "set", "max-train-mem=none")
        assert code == 0 and answer["effective"]["max_train_mem"] is None
        assert goes_on(client, job)
        assert answers(server.url) == alone
    assert pool_of(client)["max_train_bytes"] is None


def test_the_scheduler_never_complained(server):
    log = server.log()
    for word in ("leak", "LedgerError", "still lent", "Scheduler hit an exception"):
        assert word not in log, [line for line in log.splitlines() if word in line][:3]


def test_nothing_outlives_a_launcher_that_is_interrupted_while_a_job_trains(server, client):
    job = client.submit(ROWS, n_epochs=10_000, **SETTINGS)
    until(lambda: client.get(job.id).step > 0)
    assert_all_end(server, signal.SIGINT)
