"""``make demo``: serve a small model under load, teach it something meanwhile, and ask it.

Makes a model, starts a server, streams requests at it without and with a finetune job, and shows
what the job learned and what it cost.  The last line of output is one JSON object.  The exit status
is 0 only if the answer was learned, every request succeeded, and the share of requests that met the
latency target was at least ``ATTAINMENT`` of what serving alone reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from request_stream import RequestStream, Served, attainment
from sglang_harli import run_paths
from sglang_harli.client.async_client import AsyncFinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError
from sglang_harli.protocol.public import Job
from sglang_harli.tools import terminal
from sglang_harli.tools.make_model import ARCHITECTURES
from sglang_harli.tools.server_process import ServerProcess
from sglang_harli.tools.toy_text import Fact, ToyFacts

ATTAINMENT = 0.99
REQUESTS = 200  # at least so many without training, and so many while the job runs
RATE = 8.0  # requests per second
NEW_TOKENS = 20
WARM_UP = 6
FLOOR_MS = 50.0  # the target is the larger of this and three times the median measured
PAIRS = 16
HYPERPARAMETERS: dict[str, Any] = {"n_epochs": 180, "learning_rate": 2e-3, "batch_size": 4}
JOB_TIMEOUT_S = 900.0
SEED = 0


@dataclass
class Measured:
    """What the two phases gave; times in seconds."""

    target_s: float
    alone: list[Served]
    training: list[Served]
    failed: list[str]
    jobs: list[Job]  # the first is the one whose adapter is asked
    base_answer: str
    tuned_answer: str
    learned_pairs: int


def say(text: str) -> None:
    print(text, flush=True)


async def ask(session: aiohttp.ClientSession, url: str, model: str, question: str) -> str:
    """The greedy answer of a model to one chat message."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
    }
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            found = await answer.json()
            if answer.status != 200:
                raise HarliError(f"asking {model} failed with HTTP {answer.status}: {found}")
    except aiohttp.ClientError as error:
        raise HarliError(f"asking {model} failed: {error!r}") from error
    return found["choices"][0]["message"]["content"].strip()


def during(served: list[Served], spans: list[tuple[float, float]]) -> list[Served]:
    """The requests that were under way within one of the spans."""
    return [one for one in served if any(one.start <= end and one.last >= begin for begin, end in spans)]


async def measure(server: ServerProcess) -> Measured:
    """Both phases on a running server."""
    text = ToyFacts(SEED)
    facts = text.unseen_facts(PAIRS)
    prompts = [
        f"<|user|>{text.fact(x, i % 8).question}<|end|><|assistant|>" for i, x in enumerate(text.places)
    ]
    warm_up = RequestStream(server.url, prompts, rate=RATE, max_new_tokens=NEW_TOKENS)
    async with warm_up.running():
        await warm_up.until(WARM_UP)

    say(f"streaming {REQUESTS} requests without training, {RATE:g} a second, {NEW_TOKENS} tokens each")
    alone = RequestStream(server.url, prompts, rate=RATE, max_new_tokens=NEW_TOKENS)
    async with alone.running():
        await alone.until(REQUESTS)
    median_s = statistics.median(one.tpot_s for one in alone.served)
    target_s = max(FLOOR_MS / 1000, 3 * median_s)

    connector = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))
    async with AsyncFinetuneClient(server.endpoint) as client, connector as session:
        answer = await client.set(tpot_slo_ms=1000 * target_s)
        if answer.outcome != "applied":
            raise HarliError(f"the target was not applied: {answer.outcome} {answer.message}")
        say(f"median TPOT {1000 * median_s:.1f} ms; target set to {1000 * target_s:.1f} ms")
        base_answer = await ask(session, server.url, "default", facts[0].question)
        say(f"the base model, asked {facts[0].question!r}: {base_answer!r}")
        busy = RequestStream(server.url, prompts, rate=RATE, max_new_tokens=NEW_TOKENS)
        jobs: list[Job] = []
        spans: list[tuple[float, float]] = []
        async with busy.running():
            while (
                len(during(busy.served, spans)) < REQUESTS
            ):  # a fast device is done with one job before that
                job, span = await train(client, busy, facts, len(jobs))
                jobs.append(job)
                spans.append(span)
        name = jobs[0].fine_tuned_model or ""
        answers = [await ask(session, server.url, name, fact.question) for fact in facts]
    return Measured(
        target_s=target_s,
        alone=alone.served,
        training=during(busy.served, spans),
        failed=[one.error for one in (*alone.served, *busy.served) if one.error],
        jobs=jobs,
        base_answer=base_answer,
        tuned_answer=answers[0],
        learned_pairs=sum(answer == fact.answer for answer, fact in zip(answers, facts, strict=True)),
    )


async def train(
    client: AsyncFinetuneClient, stream: RequestStream, facts: list[Fact], number: int
) -> tuple[Job, tuple[float, float]]:
    """The succeeded job, and when its training began and ended (``time.monotonic``).

    Raises:
        HarliError: it failed, or takes too long.
    """
    rows = [
        {"messages": [{"role": "user", "content": f.question}, {"role": "assistant", "content": f.answer}]}
        for f in facts
    ]
    suffix = f"demo{number + 1}" if number else "demo"
    job = await client.submit(rows, suffix=suffix, filename="pairs.jsonl", seed=number, **HYPERPARAMETERS)
    say(f"job {job.id}: {PAIRS} question/answer pairs, {job.total_steps} steps; the stream goes on")
    began, shown = None, 0.0
    end = time.monotonic() + JOB_TIMEOUT_S
    while not job.status.final:
        if time.monotonic() > end:
            raise HarliError(f"the job is not done after {JOB_TIMEOUT_S:g} s: {job.status}, step {job.step}")
        await asyncio.sleep(0.25)
        job = await client.get(job.id)
        now = time.monotonic()
        if began is None and job.status == JobStatus.RUNNING:
            began = now
        if now - shown >= 10 and job.status == JobStatus.RUNNING:
            shown = now
            loss = "-" if job.loss is None else f"{job.loss:.3f}"
            say(f"  step {job.step}/{job.total_steps}, loss {loss}, {len(stream.served)} requests served")
    if job.status != JobStatus.SUCCEEDED:
        reason = f": {job.error.code}: {job.error.message}" if job.error else ""
        raise HarliError(f"the job ended as {job.status}{reason}")
    now = time.monotonic()
    return job, (began or now, now)


def summary(measured: Measured, expected: str) -> dict[str, Any]:
    """The figures of the last line."""
    alone = attainment(measured.alone, measured.target_s)
    training = attainment(measured.training, measured.target_s)
    jobs = measured.jobs
    seconds = sum((job.finished_at or 0.0) - (job.started_at or 0.0) for job in jobs)
    tokens = sum(job.trained_tokens for job in jobs)
    return {
        "learned": measured.tuned_answer == expected and measured.base_answer != expected,
        "slo_attainment_ratio": round(training / alone, 4) if alone else 0.0,
        "finetune_tokens_per_s": round(tokens / seconds, 1) if seconds > 0 else 0.0,
        "adapter": jobs[0].fine_tuned_model,
        "base_answer": measured.base_answer,
        "tuned_answer": measured.tuned_answer,
        "expected_answer": expected,
        "learned_pairs": f"{measured.learned_pairs}/{PAIRS}",
        "tpot_slo_ms": round(1000 * measured.target_s, 2),
        "attainment_alone": round(alone, 4),
        "attainment_training": round(training, 4),
        "tpot_ms_alone": _quantiles(measured.alone),
        "tpot_ms_training": _quantiles(measured.training),
        "requests_alone": len(measured.alone),
        "requests_training": len(measured.training),
        "failed_requests": len(measured.failed),
        "first_error": measured.failed[0] if measured.failed else None,
        "jobs": len(jobs),
        "trained_tokens": tokens,
        "training_s": round(seconds, 1),
    }


def _quantiles(served: list[Served]) -> dict[str, float]:
    values = sorted(1000 * one.tpot_s for one in served) or [0.0]
    return {
        name: round(values[min(len(values) - 1, int(share * len(values)))], 1)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def passed(figures: dict[str, Any]) -> bool:
    return bool(
        figures["learned"]
        and not figures["failed_requests"]
        and figures["slo_attainment_ratio"] >= ATTAINMENT
        and figures["requests_training"] >= REQUESTS
    )


def run(arch: str, log: Path) -> dict[str, Any]:
    began = time.monotonic()
    expected = ToyFacts(SEED).unseen_facts(1)[0].answer
    with tempfile.TemporaryDirectory(prefix="harli-demo-", ignore_cleanup_errors=True) as folder:
        model = Path(folder) / f"tiny-{arch}"
        say(f"making a small {arch} model")
        command = [sys.executable, "-m", "sglang_harli.cli", "make-model", str(model), "--arch", arch]
        made = subprocess.run([*command, "--seed", str(SEED)], capture_output=True, text=True, check=False)
        if made.returncode:
            raise HarliError(f"make-model failed:\n{made.stderr[-2000:]}")
        say(f"starting the server (log: {log})")
        log.write_bytes(b"")
        runs = Path(folder) / "runs"
        try:
            with ServerProcess(model, runs, log) as server:
                say(f"serving at {server.url}, finetuning at {server.endpoint}")
                try:
                    measured = asyncio.run(measure(server))
                except (HarliError, OSError):
                    say(f"the end of the server's log:\n{server.log_tail()}")
                    raise
                say("stopping the server")
        finally:  # a run directory that is never used again
            for left in (run_paths.shm_dir(str(runs)), run_paths.ipc_dir(str(runs))):
                shutil.rmtree(left, ignore_errors=True)
    return summary(measured, expected) | {"total_s": round(time.monotonic() - began, 1)}


def show(figures: dict[str, Any]) -> None:
    say(f"base model:  {figures['base_answer']}")
    say(f"new adapter: {figures['tuned_answer']}  ({figures['adapter']})")
    say(f"taught:      {figures['expected_answer']}  (pairs answered as taught: {figures['learned_pairs']})")
    say(
        f"requests within {figures['tpot_slo_ms']} ms a token: {100 * figures['attainment_alone']:.1f}% of "
        f"{figures['requests_alone']} without training, {100 * figures['attainment_training']:.1f}% of "
        f"{figures['requests_training']} with training"
    )
    say(f"finetune tokens per second under this load: {figures['finetune_tokens_per_s']}")
    if figures["failed_requests"]:
        say(f"{figures['failed_requests']} requests failed; the first: {figures['first_error']}")


def _interrupt(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Runs the demo; the exit status."""
    parser = argparse.ArgumentParser(prog="python examples/demo.py", description=__doc__)
    parser.add_argument("--arch", default="llama", choices=ARCHITECTURES)
    parser.add_argument("--log", type=Path, default=Path("harli-demo.log"), help="the server's log")
    options = parser.parse_args()
    terminal.prepare()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        figures = run(options.arch, options.log.absolute())
    except KeyboardInterrupt:
        print("interrupted: the server is stopped", file=sys.stderr, flush=True)
        return 130
    except HarliError as error:
        figures = {
            "learned": False,
            "slo_attainment_ratio": 0.0,
            "finetune_tokens_per_s": 0.0,
            "adapter": None,
            "base_answer": None,
            "tuned_answer": None,
            "error": error.message,
        }
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        print(json.dumps(figures), flush=True)
        return 1
    show(figures)
    print(json.dumps(figures), flush=True)
    return 0 if passed(figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
