"""The training loop that anybody would write (transformers + peft), as a process of its own.

It has its own copy of the weights, trains steps of four rows for ever, and prints the time and the
tokens after each backward pass; ``Trainer`` is its handle: it is held by SIGSTOP except inside
``running``, at a duty cycle if asked for.

    cd benchmark && python -m colocate.trainer --model DIR [--device cpu] [--threads 2] [--nice 0]
    [--rows 4]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from common import modules

START_S = 300.0
STEP_ROWS, ROW_TOKENS = 4, 256
PERIOD_S = 0.2  # of a duty cycle
SETTLE_S = 60.0  # for the step in flight when the number of rows changes


# ------------------------------------------------------------------ the process
def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A plain transformers + peft loop.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--rows", type=int, default=STEP_ROWS, help="of one backward pass: 1, 2 or 4")
    return parser.parse_args()


def _train(options: argparse.Namespace) -> None:
    os.nice(options.nice)
    import torch
    import torch.nn.functional as F
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from sglang_harli.peft_trainer.adapter import lora_config
    from sglang_harli.protocol.public import Hyperparameters

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    hp = Hyperparameters(lora_r=16, batch_size=STEP_ROWS)
    base = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = get_peft_model(base.to(options.device), lora_config(hp))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hp.learning_rate)
    ids = torch.randint(10, base.config.vocab_size, (STEP_ROWS, ROW_TOKENS), device=options.device)
    setting, total = {"rows": options.rows, "threads": options.threads}, 0
    _say({"ready": True})
    while True:
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            setting = json.loads(line)
            torch.set_num_threads(setting["threads"])
            _say({"setting": setting})
        for part in ids.split(setting["rows"]):
            logits = model(input_ids=part).logits[:, :-1]
            loss = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), part[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / (STEP_ROWS * (ROW_TOKENS - 1))).backward()
            total += part.numel()
            _say({"tokens": total, "at_s": time.monotonic()})
        torch.nn.utils.clip_grad_norm_(trained, hp.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


# ------------------------------------------------------------------ its handle
class Trainer:
    """Attributes:
    points: (monotonic seconds, tokens so far) after each backward pass.
    """

    def __init__(
        self, model: Path, folder: Path, *, nice: int = 0, device: str = "cpu", threads: int = 2
    ) -> None:
        words = ["--model", model, "--device", device, "--threads", threads, "--nice", nice]
        self.log_path = folder / f"trainer-nice-{nice}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if nice:  # a server that asks for little lets waiting OpenMP threads sleep: spinning ones keep the cores busy
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*modules.command("colocate.trainer"), *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=modules.found_in(environment),
                text=True,
            )
        self.points: list[tuple[float, float]] = []
        self._ready, self._set = threading.Event(), threading.Event()
        self._setting: dict[str, int] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "tokens" in said:
                self.points.append((said["at_s"], float(said["tokens"])))
                if len(self.points) >= 2:  # the first pass sets up kernels and buffers
                    self._ready.set()
            elif "setting" in said:
                self._setting = said["setting"]
                self._set.set()

    def wait_ready(self) -> None:
        """Until it trains; it is held then."""
        deadline = time.monotonic() + START_S
        while not self._ready.wait(0.5):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the plain loop did not start: {self.log_path.read_text()[-2000:]}")
        self.hold()

    def hold(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def set(self, rows: int, threads: int) -> None:
        """Rows of a backward pass, and threads: in force when this returns, held again."""
        wanted = {"rows": rows, "threads": threads}
        if self._setting == wanted:
            return
        assert self.process.stdin is not None
        self._set.clear()
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        self.resume()
        in_force = self._set.wait(SETTLE_S)
        self.hold()
        if not in_force:
            raise RuntimeError(f"the plain loop did not take its setting within {SETTLE_S:g} s")

    @contextlib.contextmanager
    def running(self, duty: float = 1.0) -> Iterator[None]:
        """Let it train for the length of a block; ``duty``: only for this share of each fifth of a
        second."""
        over = threading.Event()

        def beat() -> None:
            while not over.is_set():
                self.resume()
                over.wait(duty * PERIOD_S)
                self.hold()
                over.wait((1 - duty) * PERIOD_S)

        thread = threading.Thread(target=beat, daemon=True) if duty < 1 else None
        self.resume() if thread is None else thread.start()
        try:
            yield
        finally:
            over.set()
            if thread is not None:
                thread.join()
            self.hold()

    def finish_step(self, after_s: float, limit_s: float = 5.0) -> None:
        """Let it go on until it has said something after ``after_s``, so that the total there can
        be interpolated."""
        deadline = time.monotonic() + limit_s
        self.resume()
        while self.points[-1][0] < after_s and time.monotonic() < deadline:
            time.sleep(0.02)
        self.hold()

    def pss_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_full_info().pss

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    _train(_parse())
