"""The oracle of the training step: a plain transformers + peft loop, and what both sides are
fed."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from sglang_harli.peft_trainer.adapter import lora_config
from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.layers.dropout import DropoutMasks
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.internal import BatchCursor, MicroBatch, RunSpec
from sglang_harli.protocol.micro_batches import padded
from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.train_memory import TrainMemory

VOCABULARY = 90
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA = {
    "llama": {},
    "mistral": {"sliding_window": 7, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by a second thread, and much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(arch: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    """A random causal LM; biases and norms are random too."""
    config = AutoConfig.for_model(arch, **{**SIZES, **EXTRA[arch], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name or name.endswith("bias") else 0.15
            base = 1.0 if "norm" in name else 0.0
            parameter.data = base + scale * torch.randn_like(parameter)
    return model.to(dtype).eval()


def hyperparameters(**changes) -> Hyperparameters:
    values = {"learning_rate": 1e-3, "lora_r": 4, "lora_alpha": 8.0, "warmup_ratio": 0.1, **changes}
    result = Hyperparameters(**values)
    result.check()
    return result


@dataclass
class Step:
    """Rows of one optimizer step, already cut into micro-batches (lists of positions)."""

    rows: list[tuple[list[int], list[int]]]  # ids, labels
    micro: list[list[int]]

    @property
    def targets(self) -> int:
        return sum(sum(label != -100 for label in labels[1:]) for _, labels in self.rows)


def random_steps(
    count: int, micro_rows: int, micro_batches: int, seed: int = 1, longest: int = 16
) -> list[Step]:
    """Rows of different lengths; a prompt without loss, then a completion; the last step is
    shorter."""
    rng = random.Random(seed)
    steps = []
    for number in range(count):
        batches = 1 if micro_batches > 1 and number == count - 1 else micro_batches
        rows = []
        for _ in range(batches * micro_rows):
            ids = [rng.randrange(VOCABULARY) for _ in range(rng.randint(2, longest))]
            prompt = rng.randrange(len(ids) - 1)
            rows.append((ids, [-100] * prompt + ids[prompt:]))
        order = list(range(len(rows)))
        steps.append(Step(rows, [order[i : i + micro_rows] for i in range(0, len(rows), micro_rows)]))
    return steps


# ------------------------------------------------------------------ the oracle
class _KeyedDropout(torch.nn.Module):
    """In place of peft's nn.Dropout: the same masks that the layer-wise step draws."""

    def __init__(self, masks: DropoutMasks, layer: int, module: str) -> None:
        super().__init__()
        self.masks, self.layer, self.module = masks, layer, module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.masks.draw(self.layer, self.module, x.shape[-1]).view_as(x)


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    first_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    start: dict[str, torch.Tensor] = field(default_factory=dict)


def run_oracle(model, hp: Hyperparameters, steps: list[Step]) -> Outcome:
    """The whole step as one padded batch with a mask, the way anybody would write it."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hp.seed)
        peft_model = get_peft_model(model, lora_config(hp))
    masks = (
        DropoutMasks(hp.lora_dropout, hp.seed, torch.device("cpu"), model.dtype) if hp.lora_dropout else None
    )
    for name, module in peft_model.named_modules():
        if masks is not None and isinstance(module, torch.nn.Dropout):
            parts = name.split(".")  # base_model.model.model.layers.N.self_attn.q_proj.lora_dropout.default
            module_list = peft_model.get_submodule(".".join(parts[:-1]))
            module_list["default"] = _KeyedDropout(masks, int(parts[4]), parts[-3])
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hp.learning_rate, weight_decay=hp.weight_decay)
    kinds = {"constant": "constant_with_warmup"}
    scheduler = get_scheduler(
        kinds.get(hp.lr_scheduler, hp.lr_scheduler),
        optimizer,
        num_warmup_steps=math.ceil(hp.warmup_ratio * len(steps)),
        num_training_steps=len(steps),
    )
    outcome = Outcome(start={k: v.clone() for k, v in get_peft_model_state_dict(peft_model).items()})
    for number, step in enumerate(steps, start=1):
        width = max(len(ids) for ids, _ in step.rows)
        ids = torch.zeros(len(step.rows), width, dtype=torch.long)
        labels = torch.full((len(step.rows), width), -100)
        mask = torch.zeros(len(step.rows), width, dtype=torch.long)
        for i, (row, label) in enumerate(step.rows):
            ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(label)
            mask[i, : len(row)] = 1
        if masks is not None:
            masks.set_rows(number, [(i, len(row)) for i, (row, _) in enumerate(step.rows)], width)
        logits = peft_model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )
        loss = loss / step.targets
        loss.backward()
        if number == 1:
            outcome.first_grads = {
                name.replace(".default", ""): p.grad.clone()
                for name, p in peft_model.named_parameters()
                if p.requires_grad
            }
        norm = torch.nn.utils.clip_grad_norm_(trained, hp.max_grad_norm or float("inf"))
        outcome.rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        outcome.losses.append(loss.item())
        outcome.norms.append(norm.item())
    outcome.weights = {k: v.detach().clone() for k, v in get_peft_model_state_dict(peft_model).items()}
    return outcome


# ------------------------------------------------------------------ the layer-wise side
def feed(run: TrainingRun, steps: list[Step], start: int = 1) -> None:
    """All micro-batches of the steps from ``start`` on."""
    for number, step in enumerate(steps, start=1):
        if number < start:
            continue
        for index, rows in enumerate(step.micro):
            ids = np.array([t for i in rows for t in step.rows[i][0]], dtype=np.int32)
            labels = np.array([t for i in rows for t in step.rows[i][1]], dtype=np.int32)
            batch = MicroBatch(
                job="j",
                attempt=1,
                cursor=BatchCursor(epoch=1, step=number, index=index),
                micro_batches=len(step.micro),
                lengths=[len(step.rows[i][0]) for i in rows],
                rows=rows,
                step_target_tokens=step.targets,
            )
            run.feed(*padded(batch, ids, labels))


def make_run(
    model,
    hp: Hyperparameters,
    steps: list[Step],
    *,
    rows: int | None = None,
    logits_bytes: int = 1 << 20,
    memory: TrainMemory | None = None,
    keep: bool = True,
) -> TrainingRun:
    spec = RunSpec(job="j", attempt=1, hyperparameters=hp, total_steps=len(steps))
    return TrainingRun(
        from_transformers(model),
        spec,
        logits_bytes=logits_bytes,
        quantum_rows=rows,
        memory=memory,
        keep_activations=keep,
    )


Choose = Callable[[int], int]  # rows offered -> rows taken


def drive(run: TrainingRun, choose: Choose, until: int | None = None) -> Outcome:
    """Run to the end, or until ``until`` steps are applied."""
    outcome = Outcome()
    while (until is None or run.applied_step < until) and (shape := run.peek()) is not None:
        run.run(shape.rows if shape.fixed else choose(shape.rows))
        for metrics in run.take_metrics():
            outcome.losses.append(metrics.loss)
            outcome.norms.append(metrics.grad_norm)
            outcome.rates.append(metrics.learning_rate)
    if run.at_step_boundary:
        outcome.weights = weights(run)
    return outcome


def cut(run: TrainingRun) -> bool:
    """As where the quantum that comes next is too long for now."""
    shape = run.peek()
    return shape is not None and run.cut(shape.kind)


def weights(run: TrainingRun) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("adapter/"): tensor.clone()
        for name, tensor in run.state_tensors()
        if name.startswith("adapter/")
    }


def everything(offered: int) -> int:
    return offered


def at_most(limit: int) -> Choose:
    return lambda offered: min(limit, offered)


def at_random(seed: int) -> Choose:
    rng = random.Random(seed)
    return lambda offered: rng.randint(1, offered)
