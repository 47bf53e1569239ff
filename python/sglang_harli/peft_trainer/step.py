"""One micro-batch as a sequence of quanta (design section 5).

    embed, forward(0..L-1), head (chunks of target tokens), backward(L-1..0)

Forward keeps only each layer's input, for all rows; backward runs one layer again with gradients.
A quantum is one layer and a range of rows that is chosen when it is run, so a micro-batch begun in
large pieces may go on in small ones.  Rows are sorted by falling length and a range is padded to its
own longest row.

    saved[0]  saved[1]  ...  saved[L]     grad           each [rows, width, hidden]
    input of  input of       input of     of the output
    layer 0   layer 1        the head     of the layer below which backward stands

Padding stands to the right of every row, where causal attention cannot see it; its gradients are zero,
so it adds nothing but time.  Buffers hold finite values from the start (0 * NaN is NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.core import QuantumKind
from sglang_harli.peft_trainer.adapter import Adapter, LayerBlock
from sglang_harli.peft_trainer.frozen_base import FrozenBase
from sglang_harli.peft_trainer.layer import LayerProgram, rms_norm

HEAD_BLOCK = 16  # target tokens: the unit in which the head is cut
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Rows:
    """A micro-batch's rows on the host, sorted by falling length.

    Attributes:
        lengths: tokens of each row.
        positions: of each row within its optimizer step.
        width: the longest.
        ids: int64 ``[rows, width]``, 0 on padding.
        target_places: int64, flat places (row * width + column) whose hidden state predicts a target.
        targets: int64, the token ids to predict there.
    """

    lengths: list[int]
    positions: list[int]
    width: int
    ids: np.ndarray
    target_places: np.ndarray
    targets: np.ndarray

    @classmethod
    def make(
        cls, lengths: Sequence[int], positions: Sequence[int], ids: np.ndarray, labels: np.ndarray
    ) -> Rows:
        """From flat int32 ids and labels of ``sum(lengths)``; labels stand at their own token."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        width = max(lengths)
        padded = np.zeros((len(lengths), width), dtype=np.int64)
        places, targets = [], []
        for row, i in enumerate(order):
            span = slice(starts[i], starts[i + 1])
            padded[row, : lengths[i]] = ids[span]
            wanted = labels[span][1:]
            columns = np.flatnonzero(wanted != IGNORED)
            places.append(row * width + columns)
            targets.append(wanted[columns].astype(np.int64))
        return cls(
            [lengths[i] for i in order],
            [positions[i] for i in order],
            width,
            padded,
            np.concatenate(places),
            np.concatenate(targets),
        )

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Activations:
    """The saved layer inputs and the gradient, in one allocation that micro-batches share."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base
        self._flat: Tensor | None = None
        self._layers = len(base.layers)
        self._hidden = base.config.hidden_size

    def views(self, rows: int, width: int) -> tuple[list[Tensor], Tensor]:
        """(``saved[0..L]``, ``grad``), each ``[rows, width, hidden]``; contents finite, otherwise undefined."""
        size = rows * width * self._hidden
        needed = size * (self._layers + 2)
        flat = self._flat
        if flat is None or flat.numel() < needed:
            self._flat = flat = None  # let go first: both need not fit
            self._flat = flat = torch.zeros(needed, dtype=self._base.dtype, device=self._base.device)
        views = flat[:needed].view(self._layers + 2, rows, width, self._hidden).unbind(0)
        return list(views[:-1]), views[-1]

    def release(self) -> None:
        self._flat = None


class Rotary:
    """Cosines and sines of positions 0, 1, 2 ..., computed once by the model's own module."""

    def __init__(self, base: FrozenBase) -> None:
        self._module = base.model.model.rotary_emb
        self._like = torch.empty(0, dtype=base.dtype, device=base.device)
        self._table: tuple[Tensor, Tensor] | None = None

    def upto(self, width: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each ``[1, width, head_dim]``."""
        table = self._table
        if table is None or table[0].shape[1] < width:
            length = 1 << (width - 1).bit_length()
            table = self._module(self._like, torch.arange(length, device=self._like.device)[None])
            self._table = table
        cos, sin = table
        return cos[:, :width], sin[:, :width]


class ModelPieces:
    """What every quantum needs of the model, looked up once a run."""

    def __init__(self, base: FrozenBase, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.layers = [
            LayerProgram(layer, block.groups, base.window(i))
            for i, (layer, block) in enumerate(zip(base.layers, adapter.blocks, strict=True))
        ]
        self.leaves = [layer.leaves for layer in self.layers]
        self.embed = base.model.model.embed_tokens
        self.norm = base.model.model.norm
        self.head_weight: Tensor = base.model.lm_head.weight
        self.rotary = Rotary(base)
        self.activations = Activations(base)
        self.exact = torch.promote_types(base.dtype, torch.float32)


class MicroBatchPass:
    """The state machine of one micro-batch; ``kind`` is the quantum that comes next.

    Args:
        pieces: the model's.
        rows: the micro-batch.
        step: optimizer step, key of dropout masks.
        divisor: target tokens of the whole optimizer step.
        scale: loss scale, a device scalar, or None.
        overwrite: the gradients go straight into the step's (its first micro-batch), which they replace;
            otherwise into the blocks' ``partial``.

    Attributes:
        loss: summed cross-entropy / divisor of what the head has done; a device scalar.
    """

    def __init__(
        self,
        pieces: ModelPieces,
        rows: Rows,
        *,
        step: int,
        divisor: int,
        scale: Tensor | None,
        overwrite: bool,
    ) -> None:
        self.pieces, self.rows, self.step = pieces, rows, step
        self.divisor, self.scale, self.overwrite = divisor, scale, overwrite
        self.kind: QuantumKind | None = QuantumKind.EMBED
        self.layer = 0
        self.done = 0  # rows of this layer, or target tokens of the head
        self.loss = torch.zeros((), dtype=torch.float64, device=pieces.base.device)
        self._saved: list[Tensor] = []
        self._grad: Any = None

    @property
    def left(self) -> int:
        """Rows left in the layer, or target tokens left in the head."""
        return (len(self.rows.targets) if self.kind == QuantumKind.HEAD else self.rows.count) - self.done

    def run(self, count: int) -> tuple[int, int]:
        """One quantum of ``count`` rows (head: target tokens), at most ``left``.

        Returns:
            (rows, padded width of each); (target tokens, 1) for the head.
        """
        if self.kind == QuantumKind.EMBED:
            self._embed()
            return self.rows.count, self.rows.width
        if self.kind == QuantumKind.HEAD:
            self._head(count)
            return count, 1
        width = self.rows.lengths[self.done]  # sorted: the longest of the range
        part = (slice(self.done, self.done + count), slice(0, width))
        masks = self.pieces.adapter.masks
        if masks is not None:
            names = list(zip(self.rows.positions[part[0]], self.rows.lengths[part[0]], strict=True))
            masks.set_rows(self.step, names, width)
        if self.kind == QuantumKind.FORWARD:
            self._forward(part)
        else:
            self._backward(part)
        self._advance(count)
        return count, width

    def _advance(self, count: int) -> None:
        """To the next range, layer or kind."""
        self.done += count
        if self.left > 0:
            return
        self.done = 0
        last = len(self.pieces.layers) - 1
        if self.kind == QuantumKind.FORWARD:
            if self.layer < last:
                self.layer += 1
            else:
                self._begin_head()
        elif self.kind == QuantumKind.HEAD:
            self.kind = QuantumKind.BACKWARD  # self.layer is the last one still
        elif self.layer > 0:
            self.layer -= 1
        else:
            self.kind = None

    def _embed(self) -> None:
        device = self.pieces.base.device
        self._saved, self._grad = self.pieces.activations.views(self.rows.count, self.rows.width)
        self._places = _upload(self.rows.target_places, device)
        self._targets = _upload(self.rows.targets, device)
        with torch.no_grad():
            self._saved[0].copy_(self.pieces.embed(_upload(self.rows.ids, device)))
        self.kind = QuantumKind.FORWARD

    def _forward(self, part: tuple[slice, slice]) -> None:
        with torch.no_grad():
            x = self._saved[self.layer][part]
            out = self.pieces.layers[self.layer].forward(x, self.pieces.rotary.upto(x.shape[1]))
            self._saved[self.layer + 1][part].copy_(out)

    def _begin_head(self) -> None:
        self._grad.zero_()
        self.kind = QuantumKind.HEAD if len(self.rows.targets) else QuantumKind.BACKWARD

    def _head(self, count: int) -> None:
        """Loss of ``count`` target tokens and the gradient at their hidden states.

        The softmax is turned into the gradient in place: one ``[count, vocab]`` tensor in fp32 and, in
        16 bits, one copy of it.
        """
        places = self._places[self.done : self.done + count]
        targets = self._targets[self.done : self.done + count, None]
        hidden = self.pieces.base.config.hidden_size
        x = self._saved[-1].view(-1, hidden).index_select(0, places).requires_grad_()
        normed = rms_norm(self.pieces.norm, x)
        with torch.no_grad():
            logits = F.linear(normed.detach(), self.pieces.head_weight).to(self.pieces.exact)
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            wanted = logits.gather(1, targets)
            total = logits.exp_().sum(dim=-1, keepdim=True)
            self.loss += (total.log() - wanted).sum(dtype=torch.float64) / self.divisor
            logits.div_(total)
            logits.scatter_add_(1, targets, torch.full_like(wanted, -1.0))
            logits.mul_(1.0 / self.divisor if self.scale is None else self.scale / self.divisor)
            grad = torch.mm(logits.to(x.dtype), self.pieces.head_weight)
        (grad,) = torch.autograd.grad(normed, x, grad)
        self._grad.view(-1, hidden).index_copy_(0, places, grad)
        self._advance(count)

    def _backward(self, part: tuple[slice, slice]) -> None:
        """Recompute one layer for a range of rows; its input's gradient replaces its output's."""
        x = self._saved[self.layer][part].detach()
        leaves = self.pieces.leaves[self.layer]
        inputs = list(leaves)
        if self.layer > 0:  # the embedding is frozen: nobody wants the first layer's
            inputs.append(x.requires_grad_())
        layer, rotary = self.pieces.layers[self.layer], self.pieces.rotary.upto(x.shape[1])
        grads = layer.gradients(x, rotary, self._grad[part], inputs)
        if self.layer > 0:
            self._grad[part].copy_(grads[-1])
        block = self.pieces.adapter.blocks[self.layer]
        self._collect(block, grads[: len(leaves)], first=part[0].start == 0)

    def _collect(self, block: LayerBlock, grads: Sequence[Tensor], *, first: bool) -> None:
        target = block.grad if self.overwrite else block.partial
        assert target is not None
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        if first:  # whatever a dropped attempt left there is overwritten
            target.copy_(flat)
        else:
            target.add_(flat)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy does not block the host
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
