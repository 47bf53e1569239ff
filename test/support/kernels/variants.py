"""Every variant of our kernels that a served model of 8B or 0.6B compiles, as recorded launches."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_harli.peft_trainer.kernels import gated, heads, lora, norm, softmax
from sglang_harli.peft_trainer.kernels.heads import HeadLayout, HeadNorms
from support.kernels.compiler import Launch, recorded

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 151936
LAYOUT = HeadLayout(32, 8, 128)
TOKENS = 3


def record(dtype: torch.dtype, ranks: tuple[int, ...]) -> list[Launch]:
    """Of all families; ``ranks``: of LoRA."""

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind)

    with recorded() as launches:
        logits, targets = new(TOKENS, VOCABULARY), new(TOKENS, kind=torch.int64)
        for factor in (0.5, torch.tensor(2.0), None):
            softmax.cross_entropy(logits, targets, factor)
        both = new(TOKENS, 2 * INTERMEDIATE)
        gated.swiglu(both)
        gated.swiglu_backward(new(TOKENS, INTERMEDIATE), both)
        x, weight = new(1, TOKENS, HIDDEN), new(HIDDEN)
        _, factors = norm.rms_norm(x, weight, 1e-6)
        norm.add_rms_norm(x, x, weight, 1e-6)
        norm.rms_norm_backward(x, x, factors, weight)
        norm.rms_norm_backward(x, x, factors, weight, x)
        _heads(dtype)
        for rank in ranks:
            spans = [slice(0, 4096), slice(4096, 5120), slice(5120, 6144)]
            b = [new(span.stop - span.start, rank) for span in spans]
            out, low = new(TOKENS, 6144), new(TOKENS, 3 * rank)
            lora.add_products(out, low, b, spans)
            lora.product_gradients(out, low, b, spans, 2.0, b)
    return launches


def _heads(dtype: torch.dtype) -> None:
    flat = torch.empty(TOKENS, LAYOUT.width, dtype=dtype)
    gain = torch.empty(LAYOUT.size, dtype=dtype)
    query, key = (torch.empty(1, TOKENS, n, LAYOUT.size, dtype=dtype) for n in (LAYOUT.queries, LAYOUT.keys))
    table = torch.empty(1, TOKENS, LAYOUT.size)
    for norms in (None, HeadNorms(gain, gain, 1e-6)):
        heads.rotate(flat, table, table, LAYOUT, norms)
        heads.rotate_backward(query, key, key, flat, table, table, LAYOUT, norms)
        heads.rotate_backward(query, key.float(), key.float(), flat, table, table, LAYOUT, norms)
