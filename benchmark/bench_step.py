"""How fast is the layer-wise training step beside a plain transformers + peft loop?

    python benchmark/bench_step.py [--steps 12] [--rows 4] [--length 256] [--threads 2]

The 25M model (512 wide, 8 layers, random weights) with LoRA rank 16 on all linears, one optimizer
step of ``rows * length`` tokens, every token but a row's first a target.  Sides alternate step by
step, so that all see the same machine.  Prints one JSON object:

- the whole step: median tokens/s of each side, the plain loop's and ours, by all rows at once, by
  half of them and row by row, ours also with activations kept instead of recomputed; the ratio to
  the plain loop by all rows, and to the plain loop's best;
- one layer: median ms of forward and backward of 32, 64, 128 and 256 tokens in transformers' layer
  with peft's modules under autograd, and of the same recomputed and differentiated by ours, which
  is a backward quantum.

It does not show what serving beside it costs, nor what a latency target leaves over.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sglang_harli.peft_trainer.adapter import lora_config
from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.base.training_mode import training_mode
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec
from sglang_harli.protocol.micro_batches import padded
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


BLOCKS = (32, 64, 128, 256)  # tokens of one layer's quantum


def plain_side(
    model: torch.nn.Module, hp: Hyperparameters, ids: torch.Tensor, rows: int
) -> Callable[[], None]:
    """One call: a step of the loop that anybody would write, ``rows`` rows at a time."""
    peft_model = get_peft_model(copy.deepcopy(model), lora_config(hp))  # type: ignore[arg-type]
    peft_model.train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hp.learning_rate)

    def step() -> None:
        for part in ids.split(rows):
            logits = peft_model(input_ids=part).logits
            loss = F.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]).float(), part[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / (ids.numel() - len(ids))).backward()
        torch.nn.utils.clip_grad_norm_(trained, hp.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def layer_wise_side(
    model: torch.nn.Module,
    hp: Hyperparameters,
    ids: torch.Tensor,
    rows: int,
    quanta: dict[str, list[float]],
    *,
    kept: bool = False,
) -> Callable[[], None]:
    """One call: a step in quanta of at most ``rows`` rows; times of quanta go to ``quanta`` by
    kind, ms.

    ``kept``: with the activations of every layer kept for its backward pass.
    """
    spec = RunSpec(job="bench", attempt=1, hyperparameters=hp, total_steps=1_000_000)
    base = from_transformers(copy.deepcopy(model))
    run = TrainingRun(base, spec, logits_bytes=64 << 20, keep_activations=kept)
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
        run.feed(*padded(batch, flat, flat))
        while (shape := run.peek()) is not None:
            start = time.perf_counter()
            done = run.run(shape.rows if shape.fixed or shape.kind == "head" else min(rows, shape.rows))
            quanta.setdefault(done.kind, []).append((time.perf_counter() - start) * 1e3)
        run.take_metrics()

    return step


def layer_times(model: torch.nn.Module, hp: Hyperparameters, repeats: int) -> dict[str, dict[str, float]]:
    """Median ms of one layer's backward quantum, by tokens, of each side; the layers take turns, as
    in a step."""
    peft_model: Any = get_peft_model(copy.deepcopy(model), lora_config(hp))  # type: ignore[arg-type]
    plain = peft_model.base_model.model.model
    spec = RunSpec(job="bench", attempt=1, hyperparameters=hp, total_steps=1)
    run = TrainingRun(from_transformers(copy.deepcopy(model)), spec, logits_bytes=64 << 20)
    while (shape := run.peek()) is not None:  # the adapter is drawn
        run.run(shape.rows)
    pieces = run._pieces
    result: dict[str, dict[str, float]] = {"plain": {}, "layer_wise": {}}
    for tokens in BLOCKS:
        x = torch.randn(1, tokens, SIZES["hidden_size"], dtype=pieces.base.dtype)
        grad, places = torch.randn_like(x) * 1e-3, torch.arange(tokens)[None]
        rotary = plain.rotary_emb(x, places)
        seconds: dict[str, list[float]] = {name: [] for name in result}
        for number in range((repeats + 1) * len(plain.layers)):
            layer = number % len(plain.layers)
            start = time.perf_counter()
            entered = x.clone().requires_grad_()
            plain.layers[layer](entered, position_embeddings=rotary, position_ids=places).backward(grad)
            middle = time.perf_counter()
            with training_mode():
                program = pieces.layers[layer]
                program.gradients(program.recompute(x, pieces.rotary.upto(tokens)), grad)
            if number >= len(plain.layers):  # the first round sets up kernels and buffers
                seconds["plain"].append(middle - start)
                seconds["layer_wise"].append(time.perf_counter() - middle)
        for name, values in seconds.items():
            result[name][str(tokens)] = round(statistics.median(values) * 1e3, 3)
    return result


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
    sides: dict[str, Callable[[], None]] = {}
    for rows in sorted({args.rows, max(1, args.rows // 2), 1}, reverse=True):
        sides[f"plain_by_{rows}_rows"] = plain_side(model, hp, ids, rows)
        for kept in (False, True):
            name = f"layer_wise_by_{rows}_rows" + ("_kept" if kept else "")
            sides[name] = layer_wise_side(model, hp, ids, rows, quanta.setdefault(name, {}), kept=kept)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.steps + 2):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if number >= 2:  # the first ones set up kernels and buffers
                seconds[name].append(time.perf_counter() - start)
    tokens = args.rows * args.length
    medians = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    plain = medians[f"plain_by_{args.rows}_rows"]
    best = max(value for name, value in medians.items() if name.startswith("plain"))
    result = {
        "what": "tokens/s of one training step, medians",
        "tokens_per_s": {name: round(value, 1) for name, value in medians.items()},
        "ratio_to_plain": {name: round(value / plain, 3) for name, value in medians.items()},
        "ratio_to_best_plain": {name: round(value / best, 3) for name, value in medians.items()},
        "layer_ms": layer_times(model, hp, args.steps),
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
