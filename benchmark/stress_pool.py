"""Is anything ever read after it was given away, lost or changed while memory moves between the KV
cache and training?

    python benchmark/stress_pool.py --minutes 10 [--seed 1]

A tiny fp32 model with a pool so small that a few requests or one job fill it.  Memory is poisoned
with NaN on its way to training (HARLI_POOL_DEBUG) and SGLang's strict memory checks run on every
busy turn.  Requests come in spells, with shared beginnings, some as long as the whole pool, some
aborted or abandoned; finetune jobs come, are cancelled, paused and resumed; the cap on what
training may hold is changed; the prefix cache is flushed.  Two parts, on a server each: *fixed*
with a fixed split of training, where every finished job must have the weights and losses of an
undisturbed one, bit for bit; and *free*, where the split follows the load and activations are kept
when there is memory, so that losses are compared within 0.1%.  Both end with the pool's ledger
clean and every answer as on the quiet server.

Exits with 1 when an answer differs, a request fails that was not cut by its client, a job is lost,
doubled, different or failed, the parts of the pool do not give its total, or memory is not back at
the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from common import report, servers
from pool.stress_traffic import MOST_TOKENS, Askers, Question, catalogue, tide
from sglang_harli.errors import HarliError
from support.models import make_model
from survive.jobs import JobClients, Kind, Ticket, digest, judge, kinds

POOL_TOKENS = 4096
BATCH_SIZES = (2, 5, 9)  # the last needs more than the prefixes leave that are kept
VOCAB = 509
ENVIRONMENT = {
    "HARLI_POOL_DEBUG": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
PARTS = {"fixed": ("--harli-quantum-rows", "1"), "free": ()}
FIXED_SHARE = 0.6  # of the minutes
CAPS = (None, 0.9)  # of the pool: what --harli-max-train-mem is set to in turn
BAD_LINES = re.compile(r"[Ll]eak|Traceback|LedgerError|AssertionError|still lent|\bnan\b")
LOSS_TOLERANCE = 1e-3  # of the free split, relative


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory that moves under requests, aborts and jobs.")
    parser.add_argument("--minutes", type=float, default=10.0, help="of both parts together (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of requests and jobs")
    parser.add_argument("--streams", type=int, default=6, help="clients that send requests")
    parser.add_argument("--jobs", type=int, default=2, help="clients that submit jobs")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    options = parser.parse_args(argv)
    if options.minutes < 1:
        parser.error("--minutes: give at least 1")
    return options


class Part:
    """One server and what is done to it."""

    def __init__(self, name: str, model: str, folder: Path, options: argparse.Namespace) -> None:
        self.name, self._options = name, options
        self.seconds = 60 * options.minutes * (FIXED_SHARE if name == "fixed" else 1 - FIXED_SHARE)
        self.run_dir = folder / f"runs-{name}"
        self.server = servers.start_server(
            model,
            *("--max-total-tokens", str(POOL_TOKENS), "--context-length", str(2 * POOL_TOKENS)),
            *("--harli-tpot-slo-ms", "100", "--max-loaded-loras", "8", *PARTS[name]),
            env=ENVIRONMENT,
            run_dir=self.run_dir,
        )
        offered = [
            Kind(k.name, k.rows, k.hyperparameters | {"batch_size": size})
            for k, size in zip(kinds(), BATCH_SIZES, strict=True)
        ]
        self.jobs = JobClients(self.server.endpoint, clients=options.jobs, seed=options.seed, offered=offered)
        self.questions = catalogue(options.seed, POOL_TOKENS, VOCAB)
        self.weights: dict[str, str] = {}
        self.losses: dict[str, dict[int, float]] = {}
        self.looks = {"count": 0, "wrong": 0, "most_lent": 0}
        self.flushed = 0
        self.caps: list[str] = []

    async def run(self) -> dict[str, Any]:
        await asyncio.to_thread(self.server.wait_ready)
        async with _session() as session:
            before = [await self._answer(session, question) for question in self.questions]
            await self._undisturbed()
            asker = await self._disturbed(session, before)
            await self._until_returned(session)
            after = [await self._answer(session, question) for question in self.questions]
            pool = await self._until_returned(session)
        found = await judge(self.jobs, self.weights, self.run_dir)
        if self.name == "free":
            found["differing"] = []  # the order of sums follows the load: losses are compared
        found["losses"] = self._losses_apart()
        errors = [seen.error for seen in asker.seen if seen.error]
        return {
            "seconds": self.seconds,
            "requests": len(asker.seen),
            "cut": asker.cut,
            "failed_requests": errors,
            "differing": asker.differing
            + [
                f"question {n} at the end"
                for n, pair in enumerate(zip(before, after, strict=True))
                if pair[0] != pair[1]
            ],
            "jobs": found,
            "pool": pool,
            "looks": self.looks,
            "flushed": self.flushed,
            "caps": {outcome: self.caps.count(outcome) for outcome in sorted(set(self.caps))},
            "log": sorted({line[:300] for line in self.server.log().splitlines() if BAD_LINES.search(line)})[
                :20
            ],
            "alive": self.server.process.poll() is None,
        }

    async def _undisturbed(self) -> None:
        """One job of each kind alone: what all others are compared with."""
        async with self.jobs.connect() as client:
            for kind in self.jobs.offered:
                ticket = Ticket(f"reference-{kind.name}", kind)
                self.jobs.tickets.append(ticket)
                await self.jobs.submit(client, ticket)
                await self.jobs.finish(client, ticket)
                if ticket.status != "succeeded" or ticket.id is None:
                    raise SystemExit(f"the reference job {kind.name} ended as {ticket.status}")
                self.weights[kind.name] = digest(self.run_dir / ticket.id)
                self.losses[kind.name] = losses(self.run_dir / ticket.id)
                print(f"{self.name}: reference {kind.name}: {self.weights[kind.name][:12]}", flush=True)

    async def _disturbed(self, session: aiohttp.ClientSession, references: list[list[int]]) -> Askers:
        no_more, ended = asyncio.Event(), asyncio.Event()
        began = time.monotonic()
        spells = tide(self._options.seed, self.seconds)
        asker = Askers(
            self.server.url,
            self.questions,
            references,
            streams=self._options.streams,
            seed=self._options.seed,
            flowing=lambda: any(a <= time.monotonic() - began < b for a, b in spells),
        )
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(task) for task in (self._look(), self._meddle(session))]
            traffic = group.create_task(asker.run(ended))
            jobs = group.create_task(self.jobs.run(no_more))
            await asyncio.sleep(self.seconds)
            no_more.set()
            ended.set()
            await traffic
            await jobs
            for task in beside:
                task.cancel()
        return asker

    async def _look(self) -> None:
        """Whether the pool's parts give its total, twice a second."""
        async with self.jobs.connect() as client:
            while True:
                with contextlib.suppress(HarliError):
                    pool = (await client.status()).pool
                    assert pool is not None, "the server has no pool"
                    parts = pool["kv_bytes"] + pool["train_bytes"] + pool["free_bytes"]
                    self.looks["count"] += 1
                    self.looks["wrong"] += parts != pool["total_bytes"]
                    self.looks["most_lent"] = max(self.looks["most_lent"], pool["train_bytes"])
                await asyncio.sleep(0.5)

    async def _meddle(self, session: aiohttp.ClientSession) -> None:
        """Change the cap, and flush the prefix cache where the server is idle enough to allow
        it."""
        rng = random.Random(f"meddle {self._options.seed}")
        async with self.jobs.connect() as client:
            for turn in range(1_000_000):
                await asyncio.sleep(rng.uniform(3, 12))
                cap = CAPS[turn % len(CAPS)]
                pool = (await client.status()).pool or {}
                value = None if cap is None else str(int(cap * pool["total_bytes"]))
                self.caps.append((await client.set(max_train_mem=value)).outcome)
                self.flushed += await self._flush(session)

    async def _flush(self, session: aiohttp.ClientSession) -> bool:
        async with session.post(f"{self.server.url}/flush_cache") as answer:
            return answer.status == 200

    async def _until_returned(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """The pool's status once nothing trains and the prefix cache is empty, or after a
        minute."""
        deadline = time.monotonic() + 60
        async with self.jobs.connect() as client:
            while True:
                await self._flush(session)
                pool = (await client.status()).pool or {}
                if returned(pool) or time.monotonic() > deadline:
                    return pool
                await asyncio.sleep(0.5)

    async def _answer(self, session: aiohttp.ClientSession, question: Question) -> list[int]:
        sampling = {"max_new_tokens": MOST_TOKENS, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": list(question.prompt), "sampling_params": sampling}
        async with session.post(f"{self.server.url}/generate", json=body) as answer:
            return (await answer.json())["output_ids"]

    def _losses_apart(self) -> list[str]:
        """Finished jobs whose losses are not those of the undisturbed one."""
        apart = []
        for ticket in self.jobs.tickets:
            if ticket.status == "succeeded" and ticket.id:
                found, wanted = losses(self.run_dir / ticket.id), self.losses[ticket.kind.name]
                if not same_losses(found, wanted, 0.0 if self.name == "fixed" else LOSS_TOLERANCE):
                    apart.append(f"{ticket.id} ({ticket.kind.name}): {found} against {wanted}")
        return apart


@contextlib.asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


def losses(folder: Path) -> dict[int, float]:
    """Loss by step of a job's metrics file."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


# ------------------------------------------------------------------ verdicts (pure)
def same_losses(found: dict[int, float], wanted: dict[int, float], tolerance: float) -> bool:
    return found.keys() == wanted.keys() and all(
        math.isclose(found[step], wanted[step], rel_tol=tolerance, abs_tol=0.0) for step in wanted
    )


def returned(pool: dict[str, Any]) -> bool:
    """Whether training holds nothing, by the total and by every owner, and requests and cached
    prefixes hold nothing but SGLang's padded page."""
    held = {owner: size for owner, size in (pool.get("by_owner") or {}).items() if owner != "kv"}
    if not pool or pool["train_bytes"] or any(held.values()):
        return False
    return pool["kv_bytes"] * POOL_TOKENS <= pool["total_bytes"]


def verdict(parts: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong, one line each."""
    problems = []
    for name, found in parts.items():
        problems += [f"{name}: a request failed: {text}" for text in found["failed_requests"]]
        problems += [f"{name}: an answer differs: {text}" for text in found["differing"]]
        for fault in ("lost", "doubled", "differing", "failed", "losses"):
            problems += [f"{name}: job {fault}: {job}" for job in found["jobs"][fault]]
        looks, pool = found["looks"], found["pool"]
        if looks["wrong"] or not looks["count"]:
            problems.append(
                f"{name}: the pool's parts did not give its total at {looks['wrong']} of {looks['count']}"
            )
        if not returned(pool):
            problems.append(f"{name}: memory is not back: {pool}")
        if not looks["most_lent"] or not pool.get("reclaims"):
            problems.append(
                f"{name}: memory did not move: {looks['most_lent']} bytes lent, {pool.get('reclaims')} reclaims"
            )
        problems += [f"{name}: in the log: {line}" for line in found["log"]]
        if not found["alive"]:
            problems.append(f"{name}: the server has ended")
    return problems


def table(parts: dict[str, dict[str, Any]], problems: list[str]) -> str:
    rows = [
        ("seconds", lambda f: f"{f['seconds']:g}"),
        ("requests", lambda f: f"{f['requests']}, {f['cut']} of them aborted or abandoned"),
        (
            "requests failed / answers different",
            lambda f: f"{len(f['failed_requests'])} / {len(f['differing'])}",
        ),
        ("jobs", lambda f: ", ".join(f"{n} {status}" for status, n in sorted(f["jobs"]["statuses"].items()))),
        (
            "jobs lost / doubled / different / failed / other losses",
            lambda f: " / ".join(
                str(len(f["jobs"][n])) for n in ("lost", "doubled", "differing", "failed", "losses")
            ),
        ),
        (
            "most lent, share of the pool",
            lambda f: f"{f['looks']['most_lent'] / f['pool']['total_bytes']:.0%}",
        ),
        ("memory taken back inline, times", lambda f: str(f["pool"].get("reclaims"))),
        ("taking it back, ms: median, longest", lambda f: _reclaim(f["pool"])),
        ("micro-batches dropped / spills", lambda f: _pair(f["pool"], "dropped_micro_batches", "spills")),
        ("prefix cache flushed, times", lambda f: str(f["flushed"])),
        ("cap changed", lambda f: ", ".join(f"{n} {outcome}" for outcome, n in f["caps"].items())),
        ("held by training at the end, bytes", lambda f: str(f["pool"].get("train_bytes"))),
    ]
    lines = ["| | " + " | ".join(parts) + " |", "|---" * (len(parts) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(f) for f in parts.values()) + " |" for name, cell in rows]
    return "\n".join([*lines, "", f"Verdict: {'clean' if not problems else f'{len(problems)} problems'}."])


def _reclaim(pool: dict[str, Any]) -> str:
    times = pool.get("reclaim_ms") or {}
    return f"{times.get('p50')}, {times.get('max')}"


def _pair(pool: dict[str, Any], first: str, second: str) -> str:
    return f"{pool.get(first)} / {pool.get(second)}"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="harli-stress-", ignore_cleanup_errors=True) as name:
        model = make_model(
            Path(name) / "model", "llama", max_position_embeddings=2 * POOL_TOKENS, vocab_size=VOCAB
        )
        for part_name in PARTS:
            part = Part(part_name, model, Path(name), options)
            try:
                parts[part_name] = asyncio.run(part.run())
            finally:
                part.server.kill()
    problems = verdict(parts)
    text = table(parts, problems)
    report.write(
        "stress-pool",
        "cpu",
        question="Is anything read after it was given away, lost or changed while the pool's memory moves?",
        settings={
            "model": "Llama, 64 wide, 2 layers, fp32, random weights",
            "pool": f"{POOL_TOKENS} slots",
            "minutes": options.minutes,
            "seed": options.seed,
            "clients": f"{options.streams} with requests, {options.jobs} with jobs",
            "environment": " ".join(f"{k}={v}" for k, v in ENVIRONMENT.items()),
        },
        results=parts,
        table=text,
        not_shown="A GPU (the host backing alone), kills (benchmark/soak.py), and a model whose answers are near ties.",
        folder=options.results,
    )
    print(text)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
