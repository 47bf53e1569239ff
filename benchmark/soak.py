"""Does anything get lost, doubled, different or larger while a server is used, trained on and
killed?

    python benchmark/soak.py --minutes 30 [--seed 1] [--streams 3] [--jobs 3]
    python benchmark/soak.py --disaggregated --minutes 5

Two parts.  *Checkpoints*: a 25M model with a LoRA rank whose state is 100 MB trains under streaming
requests and saves it again and again; the gaps between tokens during a save are compared with the
target.  *Soak*: clients stream from the base and from finished adapters while ``/health`` answers;
finetune jobs come, are cancelled, paused and resumed; the service and everything are killed at
random from the seed, the service is held still; the server is started again with the same command.
At the end every job is judged: lost, doubled, run twice, and whether its weights are those of an
uninterrupted run (the split is fixed by --harli-quantum-rows), bit for bit.  With
``--disaggregated`` the server is the decode server of a prefill/decode pair: requests go through
SGLang's router, and what is killed is the decode server.

Exits with 1 when a request failed that was not in flight as the server was killed, when a job was
lost, doubled, different or failed, when memory grew by 5% or files by 16 (judged in runs of 10
minutes and more), when a killed service was away for more than 10 s, or when the p99 gap during a
checkpoint was above its target.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import report, servers
from common.servers import Server
from sglang_harli.tools.make_model import make_model
from sglang_harli.tools.server_process import free_port
from support.pair import DECODE, Pair, Side, missing
from survive import checkpoints
from survive.chaos import BACK_S, Chaos, plan
from survive.jobs import JobClients, Ticket, digest, judge, kinds
from survive.report import table, verdict
from survive.traffic import Traffic, excused
from survive.watch import EVERY_S, Watch

PROMPTS = [f"Tell me about the harbour of {town}." for town in ("Grebe", "Nea", "Tarn", "Ostel", "Vimmer")]
JUDGED_FROM_MINUTES = 10
# A small KV cache (64 MiB): one that fills with cached prefixes for an hour would look like a leak.
FLAGS = ("--harli-quantum-rows", "1", "--max-loaded-loras", "8", "--max-total-tokens", "8192")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kills, jobs and traffic; then the verdict.")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the soak (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="of kills, jobs and requests")
    parser.add_argument("--streams", type=int, default=3, help="clients that send requests")
    parser.add_argument("--jobs", type=int, default=3, help="clients that submit jobs")
    parser.add_argument("--skip-checkpoints", action="store_true", help="only the soak itself")
    parser.add_argument(
        "--disaggregated", action="store_true", help="the decode server of a pair; only the soak itself"
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the result files")
    options = parser.parse_args(argv)
    if options.minutes < 2:
        parser.error("--minutes: give at least 2")
    options.skip_checkpoints |= options.disaggregated
    return options


class Soak:
    """One server, its clients and what happens to it; of a pair it is the decode server."""

    def __init__(self, model: Path, folder: Path, options: argparse.Namespace) -> None:
        self._options = options
        self._port, self.endpoint = free_port(), f"tcp://127.0.0.1:{free_port()}"
        self._model, self.run_dir = model, folder / "runs"
        self.logs: list[str] = []
        self.watch = Watch()
        self.server, url = self.launch()
        self.jobs = JobClients(self.endpoint, clients=options.jobs, seed=options.seed)
        self.traffic = Traffic(
            url,
            PROMPTS,
            streams=options.streams,
            seed=options.seed,
            adapters=lambda: self.jobs.served,
            health_url=self.server.url,
        )
        self.chaos = Chaos(self.start, self.server, self.traffic.gate)
        self.references: dict[str, str] = {}

    def launch(self) -> tuple[Server, str]:
        """The server, and where requests go."""
        server = self.start()
        return server, server.url

    def start(self) -> Server:
        return servers.start_server(
            self._model, *FLAGS, port=self._port, run_dir=self.run_dir, endpoint=self.endpoint
        )

    async def run(self) -> dict[str, Any]:
        await asyncio.to_thread(self.server.wait_ready)
        no_more, ended = asyncio.Event(), asyncio.Event()
        seconds = 60 * self._options.minutes
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            traffic = group.create_task(self.traffic.run(ended))
            await self._uninterrupted()
            jobs = group.create_task(self.jobs.run(no_more))
            chaos = group.create_task(self.chaos.run(plan(self._options.seed, seconds)))
            await asyncio.sleep(seconds)
            await chaos
            no_more.set()
            await jobs
            ended.set()
            await traffic
            watching.cancel()
        found = await judge(self.jobs, self.references, self.run_dir)
        return self._results(found)

    async def _uninterrupted(self) -> None:
        """One run of each kind before anything is killed: what all others are compared with."""
        async with self.jobs.connect() as client:
            for kind in kinds():
                ticket = Ticket(f"reference-{kind.name}", kind)
                self.jobs.tickets.append(ticket)
                await self.jobs.submit(client, ticket)
                await self.jobs.finish(client, ticket)
                if ticket.status != "succeeded" or ticket.id is None:
                    raise SystemExit(f"the reference job {kind.name} ended as {ticket.status}")
                self.references[kind.name] = digest(self.run_dir / ticket.id)
                print(f"reference {kind.name}: {self.references[kind.name][:12]}", flush=True)

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                server = self.chaos.server
                await asyncio.to_thread(lambda s=server: self.watch.look(s.family(), s.pid))
            await asyncio.sleep(EVERY_S)

    def _results(self, found: dict[str, Any]) -> dict[str, Any]:
        bad = [s for s in self.traffic.seen if s.error is not None]
        kills = self.chaos.kills
        return {
            "jobs": found,
            "requests": len(self.traffic.seen),
            "adapter_requests": sum(1 for s in self.traffic.seen if s.adapter),
            "in_flight_when_killed": sum(1 for s in bad if excused(s, kills)),
            "failed_requests": [f"{s.adapter or 'base'}: {s.error}" for s in bad if not excused(s, kills)],
            "kills": {
                "everything": len(kills),
                "service": len(self.chaos.service_back_s),
                "stalls": len(self.chaos.stalls_back_s),
            },
            "service_back_s": [round(s, 1) for s in self.chaos.service_back_s],
            "stalls_back_s": [round(s, 1) for s in self.chaos.stalls_back_s],
            "restarts_s": [round(s, 1) for s in self.chaos.restarts_s],
            "lives": [
                {"role": life.role, "pid": life.pid, "lived_s": round(life.lived_s)}
                for life in self.watch.lives
            ],
        }

    def close(self) -> None:
        self.chaos.server.kill()


class PairSoak(Soak):
    """The decode server of a pair, whose prefill server and router stay up."""

    def launch(self) -> tuple[Server, str]:
        if (why := missing()) is not None:
            raise SystemExit(why)
        self._pair = Pair(self._model, decode=Side(FLAGS))
        self.endpoint, self.run_dir = self._pair.endpoint, self._pair.run_dir
        self._pair.__enter__()
        return self._pair.decode, self._pair.url

    def start(self) -> Server:
        return self._pair.launch(DECODE)

    def close(self) -> None:
        self._pair.close()


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="harli-soak-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model = folder / "model"
        make_model(model, "llama", size="25m", dtype="bfloat16", seconds=0)
        saves = None if options.skip_checkpoints else asyncio.run(checkpoints.run(model, folder))
        if saves is not None:
            print(f"gaps during a checkpoint, ms: {saves['during']}", flush=True)
        soak = (PairSoak if options.disaggregated else Soak)(model, folder, options)
        began = time.monotonic()
        try:
            results = asyncio.run(soak.run())
        finally:
            soak.close()
        results["seconds"] = round(time.monotonic() - began)
    results["checkpoints"] = saves
    judged = options.minutes >= JUDGED_FROM_MINUTES
    problems = verdict(results, soak.watch.lives, judged=judged)
    text = table(results, problems, judged=judged)
    report.write(
        "soak-disaggregated" if options.disaggregated else "soak",
        "cpu",
        question="Does anything get lost, doubled, different or larger under traffic, jobs, cancels and kills?",
        settings={
            "model": "25M Llama, bf16, random weights",
            "server": "the decode server of a pair" if options.disaggregated else "one",
            "minutes": options.minutes,
            "seed": options.seed,
            "streams": options.streams,
            "job clients": options.jobs,
            "a killed service is to be back within": f"{BACK_S:g} s",
        },
        results=results,
        table=text,
        not_shown=(
            "A power cut (kill -9 leaves the operating system's page cache), a GPU, more than one server, "
            "and any kill at a chosen step: test/e2e/test_kill.py goes through those."
        ),
        folder=options.results,
    )
    print(text)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
