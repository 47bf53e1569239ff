"""One micro-batch of an evaluation as a sequence of quanta: embed, forward(0..L-1), head.

The cuts are those of training, and a quantum may be dropped and run again as there. Nothing is
kept: each layer's output takes the place of its input, dropout is off, and the head gives the sums
of loss and correct predictions alone.
"""

from __future__ import annotations

from sglang_harli.core import QuantumKind
from sglang_harli.peft_trainer.layers.token_blocks import RowBlocks
from sglang_harli.peft_trainer.micro_batch_pass import MicroBatchPass, ModelPieces, upload
from sglang_harli.peft_trainer.rows import Rows


class EvaluationPass(MicroBatchPass):
    """The state machine of one micro-batch that is evaluated.

    Attributes:
        loss, correct: summed cross-entropy, and predictions that are right, of its target tokens.
    """

    HEAD = QuantumKind.HEAD_EVAL

    def __init__(self, pieces: ModelPieces, rows: Rows) -> None:
        super().__init__(pieces, rows, step=0, divisor=1, scale=None, overwrite=True)

    def _embed(self) -> None:
        device, rows = self.pieces.base.device, self.rows
        self._tensors = self.pieces.memory.carve(rows)
        self._places = upload(rows.target_places, device)
        self._targets = upload(rows.targets, device)
        self._at.saved[0].copy_(self.pieces.embed(upload(rows.ids, device)))
        self._stage = QuantumKind.FORWARD

    def _run_rows(self, rows: slice, width: int, kind: QuantumKind | None) -> None:
        self._no_dropout()
        part = (rows, slice(0, width))
        x = self._at.saved[0][part]
        if not self._from_graph(x, x):
            self.pieces.layers[self.layer].forward(x, self.pieces.rotary.upto(width), out=x)
        self._advance(rows.stop - rows.start)

    def _run_blocks(self, blocks: RowBlocks, count: int) -> None:
        self._no_dropout()
        if blocks.keys is None:
            blocks.keys = self.pieces.memory.carve_keys(blocks.length)
        keys = blocks.keys
        keys.at = at = blocks.take(count * self._block)
        cos, sin = self.pieces.rotary.upto(blocks.length)
        x = self._at.saved[0][blocks.row : blocks.row + 1, at]
        self.pieces.layers[self.layer].forward(x, (cos[:, at], sin[:, at]), past=keys, out=x)
        if blocks.finished:
            self._blocks = None
            self._advance(1)

    def _no_dropout(self) -> None:
        if self.pieces.adapter.masks is not None:
            self.pieces.adapter.masks.off = True

    def _begin_head(self) -> None:
        self._stage = self.HEAD if len(self.rows.targets) else None

    def _head(self, count: int) -> None:
        _, targets = self._compute_logits(count, None)
        logits, low = self._at.logits[:count], self._at.low[:count]
        self._add(*self.pieces.operators.losses(logits, low, targets))
        self._advance(count)

    def _end_head(self) -> None:
        self._stage = None
