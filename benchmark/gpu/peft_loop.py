"""The loop that anybody would write: transformers, peft, torch's flash attention, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from sglang_harli.peft_trainer.adapter import lora_config
from sglang_harli.protocol.public import Hyperparameters

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def peft_step(model: Any, hp: Hyperparameters, rows: int, width: int, vocab: int) -> Callable[[], object]:
    """One call: an optimizer step of ``rows`` rows in one batch, in the model's dtype, every layer
    recomputed in the backward pass.  The model is changed: peft's modules go into it."""
    device = model.lm_head.weight.device
    wrapped = get_peft_model(model, lora_config(hp))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    wrapped.enable_input_require_grads()  # type: ignore[operator]
    wrapped.train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hp.learning_rate, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(0)

    def step() -> torch.Tensor:
        ids = torch.randint(0, vocab, (rows, width), generator=generator).to(device)
        with (
            sdpa_kernel(ATTENTION, set_priority=True),
            torch.autocast(device.type, dtype=model.lm_head.weight.dtype),
        ):
            logits = wrapped(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, hp.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
