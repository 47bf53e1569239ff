"""SGLang's own bench_serving as the load client: one process that runs it again and again.

A fresh ``python -m sglang.bench_serving`` imports for ten seconds, on the cores that are measured.
So its ``cli_main`` is called in a process that stays, with a command line per run; what it sends
and how it times is bench_serving's.  Two things are recorded beside it: when the first request was
sent, and how many tokens each was to get.  It times a token when its text comes, and a random model
may say nothing but special tokens, or bytes that are no text yet: so special tokens are not left
out, and a token without text counts as seen when it comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import modules
from sglang_harli.platforms.cpu import engine

START_S = 300.0
ABORT_EVERY_S = 1.0
NO_TEXT = "\ufffd"
LATE = None  # in place of a time: the request failed or did not end in time


@dataclass(frozen=True, slots=True)
class Load:
    """Open loop: ``requests`` with Poisson arrivals at ``rate`` per second, all of it from
    ``seed``.

    ``concurrency``: at most so many at once (closed loop with an infinite rate).
    """

    requests: int
    rate: float
    seed: int
    prompt_tokens: int
    output_tokens: int
    ratio: float
    concurrency: int | None = None

    def arguments(self, url: str, model: Path, out: Path) -> list[str]:
        """bench_serving's command line."""
        words = [
            *("--backend", "sglang", "--base-url", url, "--model", str(model), "--tokenizer", str(model)),
            *("--dataset-name", "random-ids", "--num-prompts", str(self.requests), "--seed", str(self.seed)),
            *("--random-input-len", str(self.prompt_tokens), "--random-output-len", str(self.output_tokens)),
            *(
                "--random-range-ratio",
                str(self.ratio),
                "--request-rate",
                repr(self.rate),
                "--tokenize-prompt",
            ),
            *("--output-details", "--output-file", str(out), "--disable-tqdm", "--flush-cache"),
        ]
        return words + (["--max-concurrency", str(self.concurrency)] if self.concurrency else [])


# ------------------------------------------------------------------ the process that stays
def loads(text: str) -> Any:
    """As ``json.loads``; an answer that has tokens and no text gets a mark for one (pure)."""
    answer = json.loads(text)
    if isinstance(answer, dict) and answer.get("text") == "":
        answer["text"] = NO_TEXT * bool((answer.get("meta_info") or {}).get("completion_tokens"))
    return answer


def _serve() -> None:
    """Read command lines (JSON lists) from stdin, run each, answer with a JSON line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # bench_serving prints its tables into the log
    from sglang.benchmark import serving

    seen: dict[str, Any] = {}
    get_dataset, get_request = serving.get_dataset, serving.get_request

    def recorded_dataset(*args: Any, **kwargs: Any) -> Any:
        rows = get_dataset(*args, **kwargs)
        seen["asked"] = [row.output_len for row in rows]
        for row in rows:
            row.extra_request_body = {
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": row.output_len,
                    "ignore_eos": True,
                    "skip_special_tokens": False,
                }
            }
        return rows

    def recorded_request(*args: Any, **kwargs: Any) -> Any:
        seen["began_s"] = time.monotonic()
        print(json.dumps({"began_s": seen["began_s"]}), file=answers, flush=True)
        return get_request(*args, **kwargs)

    serving.get_dataset, serving.get_request = recorded_dataset, recorded_request
    serving.json = types.SimpleNamespace(**vars(json) | {"loads": loads})
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        seen.clear()
        sys.argv = ["sglang.bench_serving", *json.loads(line)]
        try:
            serving.cli_main()
            seen["ended_s"] = time.monotonic()
        except (OSError, RuntimeError, ValueError, SystemExit) as error:  # the answer of this run
            seen["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(seen), file=answers, flush=True)


class Client:
    """The handle of that process.

    Args:
        folder: of its output files and log.
        device: ``cpu``: SGLang's CPU engine is put on its path, as for servers.
        cores: it is pinned to these; None: it is not.
    """

    def __init__(self, folder: Path, device: str, cores: set[int] | None) -> None:
        self._folder, self._runs = folder, 0
        environment = dict(os.environ)
        if device == "cpu":
            engine.turn_on(environment, path=[])
        self.log_path = folder / "client.log"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                modules.command("colocate.client"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=modules.found_in(environment),
                text=True,
            )
        if cores:
            os.sched_setaffinity(self.process.pid, cores)
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self) -> None:
        self._answer(START_S, None)

    def run(
        self, url: str, model: Path, load: Load, limit_s: float, on_limit: Callable[[], None]
    ) -> dict[str, Any]:
        """Send the load; what each request saw (see ``seen``).

        Args:
            limit_s: seconds after which the rest is aborted and counts as late; ``on_limit`` is
                called before.

        Raises:
            RuntimeError: bench_serving failed.
        """
        self._runs += 1
        out = self._folder / f"load-{self._runs}.jsonl"
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(load.arguments(url, model, out)) + "\n")
        self.process.stdin.flush()

        def cut() -> None:
            on_limit()
            _abort(url)

        answer, was_cut = self._answer(limit_s, cut)
        if "error" in answer:
            raise RuntimeError(
                f"bench_serving failed: {answer['error']}; {self.log_path.read_text()[-2000:]}"
            )
        details = json.loads(out.read_text().splitlines()[-1])
        out.unlink()
        began_s = answer["began_s"]
        times = {"began_s": began_s, "ended_s": began_s + details["duration"], "cut": was_cut}
        return {**times, **seen(details, answer["asked"])}

    def _answer(self, limit_s: float, on_limit: Callable[[], None] | None) -> tuple[dict[str, Any], bool]:
        deadline, was_cut = (
            time.monotonic() + max(limit_s, START_S),
            False,
        )  # the first request is still to come
        while True:
            try:
                line = self._answers.get(timeout=max(ABORT_EVERY_S, deadline - time.monotonic()))
            except queue.Empty:
                if on_limit is None:
                    raise RuntimeError(f"the load client was not ready within {limit_s:g} s") from None
                was_cut = True
                on_limit()
                continue
            if line is None:
                raise RuntimeError(f"the load client ended: {self.log_path.read_text()[-2000:]}")
            answer = json.loads(line)
            if list(answer) != ["began_s"]:
                return answer, was_cut
            deadline = answer["began_s"] + limit_s

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _abort(url: str) -> None:
    body = json.dumps({"rid": "", "abort_all": True}).encode()
    request = urllib.request.Request(
        url + "/abort_request", data=body, headers={"Content-Type": "application/json"}
    )
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30):
        pass


@contextlib.contextmanager
def pinned() -> Iterator[frozenset[int] | None]:
    """Keep one core for the load client where there are more than two; servers inherit the rest."""
    cores = os.sched_getaffinity(0)
    if len(cores) <= 2:
        yield None
        return
    last = max(cores)
    os.sched_setaffinity(0, cores - {last})
    try:
        yield frozenset({last})
    finally:
        os.sched_setaffinity(0, cores)


def seen(details: dict[str, Any], asked: list[int]) -> dict[str, Any]:
    """Times of each request in the order of the load, from bench_serving's ``--output-details``
    (pure).

    Returns:
        ``tpots_ms`` and ``ttfts_ms`` (``LATE`` where it failed or got fewer tokens than ``asked``),
        ``gaps_ms`` (all gaps between tokens, in one list), ``tokens`` (asked), ``late``: how many
        were.
    """
    tpots: list[float | None] = []
    ttfts: list[float | None] = []
    rows = zip(
        asked, details["output_lens"], details["ttfts"], details["itls"], details["errors"], strict=True
    )
    for wanted, got, ttft_s, gaps_s, error in rows:
        ended = not error and got >= wanted and ttft_s > 0 and len(gaps_s) > 0
        ttfts.append(round(ttft_s * 1e3, 3) if ttft_s > 0 and not error else LATE)
        tpots.append(round(sum(gaps_s) / len(gaps_s) * 1e3, 3) if ended else LATE)
    gaps = [round(gap * 1e3, 3) for row in details["itls"] for gap in row]
    return {
        "tpots_ms": tpots,
        "ttfts_ms": ttfts,
        "gaps_ms": gaps,
        "tokens": list(asked),
        "late": sum(t is LATE for t in tpots),
    }


if __name__ == "__main__":
    _serve()
