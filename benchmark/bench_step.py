"""How fast is the layer-wise training step beside a plain transformers + peft loop?

    python benchmark/bench_step.py [--steps 12] [--rows 4] [--length 256] [--threads 2]

The 25M model (512 wide, 8 layers, random weights) with LoRA rank 16 on all linears, one optimizer step
of ``rows * length`` tokens, every token but a row's first a target.  Sides alternate step by step, so
that both see the same machine.  Prints one JSON object: median tokens/s of each side and its ratio to the
plain loop.  It does not show what serving beside it costs, nor what a latency target leaves over.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sglang_harli.peft_trainer.adapter import lora_config
from sglang_harli.peft_trainer.frozen_base import from_transformers
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec
from sglang_harli.protocol.public import Hyperparameters

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def plain_side(model: torch.nn.Module, hp: Hyperparameters, ids: torch.Tensor) -> Callable[[], None]:
    """One call: a step of the loop that anybody would write."""
    peft_model = get_peft_model(copy.deepcopy(model), lora_config(hp))  # type: ignore[arg-type]
    peft_model.train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hp.learning_rate)

    def step() -> None:
        logits = peft_model(input_ids=ids).logits
        F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
        ).backward()
        torch.nn.utils.clip_grad_norm_(trained, hp.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def layer_wise_side(
    model: torch.nn.Module, hp: Hyperparameters, ids: torch.Tensor, rows: int, quanta: dict[str, list[float]]
) -> Callable[[], None]:
    """One call: a step in quanta of at most ``rows`` rows; times of quanta go to ``quanta`` by kind, ms."""
    spec = RunSpec(job="bench", attempt=1, hyperparameters=hp, total_steps=1_000_000)
    run = TrainingRun(from_transformers(copy.deepcopy(model)), spec, logits_bytes=64 << 20)
    flat = ids.numpy().astype(np.int32).reshape(-1)

    def step() -> None:
        batch = MicroBatch(
            job="bench",
            attempt=1,
            cursor=BatchCursor(epoch=1, step=run.applied_step + 1, index=0),
            micro_batches=1,
            lengths=[ids.shape[1]] * ids.shape[0],
            rows=list(range(ids.shape[0])),
            step_target_tokens=ids.shape[0] * (ids.shape[1] - 1),
        )
        run.feed(batch, flat, flat)
        while (shape := run.peek()) is not None:
            start = time.perf_counter()
            done = run.run(shape.rows if shape.fixed or shape.kind == "head" else min(rows, shape.rows))
            quanta.setdefault(done.kind, []).append((time.perf_counter() - start) * 1e3)
        run.take_metrics()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa")
    model.to(getattr(torch, args.dtype))
    hp = Hyperparameters(lora_r=16, batch_size=args.rows)
    ids = torch.randint(3, SIZES["vocab_size"], (args.rows, args.length))
    quanta: dict[str, dict[str, list[float]]] = {}
    sides: dict[str, Callable[[], None]] = {"plain": plain_side(model, hp, ids)}
    for rows in sorted({args.rows, max(1, args.rows // 2), 1}, reverse=True):
        name = f"layer_wise_by_{rows}_rows"
        sides[name] = layer_wise_side(model, hp, ids, rows, quanta.setdefault(name, {}))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.steps + 2):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if number >= 2:  # the first ones set up kernels and buffers
                seconds[name].append(time.perf_counter() - start)
    tokens = args.rows * args.length
    medians = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    result = {
        "what": "tokens/s of one training step, medians",
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "ratio_to_plain": {name: round(value / medians["plain"], 3) for name, value in medians.items()},
        "quantum_ms": {
            name: {kind: round(statistics.median(values), 2) for kind, values in kinds.items()}
            for name, kinds in quanta.items()
        },
        "args": vars(args),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
