"""SwiGLU on the fused output of gate and up, forward and backward.

Rounded where torch's own operators round: silu(gate) first, then the product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sglang_harli.peft_trainer.kernels.launch import launch

BLOCK = 1024  # columns at once; 4 warps hold 8 each


def swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``, ``[tokens, width]``; ``gate_up``: ``[tokens, 2 * width]``, contiguous.
    ``out``, contiguous, may be where it goes."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty(tokens, width)
    grid = (tokens, triton.cdiv(width, BLOCK))
    launch(_forward, grid, gate_up, out, WIDTH=width, BLOCK=BLOCK, num_warps=4)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of ``gate_up``; ``grad``: of the product, contiguous. ``out``: where it goes, as
    ``gate_up`` or ``gate_up`` itself."""
    tokens, width = grad.shape
    if out is None:
        out = gate_up.new_empty(gate_up.shape)
    grid = (tokens, triton.cdiv(width, BLOCK))
    launch(_backward, grid, grad, gate_up, out, WIDTH=width, BLOCK=BLOCK, num_warps=4)
    return out


@triton.jit
def _forward(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    both = gate_up + token * 2 * WIDTH + at
    gate = tl.load(both, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + WIDTH, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + token * WIDTH + at, (active * up).to(dtype), mask=inside)


@triton.jit
def _backward(grad, gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    both = token * 2 * WIDTH + at
    incoming = tl.load(grad + token * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + both, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + both + WIDTH, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    share = 1.0 / (1.0 + tl.exp(-gate))
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    at_active = (incoming * up).to(dtype).to(tl.float32)
    at_gate = at_active * share * (1.0 + gate * (1.0 - share))
    tl.store(out + both, at_gate.to(dtype), mask=inside)
    tl.store(out + both + WIDTH, (incoming * active).to(dtype), mask=inside)
