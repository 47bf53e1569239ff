"""One micro-batch as a sequence of quanta (docs/internals/training-step.md).

    embed, forward(0..L-1), head (chunks of target tokens), backward(L-1..0)

Forward keeps only each layer's input, for all rows; backward runs one layer again with gradients.
Where memory is plentiful, forward keeps a layer's activations too (``kept``), and nothing is run
again. A quantum is one layer and a range of rows chosen when it is run, so a micro-batch begun in
large pieces may go on in small ones. Rows are sorted by falling length and a range is padded to its
own longest row.

Padding stands to the right of every row, where causal attention cannot see it; its gradients are
zero. But it must be finite (0 * NaN is NaN), and memory comes with undefined contents: what a range
leaves out of its rows is zeroed when the range is written.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sglang_harli.core import QuantumKind
from sglang_harli.device_sizes import sizes_of
from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.adapter import Adapter
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.graphs.layer_graphs import LayerGraphs
from sglang_harli.peft_trainer.layers.decoder_layer import LayerProgram
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors
from sglang_harli.peft_trainer.layers.token_blocks import RowBlocks
from sglang_harli.peft_trainer.memory.activations import Activations, MicroBatchMemory
from sglang_harli.peft_trainer.memory.kept_activations import KeptActivations
from sglang_harli.peft_trainer.memory.working_set import QuantumBound
from sglang_harli.peft_trainer.records import QuantumShape
from sglang_harli.peft_trainer.rows import Rows


class ModelPieces:
    """What every quantum needs of the model, looked up once a run; ``kept``, ``graphs`` None:
    none."""

    def __init__(
        self,
        base: FrozenBase,
        adapter: Adapter,
        memory: MicroBatchMemory,
        kept: KeptActivations | None,
        bound: QuantumBound,
        graphs: LayerGraphs | None = None,
    ) -> None:
        self.base, self.bound = base, bound
        self.adapter = adapter
        self.memory, self.kept, self.graphs = memory, kept, graphs
        self.layers = [
            LayerProgram(
                layer, block.groups, base.window(i), base.operators, wants_x=i > 0
            )  # the embedding is frozen
            for i, (layer, block) in enumerate(zip(base.layers, adapter.blocks, strict=True))
        ]
        self.embed = base.model.model.embed_tokens
        self.norm = RmsNorm("norm", base.model.model.norm)
        self.head_weight: Tensor = base.model.lm_head.weight
        self.rotary = base.rotary()
        self.operators = base.operators
        self.sizes = sizes_of(base.device.type)


class MicroBatchPass:
    """The state machine of one micro-batch.

    Args:
        step: optimizer step, key of dropout masks; divisor: target tokens of the whole step.
        scale: loss scale, a device scalar, or None.
        overwrite: gradients replace the step's (its first micro-batch); else go to ``partial``.

    Attributes:
        loss: summed cross-entropy / divisor of what the head has done; a device scalar.
        correct: target tokens of it whose logit is the largest; a device scalar.
    """

    HEAD = QuantumKind.HEAD  # the kind of the head's quanta

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
        self._stage: QuantumKind | None = QuantumKind.EMBED
        self.layer = 0
        self.done = 0  # rows of this layer, or target tokens of the head
        self._block = pieces.sizes.token_block
        self.loss = torch.zeros((), dtype=torch.float64, device=pieces.base.device)
        self.correct = torch.zeros_like(self.loss)
        self._tensors: Activations | None = None
        self._blocks: RowBlocks | None = None  # row ``done`` is taken in blocks of tokens
        # A row that cannot be, for want of memory: stage, layer, row.
        self._uncut: tuple[QuantumKind | None, int, int] | None = None

    @property
    def kind(self) -> QuantumKind | None:
        """The quantum that comes next; None: the micro-batch is done."""
        if self._blocks is not None:
            return self._blocks.kind
        if self._stage == QuantumKind.BACKWARD and (kept := self._next_kept()) and kept[0] == self.done:
            return QuantumKind.BACKWARD_KEPT
        return self._stage

    @property
    def left(self) -> int:
        """Rows that the next quantum may take (kept ones: must), or the head's target tokens."""
        if self._stage == QuantumKind.BACKWARD and (kept := self._next_kept()):
            return kept[1] if kept[0] == self.done else kept[0] - self.done
        return self._unfinished

    def shape(self, head_tokens: int, fixed_rows: int | None) -> QuantumShape:
        """The quantum that comes next, whose memory is held from now on; ``fixed_rows``: of a fixed
        split. ``head_tokens``: most target tokens whose logits are computed at once."""
        bound = self.pieces.bound
        if fixed_rows is None and self._too_long(bound):
            self.cut()
        self._obtain_keys()
        kind, left, width = self.kind, self.left, self.rows.width
        assert kind is not None
        if (blocks := self._blocks) is not None:
            most = math.ceil(blocks.left / self._block)
            most = bound.blocks(kind, self._block, blocks.length, most)
            return QuantumShape(kind, most, self._block, False, blocks.length)
        if kind == QuantumKind.BACKWARD_KEPT:
            return QuantumShape(kind, left, self.rows.lengths[self.done], True)
        if kind == QuantumKind.EMBED:
            return QuantumShape(kind, left, width, fixed_rows is not None)
        if kind != self.HEAD:
            if fixed_rows is not None:
                return QuantumShape(kind, min(left, fixed_rows), width, True)
            most = bound.rows(kind, self.rows.lengths[self.done], left, keeps=self._keeps)
            return QuantumShape(kind, most, width, False)
        most = min(left, head_tokens)
        if fixed_rows is None:
            most = bound.head_tokens(most)
        if fixed_rows is not None:
            return QuantumShape(kind, 1, min(most, fixed_rows * width), True)
        block = min(self.pieces.sizes.head_block, head_tokens)
        return QuantumShape(kind, max(1, math.ceil(most / block)), min(block, most), False)

    def _too_long(self, bound: QuantumBound) -> bool:
        """Whether the row that comes next takes too much memory whole."""
        kind = self.kind
        if self._blocks is not None or kind is None:
            return False
        if kind not in (QuantumKind.FORWARD, QuantumKind.BACKWARD):
            return False
        return bound.too_long(kind, self.rows.lengths[self.done])

    def bytes_of(self, count: int) -> int:
        """What ``run(count)`` takes beside the leases, estimated."""
        kind, needs = self.kind, self.pieces.bound.needs
        assert kind is not None
        if self._blocks is not None:
            return needs.leaves + needs.block_bytes(kind, count * self._block, self._blocks.length)
        if kind == self.HEAD:
            return needs.head_bytes(count)
        width = self.rows.lengths[self.done]
        return needs.leaves + count * needs.row_bytes(kind, width, keeps=self._keeps)

    @property
    def _keeps(self) -> bool:
        """Whether the quantum that comes next may keep what it computes."""
        kept = self.pieces.kept
        return kept is not None and kept.keeping and self.kind == QuantumKind.FORWARD

    @property
    def divisible(self) -> bool:
        """Whether one row of the quantum that comes next can be run in smaller pieces."""
        if self._blocks is not None or self.kind not in (QuantumKind.FORWARD, QuantumKind.BACKWARD):
            return self.kind == QuantumKind.BACKWARD_KEPT
        length = self.rows.lengths[self.done]
        return length > self._block and self._uncut != (self._stage, self.layer, self.done)

    @property
    def _unfinished(self) -> int:
        whole = len(self.rows.targets) if self._stage == self.HEAD else self.rows.count
        return whole - self.done

    def _next_kept(self) -> tuple[int, int] | None:
        """(first row, rows) of the layer's next kept range."""
        return None if self.pieces.kept is None else self.pieces.kept.next(self.layer)

    def cut(self) -> bool:
        """Recompute the next kept range, or take the next row in blocks; False: neither."""
        if self.kind == QuantumKind.BACKWARD_KEPT and self.pieces.kept is not None:
            self.pieces.kept.drop_next(self.layer)
            return True
        if self._blocks is not None or self._stage not in (QuantumKind.FORWARD, QuantumKind.BACKWARD):
            return False
        length = self.rows.lengths[self.done]
        if length <= self._block or self._uncut == (self._stage, self.layer, self.done):
            return False
        self._blocks = RowBlocks(self.done, length, backward=self._stage == QuantumKind.BACKWARD)
        return True

    def _obtain_keys(self) -> None:
        """Hold the memory of a row in blocks; the row stays whole where there is none."""
        blocks = self._blocks
        if blocks is not None and blocks.keys is None and not self.pieces.memory.obtain_keys(blocks.length):
            self._blocks, self._uncut = None, (self._stage, self.layer, self.done)

    @property
    def misleads(self) -> bool:
        """The time of the next quantum says nothing about its kind."""
        return self._blocks is not None and self._blocks.fills

    def extent(self, count: int) -> tuple[int, int]:
        """(tokens with padding, padded row width) of ``run(count)``; head: (target tokens, 1)."""
        kind = self.kind
        if self._blocks is not None:
            return min(count * self._block, self._blocks.left), self._blocks.length
        if kind == QuantumKind.EMBED:
            return self.rows.count * self.rows.width, self.rows.width
        if kind == self.HEAD:
            return count, 1
        width = self.rows.lengths[self.done]  # sorted: the longest of the range
        return count * width, width

    def run(self, count: int) -> tuple[int, int]:
        """One quantum of ``count`` rows (head: target tokens; a cut row: blocks), ``left`` at most.
        Gives its ``extent``."""
        kind, extent = self.kind, self.extent(count)
        if self._blocks is not None:
            self._run_blocks(self._blocks, count)
        elif kind == QuantumKind.EMBED:
            self._embed()
        elif kind == self.HEAD:
            self._head(count)
        else:
            self._run_rows(slice(self.done, self.done + count), extent[1], kind)
        return extent

    def _run_rows(self, rows: slice, width: int, kind: QuantumKind | None) -> None:
        part, masks = (rows, slice(0, width)), self.pieces.adapter.masks
        if masks is not None:
            names = list(zip(self.rows.positions[rows], self.rows.lengths[rows], strict=True))
            masks.set_rows(self.step, names, width)
        if kind == QuantumKind.FORWARD:
            self._forward(part)
        else:
            self._backward(part, kept=kind == QuantumKind.BACKWARD_KEPT)
        self._advance(rows.stop - rows.start)

    def _run_blocks(self, blocks: RowBlocks, count: int) -> None:
        if blocks.keys is None:
            blocks.keys = self.pieces.memory.carve_keys(blocks.length)
        keys, kind, fills = blocks.keys, blocks.kind, blocks.fills
        keys.at = at = blocks.take(count * self._block)
        row, length = slice(blocks.row, blocks.row + 1), blocks.length
        masks, program = self.pieces.adapter.masks, self.pieces.layers[self.layer]
        if masks is not None:
            masks.set_rows(self.step, [(self.rows.positions[blocks.row], length)], length, at)
        cos, sin = self.pieces.rotary.upto(length)
        x, rotary = self._at.saved[self.layer][row, at], (cos[:, at], sin[:, at])
        if fills:
            program.fill_keys(x, rotary, keys)
        elif kind == QuantumKind.FORWARD:
            below = self._at.saved[self.layer + 1][row]
            program.forward(x, rotary, past=keys, out=below[:, at])
            if at.stop == length:
                below[:, length:].zero_()
        else:
            grad = self._at.grad[row, at]
            trace = program.recompute(x, rotary, keys)
            leaves, _ = program.gradients(trace, grad, keys)
            self._collect(leaves, first=not row.start and at.stop == length)
        if blocks.finished:
            self._blocks = None
            self._advance(1)

    def _advance(self, count: int) -> None:
        """To the next range, layer or kind."""
        self.done += count
        if self._unfinished > 0:
            return
        self.done = 0
        last = len(self.pieces.layers) - 1
        if self._stage == QuantumKind.FORWARD:
            if self.layer < last:
                self.layer += 1
            else:
                self._begin_head()
        elif self._stage == self.HEAD:
            self._end_head()
        elif self.layer > 0:
            self.layer -= 1
        else:
            self._stage = None

    def _end_head(self) -> None:
        self._stage = QuantumKind.BACKWARD  # self.layer is the last one still

    @property
    def _at(self) -> Activations:
        assert self._tensors is not None  # from EMBED on
        return self._tensors

    def _embed(self) -> None:
        device, rows = self.pieces.base.device, self.rows
        self._tensors = self.pieces.memory.carve(rows)
        if self.pieces.kept is not None:
            self.pieces.kept.begin(self._at.saved)
        self._places = upload(rows.target_places, device)
        self._targets = upload(rows.targets, device)
        self._at.saved[0].copy_(self.pieces.embed(upload(rows.ids, device)))
        self._stage = QuantumKind.FORWARD

    def _forward(self, part: tuple[slice, slice]) -> None:
        x, (rows, columns) = self._at.saved[self.layer][part], part
        layer, rotary = self.pieces.layers[self.layer], self.pieces.rotary.upto(columns.stop)
        below, kept = self._at.saved[self.layer + 1][rows], self.pieces.kept
        out = below[:, columns]
        if not self._from_graph(x, out) and (
            kept is None or not kept.forward(self.layer, rows.start, layer, x, rotary, out)
        ):
            layer.forward(x, rotary, out=out)
        if columns.stop < below.shape[1]:
            below[:, columns.stop :].zero_()  # a later range may be cut wider

    def _from_graph(self, x: Tensor, out: Tensor) -> bool:
        """The layer's output from a graph; False: there is none, now."""
        graphs, layer = self.pieces.graphs, self.layer
        return graphs is not None and graphs.forward(
            layer, self.pieces.layers[layer], x, self.pieces.rotary, out
        )

    def _begin_head(self) -> None:
        self._at.grad.zero_()
        self._stage = QuantumKind.HEAD if len(self.rows.targets) else QuantumKind.BACKWARD

    def _head(self, count: int) -> None:
        """Loss of ``count`` target tokens and the gradient at their hidden states.

        The softmax is turned into the gradient in place: one ``[count, vocab]`` tensor in the exact
        dtype and, in 16 bits, one copy of it.
        """
        trace, operators = SavedTensors(), self.pieces.operators
        places, targets = self._compute_logits(count, trace)
        logits, low = self._at.logits[:count], self._at.low[:count]
        factor = 1.0 / self.divisor if self.scale is None else self.scale / self.divisor
        self._add(*operators.losses_and_gradient(logits, low, targets, factor))
        grad = operators.rms_norm_backward(self.pieces.norm, torch.mm(low, self.pieces.head_weight), trace)
        self._at.grad.view(-1, grad.shape[1]).index_copy_(0, places, grad)
        self._advance(count)

    def _add(self, loss: Tensor, correct: Tensor) -> None:
        """Of some target tokens, their sum and number."""
        self.correct += correct
        self.loss += loss / self.divisor

    def _compute_logits(self, count: int, trace: SavedTensors | None) -> tuple[Tensor, Tensor]:
        """The logits of ``count`` target tokens into ``low``.  Gives their places and ids."""
        places = self._places[self.done : self.done + count].long()
        targets = self._targets[self.done : self.done + count, None].long()
        hidden = self.pieces.base.config.hidden_size
        rows = self._at.saved[-1].view(-1, hidden).index_select(0, places)
        normed = self.pieces.operators.rms_norm(self.pieces.norm, rows, trace)
        torch.mm(normed, self.pieces.head_weight.t(), out=self._at.low[:count])
        return places, targets

    def _backward(self, part: tuple[slice, slice], *, kept: bool) -> None:
        """One layer for a range of rows; its input's gradient replaces its output's."""
        grad, program = self._at.grad[part], self.pieces.layers[self.layer]
        if kept:
            assert self.pieces.kept is not None
            leaves, _ = self.pieces.kept.gradients(self.layer, grad)
        else:
            x, graphs, rotary = self._at.saved[self.layer][part], self.pieces.graphs, self.pieces.rotary
            leaves = None if graphs is None else graphs.gradients(self.layer, program, x, grad, rotary)
            if leaves is None:
                leaves, _ = program.gradients(program.recompute(x, rotary.upto(x.shape[1])), grad)
        self._collect(leaves, first=part[0].start == 0)

    def _collect(self, leaves: Tensor, *, first: bool) -> None:
        """Take the gradients of a layer's adapter weights for some rows."""
        block = self.pieces.adapter.blocks[self.layer]
        target = block.grad if self.overwrite else block.partial
        assert target is not None
        if first:  # whatever a dropped attempt left there is overwritten
            target.copy_(leaves)
        else:
            target.add_(leaves)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy, in the array's dtype; the message that it lies in goes with the micro-batch."""
    return device_calls.copied_to(torch.from_numpy(array.copy()), device)
