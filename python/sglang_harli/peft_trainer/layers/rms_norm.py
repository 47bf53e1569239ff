"""RMSNorm with a frozen weight: what transformers' module gives, and the gradient of its input.

``forward`` and ``backward`` are those of a CPU; a device's are ``operators.torch_kernels``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors


class RmsNorm:
    """One norm of a layer: transformers' ``module``; ``name``: in traces."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.weight: Tensor = module.weight.detach()
        self.epsilon: float = module.variance_epsilon
        # fp64 is for tests: bit for bit transformers' own, which rounds to fp32 on the way.
        self._by_hand = self.weight.dtype != torch.float64

    def forward(self, x: Tensor, trace: SavedTensors | None) -> Tensor:
        """Normed over the last axis, contiguous; ``trace`` remembers what ``backward`` needs."""
        if not self._by_hand:
            return self._native(x) if trace is None else trace.run(self.name, self._native, x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = norm.square_().div_(x.shape[-1]).add_(self.epsilon).rsqrt_()
        if trace is not None:
            trace[self.name], trace[self.name + " factor"] = x, factor
        return (x * factor).to(x.dtype).mul_(self.weight)

    def backward(self, grad: Tensor, trace: SavedTensors, passed: Tensor | None = None) -> Tensor:
        """Of x, from ``grad`` of the output; ``passed``: another gradient of x, added to it."""
        if not self._by_hand:
            (own,) = trace.pieces[self.name].backward(grad)
            return own if passed is None else own + passed
        x, factor = trace[self.name], trace[self.name + " factor"]
        normed = x * factor  # fp32
        exact = grad * self.weight.float()
        along = torch.linalg.vecdot(exact, normed).div_(x.shape[-1]).unsqueeze(-1)
        exact.addcmul_(normed, along, value=-1).mul_(factor)
        if passed is not None:
            exact.add_(passed)
        return exact.to(x.dtype)

    def _native(self, x: Tensor) -> Tensor:
        return self.module(x)
