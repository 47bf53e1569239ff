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

from torch import Tensor

from sglang_harli.errors import UnsupportedError
from sglang_harli.peft_trainer.layers.lora_linear import LinearGroup
from sglang_harli.peft_trainer.layers.operators.plain import Gate, Heads, Operators
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
        operators: of the device that all of it lies on.
        wants_x: whether the gradient of its input is wanted.

    Raises:
        UnsupportedError: the device has no gradient of the MLP's activation.

    Attributes:
        references: frozen or adapter weights that a trace may hold.
        leaves: the adapter's weights in the order of the layer's block; leaf_shapes: theirs.
        leaf_count: elements of all of them.
    """

    def __init__(
        self,
        layer: Any,
        groups: list[LinearGroup],
        window: int | None,
        operators: Operators,
        *,
        wants_x: bool,
    ) -> None:
        self.qkv, self.o, self.gate_up, self.down = groups
        self.operators = operators
        attention = layer.self_attn
        self.norm = RmsNorm("norm", layer.input_layernorm)
        self.middle_norm = RmsNorm("middle norm", layer.post_attention_layernorm)
        head_norms: tuple[RmsNorm, RmsNorm] | None = None
        if getattr(attention, "q_norm", None) is not None:
            head_norms = RmsNorm("q norm", attention.q_norm), RmsNorm("k norm", attention.k_norm)
        self.heads = Heads(self.qkv.columns, attention.head_dim, head_norms)
        self.attend = operators.attention(attention.scaling, attention.num_key_value_groups, window)
        self.gate = Gate(self.gate_up.columns, layer.mlp.act_fn)
        if not operators.supports(self.gate.activation):
            name = type(self.gate.activation).__name__
            raise UnsupportedError(f"the activation {name} cannot be trained on this device")
        norms = [self.norm, self.middle_norm, *(head_norms or ())]
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
        self,
        x: Tensor,
        rotary: RotaryTable,
        trace: SavedTensors | None = None,
        past: RowKeys | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The layer's output, into ``out`` if given (it may be x); ``trace`` remembers what
        ``gradients`` needs. ``past``: x and the tables are a block of one row, which attends to
        what is known of it."""
        middle, normed = self._to_mlp(x, rotary, trace, past)
        return self.operators.add(self._mlp(normed, trace), middle, out)

    def recompute(self, x: Tensor, rotary: RotaryTable, past: RowKeys | None = None) -> SavedTensors:
        """What ``gradients`` needs; the output is not wanted, so its last product is left out."""
        trace = SavedTensors()
        self._mlp(self._to_mlp(x, rotary, trace, past)[1], trace, values=False)
        return trace

    def fill_keys(self, x: Tensor, rotary: RotaryTable, past: RowKeys) -> None:
        """Keys and values of a block of one row, and nothing else."""
        past.extended(*self._heads(x, rotary, None)[1:])

    def attention_half(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """x and what attention adds to it."""
        return self.operators.add(self._attended(x, rotary, None, None), x)

    def mlp_half(self, x: Tensor) -> Tensor:
        """What the MLP adds to x, its norm's input."""
        return self._mlp(self.operators.rms_norm(self.middle_norm, x, None), None)

    def _to_mlp(
        self, x: Tensor, rotary: RotaryTable, trace: SavedTensors | None, past: RowKeys | None
    ) -> tuple[Tensor, Tensor]:
        """x and what attention adds to it; the same normed."""
        trace = trace if self._wants_middle else None
        added = self._attended(x, rotary, trace, past)
        return self.operators.add_rms_norm(self.middle_norm, x, added, trace)

    def _attended(
        self, x: Tensor, rotary: RotaryTable, trace: SavedTensors | None, past: RowKeys | None
    ) -> Tensor:
        """What attention adds to x."""
        inner = trace if self._wants_heads else None
        query, key, value = self._heads(x, rotary, inner)
        if past is not None:
            key, value = past.extended(key, value)
        out = self.attend.forward(query, key, value, inner)
        return self.o.forward(out.view(-1, out.shape[-1]), trace).view_as(x)

    def _heads(
        self, x: Tensor, rotary: RotaryTable, trace: SavedTensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[rows, heads, width, head_dim]`` each."""
        normed = self.operators.rms_norm(self.norm, x, trace if self.wants_x else None)
        flat = self.qkv.forward(normed.view(-1, x.shape[-1]), trace)
        return self.operators.split_heads(flat, self.heads, rotary, trace)

    def _mlp(self, normed: Tensor, trace: SavedTensors | None, *, values: bool = True) -> Tensor:
        """What the MLP adds to its norm's input; ``values`` as in ``LinearGroup.forward``."""
        inner = trace if self._wants_gates else None
        flat = self.gate_up.forward(normed.view(-1, normed.shape[-1]), inner)
        product = self.operators.gated(flat, self.gate, inner)
        return self.down.forward(product, trace, values=values).view_as(normed)

    # ---- backward
    def gradients(
        self, trace: SavedTensors, grad: Tensor, past: RowKeys | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Of all adapter weights, as in the layer's block; and of the layer's input, if wanted,
        which replaces ``grad``.

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
        return leaves, self._attention_backward(trace, middle, past, grads[0], grads[1], grad)

    def _mlp_backward(
        self, trace: SavedTensors, grad: Tensor, gate_up: list[Tensor], down: list[Tensor]
    ) -> Tensor | None:
        """Gradient of x after attention, if wanted."""
        flat = grad.reshape(-1, grad.shape[-1])
        incoming = self.down.backward(flat, trace, down, wants_x=self._wants_gates)
        if incoming is None:
            return None
        both = self.operators.gated_backward(incoming, self.gate, trace)
        normed = self.gate_up.backward(both, trace, gate_up, wants_x=self._wants_middle)
        if normed is None:
            return None
        return self.operators.rms_norm_backward(self.middle_norm, normed.view(grad.shape), trace, grad)

    def _attention_backward(
        self,
        trace: SavedTensors,
        grad: Tensor,
        past: RowKeys | None,
        qkv: list[Tensor],
        o: list[Tensor],
        below: Tensor,
    ) -> Tensor | None:
        """Gradient of the layer's input, into ``below``, if wanted.  ``grad``: of x after
        attention."""
        rows, width, hidden = grad.shape
        out = self.o.backward(grad.view(-1, hidden), trace, o, wants_x=self._wants_heads)
        if out is None:
            return None
        query, key, value = self.attend.backward(out.view(rows, width, -1), trace)
        if past is not None:
            key, value = past.completed(key, value)
        both = self.operators.split_heads_backward(query, key, value, self.heads, trace)
        normed = self.qkv.backward(both, trace, qkv, wants_x=self.wants_x)
        if normed is None:
            return None
        return self.operators.rms_norm_backward(self.norm, normed.view(grad.shape), trace, grad, below)
