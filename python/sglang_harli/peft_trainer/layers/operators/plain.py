"""The operators of a decoder layer and of the head, forward and backward, as a CPU runs them best.

A layer is a chain of these between its products with frozen weights. Each is explicit both ways:
what a backward needs is put into ``trace`` by name, as plain tensors. A device has a subclass that
replaces those for which it has kernels (``torch_kernels``); ``choose`` says which one runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.layers.attention import CausalAttention
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm
from sglang_harli.peft_trainer.layers.rotary import RotaryTable, rotated, rotated_back
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors


@dataclass(frozen=True)
class Heads:
    """How q, k and v lie in the output of their linears: ``columns`` of each, one behind the other;
    ``norms``: of the heads of q and k, or None."""

    columns: Sequence[slice]
    head_dim: int
    norms: tuple[RmsNorm, RmsNorm] | None


@dataclass(frozen=True)
class Gate:
    """The MLP's activation; ``columns``: gate's and up's in the output of their linears."""

    columns: Sequence[slice]
    activation: Any

    @property
    def silu(self) -> bool:
        return type(self.activation).__name__ in ("SiLU", "SiLUActivation")


@dataclass(frozen=True)
class LoraPart:
    """One adapter of a group: its ``rank`` columns of the low products, its ``columns`` of the
    group's output, and its B, ``[columns, rank]``."""

    rank: slice
    columns: slice
    b: Tensor


class Operators:
    """The operators of a CPU, and what a device's must do. ``trace`` None: no backward follows.

    Attributes:
        token_major: heads lie in memory as ``[rows, width, heads, head_dim]``; they are given as
            ``[rows, heads, width, head_dim]`` in either case.
    """

    token_major = False

    def supports(self, activation: Any) -> bool:
        """Whether ``gated`` takes this activation."""
        return True

    # ---- sums and norms
    def add(self, added: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Their sum, into ``out`` if given; ``added`` may be overwritten."""
        total = added.add_(x)
        return total if out is None else out.copy_(total)

    def rms_norm(self, norm: RmsNorm, x: Tensor, trace: SavedTensors | None) -> Tensor:
        """Normed over the last axis, contiguous."""
        return norm.forward(x, trace)

    def add_rms_norm(
        self, norm: RmsNorm, x: Tensor, added: Tensor, trace: SavedTensors | None
    ) -> tuple[Tensor, Tensor]:
        """(x + added, that normed); ``added`` may be overwritten."""
        total = self.add(added, x)
        return total, self.rms_norm(norm, total, trace)

    def rms_norm_backward(
        self,
        norm: RmsNorm,
        grad: Tensor,
        trace: SavedTensors,
        passed: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of the norm's input, into ``out`` if given, from that of its output.
        ``passed``: another gradient of the input, added to it; it may be ``out``."""
        found = norm.backward(grad, trace, passed)
        return found if out is None else out.copy_(found)

    # ---- heads and attention
    def attention(self, scale: float, repeats: int, window: int | None) -> CausalAttention:
        """The attention of a layer; see there for the arguments."""
        return CausalAttention(scale, repeats, window)

    def split_heads(
        self, flat: Tensor, heads: Heads, rotary: RotaryTable, trace: SavedTensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, normed and rotated, ``[rows, heads, width, head_dim]`` each.

        ``flat``: ``[rows * width, q + k + v]``; ``rotary``: of the ``width`` positions.
        """
        width = rotary[0].shape[1]
        query, key, value = (
            flat[:, part].view(len(flat) // width, width, -1, heads.head_dim) for part in heads.columns
        )
        if heads.norms is not None:
            query = self.rms_norm(heads.norms[0], query, trace)
            key = self.rms_norm(heads.norms[1], key, trace)
        if trace is not None:
            trace["cos"], trace["sin"] = rotary
        return rotated(query, rotary), rotated(key, rotary), value.transpose(1, 2).contiguous()

    def split_heads_backward(
        self, query: Tensor, key: Tensor, value: Tensor, heads: Heads, trace: SavedTensors
    ) -> Tensor:
        """``[rows * width, q + k + v]`` from the gradients of ``split_heads``' results; those of
        key and value may have the exact dtype."""
        rows, _, width, size = query.shape
        both = query.new_empty(rows * width, heads.columns[-1].stop)
        views = [both[:, part].view(rows, width, -1, size) for part in heads.columns]
        rotary = trace["cos"], trace["sin"]
        for norm, grad, view in zip(heads.norms or (None, None), (query, key), views, strict=False):
            rotated_back(grad, rotary, view)
            if norm is not None:
                view.copy_(norm.backward(view, trace))
        views[2].copy_(value.transpose(1, 2))
        return both

    # ---- the MLP's activation
    def gated(self, flat: Tensor, gate: Gate, trace: SavedTensors | None) -> Tensor:
        """``activation(gate) * up``, ``[tokens, intermediate]``, of ``flat``: both side by side,
        which may be overwritten if no backward follows."""
        inputs, up = (flat[:, columns] for columns in gate.columns)
        active = self._activated(inputs, gate, trace)
        if trace is None:
            return active.mul_(up)
        trace["gate up"], trace["active"] = flat, active
        return active * up

    def gated_backward(self, grad: Tensor, gate: Gate, trace: SavedTensors) -> Tensor:
        """The gradient of ``flat``; ``grad``, of the product, may be overwritten."""
        saved = trace["gate up"]
        inputs, up = (saved[:, columns] for columns in gate.columns)
        both = torch.empty_like(saved)
        grad_inputs, grad_up = (both[:, columns] for columns in gate.columns)
        torch.mul(grad, trace["active"], out=grad_up)
        grad.mul_(up)
        self._activation_backward(grad, inputs, gate, trace, grad_inputs)
        return both

    def _activated(self, inputs: Tensor, gate: Gate, trace: SavedTensors | None) -> Tensor:
        if gate.silu:
            return F.silu(inputs)
        if trace is not None:
            return trace.run("activation", gate.activation, inputs)
        return gate.activation(inputs)

    def _activation_backward(
        self, grad: Tensor, inputs: Tensor, gate: Gate, trace: SavedTensors, out: Tensor
    ) -> None:
        """The gradient of the activation's ``inputs``, into ``out``."""
        if gate.silu:
            torch.ops.aten.silu_backward.grad_input(grad, inputs, grad_input=out)
        else:
            out.copy_(trace.pieces["activation"].backward(grad)[0])

    # ---- LoRA products
    def low_products(self, x: Tensor, a: Tensor, scaling: float) -> Tensor:
        """``x @ a.T * scaling``, ``[tokens, adapters * rank]``."""
        low = torch.mm(x, a.t())
        return low if scaling == 1.0 else low.mul_(scaling)

    def add_lora(self, out: Tensor, low: Tensor, parts: Sequence[LoraPart]) -> None:
        """To each part's columns of ``out`` its low products times its B."""
        for part in parts:
            out[:, part.columns].addmm_(low[:, part.rank], part.b.t())

    def lora_backward(
        self,
        grad: Tensor,
        low: Tensor,
        parts: Sequence[LoraPart],
        scaling: float,
        grad_b: Sequence[Tensor],
    ) -> Tensor:
        """The gradient of ``x @ a.T``; those of each B are written to ``grad_b``.

        ``grad``: ``[tokens, width]``, of the group's output; ``low``: as ``low_products`` gave it.
        """
        grad_low = torch.empty_like(low)
        for part, found in zip(parts, grad_b, strict=True):
            out = grad[:, part.columns]
            torch.mm(out, part.b, out=grad_low[:, part.rank])
            torch.mm(out.t(), low[:, part.rank], out=found)
        return grad_low if scaling == 1.0 else grad_low.mul_(scaling)

    # ---- the head
    def losses(self, logits: Tensor, low: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropies in fp64, number of targets whose logit is the largest), both
        device scalars.

        Args:
            logits: ``[tokens, vocabulary]`` in the exact dtype; overwritten.
            low: the logits in the base's dtype; ``logits`` itself where the dtypes agree.
            targets: int64 ``[tokens, 1]``.
        """
        return self._softmax(logits, low, targets)[1:]

    def losses_and_gradient(
        self, logits: Tensor, low: Tensor, targets: Tensor, factor: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``losses``; ``low`` becomes the gradient of the sum at the logits, times
        ``factor``."""
        total, loss, correct = self._softmax(logits, low, targets)
        logits.div_(total)
        logits.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=logits.dtype))
        logits.mul_(factor)
        if low.dtype != logits.dtype:
            low.copy_(logits)
        return loss, correct

    def _softmax(self, logits: Tensor, low: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sums of the exponentials, which are left in the logits; loss; correct)."""
        if low.dtype != logits.dtype:
            logits.copy_(low)
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        wanted = logits.gather(1, targets)
        correct = (wanted == 0).sum()  # the largest one: a pass less than argmax
        total = logits.exp_().sum(dim=-1, keepdim=True)
        return total, (total.log() - wanted).sum(dtype=torch.float64), correct

    # ---- many tensors at once: the state of several layers
    def zero(self, tensors: Sequence[Tensor]) -> None:
        """All of them."""
        for tensor in tensors:
            tensor.zero_()

    def copy(self, into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Each source to its place, dense in the same layout."""
        for place, source in zip(into, sources, strict=True):
            place.copy_(source)

    def add_all(self, totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """To each total its part."""
        for total, part in zip(totals, parts, strict=True):
            total.add_(part)

    def scale(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """All of them by a device scalar."""
        for tensor in tensors:
            tensor.mul_(factor)

    def norms(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Of each its norm into ``out``, ``[len(tensors)]``."""
        for index, tensor in enumerate(tensors):
            out[index] = torch.linalg.vector_norm(tensor)
