"""Models by the shapes of well-known ones, with random weights, and what their steps compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from sglang_harli.config import SWITCHED, HarliOptions
from sglang_harli.managers.scheduler.training.warm_up import CHECKS
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, from_transformers
from sglang_harli.peft_trainer.graphs.graph_check import graphs_of
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters

RANK = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 model's: widths, heads, layers of the whole model, and its vocabulary."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int

    def config(self, layers: int | None = None) -> Qwen3Config:
        return Qwen3Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            num_hidden_layers=layers or self.layers,
            max_position_embeddings=40_960,
            tie_word_embeddings=False,
        )

    def step_flops(self, rows: int, width: int, layers: int) -> float:
        """Floating-point operations of a training step that recomputes nothing: a forward, the
        gradients at activations (weights are frozen), the adapter's three products, and attention.

        The causal half of attention is counted, forward and two and a half times that backward.
        """
        heads, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        linears = [
            (self.hidden, heads),
            *((self.hidden, keys),) * 2,
            (heads, self.hidden),
            *((self.hidden, self.intermediate),) * 2,
            (self.intermediate, self.hidden),
        ]
        tokens = rows * width
        base = sum(a * b for a, b in linears) * layers + self.hidden * self.vocab
        adapter = sum(RANK * (a + b) for a, b in linears) * layers
        pairs = rows * width * (width + 1) / 2
        attention = 4 * heads * pairs * layers
        return 4 * base * tokens + 6 * adapter * tokens + 3.5 * attention


SHAPES = {
    "tiny": Shape(64, 96, 4, 2, 16, 2, 512),
    "0.6b": Shape(1024, 3072, 16, 8, 128, 28, 151_936),
    "8b": Shape(4096, 12_288, 32, 8, 128, 36, 151_936),
}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A transformers model with random weights, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            shape.config(layers), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def served_base(model: Any) -> tuple[FrozenBase, dict[str, str]]:
    """The model as a server trains it: weights of one input side by side, as SGLang has them, and
    what was compared with torch's own way on this device in use.  And what came of each family."""
    for layer in model.model.layers:
        _adjoin([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj])
        _adjoin([layer.mlp.gate_proj, layer.mlp.up_proj])
    switches = KernelSwitches(HarliOptions().kernel_switches)
    base = dataclasses.replace(from_transformers(model), kernels=switches)
    found: dict[str, str] = {}
    for family, check in zip(SWITCHED, CHECKS, strict=True):
        note = check(base)
        found[family] = note or ("as torch" if family in switches.used else "not compared here")
    return base, found


def _adjoin(linears: list[nn.Linear]) -> None:
    whole = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, whole.split([len(linear.weight) for linear in linears]), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)


def training_run(
    base: FrozenBase, steps: int, *, keep: bool, logits_bytes: int, rank: int = RANK
) -> TrainingRun:
    """A run of ours on a base, with graphs where they are used."""
    hp = Hyperparameters(batch_size=4, lora_r=rank, learning_rate=1e-3)
    spec = RunSpec(job="check", attempt=1, hyperparameters=hp, total_steps=steps)
    return TrainingRun(base, spec, logits_bytes=logits_bytes, keep_activations=keep, graphs=graphs_of)


def feed(run: TrainingRun, step: int, lengths: list[int], vocab: int, seed: int = 0) -> None:
    """A step's one micro-batch of random rows."""
    ids = np.random.default_rng([seed, step]).integers(0, vocab, sum(lengths), dtype=np.int32)
    batch = MicroBatch(
        job="check",
        attempt=1,
        cursor=BatchCursor(epoch=1, step=step, index=0),
        micro_batches=1,
        lengths=lengths,
        rows=list(range(len(lengths))),
        step_target_tokens=sum(lengths) - len(lengths),
    )
    run.feed(*padded(batch, ids, ids))
