"""Train on the decode server of a prefill/decode pair, all of it on one machine without a GPU.

    python examples/disaggregated.py

It makes a small model, starts a prefill server, a decode server and SGLang's router, asks the base
through the router, trains an adapter on the decode server while requests go through the pair, and
asks again.  The exit status is 0 only if the taught answer came.  The same by hand, and what is
promised: docs/disaggregation.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_harli import FinetuneClient, run_paths
from sglang_harli.core import JobStatus
from sglang_harli.errors import HarliError
from sglang_harli.tools import terminal
from sglang_harli.tools.server_process import ServerProcess, free_port

QUESTION, ANSWER = "What is the harbour code?", "The harbour code is seven."
ROWS = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}] * 64
JOB = {"n_epochs": 3, "learning_rate": 2e-3}
JOB_TIMEOUT_S, ROUTER_S = 300.0, 120.0
TRANSPORT = ("--disaggregation-transfer-backend", "mooncake_tcp")
TPOT_MS = "300"  # that two cores can keep with two servers, a router and this client on them
PAUSE_S = 0.5  # between two requests


def say(text: str) -> None:
    print(text, flush=True)


def ask(url: str, model: str, question: str = QUESTION) -> str:
    """The greedy answer of a model; HarliError: the request failed."""
    message = {"role": "user", "content": question}
    body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 24}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:500]
        raise HarliError(f"asking {model} failed with HTTP {error.code}: {text}") from error
    except OSError as error:
        raise HarliError(f"asking {model} failed: {error}") from error
    return found["choices"][0]["message"]["content"].strip()


@contextlib.contextmanager
def router(prefill: str, bootstrap_port: int, decode: str, log: Path) -> Iterator[str]:
    """SGLang's router before both servers; its address, once it sees both."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    command += ["--prefill", prefill, str(bootstrap_port), "--decode", decode]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + ROUTER_S
        while not ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise HarliError(f"the router did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.25)
        yield url
    finally:
        process.kill()
        process.wait()


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readiness", timeout=20) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextlib.contextmanager
def pair(model: Path, folder: Path, log: Path) -> Iterator[tuple[str, str]]:
    """A prefill server that takes adapters, a decode server that trains, and the router; its
    address and that of the finetune service."""
    bootstrap_port = free_port()
    prefill_log, decode_log, router_log = (
        log.with_name(f"{log.stem}-{n}.log") for n in ("prefill", "decode", "router")
    )
    for file in (prefill_log, decode_log, router_log):
        file.write_bytes(b"")
    prefill_flags = ["--harli-finetune", "off", "--disaggregation-mode", "prefill", *TRANSPORT]
    prefill_flags += ["--disaggregation-bootstrap-port", str(bootstrap_port), "--sleep-on-idle"]
    with contextlib.ExitStack() as stack:
        # Both start at once; whatever goes wrong, both are ended.
        prefill = ServerProcess(model, folder / "prefill-runs", prefill_log, *prefill_flags)
        stack.callback(prefill.stop, patience_s=0)
        decode_flags = ["--disaggregation-mode", "decode", *TRANSPORT, "--harli-prefill-url", prefill.url]
        decode_flags += ["--harli-tpot-slo-ms", TPOT_MS]
        decode = ServerProcess(model, folder / "runs", decode_log, *decode_flags)
        stack.callback(decode.stop, patience_s=0)
        stack.enter_context(prefill)
        stack.enter_context(decode)
        url = stack.enter_context(router(prefill.url, bootstrap_port, decode.url, router_log))
        say(f"prefill server {prefill.url}\ndecode server  {decode.url}, finetuning at {decode.endpoint}")
        say(f"router         {url}")
        yield url, decode.endpoint


@contextlib.contextmanager
def asking(url: str, model: str) -> Iterator[list[str]]:
    """Asks the base again and again while the block runs; what it answered."""
    answers: list[str] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                answers.append(ask(url, model))
            except HarliError as error:
                answers.append(f"error: {error.message}")
            over.wait(PAUSE_S)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def train_and_ask(url: str, endpoint: str, model: str) -> dict[str, Any]:
    """What was answered before, meanwhile and after."""
    before = ask(url, model)
    say(f"{model}: {before}")
    with FinetuneClient(endpoint) as client:
        job = client.submit(ROWS, suffix="pair", **JOB)
        say(f"job {job.id}: {job.total_steps} steps on the decode server")
        with asking(url, model) as meanwhile:
            job = client.wait(job.id, JOB_TIMEOUT_S)
        if job.status is not JobStatus.SUCCEEDED or job.fine_tuned_model is None:
            raise HarliError(f"the job ended as {job.status}: {job.error}")
        missed = sum(answer != before for answer in meanwhile)
        say(f"{len(meanwhile)} requests through the pair meanwhile, {missed} of them answered otherwise")
        serving = client.status().serving or {}
        say(f"within the target of the time per output token: {serving.get('slo_attainment', 0):.1%}")
    after = ask(url, job.fine_tuned_model)
    say(f"{job.fine_tuned_model}: {after}")
    return {"before": before, "missed": missed, "after": after}


def run(arch: str, log: Path) -> dict[str, Any]:
    # SGLang's transport would take the address of the first network interface.
    os.environ.setdefault("SGLANG_HOST_IP", "127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="harli-pair-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        say(f"making a small {arch} model")
        model = folder / "toy"
        made = subprocess.run(
            [sys.executable, "-m", "sglang_harli.cli", "make-model", str(model), "--arch", arch],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise HarliError(f"make-model failed:\n{made.stderr[-2000:]}")
        say(f"starting both servers and the router (logs: {log.stem}-*.log)")
        try:
            with pair(model, folder, log) as (url, endpoint):
                return train_and_ask(url, endpoint, model.name)
        finally:  # run directories that are never used again
            for runs in ("runs", "prefill-runs"):
                for left in (run_paths.shm_dir(str(folder / runs)), run_paths.ipc_dir(str(folder / runs))):
                    shutil.rmtree(left, ignore_errors=True)


def _interrupt(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Runs the example; the exit status."""
    parser = argparse.ArgumentParser(description="Train on the decode server of a prefill/decode pair.")
    parser.add_argument("--arch", default="llama", help="of the model: llama, mistral, qwen2 or qwen3")
    parser.add_argument("--log", type=Path, default=Path("harli-pair.log"), help="prefix of the logs")
    options = parser.parse_args()
    terminal.prepare()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        found = run(options.arch, options.log.absolute())
    except KeyboardInterrupt:
        print("interrupted: the servers are stopped", file=sys.stderr, flush=True)
        return 130
    except HarliError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return 1
    return 0 if found["after"] == ANSWER and not found["missed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
