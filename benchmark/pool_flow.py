"""Does memory flow to the KV cache and back while a job trains, and is every request served?

    python benchmark/pool_flow.py [--waves 3] [--seed 1]

One server of a 25M model whose KV pool is small enough to matter.  A job trains and holds most of
the pool; then long prompts arrive at once that together need nearly all of it, and after a rest as
many again.  The pool of ``harli status --json`` is looked at several times a second; the picture
shows its bytes by owner over time.

Exits with 1 when a request failed, when the bytes did not always sum, when memory did not flow to
the KV cache in every wave or not back to training after it, or when the job stood still or failed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import report, servers
from pool import flow_picture, trace
from pool.flow_judge import Sample, Span, judge, table
from pool.trace import Ask, Wave
from sglang_harli import FinetuneClient
from sglang_harli.errors import HarliError
from sglang_harli.tools.make_model import make_model

POOL_TOKENS = 8192
PROMPTS = 3  # of a wave: together FILL of the pool
FILL = 0.92
ANSWER = 48  # tokens of each
LOOK_S = 0.15
READY_S, BACK_S = 120.0, 120.0  # most seconds to wait for training to hold memory: at first, and again
REST_S = 4.0  # after training holds memory again, so that the picture shows it
PREFIX_KEEP = 0.25
LOGITS = "4MiB"
JOB: dict[str, Any] = {
    "lora_r": 8,
    "batch_size": 2,
    "n_epochs": 10_000,
    "checkpoint_every": 0,
    "max_seq_length": 256,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Long prompts arrive while a job trains: who holds the memory?"
    )
    parser.add_argument("--waves", type=int, default=3, help="of long prompts (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    options = parser.parse_args(argv)
    if options.waves < 1:
        parser.error("--waves: give at least 1")
    return options


class Looker:
    """Looks at a server's pool until the block ends; ``samples`` grows.

    Args:
        endpoint: of the finetune service.
        job: the job whose step is noted.
    """

    def __init__(self, endpoint: str, job: str) -> None:
        self.samples: list[Sample] = []
        self.pool: dict[str, Any] = {}
        self._endpoint, self._job = endpoint, job
        self._began = time.monotonic()
        self._ended = threading.Event()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _run(self) -> None:
        with FinetuneClient(self._endpoint) as client:
            while not self._ended.wait(LOOK_S):
                with contextlib.suppress(HarliError):
                    pool, step = client.status().pool, client.get(self._job).step
                    if pool is not None:
                        self.pool = pool
                        self.samples.append(Sample.of(self.now_s, pool, step))

    def until_training_holds(self, nbytes: int, limit_s: float) -> None:
        """Wait until training holds this much, or for ``limit_s``: the verdict says what came of
        it."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.samples and self.samples[-1].train >= nbytes:
                return
            time.sleep(LOOK_S)


def prompts(seed: int, waves: int, vocab: int) -> list[Wave]:
    """Waves of prompts that have nothing in common (pure)."""
    rng = random.Random(seed)
    length = int(FILL * POOL_TOKENS) // PROMPTS - ANSWER
    return [
        Wave(
            "long",
            tuple(
                Ask(tuple(rng.randrange(10, vocab) for _ in range(length)), ANSWER) for _ in range(PROMPTS)
            ),
            0.0,
        )
        for _ in range(waves)
    ]


def run(server: servers.Server, waves: list[Wave]) -> dict[str, Any]:
    """The demonstration; what ``judge`` wants."""
    words = "one pool of memory moves between the cache and the job "
    rows = [{"prompt": f"{n}: ", "completion": words * 100} for n in range(64)]
    spans, seen = [], []
    with FinetuneClient(server.endpoint) as client:
        job = client.submit(rows, on_overflow="truncate", **JOB)
        looker = Looker(server.endpoint, job.id)
        with looker.looking():
            looker.until_training_holds(1, READY_S)
            time.sleep(REST_S)
            for number, wave in enumerate(waves):
                held = looker.samples[-1].train if looker.samples else 0
                began_s = looker.now_s
                found = trace.drive(server.url, [wave])
                spans.append(Span(began_s, looker.now_s))
                for one in found:
                    one.name = f"{number + 1}.{one.name.split('.')[1]}"
                seen += found
                step = client.get(job.id).step
                looker.until_training_holds(max(held // 2, 1), BACK_S)
                _until_step(client, job.id, step + 1)
                time.sleep(REST_S)
        status = str(client.get(job.id).status)
        with contextlib.suppress(HarliError):
            client.cancel(job.id)
    return {
        "samples": looker.samples,
        "waves": spans,
        "requests": len(seen),
        "failed": {one.name: one.error for one in seen if one.error is not None},
        "ttft_s": {one.name: round(one.ttft_s, 3) for one in seen},
        "job": status,
        "dropped": looker.pool.get("dropped_micro_batches", 0),
        "stripe_bytes": looker.pool.get("stripe_bytes", 1),
        "pool_at_the_end": looker.pool,
    }


def _until_step(client: FinetuneClient, job: str, step: int) -> None:
    deadline = time.monotonic() + BACK_S
    while time.monotonic() < deadline and client.get(job).step < step:
        time.sleep(LOOK_S)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="harli-flow-", ignore_cleanup_errors=True) as name:
        model = Path(name) / "model"
        made = make_model(model, "llama", size="25m", dtype="bfloat16", seconds=0)
        flags = ["--max-total-tokens", str(POOL_TOKENS), "--harli-prefix-keep", str(PREFIX_KEEP)]
        flags += ["--harli-logits-mem", LOGITS]
        server = servers.ours(model, *flags)
        with servers.ended(server):
            server.wait_ready()
            results = run(server, prompts(options.seed, options.waves, made["vocab_size"]))
    problems = judge(results)
    text = table(results, problems)
    page = report.write(
        "pool-flow",
        "cpu",
        question="Does memory flow to the KV cache and back while a job trains?",
        settings={
            "model": "Llama, 512 wide, 8 layers, 25M parameters, bf16, random weights",
            "pool": f"{POOL_TOKENS} slots; prefixes keep {PREFIX_KEEP:.0%}",
            "job": f"rank {JOB['lora_r']} on all linear layers, {JOB['batch_size']} rows of {JOB['max_seq_length']}",
            "waves": f"{options.waves} of {PROMPTS} prompts from seed {options.seed}, {FILL:.0%} of the pool",
        },
        results={
            **results,
            "samples": [asdict(sample) for sample in results["samples"]],
            "waves": [asdict(span) for span in results["waves"]],
        },
        table=text,
        picture=flow_picture.svg(results["samples"], results["waves"]),
        not_shown=(
            "What the flow costs either side: `bench_pool.py` measures that. Looks are some tenths of a second apart, "
            "so a movement to and fro within one is not seen."
        ),
        folder=options.results,
    )
    print(text)
    print(f"written: {page}")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
