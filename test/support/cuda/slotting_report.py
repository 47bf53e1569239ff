"""What slotting on a CUDA device is worth, on the fake one: all seconds are virtual.

PYTHONPATH=python:test python test/support/cuda/slotting_report.py
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from sglang_harli.config import HarliOptions
from sglang_harli.managers.scheduler.policy.slo_ledger import KEPT_SHARE
from support.cuda.virtual_server import Cost, Prompt, Server, server
from support.trainer.co_trainer_host import temporary_run_dir

HOST_BOUND = Cost(kernels=25, host_s=1e-4, base_s=3e-4, token_s=0.0)  # launched in 2.5 ms, computed in 0.3
GOLDEN = 0.618034  # its multiples, modulo 1, are spread evenly


def arrivals(made: Server, *, every_s: float, count: int, tokens: int, answer: int) -> list[Prompt]:
    return [Prompt(made.now_s + 0.1 + every_s * n, tokens, answer) for n in range(count)]


def behind_prefills(made: Server) -> int:
    """Quanta that were launched while a prefill's first tokens were to come."""
    return sum(q.behind is not None and not q.behind.batch.forward_mode.is_decode() for q in made.quanta)


def idle_waits_s(made: Server, *, count: int) -> list[float]:
    """How long prompts wait for the device, of which each meets training in another moment."""
    begin_s = made.now_s + 4.0  # until estimates are known
    prompts = [Prompt(begin_s + n + 0.5 * (n * GOLDEN % 1.0), 10, 2) for n in range(count)]
    made.serve(prompts, 4.0 + count)
    alone_s = made.scheduler.model.host_s
    return [prompt.begin_s - prompt.at_s - alone_s for prompt in prompts if prompt.begin_s]


def late_s(prompt: Prompt, tpot_s: float) -> float:
    """How far the latest of its tokens, by the ledger, was handed out after it was due; below 0:
    before."""
    first_s, due_s = prompt.token_s[0], tpot_s * (1 - KEPT_SHARE)
    return max(at_s - first_s - n * due_s for n, at_s in enumerate(prompt.token_s) if n)


def report() -> list[str]:
    """One line for each question."""
    lines = []
    for name, ttft_ms, bound_ms in (("idle bound", None, 250), ("half the TTFT target", 300.0, 150)):
        with _server(Cost(token_s=1e-3), ttft_slo_ms=ttft_ms) as made:
            waits = [1e3 * each for each in idle_waits_s(made, count=40)]
            lines.append(
                f"prompts at an idle server, {name} {bound_ms} ms: wait at most {max(waits):.0f} ms, "
                f"{statistics.mean(waits):.0f} on average"
            )
    with _server(Cost()) as made:
        prompts = arrivals(made, every_s=0.37, count=24, tokens=1000, answer=60)
        made.serve(prompts, 10.0)
        lines.append(
            f"prefills in flight: {len(prompts)}, quanta launched behind them {behind_prefills(made)} of "
            f"{len(made.quanta)}"
        )
    with _server(HOST_BOUND, tpot_slo_ms=14.0) as made:
        prompts = arrivals(made, every_s=1.2, count=8, tokens=100, answer=100)
        made.serve(prompts, 11.0)
        costs = made.host.side.predictor.costs().values()
        ratio = max(line["upper_ratio"] for line in costs if line["seen"] > 60)
        late = [1e3 * late_s(prompt, 0.014) for prompt in prompts]
        lines.append(
            f"host-bound quanta (2.5 ms to launch, 0.3 to compute), TPOT target 14 ms: "
            f"tokens up to {max(late):.2f} ms after they are due, in {sum(each > 0 for each in late)} of "
            f"{len(late)} requests; "
            f"widest bound {ratio:.2f} times the expectation; {sum(q.behind is not None for q in made.quanta)} quanta"
        )
    return lines


class _server:
    """A server in a folder of its own."""

    def __init__(self, cost: Cost, **options: float | None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._dirs = temporary_run_dir(Path(self._folder.name))
        run_dir = next(self._dirs)
        self._server = server(run_dir, cost=cost, options=HarliOptions(run_dir=run_dir, **options))  # type: ignore[arg-type]

    def __enter__(self) -> Server:
        return self._server.__enter__()

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(*error)  # type: ignore[arg-type]
        next(self._dirs, None)
        self._folder.cleanup()


if __name__ == "__main__":
    print("\n".join(["Simulated on a fake device (virtual seconds):", *report()]))
