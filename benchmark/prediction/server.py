"""The latency predictor on a real server: mixed loads while a job trains, then while another
process takes half a core.

Part of ``bench_predictor.py`` (``--server``).  The server judges every decode step by a prediction
that had not seen it, so all loads are held out; this reads its counts once a second.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import load as bench_load
from common import servers
from common.neighbour import neighbour
from sglang_harli import FinetuneClient

MAPE, COVERAGE, BACK_WITHIN = 0.10, 0.98, 200
WARM_UP = 300  # decode steps that are not judged: the predictor starts from a guess
LEAST = 400  # judged steps of a span
# A look takes time of the cores that decode steps run on: ten of them a second made the error 16 to
# 19% on two cores, one a second 8% (*measured*).
POLL_S = 1.0
# Streams, tokens of prompt and of output of clients that are there at the same time; the mixes take
# turns.
MIXES = (
    ((1, 64, 120),),
    ((4, 200, 80), (1, 600, 60)),
    ((8, 64, 60), (2, 400, 40)),
    ((2, 1000, 100),),
)
ROWS = 64
PHASES = ("decode", "decode_adapters")


@dataclass(frozen=True, slots=True)
class Seen:
    """Decode steps of the server by now, how many were within their bound, and the sum of their
    relative errors."""

    at_s: float
    steps: int
    covered: int
    error: float


@dataclass(frozen=True, slots=True)
class Span:
    """Of the decode steps between two looks."""

    steps: int
    mape: float
    coverage: float


def look(server: servers.Server) -> Seen:
    serving = servers.get(server, "/server_info")["internal_states"][0]["harli"]["serving"]
    scores = [serving["prediction"][phase] for phase in PHASES if phase in serving["prediction"]]
    steps = sum(score["steps"] for score in scores)
    covered = sum(round(score["steps"] * score["total_coverage"]) for score in scores)
    error = sum(score["steps"] * score["total_mape"] for score in scores)
    return Seen(time.monotonic(), steps, covered, error)


def span(first: Seen, last: Seen) -> Span:
    steps = last.steps - first.steps
    if not steps:
        return Span(0, float("nan"), float("nan"))
    return Span(steps, (last.error - first.error) / steps, (last.covered - first.covered) / steps)


def from_step(seen: Sequence[Seen], step: int) -> Seen:
    """The first look at which so many steps were over, or the last."""
    return next((each for each in seen if each.steps >= step), seen[-1])


def back_after(seen: Sequence[Seen]) -> int:
    """Steps after the first look until the next 200 are covered as promised; all of them where they
    never are."""
    for first in seen:
        last = from_step(seen, first.steps + BACK_WITHIN)
        if last.steps - first.steps >= BACK_WITHIN and span(first, last).coverage >= COVERAGE:
            return first.steps - seen[0].steps
    return seen[-1].steps - seen[0].steps


def watch(server: servers.Server, enough: Callable[[Seen], bool], limit_s: float) -> list[Seen]:
    """Looks until there were enough steps, or ``limit_s`` are over."""
    seen = [look(server)]
    while not enough(seen[-1]) and seen[-1].at_s - seen[0].at_s < limit_s:
        time.sleep(POLL_S)
        seen.append(look(server))
    return seen


@contextlib.contextmanager
def traffic(url: str, vocab: int) -> Iterator[None]:
    """The mixes of clients, one after the other, until the block ends.

    Raises:
        RuntimeError: a request failed.
    """
    over = threading.Event()
    failures: list[BaseException] = []

    def client(mix: int, number: int, load: bench_load.Load, ends_s: float) -> None:
        rng = random.Random(f"{mix}-{number}-{load}")
        try:
            while not over.is_set() and time.monotonic() < ends_s:
                bench_load.stream(url, load.prompt(rng), load.output_tokens)
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(error)
            over.set()

    def director() -> None:
        for turn in range(1_000_000):
            if over.is_set():
                return
            ends_s, clients = time.monotonic() + 4.0, []
            for streams, prompt, output in MIXES[turn % len(MIXES)]:
                load = bench_load.Load(streams, prompt, output, vocab, seed=turn)
                clients += [
                    threading.Thread(target=client, args=(turn, n, load, ends_s), daemon=True)
                    for n in range(streams)
                ]
            for each in clients:
                each.start()
            for each in clients:
                each.join()

    conductor = threading.Thread(target=director, daemon=True)
    conductor.start()
    try:
        yield
    finally:
        over.set()
        conductor.join()
    if failures:
        raise RuntimeError(f"a client failed: {failures[0]!r}") from failures[0]


def rows() -> list[dict[str, str]]:
    text = "a river, a stone bridge and a lamp in the garden by the harbour "
    return [{"prompt": f"{n}: ", "completion": text * 4} for n in range(ROWS)]


def measure(model: Path | None, size: str, steps: int, limit_s: float) -> dict[str, Any]:
    """Start a server, train, and judge its predictions.

    Args:
        model: folder; None: a Llama of ``size`` is made.
        steps: decode steps of the quiet and of the disturbed span each.
        limit_s: of each span.
    """
    with tempfile.TemporaryDirectory(prefix="harli-predictor-") as folder:
        if model is None:
            from sglang_harli.tools.make_model import make_model

            model = Path(folder) / "model"
            make_model(model, "llama", size=size, dtype="bfloat16", seconds=0)
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        server = servers.ours(model, "--harli-tpot-slo-ms", "60")
        with servers.ended(server):
            server.wait_ready()
            with FinetuneClient(server.endpoint) as client:
                client.submit(rows(), batch_size=4, n_epochs=1000, checkpoint_every=0)
            with traffic(server.url, vocab):
                warm = watch(server, lambda seen: seen.steps >= WARM_UP, limit_s)
                begin = warm[-1].steps
                quiet = watch(server, lambda seen: seen.steps >= begin + steps, limit_s)
                with neighbour():
                    begin_disturbed = quiet[-1].steps
                    disturbed = watch(server, lambda seen: seen.steps >= begin_disturbed + steps, limit_s)
                begin_after = disturbed[-1].steps
                after = watch(server, lambda seen: seen.steps >= begin_after + steps, limit_s)
            states = servers.get(server, "/server_info")["internal_states"][0]["harli"]
    return {
        "quiet": asdict(span(quiet[0], quiet[-1])),
        **_after_change("core taken", disturbed),
        **_after_change("core given back", after),
        "job": {
            name: (states["training"] or {}).get(name)
            for name in ("step", "quanta", "busy_quanta", "train_s")
        },
        "prediction": states["serving"]["prediction"],
    }


def _after_change(name: str, seen: Sequence[Seen]) -> dict[str, Any]:
    settled = from_step(seen, seen[0].steps + BACK_WITHIN)
    return {name: {**asdict(span(settled, seen[-1])), "back_after": back_after(seen)}}


# ------------------------------------------------------------------ the verdict
def judge(found: dict[str, Any]) -> list[str]:
    """What does not hold, a sentence each."""
    wrong = []
    for name in ("quiet", "core taken", "core given back"):
        row = found[name]
        if row["steps"] < LEAST:
            wrong.append(
                f"server, {name}: {row['steps']} decode steps were judged, at least {LEAST} are needed"
            )
        if not row["coverage"] >= COVERAGE:
            wrong.append(
                f"server, {name}: {100 * row['coverage']:.2f}% covered, must be at least {100 * COVERAGE:g}%"
            )
        if row.get("back_after", 0) > BACK_WITHIN:
            wrong.append(
                f"server, {name}: covered again after {row['back_after']} steps, must be {BACK_WITHIN} at most"
            )
    if not found["quiet"]["mape"] < MAPE:
        wrong.append(
            f"server, quiet: error {100 * found['quiet']['mape']:.2f}%, must be below {100 * MAPE:g}%"
        )
    if not found["job"]["busy_quanta"]:
        wrong.append("server: no training quantum ran beside the requests")
    return wrong


def table(found: dict[str, Any]) -> str:
    lines = [
        "| real server | decode steps | error | covered | covered again after |",
        "|---|---|---|---|---|",
    ]
    for name in ("quiet", "core taken", "core given back"):
        row = found[name]
        back = f"{row['back_after']} steps" if "back_after" in row else "-"
        lines.append(
            f"| {name} | {row['steps']} | {100 * row['mape']:.2f}% | {100 * row['coverage']:.2f}% | {back} |"
        )
    return "\n".join(lines)
