"""Records the loop between two steps of serving in a real server under load, for
``slotting_record.replay``.

    cd test && python -m support.slotting_recorder OUT.jsonl.gz [--calls N] [--flags
    "--harli-tpot-slo-ms 6"]

A server of a small model, streams of requests with pauses between them, and a job; ends when N
calls are recorded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shlex
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT_ENV, CALLS_ENV = "TEST_RECORD_OUT", "TEST_RECORD_CALLS"
NAME = "recorder"


# ------------------------------------------------------------------ in the scheduler process
class _Record:
    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most = path, most
        self.calls: list[list[Any]] = []
        self.depth, self.over = 0, False

    def out(self, name: str, arguments: list[Any], result: Any) -> Any:
        from support.slotting_record import plain

        if not self.over:
            assert self.depth, f"{name} is asked outside of a call"
            self.calls.append(["out", name, plain(arguments), plain(result)])
        return result

    def call(self, name: str, arguments: list[Any], run: Callable[[], Any]) -> Any:
        from support.slotting_record import plain

        if self.over:
            return run()
        entry = ["in", name, plain(arguments), None]
        self.calls.append(entry)
        self.depth += 1
        try:
            entry[3] = plain(result := run())
        finally:
            self.depth -= 1
        if len(self.calls) >= self.most and not self.depth:
            self.over = True
            temporary = self.path.with_suffix(".tmp")
            with gzip.GzipFile(temporary, "wb", mtime=0) as file:
                file.writelines(json.dumps(each).encode() + b"\n" for each in self.calls)
            os.replace(temporary, self.path)
        return result


class _Asked:
    """Notes what the loop asks of an object."""

    def __init__(self, inner: Any, record: _Record, values: tuple[str, ...]) -> None:
        self._inner, self._record, self._values = inner, record, values

    def __getattr__(self, name: str) -> Any:
        from support.slotting_record import ON_A_CPU

        if name in ON_A_CPU:
            return getattr(self._inner, name)
        if name in self._values:
            return self._record.out(name, [], getattr(self._inner, name))

        def method(*arguments: Any, **named: Any) -> Any:
            result = getattr(self._inner, name)(*arguments, **named)
            return self._record.out(name, [*arguments, *named.values()], result)

        return method


def activate() -> None:
    from sglang_harli.managers.scheduler.policy.slotting import Slotting

    record = _Record(Path(os.environ[OUT_ENV]), int(os.environ[CALLS_ENV]))
    methods: dict[str, Any] = {
        name: getattr(Slotting, name)
        for name in ("__init__", "decoded", "prefilled", "run_claimed", "fill", "fill_idle")
    }

    def init(self: Any, training: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        asked = _Asked(training, record, ("queued_s", "saving", "barred"))
        methods["__init__"](self, asked, lambda: record.out("clock", [], clock()))

    def decoded(self: Any, *, finished: bool) -> bool:
        return record.call("decoded", [finished], lambda: methods["decoded"](self, finished=finished))

    def prefilled(self: Any) -> None:
        record.call("prefilled", [], lambda: methods["prefilled"](self))

    def run_claimed(self: Any, until_s: float) -> None:
        record.call("run_claimed", [until_s], lambda: methods["run_claimed"](self, until_s))

    def fill(self: Any, serving: Any) -> None:
        asked = _Asked(serving, record, ("targets", "running"))
        record.call("fill", [], lambda: methods["fill"](self, asked))

    def fill_idle(self: Any, load: Callable[[], Any], targets: Any, until_s: float) -> bool:
        asked = lambda: record.out("load", [], load())  # noqa: E731
        run = lambda: methods["fill_idle"](self, asked, targets, until_s)  # noqa: E731
        return record.call("fill_idle", [targets, until_s], run)

    for name, method in (("__init__", init), ("decoded", decoded), ("prefilled", prefilled)):
        setattr(Slotting, name, method)
    for name, method in (("run_claimed", run_claimed), ("fill", fill), ("fill_idle", fill_idle)):
        setattr(Slotting, name, method)


def environment(folder: Path, out: Path, calls: int) -> dict[str, str]:
    """Of a server that is recorded; ``folder`` takes the plugin."""
    metadata = folder / "harli_test_recorder-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harli-test-recorder\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{NAME} = support.slotting_recorder:activate\n"
    )
    path = [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "SGLANG_PLUGINS": f"harli,{NAME}",
        OUT_ENV: str(out),
        CALLS_ENV: str(calls),
    }


# ------------------------------------------------------------------ the load
def main() -> None:
    from sglang_harli import FinetuneClient
    from support.http import generate
    from support.models import make_model
    from support.server import start_server

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calls", type=int, default=6000)
    parser.add_argument("--flags", default="", help="of the server, as one string")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plugin").mkdir()
        model = make_model(folder / "model", "llama")
        env = environment(folder / "plugin", options.out.resolve(), options.calls)
        with start_server(model, *shlex.split(options.flags), env=env) as server:
            server.wait_ready()
            client = FinetuneClient(server.endpoint)
            rows = [{"prompt": f"row {n}", "completion": " a b c" * (1 + n % 9)} for n in range(64)]
            client.submit(rows, n_epochs=500, batch_size=4)
            rng, over = random.Random(0), threading.Event()

            def ask(seed: int) -> None:
                own = random.Random(seed)
                while not over.is_set():
                    generate(server.url, "a b c d" * own.randint(1, 20), tokens=own.randint(4, 60))
                    over.wait(own.expovariate(1.0))

            threads = [threading.Thread(target=ask, args=(rng.random(),)) for _ in range(4)]
            for thread in threads:
                thread.start()
            while not options.out.exists():
                time.sleep(0.5)
            over.set()
            for thread in threads:
                thread.join()
    print(f"{options.out}: {options.calls} calls, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
