"""Does one pool for the KV cache and for training do what a static split of the same memory cannot?

    python benchmark/bench_pool.py [--quick] [--seed 1]

Four servers of a 25M model (with --quick a smaller one) with the same memory for KV cache and
training together serve the same request trace (``pool/trace.py``, from the seed) in turn, those
that are not measured held by SIGSTOP: plain SGLang with all of it as KV cache and no training; two
static splits, whose KV cache is 50 and 80% of it, the rest a fixed reserve for training; and the
unified pool.  All but the first train meanwhile, with the same job.  After the trace, with nothing
in training, one request as long as the server accepts shows how many tokens the cache holds.  The
largest micro-batches are found by trying (``pool/capacity.py``).

Exits with 1 when a statement that must hold does not (``pool/judge.py`` lists them): the unified
pool caches as many tokens as SGLang alone and trains the micro-batch that the whole budget allows,
no split does either, no request is retracted or rejected that SGLang alone serves, and memory is
taken back in less than a decode step at the median.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import report as bench_report
from common import servers
from common.servers import Server
from pool import capacity as bench_pool_capacity
from pool import picture, trace
from pool.judge import MODES, PLAIN, SPLITS, UNIFIED, judge, table
from pool.trace import Ask, Seen
from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError

LOGITS = 2**20
HYPERPARAMETERS = {"lora_r": 4, "target_modules": ("q_proj", "v_proj")}  # small, so that rows decide
KEPT_ROW_TOKENS = 16  # of the largest micro-batch that keeps all its activations
PROBE_TOKENS = 8  # that the longest request gets
JOB_ROWS = 64
LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Sizes:
    """``model``: of ``make_model``; ``pool_tokens``: slots of the KV cache where it has all the
    memory; ``row_tokens``: of the job's rows and of the largest micro-batch's; ``batch``: rows of
    the job's micro-batches, that the smallest split can hold."""

    model: str
    dtype: str
    pool_tokens: int
    row_tokens: int
    waves: int
    rest_s: float
    launches: int
    batch: int


QUICK = Sizes(
    model="tiny", dtype="float32", pool_tokens=4096, row_tokens=256, waves=3, rest_s=4.0, launches=1, batch=1
)
FULL = Sizes(
    model="25m", dtype="bfloat16", pool_tokens=8192, row_tokens=512, waves=8, rest_s=10.0, launches=2, batch=1
)
SHAPES = {"tiny": "256 wide, 4 layers, 3.5M parameters", "25m": "512 wide, 8 layers, 25M parameters"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One pool against a static split of the same memory.")
    parser.add_argument("--quick", action="store_true", help="a smaller pool, a shorter trace, one launch")
    parser.add_argument("--seed", type=int, default=1, help="of the request trace (default: 1)")
    parser.add_argument(
        "--results", type=Path, default=bench_report.RESULTS, help="folder of the result files"
    )
    return parser.parse_args(argv)


# ------------------------------------------------------------------ servers
def start(mode: str, model: Path, sizes: Sizes, total_bytes: int) -> Server:
    """A server of ``mode``; not ready yet."""
    flags = ["--decode-log-interval", "1", "--random-seed", "1", "--max-total-tokens"]
    if mode == PLAIN:
        return servers.plain(model, [*flags, str(sizes.pool_tokens)])
    flags = ["--harli-logits-mem", str(LOGITS), "--harli-tpot-slo-ms", "100", *flags]
    if mode == UNIFIED:
        return servers.ours(model, *flags, str(sizes.pool_tokens))
    share = SPLITS[mode]
    rest = str(total_bytes - int(share * total_bytes))
    return servers.start_server(
        model,
        *("--harli-max-train-mem", rest, *flags, str(int(share * sizes.pool_tokens))),
        env={"HARLI_POOL_BACKING": "off"},  # SGLang's own pool, and training's memory beside it
    )


@contextlib.contextmanager
def training(server: Server, sizes: Sizes) -> Iterator[Callable[[], int]]:
    """A job in training; yields a function that gives the tokens trained so far."""
    word = "one pool of memory moves between the cache and the job "
    rows = [{"prompt": f"{n}: ", "completion": word * (sizes.row_tokens // 4)} for n in range(JOB_ROWS)]
    with FinetuneClient(server.endpoint) as client:
        job = client.submit(
            rows,
            n_epochs=10_000,
            batch_size=sizes.batch,
            checkpoint_every=0,
            max_seq_length=sizes.row_tokens,
            on_overflow="truncate",
            **HYPERPARAMETERS,
        )
        until(lambda: client.get(job.id).step > 0)
        try:
            yield lambda: client.get(job.id).trained_tokens
        finally:
            client.cancel(job.id)
            until(lambda: client.get(job.id).status is JobStatus.CANCELLED)


def until(what: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not reached within {limit_s:g} s")
        time.sleep(0.1)


class Looks:
    """Looks at a server while a trace runs.

    Attributes:
        pool: as last seen; None where the server has none that can lend.
        sums: False once the pool's parts did not give its total.
        grown_bytes: most resident memory of the scheduler, above that at the beginning.
    """

    def __init__(self, server: Server, *, trains: bool) -> None:
        self.sums, self.grown_bytes = True, 0
        self.pool: dict[str, Any] | None = None
        self._scheduler = server.find("sglang::scheduler")
        self._began_bytes = self._scheduler.memory_info().rss
        self._endpoint = server.endpoint if trains else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Looks:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(FinetuneClient(self._endpoint)) if self._endpoint else None
            while not self._ended.wait(LOOK_S):
                grown = self._scheduler.memory_info().rss - self._began_bytes
                self.grown_bytes = max(self.grown_bytes, grown)
                if client is not None:
                    with contextlib.suppress(HarliError):
                        self._look(client.status().pool)

    def _look(self, pool: dict[str, Any] | None) -> None:
        if pool is not None and pool["backing"] != "fixed":
            self.pool = pool
            self.sums &= pool["kv_bytes"] + pool["train_bytes"] + pool["free_bytes"] == pool["total_bytes"]


# ------------------------------------------------------------------ one mode
def serve(mode: str, server: Server, waves: list[trace.Wave], sizes: Sizes) -> dict[str, Any]:
    """The row of one mode; see ``bench_pool_judge``."""
    tokens_per_s = None
    with contextlib.ExitStack() as stack:
        looks = stack.enter_context(Looks(server, trains=mode != PLAIN))
        trained = stack.enter_context(training(server, sizes)) if mode != PLAIN else None
        began, before = time.monotonic(), trained() if trained else 0
        seen = trace.drive(server.url, waves, rests=trained is not None)
        if trained:
            tokens_per_s = round((trained() - before) / (time.monotonic() - began), 1)
    if (looks.pool is None) != (mode != UNIFIED):
        raise RuntimeError(f"{mode}: the server's pool is {looks.pool}")
    row = trace.summary(seen)
    row |= {"tokens_per_s": tokens_per_s, "pool": looks.pool, "sums": looks.sums}
    row["grown_bytes"] = looks.grown_bytes
    return row | longest(server)


def longest(server: Server) -> dict[str, int]:
    """The longest request that the server takes, and what a second one finds of it in the prefix
    cache."""
    slots = int(servers.get(server, "/server_info")["max_total_num_tokens"])
    prompt = tuple(10 + n % 997 for n in range(slots - PROBE_TOKENS - 2))
    first, again = Seen("longest"), Seen("again")
    trace.send(server.url, Ask(prompt, PROBE_TOKENS), first)
    trace.send(server.url, Ask(prompt, PROBE_TOKENS), again)
    for one in (first, again):
        if one.error is not None:
            raise RuntimeError(f"the longest request of {slots} slots failed: {one.error}")
    return {"peak_tokens": trace.peak(server.log()), "cached_again": again.cached_tokens}


def launch(model: Path, sizes: Sizes, total_bytes: int, seed: int, vocab: int) -> dict[str, dict[str, Any]]:
    """Start all modes at once, hold them, and let one after the other serve the trace."""
    waves = trace.trace(seed, sizes.pool_tokens, vocab, sizes.waves, sizes.rest_s)
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        running = {mode: start(mode, model, sizes, total_bytes) for mode in MODES}
        stack.enter_context(servers.ended(*running.values()))
        with ThreadPoolExecutor(
            len(running)
        ) as threads:  # a server that is up takes no time from those that start
            list(threads.map(_hold_when_ready, running.values()))
        for mode, server in running.items():
            began = time.monotonic()
            with servers.running(server):
                rows[mode] = serve(mode, server, waves, sizes)
            print(f"{mode}: {time.monotonic() - began:.0f} s", flush=True)
    return rows


def _hold_when_ready(server: Server) -> None:
    server.wait_ready()
    servers.hold(server)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    sizes = QUICK if options.quick else FULL
    from sglang_harli.tools.make_model import make_model

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="harli-pool-", ignore_cleanup_errors=True) as name:
        model = Path(name) / "model"
        length = {"max_position_embeddings": 2 * sizes.pool_tokens}
        made = make_model(model, "llama", size=sizes.model, dtype=sizes.dtype, seconds=0, overrides=length)
        rows = bench_pool_capacity.Rows(sizes.row_tokens, KEPT_ROW_TOKENS, HYPERPARAMETERS, LOGITS)
        capacity = bench_pool_capacity.measure(model, sizes.pool_tokens, rows)
        launches = [
            launch(model, sizes, capacity["total_bytes"], options.seed, made["vocab_size"])
            for _ in range(sizes.launches)
        ]
    results = {"capacity": capacity, "launches": launches, "seconds": round(time.monotonic() - began)}
    statements = judge(results)
    text = table(results, statements)
    page = report(options, sizes, results, text)
    print(text)
    print(f"written: {page} ({results['seconds']} s)")
    for statement in statements:
        if not statement.holds:
            print(f"FAILED: {statement.text}: {statement.found}")
    return 0 if all(statement.holds for statement in statements) else 1


def report(options: argparse.Namespace, sizes: Sizes, results: dict[str, Any], text: str) -> Path:
    """JSON, page and picture; the path of the page."""
    mib = results["capacity"]["total_bytes"] / 2**20
    return bench_report.write(
        "pool-quick" if options.quick else "pool",
        "cpu",
        question="Does one pool for the KV cache and for training do what a static split of it cannot?",
        settings={
            "model": f"Llama, {SHAPES[sizes.model]}, {sizes.dtype}, random weights",
            "memory": f"{sizes.pool_tokens} slots, {mib:.0f} MiB, "
            f"{results['capacity']['stripe_bytes'] / 2**20:.2f} MiB a stripe",
            "trace": f"{sizes.waves} waves from seed {options.seed}, {sizes.rest_s:g} s of rest after each (none where "
            "nothing trains)",
            "job": f"rank {HYPERPARAMETERS['lora_r']} on q_proj and v_proj, {sizes.batch} rows of {sizes.row_tokens} tokens",
            "largest micro-batch": f"rows of {sizes.row_tokens} tokens; with kept activations of {KEPT_ROW_TOKENS}",
            "launches": sizes.launches,
        },
        results=results,
        table=text,
        picture=picture.svg(results),
        not_shown=(
            "A GPU, a larger model, and a trace that needs more than the pool: there SGLang alone retracts too, and "
            "what it retracts depends on timing. Preemptions are SGLang's retractions. The decode step is the "
            "median gap between two tokens at the client."
        ),
        folder=options.results,
    )


if __name__ == "__main__":
    sys.exit(main())
