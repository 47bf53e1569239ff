"""Finetune jobs that come and go during a soak, and the verdict on what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_harli import AsyncFinetuneClient
from sglang_harli.errors import NotReadyError, StateError
from sglang_harli.protocol.public import Event

AWAY_S = 300.0  # how long a client tries to reach a server that was killed
FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Kind:
    """Data and hyperparameters; every uninterrupted run of a kind ends with the same weights."""

    name: str
    rows: list[dict[str, str]]
    hyperparameters: dict[str, Any]


def kinds() -> list[Kind]:
    """Three small jobs of 12 optimizer steps, with what an interruption could get wrong: dropout,
    accumulation, a schedule, several epochs."""
    base = {"lora_r": 8, "batch_size": 2, "n_epochs": 2, "checkpoint_every": 3, "learning_rate": 1e-3}
    return [
        Kind("accumulating", _rows(1, 24), base | {"gradient_accumulation_steps": 2, "lora_dropout": 0.1}),
        Kind("cosine", _rows(2, 12), base | {"lr_scheduler": "cosine", "seed": 7}),
        Kind(
            "few-modules", _rows(3, 12), base | {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}
        ),
    ]


def _rows(seed: int, count: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    towns = ["Grebe", "Nea", "Tarn", "Ostel", "Vimmer", "Quay", "Lund", "Parra"]
    return [
        {
            "prompt": f"Question {n}: how far is {rng.choice(towns)} from {rng.choice(towns)}?",
            "completion": f" It is {rng.randrange(1000)} miles by road and {rng.randrange(1000)} by sea.",
        }
        for n in range(count)
    ]


@dataclass
class Ticket:
    """One job as its client knows it; ``id`` is set once the submit was acknowledged."""

    key: str
    kind: Kind
    id: str | None = None
    may_cancel: bool = False
    status: str = ""
    model: str | None = None


class JobClients:
    """A few clients, each with one job at a time.

    Args:
        endpoint: of the finetune service.
        seed: of what they submit and when they cancel or pause.
        offered: what they choose from (default: ``kinds()``).
    """

    def __init__(
        self, endpoint: str, *, clients: int, seed: int, offered: Sequence[Kind] | None = None
    ) -> None:
        self.tickets: list[Ticket] = []
        self.offered = list(offered or kinds())
        self._endpoint, self._clients, self._seed = endpoint, clients, seed

    @property
    def served(self) -> list[str]:
        """Adapters that have been announced as servable."""
        return [t.model for t in self.tickets if t.model]

    def connect(self) -> AsyncFinetuneClient:
        return AsyncFinetuneClient(self._endpoint, connect_timeout_s=AWAY_S)

    async def run(self, stop: asyncio.Event) -> None:
        """Submit until ``stop``, then wait for what is under way."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._clients):
                group.create_task(self._client(random.Random(f"{self._seed} {number}"), stop))

    async def _client(self, rng: random.Random, stop: asyncio.Event) -> None:
        async with self.connect() as client:
            while not stop.is_set():
                ticket = Ticket(f"soak-{rng.getrandbits(64):016x}", rng.choice(self.offered))
                self.tickets.append(ticket)
                await self.submit(client, ticket)
                assert ticket.id is not None
                what = rng.random()
                if what < 0.25:
                    await asyncio.sleep(rng.uniform(0, 12))
                    await self._steer(client, ticket, cancel=what < 0.15)
                await self.finish(client, ticket)

    async def submit(self, client: AsyncFinetuneClient, ticket: Ticket) -> None:
        """Until it is acknowledged; the key makes a repeated submit harmless."""
        job = await _patiently(
            lambda: client.submit(
                ticket.kind.rows,
                suffix=ticket.kind.name,
                idempotency_key=ticket.key,
                **ticket.kind.hyperparameters,
            )
        )
        ticket.id = job.id

    async def _steer(self, client: AsyncFinetuneClient, ticket: Ticket, *, cancel: bool) -> None:
        assert ticket.id is not None
        job = ticket.id
        with contextlib.suppress(StateError):  # it was over already
            if cancel:
                ticket.may_cancel = True
                await _patiently(lambda: client.cancel(job))
            else:
                await _patiently(lambda: client.pause(job))
                await asyncio.sleep(1)
                await _patiently(lambda: client.resume(job))

    async def finish(self, client: AsyncFinetuneClient, ticket: Ticket) -> None:
        """Wait for the job's end."""
        assert ticket.id is not None
        job = ticket.id
        over = await _patiently(lambda: client.wait(job))
        ticket.status, ticket.model = str(over.status), over.fine_tuned_model


async def _patiently(call: Any) -> Any:
    while True:
        try:
            return await call()
        except NotReadyError:  # the server is being restarted
            await asyncio.sleep(0.5)


# ------------------------------------------------------------------ verdicts
async def judge(clients: JobClients, references: dict[str, str], run_dir: Path) -> dict[str, Any]:
    """What became of every acknowledged job: lost, doubled, differing and failed ones by id."""
    found: dict[str, list[str]] = {name: [] for name in ("lost", "doubled", "differing", "failed")}
    acknowledged = {t.id: t for t in clients.tickets if t.id}
    async with clients.connect() as client:
        jobs = {job.id: job for job in await client.list(limit=10_000)}
        found["lost"] += [job for job in acknowledged if job not in jobs]
        # Each key was repeated until it was acknowledged: a job that no ticket names is a second
        # one.
        found["doubled"] += [job for job in jobs if job not in acknowledged]
        for job, ticket in acknowledged.items():
            if job not in jobs:
                continue
            events = [event async for event in client.events(job)]
            found["doubled"] += [f"{job}: {why}" for why in told_twice(events)]
            status = str(jobs[job].status)
            if status == "succeeded":
                if digest(run_dir / job) != references[ticket.kind.name]:
                    found["differing"].append(job)
            elif not (status == "cancelled" and ticket.may_cancel):
                found["failed"].append(f"{job}: {status} {jobs[job].error}")
    statuses = Counter(str(job.status) for job in jobs.values())
    return {"acknowledged": len(acknowledged), "statuses": dict(statuses), **found}


def told_twice(events: Sequence[Event]) -> Iterator[str]:
    """What happened to a job more often than it may (pure)."""
    types = [event.type for event in events]
    for once in ("job_created", "adapter_published", *FINAL):
        if types.count(once) > 1:
            yield f"{types.count(once)} times {once}"
    ends = [at for at, kind in enumerate(types) if kind in FINAL]
    if ends and any(kind in ("started", "resumed", "step_metrics") for kind in types[ends[0] :]):
        yield "it was run again after its end"
    steps = Counter((e.data.get("attempt"), e.data.get("step")) for e in events if e.type == "step_metrics")
    for (attempt, step), count in steps.items():
        if count > 1:
            yield f"step {step} of attempt {attempt} counted {count} times"


def digest(folder: Path) -> str:
    """Of a job's adapter."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
