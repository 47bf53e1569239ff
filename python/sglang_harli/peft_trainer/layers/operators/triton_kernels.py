"""The operators of a layer and of the head by kernels of ours (``kernels``), a family at a time.

A family is used where its switch says so, on tensors of the dtype that it was compared in, and
where the tensors lie as its kernels want them; everything else is torch's (``torch_kernels``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_harli.peft_trainer.kernels import gated, heads, lora, norm, softmax
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.layers.operators.plain import Gate, Heads, LoraPart
from sglang_harli.peft_trainer.layers.operators.torch_kernels import TorchOperators
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm
from sglang_harli.peft_trainer.layers.rotary import RotaryTable
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors


class TritonOperators(TorchOperators):
    """The operators of a device with kernels of ours.  ``dtype``: of the base; ``switches``: which
    families are used, read at each call. A backward goes by what its trace has."""

    def __init__(self, *, flash: bool, dtype: torch.dtype, switches: KernelSwitches) -> None:
        super().__init__(flash=flash)
        self.dtype, self.switches = dtype, switches

    def _uses(self, family: str, x: Tensor) -> bool:
        return family in self.switches.used and x.dtype == self.dtype

    # ---- sums and norms
    def rms_norm(self, norm_: RmsNorm, x: Tensor, trace: SavedTensors | None) -> Tensor:
        if not (self._uses("norm", x) and _in_rows(x)):
            return super().rms_norm(norm_, x, trace)
        out, factors = norm.rms_norm(x, norm_.weight, norm_.epsilon)
        if trace is not None:
            trace[norm_.name], trace[norm_.name + " factors"] = x, factors
        return out

    def add_rms_norm(
        self, norm_: RmsNorm, x: Tensor, added: Tensor, trace: SavedTensors | None
    ) -> tuple[Tensor, Tensor]:
        if not (self._uses("norm", x) and _in_rows(x) and added.is_contiguous()):
            return super().add_rms_norm(norm_, x, added, trace)
        total, out, factors = norm.add_rms_norm(x, added, norm_.weight, norm_.epsilon, added)
        if trace is not None:
            trace[norm_.name], trace[norm_.name + " factors"] = total, factors
        return total, out

    def rms_norm_backward(
        self,
        norm_: RmsNorm,
        grad: Tensor,
        trace: SavedTensors,
        passed: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if norm_.name + " factors" not in trace:
            return super().rms_norm_backward(norm_, grad, trace, passed, out)
        x, factors = trace[norm_.name], trace[norm_.name + " factors"]
        return norm.rms_norm_backward(grad.contiguous(), x, factors, norm_.weight, passed, out)

    # ---- heads
    def split_heads(
        self, flat: Tensor, heads_: Heads, rotary: RotaryTable, trace: SavedTensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = _layout(heads_)
        if not self._uses("rotary", flat) or layout is None:
            return super().split_heads(flat, heads_, rotary, trace)
        turned = heads.rotate(flat, *rotary, layout, _head_norms(heads_))
        if trace is not None:
            trace["cos"], trace["sin"] = rotary
            # What of it the backward reads is what came before the norms.
            trace["heads"] = flat if heads_.norms is not None else flat[:0]
        query, key = turned.split([layout.queries, layout.keys], 2)
        value = flat[:, heads_.columns[2]].view(*turned.shape[:2], -1, layout.size)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def split_heads_backward(
        self, query: Tensor, key: Tensor, value: Tensor, heads_: Heads, trace: SavedTensors
    ) -> Tensor:
        layout = _layout(heads_)
        if "heads" not in trace or layout is None:
            return super().split_heads_backward(query, key, value, heads_, trace)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        cos, sin, norms = trace["cos"], trace["sin"], _head_norms(heads_)
        return heads.rotate_backward(query, key, value, trace["heads"], cos, sin, layout, norms)

    # ---- the MLP's activation
    def gated(self, flat: Tensor, gate: Gate, trace: SavedTensors | None) -> Tensor:
        if not (self._uses("gated", flat) and _in_halves(flat, gate)):
            return super().gated(flat, gate, trace)
        if trace is not None:
            trace["gate up"] = flat
        return gated.swiglu(flat)

    def gated_backward(self, grad: Tensor, gate: Gate, trace: SavedTensors) -> Tensor:
        if "active" in trace:
            return super().gated_backward(grad, gate, trace)
        return gated.swiglu_backward(grad, trace["gate up"])

    # ---- LoRA products
    def add_lora(self, out: Tensor, low: Tensor, parts: Sequence[LoraPart]) -> None:
        if not (self._uses("lora", out) and len(parts) <= lora.MOST):
            return super().add_lora(out, low, parts)
        lora.add_products(out, low, [part.b for part in parts], [part.columns for part in parts])

    def lora_backward(
        self,
        grad: Tensor,
        low: Tensor,
        parts: Sequence[LoraPart],
        scaling: float,
        grad_b: Sequence[Tensor],
    ) -> Tensor:
        if not (self._uses("lora", grad) and len(parts) <= lora.MOST):
            return super().lora_backward(grad, low, parts, scaling, grad_b)
        b, columns = [part.b for part in parts], [part.columns for part in parts]
        return lora.product_gradients(grad, low, b, columns, scaling, grad_b)

    # ---- the head
    def losses(self, logits: Tensor, low: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self._uses("head", low):
            return super().losses(logits, low, targets)
        return softmax.cross_entropy(low, targets, None)

    def losses_and_gradient(
        self, logits: Tensor, low: Tensor, targets: Tensor, factor: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self._uses("head", low):
            return super().losses_and_gradient(logits, low, targets, factor)
        return softmax.cross_entropy(low, targets, factor)


def _in_rows(x: Tensor) -> bool:
    """``[tokens, hidden]``, contiguous, or ``[rows, width, hidden]`` whose rows are."""
    hidden = x.shape[-1]
    if x.dim() == 2:
        return x.is_contiguous()
    return x.dim() == 3 and x.stride()[1:] == (hidden, 1) and x.stride(0) % hidden == 0


def _layout(heads_: Heads) -> heads.HeadLayout | None:
    """None: heads that our kernels do not take."""
    queries, keys, _ = (part.stop - part.start for part in heads_.columns)
    size, norms = heads_.head_dim, heads_.norms
    if size % 2 or (norms is not None and norms[0].epsilon != norms[1].epsilon):
        return None
    return heads.HeadLayout(queries // size, keys // size, size)


def _head_norms(heads_: Heads) -> heads.HeadNorms | None:
    if heads_.norms is None:
        return None
    query, key = heads_.norms
    return heads.HeadNorms(query.weight, key.weight, query.epsilon)


def _in_halves(flat: Tensor, gate: Gate) -> bool:
    """SwiGLU on gate and up side by side, each half of the columns."""
    half = flat.shape[1] // 2
    first, second = gate.columns
    together = (first.start, first.stop, second.start, second.stop) == (0, half, half, 2 * half)
    return gate.silu and together and flat.is_contiguous()
