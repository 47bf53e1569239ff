"""How each mode of the co-location benchmark is started, run for one cell, and ended.

Everything is started once and held by SIGSTOP; a cell lets its own server (and trainer) go.
Servers:

plain    plain SGLang with our launcher's limits, no plugin but the one that adds up busy turns (``colocate/busy.py``)
sleepy   plain SGLang with --sleep-on-idle and no plugin at all: what a trainer at lowest priority runs beside
ours     our launcher; one job trains all the time but in cells of the mode "paused job", targets are set while it runs

Fixed time slices are our server with a target that never binds and ``max-quantum-ms`` as the slice:
after each decode step training gets that long, whatever the requests can spare.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colocate import busy, busy_server, shown
from colocate.client import Client, Load
from colocate.judge import HARLI, NICE, PAUSED, PLAIN_LOOP, SHIFT, SLICES, TRAIN, UNCOORDINATED
from colocate.noise import Watch
from colocate.plan import Cell
from colocate.trainer import ROW_TOKENS, STEP_ROWS, Trainer
from common import load as bench_load
from common import servers
from common.neighbour import neighbour
from common.servers import Server
from sglang_harli import FinetuneClient

NEVER_BINDS_MS = 3_600_000.0
TRAIN_ONLY_QUANTUM_MS = 1000.0
JOB_ROWS, WORDS = 64, 80  # of text that is longer than a row in any tokenizer: each row is cut to its length
START_LIMIT_S = 600.0
SETTLE_S = 1.0  # after something was let go, or options were set
CUT_AFTER = 3.0  # times serve-only's time
LAST_STEP_S = 5.0  # waited for the end of a step, to know how much of it was trained in time
IDLE_TURNS = (HARLI, TRAIN, TRAIN, HARLI, HARLI, TRAIN, TRAIN, HARLI)
LOOK_S = 1.0  # a look takes time of the cores that decode: ten in a second are seen in the predictor's error
SHIFT_STEPS = 400  # the predictor's figures are of its latest 200 steps, and 200 it may need


@dataclass(frozen=True, slots=True)
class Place:
    """What is served: ``model`` folder, ``device``, the traffic's lengths, flags of every server,
    threads."""

    model: Path
    folder: Path
    device: str
    prompt_tokens: int
    output_tokens: int
    ratio: float
    flags: tuple[str, ...]
    client_cores: frozenset[int] | None
    weights_bytes: int
    threads: int = 2


class Rig:
    """Everything that runs, held until a cell lets it go."""

    def __init__(self, place: Place, watch: Watch) -> None:
        self.place = place
        self.watch = watch
        self.servers: dict[str, Server] = {}
        self.trainers: dict[int, Trainer] = {}
        self.start_s: dict[str, float] = {}
        self._busy_path = place.folder / "busy.txt"
        self._stack = contextlib.ExitStack()
        self._job = ""
        self._last_event = 0

    # ---------------------------------------------------------------- up and down
    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:  # what went wrong is most often said in a log, and those go with the folder
            for name, server in self.servers.items():
                print(f"---- {name}\n{server.log_tail(30)}", file=sys.stderr)
        self._stack.close()

    def start(self, names: list[str], nices: list[int]) -> None:
        """Start servers, plain loops and the load client; all are held at the end, our job in
        training."""
        for name in names:
            self.servers[name] = server = self._start(name)
            self._stack.enter_context(servers.ended(server))
        self.client = Client(
            self.place.folder,
            self.place.device,
            set(self.place.client_cores) if self.place.client_cores else None,
        )
        self._stack.callback(self.client.close)
        for nice in nices:
            self.trainers[nice] = trainer = Trainer(
                self.place.model,
                self.place.folder,
                nice=nice,
                device=self.place.device,
                threads=self.place.threads,
            )
            self._stack.callback(trainer.close)
        waits = [self.client.wait_ready, *(t.wait_ready for t in self.trainers.values())]
        waits += [functools.partial(self._ready, name) for name in names]
        with ThreadPoolExecutor(
            len(waits)
        ) as threads:  # a server that is up takes no time from those that start
            list(threads.map(lambda wait: wait(), waits))
        if "ours" in self.servers:
            with servers.running(self.servers["ours"]):
                self._submit()

    def _start(self, name: str) -> Server:
        place, flags = self.place, list(self.place.flags)
        if name == "ours":
            return servers.start_server(place.model, *flags, device=place.device)
        if name == "sleepy":
            return servers.start_server(
                place.model, *flags, "--sleep-on-idle", launcher="plain", device=place.device
            )
        env = busy_server.environment(place.folder / "plugin", self._busy_path, place.device)
        return servers.start_server(place.model, *flags, launcher="plain", env=env, device=place.device)

    def _ready(self, name: str) -> None:
        server = self.servers[name]
        self.start_s[name] = round(server.wait_ready(START_LIMIT_S), 1)
        servers.hold(server)

    def _submit(self) -> None:
        word = "the time that serving leaves over trains the adapter "
        rows = [{"prompt": f"{n}: ", "completion": word * WORDS} for n in range(JOB_ROWS)]
        with self._harli() as client:
            job = client.submit(
                rows,
                n_epochs=10_000,
                batch_size=STEP_ROWS,
                checkpoint_every=0,
                max_seq_length=ROW_TOKENS,
                on_overflow="truncate",
                lora_r=16,
            )
            deadline = time.monotonic() + shown.JOB_LIMIT_S
            while (seen := client.get(job.id)).step < 3:
                if seen.status.final or time.monotonic() > deadline:
                    raise RuntimeError(f"the job does not train: {seen}")
                time.sleep(0.2)
            self._job = job.id
            tokens = [event.data["tokens"] for event in self._events(client)]
        if set(tokens) != {STEP_ROWS * ROW_TOKENS}:
            raise RuntimeError(
                f"steps of {sorted(set(tokens))} tokens, not of {STEP_ROWS} rows of {ROW_TOKENS}"
            )

    def limits(self) -> dict[str, Any]:
        """What limits the servers have, by name; those that differ between two of them hold each
        one's."""
        found: dict[str, dict[str, Any]] = {}
        for name, server in self.servers.items():
            with servers.running(server):
                found[name] = servers.limits_of(server)
        alike = {}
        for key in (*servers.LIMITS, "max_total_num_tokens"):
            values = {name: limits.get(key) for name, limits in found.items()}
            one = next(iter(values.values()))
            alike[key] = one if all(value == one for value in values.values()) else values
        return alike

    def _harli(self) -> FinetuneClient:
        return FinetuneClient(self.servers["ours"].endpoint)

    def _events(self, client: FinetuneClient) -> list[Any]:
        """Steps since the last call."""
        events = list(client.events(self._job, self._last_event))
        if events:
            self._last_event = events[-1].id
        return [event for event in events if event.type == "step_metrics"]

    # ---------------------------------------------------------------- one cell
    def measure(self, cell: Cell) -> dict[str, Any]:
        """Let the cell's processes go, measure, hold them again."""
        self.watch.begin()
        if cell.mode == PLAIN_LOOP:
            found = self._plain_loop(cell)
        elif cell.mode in (TRAIN, HARLI, PAUSED, SLICES):
            found = self._ours(cell)
        else:
            found = self._plain(cell)
        noise = self.watch.end()
        base = {name: getattr(cell, name) for name in ("mode", "setting", "load", "repetition", "target_ms")}
        meant = cell.load == SHIFT  # there another process is part of the cell
        return {**base, **found, "noise": noise, "disturbed": None if meant else noise["why"]}

    def _plain_loop(self, cell: Cell) -> dict[str, Any]:
        trainer = self.trainers[0]
        trainer.set(cell.rows, cell.threads)
        with trainer.running():
            time.sleep(SETTLE_S)
            began_s = time.monotonic()
            time.sleep(cell.seconds)
            ended_s = time.monotonic()
        trainer.finish_step(ended_s)
        return {**shown.trained(trainer.points, began_s, ended_s), "pss_bytes": trainer.pss_bytes()}

    def _plain(self, cell: Cell) -> dict[str, Any]:
        server = self.servers["sleepy" if cell.mode == NICE else "plain"]
        trainer = None
        if cell.mode in (UNCOORDINATED, NICE):
            trainer = self.trainers[19 if cell.mode == NICE else 0]
            trainer.set(cell.rows, cell.threads)
        cut_s: list[float] = []
        with servers.running(server), contextlib.ExitStack() as stack:
            if trainer is not None:
                stack.enter_context(trainer.running(cell.duty))

            def give_up() -> None:
                cut_s.append(time.monotonic())
                stack.close()  # the trainer is held, so that the server can drop the rest

            found = self._serve(cell, server, give_up)
            stack.close()
            peak = server.pss_bytes()
        began_s, ended_s = found["began_s"], found["ended_s"]
        if trainer is None:
            busy_s = busy.between(busy.read(self._busy_path), began_s, ended_s)
            return {**found, "busy": busy_s / (ended_s - began_s), "pss_bytes": peak}
        ended_s = cut_s[0] if cut_s else ended_s
        trainer.finish_step(ended_s)
        trained = shown.trained(trainer.points, began_s, ended_s)
        return {**found, **trained, "pss_bytes": peak + trainer.pss_bytes()}

    def _serve(self, cell: Cell, server: Server, on_limit: Any) -> dict[str, Any]:
        place = self.place
        load = Load(
            cell.requests,
            cell.rate,
            1000 + cell.repetition,
            place.prompt_tokens,
            place.output_tokens,
            place.ratio,
        )
        found = self.client.run(server.url, place.model, load, cell.limit_s, on_limit)
        gaps = sorted(found.pop("gaps_ms"))
        spread = {f"p{p}": bench_load.percentile(gaps, p) for p in (50, 99, 100)} if gaps else None
        return {**found, "gap_ms": spread, "seconds": round(found["ended_s"] - found["began_s"], 3)}

    def _ours(self, cell: Cell) -> dict[str, Any]:
        server = self.servers["ours"]
        if cell.mode == HARLI and not cell.load:
            return self._idle(cell, server)
        if cell.mode == PAUSED:
            with servers.running(server), self._harli() as client, shown.paused(client, self._job):
                time.sleep(SETTLE_S)
                found = self._serve(cell, server, lambda: None)
                return {**found, "pss_bytes": server.pss_bytes()}
        beside = cell.mode == HARLI and isinstance(cell.load, int) and cell.seconds > 0
        with servers.running(server), self._harli() as client:
            turns = [self._turn(client, cell, TRAIN, cell.seconds)] if beside else []
            limits = self._targets(client, cell)
            time.sleep(SETTLE_S)
            self._events(client)  # those before are not needed
            offset_s = time.time() - time.monotonic()
            first = self._total(client, offset_s)
            quanta = shown.quanta(client)
            found: dict[str, Any] = {}
            if cell.load == SHIFT:
                found = self._shift(cell, server, client)
            elif cell.load:
                found = self._serve(cell, server, lambda: None)
            else:
                found["began_s"] = time.monotonic()
                time.sleep(cell.seconds)
                found["ended_s"] = time.monotonic()
            prediction, ran = shown.decode_steps(client), shown.quanta(client)
            points = [first, *self._steps(client, offset_s, found["ended_s"], first[1])]
            peak = server.pss_bytes()
            if beside:
                turns.append(self._turn(client, cell, TRAIN, cell.seconds))
                found["train_only_tokens_per_s"] = shown.rate(turns)
        trained = shown.trained(points, found["began_s"], found["ended_s"])
        between = {name: ran[name] - quanta[name] for name in ran.keys() & quanta.keys()}
        return {
            "prediction": prediction,
            "quanta": between,
            "limits_ms": limits,
            **found,
            **trained,
            "pss_bytes": peak,
        }

    def _idle(self, cell: Cell, server: Server) -> dict[str, Any]:
        """Nothing is served: default limits and train-only's in turns, since a machine's speed
        changes in seconds."""
        turns: dict[str, list[tuple[float, float]]] = {HARLI: [], TRAIN: []}
        with servers.running(server), self._harli() as client:
            for mode in IDLE_TURNS:
                turns[mode].append(self._turn(client, cell, mode, cell.seconds / len(IDLE_TURNS) * 2))
            peak = server.pss_bytes()
        rates = {mode: shown.rate(found) for mode, found in turns.items()}
        return {"tokens_per_s": rates[HARLI], "train_only_tokens_per_s": rates[TRAIN], "pss_bytes": peak}

    def _turn(self, client: FinetuneClient, cell: Cell, mode: str, seconds: float) -> tuple[float, float]:
        """(finetune tokens, seconds) with nothing served under the limits of ``mode``."""
        self._targets(client, replace(cell, mode=mode))
        time.sleep(SETTLE_S / 2)
        self._events(client)
        offset_s = time.time() - time.monotonic()
        began_s, _ = first = self._total(client, offset_s)
        ended_s = began_s + seconds
        time.sleep(max(ended_s - time.monotonic(), 0.0))
        points = [first, *self._steps(client, offset_s, ended_s, 0.0)]
        return busy.between(points, began_s, ended_s), seconds

    def _targets(self, client: FinetuneClient, cell: Cell) -> dict[str, float]:
        """``harli set`` for this cell; what is in force then."""
        values: dict[str, float | str | None] = {
            "tpot_slo_ms": 50.0 if cell.target_ms is None else cell.target_ms,
            "max_itl_ms": None,
            "ttft_slo_ms": None,
            "max_quantum_ms": None,
            "max_idle_quantum_ms": None,
        }
        if cell.mode == TRAIN:
            values["max_idle_quantum_ms"] = TRAIN_ONLY_QUANTUM_MS
        if cell.mode == SLICES:
            values |= {"tpot_slo_ms": NEVER_BINDS_MS, "max_quantum_ms": cell.slice_ms}
        answer = client.set(**values)
        if answer.outcome != "applied":
            raise RuntimeError(f"harli set {values}: {answer.outcome}: {answer.message}")
        effective = answer.effective
        return {"busy": effective["max_quantum_ms"], "idle": effective["max_idle_quantum_ms"]}

    def _total(self, client: FinetuneClient, offset_s: float) -> tuple[float, float]:
        """The end of the next step, as the zero of what is counted."""
        deadline = time.monotonic() + shown.JOB_LIMIT_S
        while time.monotonic() < deadline:
            steps = self._events(client)
            if steps:
                return steps[-1].created_at - offset_s, 0.0
            time.sleep(0.05)
        raise RuntimeError("the job does not train while nothing is served")

    def _steps(
        self, client: FinetuneClient, offset_s: float, ended_s: float, total: float
    ) -> list[tuple[float, float]]:
        """(monotonic seconds, tokens so far) at the end of each step, up to the first after
        ``ended_s``."""
        points: list[tuple[float, float]] = []
        deadline = time.monotonic() + LAST_STEP_S
        while True:
            for event in self._events(client):
                total += event.data["tokens"]
                points.append((event.created_at - offset_s, total))
            if (points and points[-1][0] >= ended_s) or time.monotonic() > deadline:
                return points
            time.sleep(0.05)

    def _shift(self, cell: Cell, server: Server, client: FinetuneClient) -> dict[str, Any]:
        """Load all the time; another process takes half of a core, and the predictor is judged from
        200 steps later on."""

        def decode_steps() -> dict[str, Any]:
            deadline = time.monotonic() + shown.JOB_LIMIT_S
            while (score := shown.decode_steps(client)) is None:  # the scheduler did not answer in time
                if time.monotonic() > deadline:
                    raise RuntimeError("harli status shows no predicted decode steps")
                time.sleep(0.2)
            return score

        with ThreadPoolExecutor(1) as thread:
            load = thread.submit(self._serve, cell, server, lambda: None)
            time.sleep(cell.seconds)
            with neighbour():
                before = decode_steps()
                while not load.done() and decode_steps()["steps"] < before["steps"] + SHIFT_STEPS:
                    time.sleep(LOOK_S)
                after = decode_steps()
            found = load.result()
        steps = after["steps"] - before["steps"]
        return {**found, "shift": {"before": before, "after": after, "steps": steps}}
