"""Quanta of one layer replayed as CUDA graphs (docs/internals/training-step.md).

A small quantum is bound by its launches, not by its arithmetic. Where its shape comes again it is
captured once, while nothing is served, and from then on launched as one:

    x, grad ─copy─► staging ─ graph: forward, or forward again and backward ─► staging ─copy─► next layer's input, grad, gradients

Widths are padded to buckets, so that few shapes come. Padding stands to the right, where causal
attention cannot see it, and its gradients are zero. A graph reads and writes staging, whose
addresses never change, the frozen weights and the adapter's: where the latter have moved the graph
is captured anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sglang_harli.core import QuantumKind
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.graphs.cache import Captured, GraphCache
from sglang_harli.peft_trainer.graphs.capture import Capture
from sglang_harli.peft_trainer.layers.decoder_layer import LayerProgram
from sglang_harli.peft_trainer.layers.rotary import Rotary, RotaryTable

logger = logging.getLogger(__name__)

BUCKET = 64  # tokens: widths are padded to multiples of it
MOST, MOST_BYTES = 512, 256 * 2**20  # graphs of a run
SEEN = 4096  # shapes that are remembered as run eagerly
# A layer of about 60 launches takes the host 0.5 ms; a device does 2.5e14 operations a second of
# such products. Where the arithmetic takes twice as long as the launches a graph gains nothing.
_LAUNCH_S, _OPERATIONS_S = 5e-4, 2.5e14
_STAGED = 2  # tensors of a quantum's tokens in staging


def launch_bound_tokens(layer_parameters: int) -> int:
    """Tokens of a quantum up to which its launches matter, for a layer of so many weights."""
    return int(_LAUNCH_S * _OPERATIONS_S / layer_parameters)


def bucket_of(width: int, positions: int | None = None) -> int:
    """The padded width; ``positions``: of the model, never exceeded."""
    padded = -(-width // BUCKET) * BUCKET
    return padded if positions is None else max(min(padded, positions), width)


@dataclass(frozen=True, slots=True)
class _Staging:
    """Fixed memory that graphs read and write, each flat: ``tokens * hidden``; leaves: a layer's
    adapter (all have the same size)."""

    x: Tensor
    grad: Tensor
    leaves: Tensor


class LayerGraphs:
    """The graphs of one run's layers.

    Args:
        capture: makes them; most: how many; most_bytes: of graphs and staging together.
        most_tokens: of a quantum, padding included; larger ones run eagerly. Staging takes half of
            ``most_bytes`` at most, which may lower it.
        positions: of the model; None: without end.
        like: a tensor whose dtype and device are the base's; hidden: its width.

    Attributes:
        most_bytes: as given; may_capture: nothing is served and nothing waits now.
        captured, replayed: graphs made, and launched; failed: why no more are made, or "".
    """

    def __init__(
        self,
        capture: Capture,
        *,
        most: int,
        most_bytes: int,
        most_tokens: int,
        hidden: int,
        positions: int | None,
        like: Tensor,
    ) -> None:
        self.most_bytes = most_bytes
        token_bytes = _STAGED * hidden * like.element_size()
        most_tokens = min(most_tokens, most_bytes // 2 // token_bytes)
        self.cache = GraphCache(most, most_bytes - most_tokens * token_bytes)
        self.may_capture = False
        self.captured = self.replayed = 0
        self.failed = ""
        self._capture, self._positions = capture, positions
        self._most, self._hidden, self._like = most_tokens, hidden, like
        self._staging: _Staging | None = None
        self._seen: dict[Hashable, None] = {}

    @classmethod
    def of(cls, base: FrozenBase, capture: Capture, most_bytes: int = MOST_BYTES) -> LayerGraphs:
        """Of a run on ``base``, within ``MOST`` graphs and ``MOST_BYTES``, or ``most_bytes`` if
        that is less."""
        weights = sum(inputs * outputs for inputs, outputs in base.linear_sizes().values())
        return cls(
            capture,
            most=MOST,
            most_bytes=min(most_bytes, MOST_BYTES),
            most_tokens=launch_bound_tokens(weights),
            hidden=base.config.hidden_size,
            positions=base.positions,
            like=base.model.lm_head.weight.detach(),
        )

    def status(self) -> dict[str, Any]:
        """For ``harli status``."""
        return {
            "captured": self.captured,
            "replayed": self.replayed,
            "held": len(self.cache),
            "held_bytes": self.cache.nbytes,
            "evicted": self.cache.evicted,
            "stale": self.cache.stale,
            "failed": self.failed,
        }

    def begin(self, idle: bool) -> int:
        """A quantum begins; ``idle``: graphs may be captured in it. Gives ``captured``."""
        self.may_capture = idle
        return self.captured

    # ---- quanta
    def forward(self, layer: int, program: LayerProgram, x: Tensor, rotary: Rotary, out: Tensor) -> bool:
        """``program.forward(x, out=out)``; False: to be run eagerly.  ``x``, ``out``: ``[rows,
        width, hidden]``."""
        shape = self._shape(x)
        if shape is None:
            return False

        def work(staging: _Staging, tables: RotaryTable) -> None:
            place = _view(staging.x, shape, self._hidden)
            program.forward(place, tables, out=place)

        graph = self._graph(QuantumKind.FORWARD, layer, program, shape, rotary, work)
        if graph is None or (staging := self._staging) is None:
            return False
        place = self._fill(staging.x, x, shape)
        self._replay(graph)
        out.copy_(place)
        return True

    def gradients(
        self, layer: int, program: LayerProgram, x: Tensor, grad: Tensor, rotary: Rotary
    ) -> Tensor | None:
        """``program.gradients(program.recompute(x), grad)``: those of the adapter's weights, in
        staging until the next call; None: to be run eagerly."""
        shape = self._shape(x)
        if shape is None:
            return None

        def work(staging: _Staging, tables: RotaryTable) -> None:
            trace = program.recompute(_view(staging.x, shape, self._hidden), tables)
            leaves, _ = program.gradients(trace, _view(staging.grad, shape, self._hidden))
            staging.leaves.copy_(leaves)

        graph = self._graph(QuantumKind.BACKWARD, layer, program, shape, rotary, work)
        if graph is None or (staging := self._staging) is None:
            return None
        self._fill(staging.x, x, shape)
        place = self._fill(staging.grad, grad, shape)
        self._replay(graph)
        if program.wants_x:
            grad.copy_(place)
        return staging.leaves

    # ---- memory that is asked back
    def clear(self) -> None:
        """Let every graph and the staging go; captured again when idle time comes."""
        self.cache.clear()
        self._staging = None

    # ---- how
    def _shape(self, x: Tensor) -> tuple[int, int] | None:
        """(rows, padded width) of a quantum that graphs are for."""
        rows, width = x.shape[:2]
        padded = bucket_of(width, self._positions)
        return (rows, padded) if rows * padded <= self._most and not self.failed else None

    def _graph(
        self,
        kind: QuantumKind,
        layer: int,
        program: LayerProgram,
        shape: tuple[int, int],
        rotary: Rotary,
        work: Callable[[_Staging, RotaryTable], None],
    ) -> Captured | None:
        """The graph of this shape; captured now where that is possible."""
        key = (kind, layer, *shape)
        tables = rotary.upto(shape[1])
        places = (tables[0].data_ptr(), tables[1].data_ptr(), *(leaf.data_ptr() for leaf in program.leaves))
        found = self.cache.get(key, places)
        if found is not None or not self.may_capture:
            self._see(key)
            return found
        if key not in self._seen:  # a shape that came once may never come again
            self._see(key)
            return None
        staging = self._staging = self._staging or self._make_staging(program)
        try:
            work(staging, tables)  # loads and chooses the kernels of the padded shape
            graph, nbytes = self._capture.capture(lambda: work(staging, tables))
        except RuntimeError as error:
            self._end(f"a capture failed: {error}")
            return None
        self.captured += 1
        captured = Captured(graph, nbytes, places)
        if not self.cache.put(key, captured):  # it would be made again each time
            self._end(f"one takes {nbytes} bytes, and {self.cache.most_bytes} is the most for all")
            return None
        return captured

    def _end(self, why: str) -> None:
        """No more of them in this run."""
        self.failed = f"quanta run without CUDA graphs: {why}"
        logger.warning("harli: %s", self.failed)
        self.clear()

    def _see(self, key: Hashable) -> None:
        if key not in self._seen and len(self._seen) >= SEEN:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None

    def _make_staging(self, program: LayerProgram) -> _Staging:
        x, grad = (self._like.new_zeros(self._most * self._hidden) for _ in range(_STAGED))
        return _Staging(x, grad, self._like.new_zeros(program.leaf_count))

    def _fill(self, flat: Tensor, source: Tensor, shape: tuple[int, int]) -> Tensor:
        """Contents of a quantum into staging, zeros behind its width; their place."""
        place, width = _view(flat, shape, self._hidden), source.shape[1]
        place[:, :width].copy_(source)
        if width < shape[1]:
            place[:, width:].zero_()
        return place[:, :width]

    def _replay(self, captured: Captured) -> None:
        captured.graph.replay()
        self.replayed += 1


def _view(flat: Tensor, shape: tuple[int, int], hidden: int) -> Tensor:
    rows, width = shape
    return flat[: rows * width * hidden].view(rows, width, hidden)
