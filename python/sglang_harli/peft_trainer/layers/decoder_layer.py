"""One decoder layer of the supported architectures, written for short quanta.

    x ─ norm ─ q,k,v ─ (head norms) ─ rotary ─ attention ─ o ─(+x)─ norm ─ gate,up ─ silu·mul ─ down
    ─(+)─

Llama, Mistral, Qwen2 and Qwen3 differ here in biases, head norms and the window only, all of which
are read off the transformers layer. The result is transformers' own (tests compare), in fewer
passes over memory and kernel launches, with a backward that is written out: autograd's graph of a
layer costs as much as the arithmetic of a short row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.layers.attention import CausalAttention
from sglang_harli.peft_trainer.layers.lora_linear import LinearGroup
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm
from sglang_harli.peft_trainer.layers.rotary import RotaryTable
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors
from sglang_harli.peft_trainer.layers.token_blocks import RowKeys


class LayerProgram:
    """Runs one layer, without gradients, on ``[rows, width, hidden]``; weights stay where they are.

    Args:
        layer: transformers' decoder layer.
        groups: its linears by ``INPUT_GROUPS``: q k v, o, gate up, down.
        window: tokens that a position attends to, or None for all before it.
        wants_x: whether the gradient of its input is wanted.

    Attributes:
        references: frozen or adapter weights that a trace may hold.
        leaves: the adapter's weights in the order of the layer's block; leaf_shapes: theirs.
        leaf_count: elements of all of them.
    """

    def __init__(self, layer: Any, groups: list[LinearGroup], window: int | None, *, wants_x: bool) -> None:
        self.qkv, self.o, self.gate_up, self.down = groups
        attention = layer.self_attn
        self.norm = RmsNorm("norm", layer.input_layernorm)
        self.middle_norm = RmsNorm("middle norm", layer.post_attention_layernorm)
        self.head_norms: tuple[RmsNorm, RmsNorm] | None = None
        if getattr(attention, "q_norm", None) is not None:
            self.head_norms = RmsNorm("q norm", attention.q_norm), RmsNorm("k norm", attention.k_norm)
        self.head_dim: int = attention.head_dim
        self.attend = CausalAttention(attention.scaling, attention.num_key_value_groups, window)
        self.activation = layer.mlp.act_fn
        self.silu = type(self.activation).__name__ in ("SiLU", "SiLUActivation")
        norms = [self.norm, self.middle_norm, *(self.head_norms or ())]
        self.leaves = [leaf for group in groups for leaf in group.leaves]
        self.references = [*(norm.weight for norm in norms), *self.leaves]
        self.leaf_shapes = [tuple(leaf.shape) for leaf in self.leaves]
        self._leaf_sizes = [leaf.numel() for leaf in self.leaves]
        self.leaf_count = sum(self._leaf_sizes)
        self._leaf_counts = [len(group.leaves) for group in groups]
        # What is differentiated, from the top: below the MLP, below o, below q, k and v.
        self.wants_x = wants_x
        self._wants_heads = wants_x or self.qkv.a is not None
        self._wants_middle = self._wants_heads or self.o.a is not None
        self._wants_gates = self._wants_middle or self.gate_up.a is not None

    # ---- forward
    def forward(
        self, x: Tensor, rotary: RotaryTable, trace: SavedTensors | None = None, past: RowKeys | None = None
    ) -> Tensor:
        """The layer's output; ``trace`` remembers what ``gradients`` needs. ``past``: x and the
        tables are a block of one row, which attends to what is known of it."""
        middle = self.attention_half(x, rotary, trace, past)
        return self.mlp_half(middle, trace).add_(middle)

    def recompute(self, x: Tensor, rotary: RotaryTable, past: RowKeys | None = None) -> SavedTensors:
        """What ``gradients`` needs; the output is not wanted, so its last product is left out."""
        trace = SavedTensors()
        self.mlp_half(self.attention_half(x, rotary, trace, past), trace, values=False)
        return trace

    def fill_keys(self, x: Tensor, rotary: RotaryTable, past: RowKeys) -> None:
        """Keys and values of a block of one row, and nothing else."""
        past.extended(*self._heads(x, rotary, None)[1:])

    def attention_half(
        self, x: Tensor, rotary: RotaryTable, trace: SavedTensors | None = None, past: RowKeys | None = None
    ) -> Tensor:
        """x and what attention adds to it."""
        if not self._wants_middle:
            trace = None
        inner = trace if self._wants_heads else None
        query, key, value = self._heads(x, rotary, inner)
        if past is not None:
            key, value = past.extended(key, value)
        out = self.attend.forward(query, key, value, inner)
        added = self.o.forward(out.view(-1, out.shape[-1]), trace).view_as(x)
        return added.add_(x)

    def _heads(
        self, x: Tensor, rotary: RotaryTable, trace: SavedTensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[rows, heads, width, head_dim]`` each."""
        rows, width, hidden = x.shape
        normed = self.norm.forward(x, trace if self.wants_x else None)
        flat = self.qkv.forward(normed.view(-1, hidden), trace)
        query, key, value = (flat[:, part].view(rows, width, -1, self.head_dim) for part in self.qkv.columns)
        if self.head_norms is not None:
            query = self.head_norms[0].forward(query, trace)
            key = self.head_norms[1].forward(key, trace)
        if trace is not None:
            trace["cos"], trace["sin"] = rotary
        return rotated(query, rotary), rotated(key, rotary), value.transpose(1, 2).contiguous()

    def mlp_half(self, x: Tensor, trace: SavedTensors | None = None, *, values: bool = True) -> Tensor:
        """What the MLP adds to x, its norm's input; ``values`` as in ``LinearGroup.forward``."""
        inner = trace if self._wants_gates else None
        normed = self.middle_norm.forward(x, trace if self._wants_middle else None)
        flat = self.gate_up.forward(normed.view(-1, x.shape[-1]), inner)
        gate, up = (flat[:, columns] for columns in self.gate_up.columns)
        if self.silu:
            active = F.silu(gate)
        elif inner is not None:
            active = inner.run("activation", self.activation, gate)
        else:
            active = self.activation(gate)
        if inner is not None:
            inner["gate up"], inner["active"] = flat, active
            product = active * up
        else:
            product = active.mul_(up)
        return self.down.forward(product, trace, values=values).view_as(x)

    # ---- backward
    def gradients(
        self, trace: SavedTensors, grad: Tensor, past: RowKeys | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Of all adapter weights, as in the layer's block; and of the layer's input, if wanted.

        ``grad``: ``[rows, width, hidden]``, of the layer's output; ``past``: as for ``recompute``,
        with all blocks behind this one done.
        """
        leaves = grad.new_empty(self.leaf_count)
        parts = [
            part.view(shape)
            for part, shape in zip(leaves.split(self._leaf_sizes), self.leaf_shapes, strict=True)
        ]
        grads: list[list[Tensor]] = []
        for count in self._leaf_counts:
            grads.append(parts[:count])
            parts = parts[count:]
        middle = self._mlp_backward(trace, grad, grads[2], grads[3])
        if middle is None:
            return leaves, None
        return leaves, self._attention_backward(trace, middle, past, grads[0], grads[1])

    def _mlp_backward(
        self, trace: SavedTensors, grad: Tensor, gate_up: list[Tensor], down: list[Tensor]
    ) -> Tensor | None:
        """Gradient of x after attention, if wanted."""
        flat = grad.reshape(-1, grad.shape[-1])
        incoming = self.down.backward(flat, trace, down, wants_x=self._wants_gates)
        if incoming is None:
            return None
        saved = trace["gate up"]
        gate, up = (saved[:, columns] for columns in self.gate_up.columns)
        both = torch.empty_like(saved)
        grad_gate, grad_up = (both[:, columns] for columns in self.gate_up.columns)
        torch.mul(incoming, trace["active"], out=grad_up)
        incoming.mul_(up)
        if self.silu:
            torch.ops.aten.silu_backward.grad_input(incoming, gate, grad_input=grad_gate)
        else:
            grad_gate.copy_(trace.pieces["activation"].backward(incoming)[0])
        normed = self.gate_up.backward(both, trace, gate_up, wants_x=self._wants_middle)
        if normed is None:
            return None
        return self.middle_norm.backward(normed.view(grad.shape), trace, grad)

    def _attention_backward(
        self, trace: SavedTensors, grad: Tensor, past: RowKeys | None, qkv: list[Tensor], o: list[Tensor]
    ) -> Tensor | None:
        """Gradient of the layer's input, if wanted.  ``grad``: of x after attention."""
        rows, width, hidden = grad.shape
        out = self.o.backward(grad.view(-1, hidden), trace, o, wants_x=self._wants_heads)
        if out is None:
            return None
        query, key, value = self.attend.backward(out.view(rows, width, -1), trace)
        if past is not None:
            key, value = past.completed(key, value)
        both = grad.new_empty(rows * width, self.qkv.width)
        views = [both[:, part].view(rows, width, -1, self.head_dim) for part in self.qkv.columns]
        rotary = trace["cos"], trace["sin"]
        for norm, heads, view in zip(self.head_norms or (None, None), (query, key), views, strict=False):
            rotated_back(heads, rotary, view)
            if norm is not None:
                view.copy_(norm.backward(view, trace))
        views[2].copy_(value.transpose(1, 2))
        normed = self.qkv.backward(both, trace, qkv, wants_x=self.wants_x)
        if normed is None:
            return None
        return self.norm.backward(normed.view(grad.shape), trace, grad)


def rotated(x: Tensor, rotary: RotaryTable) -> Tensor:
    """Rotary embedding of ``[rows, width, heads, size]`` as ``[rows, heads, width, size]``."""
    cos, sin = (part.unsqueeze(2) for part in rotary)
    rows, width, heads, size = x.shape
    out = x.new_empty(rows, heads, width, size)
    view, half = out.transpose(1, 2), size // 2
    torch.mul(x, cos, out=view)
    view[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    view[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def rotated_back(grad: Tensor, rotary: RotaryTable, out: Tensor) -> None:
    """The gradient at ``rotated``'s input, into ``out``, from that at its output."""
    cos, sin = (part.unsqueeze(2) for part in rotary)
    grad, half = grad.transpose(1, 2), grad.shape[-1] // 2
    if grad.dtype == out.dtype:
        torch.mul(grad, cos, out=out)
    else:
        out.copy_(grad * cos)
    out[..., half:].addcmul_(grad[..., :half].to(out.dtype), sin[..., :half], value=-1)
    out[..., :half].addcmul_(grad[..., half:].to(out.dtype), sin[..., half:])
