"""Two pairs, one of plain SGLang and one whose decode server trains; one of them runs, the other is
held by SIGSTOP.

A pair stands on two machines; here the scheduler of the decode server has cores of its own, and
everything else (the prefill server, both HTTP processes, the router, the load client) shares the
others.  So what training costs is seen where it is spent.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from colocate import busy, busy_server
from common import jobs, servers
from disaggregated.plan import HARLI, SERVE
from sglang_harli import FinetuneClient
from support.pair import DECODE, Pair, Side, missing

PLAIN, OURS = "plain", "ours"
OF_MODE = {SERVE: PLAIN, HARLI: OURS}
SCHEDULER = "sglang::scheduler"
JOB: dict[str, Any] = {"lora_r": 16, "batch_size": 4, "max_seq_length": 128, "on_overflow": "truncate"}


class Pairs:
    """Args:
    model: its folder.
    folder: takes what is written.
    flags: of every server.
    """

    def __init__(self, model: Path, folder: Path, flags: tuple[str, ...]) -> None:
        self._busy_path = folder / "busy.txt"
        self._data = jobs.write_data(folder / "data.jsonl", words=(8, 20))
        self.decode_cores, self.other_cores = split(os.sched_getaffinity(0))
        threads = (("OMP_NUM_THREADS", str(len(self.decode_cores))),)
        # Of both pairs: on the CPU engine SGLang's own cannot send KV (patches/17).
        prefill = Side(("--harli-finetune", "off", *flags), "harli", threads)
        busy_env = busy_server.environment(folder / "plugin", self._busy_path, "cpu")
        self.pairs = {
            PLAIN: Pair(model, prefill=prefill, decode=Side(flags, "plain", (*threads, *busy_env.items()))),
            OURS: Pair(model, prefill=prefill, decode=Side(flags, "harli", threads)),
        }
        self.start_s: dict[str, float] = {}
        self.job = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Pairs:
        if (why := missing()) is not None:
            raise SystemExit(why)
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:  # what went wrong is most often said in a log, and those go with the folder
            for name, pair in self.pairs.items():
                print(f"==== {name}", file=sys.stderr)
                pair.print_logs(30)
        self._stack.close()

    def start(self) -> None:
        """Start both, one behind the other; each is held then, the job of ours in training."""
        for name, pair in self.pairs.items():
            self._stack.callback(pair.close)
            pair.start()
            self._pin(pair)
            if name == OURS:
                with FinetuneClient(pair.endpoint) as client:
                    self.job = jobs.train(client, self._data, **JOB)
            servers.hold(pair)
        os.sched_setaffinity(0, self.other_cores)  # the load client's

    def _pin(self, pair: Pair) -> None:
        scheduler = pair.decode.find(SCHEDULER).pid
        for process in pair.family():
            cores = self.decode_cores if process.pid == scheduler else self.other_cores
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, cores)

    @contextlib.contextmanager
    def running(self, mode: str) -> Iterator[Pair]:
        pair = self.pairs[OF_MODE[mode]]
        with servers.running(pair):
            yield pair

    def client(self) -> FinetuneClient:
        return FinetuneClient(self.pairs[OURS].endpoint)

    def busy(self, began_s: float, ended_s: float) -> float:
        """Share of the time in which the plain decode server had something to compute."""
        return busy.between(busy.read(self._busy_path), began_s, ended_s) / (ended_s - began_s)

    def pss_bytes(self, mode: str) -> int:
        """Of the decode server."""
        return self.pairs[OF_MODE[mode]].servers[DECODE].pss_bytes()


def split(cores: set[int]) -> tuple[set[int], set[int]]:
    """Cores of the decode server's scheduler, and of everything else: the same where there is one
    (pure)."""
    ordered = sorted(cores)
    if len(ordered) < 2:
        return cores, cores
    return set(ordered[len(ordered) // 2 :]), set(ordered[: len(ordered) // 2])
