"""The log-probabilities of one row by the frozen base alone, a quantum at a time.

In the base's dtype, as training computes, and in fp32: the difference is what rounding does. In
fp32 no second copy of the model is made: weights are widened slice by slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sglang_harli.architectures import INPUT_GROUPS
from sglang_harli.device_sizes import sizes_of
from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.base.training_mode import training_mode
from sglang_harli.peft_trainer.layers.decoder_layer import LayerProgram
from sglang_harli.peft_trainer.layers.lora_linear import LinearGroup
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm

SLICE = 4 << 20  # weights that are widened at once: 16 MiB in fp32


class BareForward:
    """One row of ``ids`` (two at least) through the base, which stays as it is.

    ``head_tokens``: most tokens whose logits are computed at once; ``exact``: in fp32 (fp64 if it
    is). Of ``whole`` quanta, ``quanta`` have run.
    """

    def __init__(self, base: FrozenBase, ids: list[int], head_tokens: int, *, exact: bool) -> None:
        self._base, self._ids, self._exact = base, ids, exact
        self._dtype = torch.promote_types(base.dtype, torch.float32) if exact else base.dtype
        self._block = min(sizes_of(base.device.type).head_block, head_tokens)
        head: Tensor = base.model.lm_head.weight
        self._rows = max(1, SLICE // head.shape[1])  # of the head, in a quantum
        heads = -(-len(head) // self._rows) if exact else -(-(len(ids) - 1) // self._block)
        self.quanta, self.whole = 0, 1 + len(base.layers) * (2 if exact else 1) + heads
        self._work = self._steps()
        self._found: Tensor | None = None
        self._copied: Any = None

    @property
    def finished(self) -> bool:
        return self.quanta == self.whole

    def run(self) -> None:
        """The next quantum."""
        with training_mode():
            next(self._work)
        self.quanta += 1

    def logprobs(self) -> list[float] | None:
        """Of each token but the first, given those before it; None while the device computes."""
        if not self.finished or (self._copied is not None and not self._copied.query()):
            return None
        assert self._found is not None
        return self._found.tolist()

    # ---- the quanta
    def _steps(self) -> Iterator[None]:
        base, width = self._base, len(self._ids)
        ids = device_calls.copied_to(torch.tensor(self._ids), base.device)
        x = base.model.model.embed_tokens(ids[None]).to(self._dtype)
        cos, sin = base.rotary().upto(width)
        rotary = (cos.to(self._dtype), sin.to(self._dtype)) if self._exact else (cos, sin)
        yield
        for index in range(len(base.layers)):
            if not self._exact:
                x = _program(base, index).forward(x, rotary)
                yield
                continue
            program = _exact_program(base, index)
            middle = program.attention_half(x, rotary)
            yield
            x = program.mlp_half(middle).add_(middle)
            yield
        heads = self._exact_head if self._exact else self._head
        yield from heads(x[0, :-1], ids[1:, None])

    def _head(self, x: Tensor, targets: Tensor) -> Iterator[None]:
        """As ``MicroBatchPass`` computes logits: rounded to the base's dtype."""
        norm, head = RmsNorm("norm", self._base.model.model.norm), self._base.model.lm_head.weight
        operators = self._base.operators
        found = x.new_empty(len(x), dtype=torch.float32)
        for begin in range(0, len(x), self._block):
            part = slice(begin, begin + self._block)
            logits = torch.mm(operators.rms_norm(norm, x[part], None), head.t()).to(torch.float32)
            found[part] = logits.log_softmax(-1).gather(1, targets[part])[:, 0]
            if part.stop >= len(x):
                self._take(found)
            yield

    def _exact_head(self, x: Tensor, targets: Tensor) -> Iterator[None]:
        """The vocabulary slice by slice."""
        head = self._base.model.lm_head.weight
        norm = RmsNorm("norm", _exact_norm(self._base.model.model.norm))
        normed = self._base.operators.rms_norm(norm, x, None)
        total = x.new_full((len(x), 1), -torch.inf)
        wanted = torch.zeros_like(total)
        for begin in range(0, len(head), self._rows):
            rows = head[begin : begin + self._rows]
            logits = torch.mm(normed, rows.to(normed.dtype).t())
            total = torch.logaddexp(total, logits.logsumexp(-1, keepdim=True))
            place = targets - begin
            inside = (place >= 0) & (place < len(rows))
            wanted += logits.gather(1, place.clamp(0, len(rows) - 1)) * inside
            if begin + self._rows >= len(head):
                self._take((wanted - total)[:, 0])
            yield

    def _take(self, found: Tensor) -> None:
        if found.device.type == "cpu":
            self._found = found
            return
        self._found = device_calls.pinned(found.shape, found.dtype).copy_(found, non_blocking=True)
        self._copied = device_calls.event()


# ------------------------------------------------------------------ one layer
def _program(base: FrozenBase, index: int) -> LayerProgram:
    return LayerProgram(
        base.layers[index],
        _groups(base, index, LinearGroup),
        base.window(index),
        base.operators,
        wants_x=False,
    )


def _exact_program(base: FrozenBase, index: int) -> LayerProgram:
    layer = base.layers[index]
    attention = layer.self_attn
    names = [name for name in ("q_norm", "k_norm") if getattr(attention, name, None) is not None]
    fields = ("head_dim", "scaling", "num_key_value_groups")
    widened = SimpleNamespace(
        self_attn=SimpleNamespace(
            **{name: _exact_norm(getattr(attention, name)) for name in names},
            **{name: getattr(attention, name) for name in fields},
        ),
        input_layernorm=_exact_norm(layer.input_layernorm),
        post_attention_layernorm=_exact_norm(layer.post_attention_layernorm),
        mlp=layer.mlp,
    )
    groups = _groups(base, index, _ExactGroup)
    return LayerProgram(widened, groups, base.window(index), base.operators, wants_x=False)


def _groups(base: FrozenBase, index: int, kind: type[LinearGroup]) -> list[LinearGroup]:
    """A layer's linears without an adapter."""
    linears = {name: linear for name, (_, linear) in base.linears(index).items()}
    return [
        kind(list(names), [linears[n] for n in names], [], None, [], scaling=1.0, layer=index, masks=None)
        for names in INPUT_GROUPS
    ]


def _exact_norm(norm: Any) -> Any:
    return SimpleNamespace(weight=norm.weight.detach().float(), variance_epsilon=norm.variance_epsilon)


class _ExactGroup(LinearGroup):
    """Multiplies in the dtype of its input by weights of another."""

    def forward(self, x: Tensor, trace: Any, *, values: bool = True) -> Tensor:
        out = x.new_empty(len(x), self.width)
        for weight, bias, columns in self._frozen:
            rows = max(1, SLICE // weight.shape[1])
            for begin in range(0, len(weight), rows):
                part = weight[begin : begin + rows].to(x.dtype)
                place = out[:, columns.start + begin : columns.start + begin + len(part)]
                torch.mm(x, part.t(), out=place)
            if bias is not None:
                out[:, columns] += bias.to(x.dtype)
        return out
