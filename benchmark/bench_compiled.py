"""Would compiled layers train faster beside requests?

    python benchmark/bench_compiled.py [--repeats 40] [--threads 2]

One layer's backward quantum (recomputed and differentiated, as the scheduler runs it) of the 25M
model, of 32 to 256 tokens: as it is, and compiled by torch.compile as one graph for exactly that
shape, by turns.  The compiled one must give the same numbers (bf16 rounds elsewhere) without a
break of the graph, or this ends with an error.

A compiler's graph ends where something is written into a slice, so products get their own memory
there and are copied; that is part of what is compared.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config
from transformers import AutoModelForCausalLM, LlamaConfig

from bench_step import BLOCKS, SIZES
from common import report
from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.base.training_mode import training_mode
from sglang_harli.peft_trainer.layers import attention
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import RunSpec
from sglang_harli.protocol.public import Hyperparameters

LAYERS = range(
    1, 4
)  # in turn, as in a step: weights come from memory; layer 0 wants no gradient of its input
CLOSE = 0.02  # of the norm
Quantum = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def copied(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, with ``out`` filled by a copy."""

    @functools.wraps(product)
    def call(*args: Any, out: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        result = product(*args, **more)
        return result if out is None else out.copy_(result)

    return call


@contextmanager
def compilable() -> Iterator[None]:
    """The layer's code as one graph: no writes into slices by ``out``, and the mask is a
    constant."""
    later = attention._later
    mask = later(torch.float32)
    products = {name: getattr(torch, name) for name in ("mm", "mul", "addmm")}
    try:
        attention._later = lambda _: mask  # type: ignore[assignment]
        for name, product in products.items():
            setattr(torch, name, copied(product))
        yield
    finally:
        attention._later = later
        for name, product in products.items():
            setattr(torch, name, product)


def layers() -> tuple[list[Any], Any]:
    """(programs of ``LAYERS``, the rotary tables)."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa")
    spec = RunSpec(job="bench", attempt=1, hyperparameters=Hyperparameters(lora_r=16), total_steps=1)
    run = TrainingRun(from_transformers(model.to(torch.bfloat16)), spec, logits_bytes=64 << 20)
    while (shape := run.peek()) is not None:  # the adapter is drawn
        run.run(shape.rows)
    return [run._pieces.layers[n] for n in LAYERS], run._pieces.rotary


def quantum(program: Any) -> Quantum:
    def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, grad: torch.Tensor) -> Any:
        return program.gradients(program.recompute(x, (cos, sin)), grad)

    return run


def measure(programs: list[Any], rotary: Any, tokens: int, repeats: int) -> dict[str, float]:
    """Median ms of both, their ratio, what compiling took, and how far apart the results are."""
    x = torch.randn(1, tokens, SIZES["hidden_size"], dtype=torch.bfloat16)
    arguments = (x, *rotary.upto(tokens), torch.randn_like(x) * 1e-3)
    eager = [quantum(program) for program in programs]
    compiled: list[Quantum] = [torch.compile(each, fullgraph=True, dynamic=False) for each in eager]

    def timed(run: Quantum) -> tuple[Any, float]:
        start = time.perf_counter()
        result = run(*arguments)
        return result, time.perf_counter() - start

    with compilable():
        first, seconds = zip(*map(timed, compiled), strict=True)
    apart = max(
        float((a.float() - b.float()).norm() / a.float().norm())
        for one, other in zip(eager, first, strict=True)
        for a, b in zip(one(*arguments), other, strict=True)
    )
    if not apart < CLOSE:
        sys.exit(f"{tokens} tokens: the compiled layer differs by {apart:.3f} of the norm")
    eager_ms, compiled_ms = [], []
    for _ in range(repeats):
        for one, other in zip(eager, compiled, strict=True):
            eager_ms.append(timed(one)[1] * 1e3)
            with compilable():
                compiled_ms.append(timed(other)[1] * 1e3)
    as_is, now = statistics.median(eager_ms), statistics.median(compiled_ms)
    return {
        "eager_ms": round(as_is, 3),
        "compiled_ms": round(now, 3),
        "ratio": round(now / as_is, 3),
        "compile_s": round(sum(seconds), 1),
        "apart": round(apart, 5),
    }


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [
        "| tokens | as it is, ms | compiled, ms | compiled, of as it is | compiling took | results differ by |",
        "|---|---|---|---|---|---|",
    ]
    for tokens, row in found.items():
        lines.append(
            f"| {tokens} | {row['eager_ms']:.2f} | {row['compiled_ms']:.2f} | {row['ratio']:.2f} | "
            f"{row['compile_s']:.0f} s | {100 * row['apart']:.2f}% |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40, help="of each of the three layers")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch._inductor.config.cpp_wrapper = (
        True  # its kernels are called from C++, past what is put in place above
    )
    with training_mode():
        programs, rotary = layers()
        found = {str(tokens): measure(programs, rotary, tokens, args.repeats) for tokens in BLOCKS}
    text = table(found)
    page = report.write(
        "compiled",
        "cpu",
        question="Would compiled layers train faster beside requests?",
        settings={
            "model": "Llama, 512 wide, 25M parameters, bf16, random weights; LoRA rank 16 on all linear layers",
            "measured": f"recompute and gradients of one row, medians of {args.repeats} rounds of {len(LAYERS)} layers in "
            f"turn, both sides by turns; {args.threads} threads",
            "compiled": "torch.compile (Inductor), fullgraph, one static shape at a time",
        },
        results=found,
        table=text,
        not_shown="A GPU, where launches cost more; several rows at once; what compiling beside requests costs them.",
    )
    print(text)
    print(f"written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
