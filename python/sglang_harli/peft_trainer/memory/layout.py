"""What a run's tensors take: the dtypes of its state and logits, and a job's memory in bytes."""

from __future__ import annotations

import torch

from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.protocol.job_limits import MemoryLayout


def state_dtypes(dtype: torch.dtype, *, accumulates: bool) -> tuple[torch.dtype, ...]:
    """Of a layer's flat tensors, in the order of ``LayerBlock.flats``, gradients included."""
    exact = torch.promote_types(dtype, torch.float32)
    copy = () if exact == dtype else (dtype,)
    return (exact, *copy, *[exact] * (4 if accumulates else 3))


def logits_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the logits: exact and, where the base has 16 bits, in its dtype."""
    exact = torch.promote_types(dtype, torch.float32)
    return (exact,) if exact == dtype else (exact, dtype)


def memory_layout(base: FrozenBase, logits_bytes: int) -> MemoryLayout:
    """For the scheduler's hello; ``logits_bytes``: of the largest logits tensor."""
    exact = torch.promote_types(base.dtype, torch.float32)
    return MemoryLayout(
        parameter_bytes=tuple(d.itemsize for d in state_dtypes(base.dtype, accumulates=False)),
        accumulated_bytes=exact.itemsize,
        inputs=len(base.layers) + 2,  # of each layer and of the head, and a gradient
        input_bytes=base.dtype.itemsize,
        logit_bytes=tuple(d.itemsize for d in logits_dtypes(base.dtype)),
        head_tokens=logits_bytes // (exact.itemsize * base.config.vocab_size),
    )
