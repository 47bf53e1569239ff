"""Makes recordings of a real server's steps: under mixed clients, beside another process, and in
bursts.

Part of ``ablate_predictor.py`` (``--record``).
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import load as bench_load
from common.neighbour import neighbour
from common.servers import ended
from prediction.recorder import environment
from prediction.server import rows, traffic
from sglang_harli import FinetuneClient
from support.server import start_server

LIMIT_S = 600.0  # of one recording
NEIGHBOUR_S = 30.0  # taken, and then not
BURST, PAUSE_S = 12, (1.0, 6.0)  # requests of a burst; seconds between two


def make(folder: Path, kinds: Sequence[str], size: str, steps: int) -> None:
    """One recording of each kind, as ``KIND.jsonl.gz`` in ``folder``.

    Raises:
        RuntimeError: a request failed, or the steps were not reached in time.
    """
    from sglang_harli.tools.make_model import make_model

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="harli-ablation-") as name:
        model = Path(name) / "model"
        make_model(model, "llama", size=size, dtype="bfloat16", seconds=0)
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        for kind in kinds:
            out = folder.resolve() / f"{kind}.jsonl.gz"
            out.unlink(missing_ok=True)
            env = environment(Path(name) / f"plugin-{kind}", out, steps)
            server = start_server(model, "--harli-tpot-slo-ms", "60", env=env)
            with ended(server):
                server.wait_ready()
                with FinetuneClient(server.endpoint) as client:
                    client.submit(rows(), batch_size=4, n_epochs=1000, checkpoint_every=0)
                with _under(kind, server.url, vocab):
                    _wait_for(out)
            print(f"{out.name}: {out.stat().st_size} bytes", flush=True)


def _wait_for(path: Path) -> None:
    ends_s = time.monotonic() + LIMIT_S
    while not path.exists():
        if time.monotonic() > ends_s:
            raise RuntimeError(
                f"{path.name}: not enough decode steps within {LIMIT_S:g} s: give --steps fewer"
            )
        time.sleep(0.5)


@contextlib.contextmanager
def _under(kind: str, url: str, vocab: int) -> Iterator[None]:
    if kind == "bursts":
        with _bursts(url, vocab):
            yield
        return
    with traffic(url, vocab), _every_other() if kind == "neighbour" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _every_other() -> Iterator[None]:
    """Another process takes half a core for a while, and not for a while, in turns, until the block
    ends."""
    over = threading.Event()

    def turns() -> None:
        while not over.wait(NEIGHBOUR_S):
            with neighbour():
                over.wait(NEIGHBOUR_S)

    thread = threading.Thread(target=turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _bursts(url: str, vocab: int) -> Iterator[None]:
    """A burst of requests, then none for a while, until the block ends.

    Raises:
        RuntimeError: a request failed.
    """
    over, rng = threading.Event(), random.Random(0)
    failures: list[BaseException] = []

    def client(load: bench_load.Load, seed: int) -> None:
        try:
            bench_load.stream(url, load.prompt(random.Random(seed)), load.output_tokens)
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(error)
            over.set()

    def director() -> None:
        while not over.is_set():
            clients = []
            for n in range(rng.randint(1, BURST)):
                load = bench_load.Load(1, rng.choice((16, 64, 200, 600)), rng.randint(8, 80), vocab)
                clients.append(
                    threading.Thread(target=client, args=(load, rng.randrange(1 << 30) + n), daemon=True)
                )
            for each in clients:
                each.start()
            for each in clients:
                each.join()
            over.wait(rng.uniform(*PAUSE_S))

    thread = threading.Thread(target=director, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise RuntimeError(f"a request failed: {failures[0]!r}") from failures[0]
