"""Activations kept from forward to backward, so that nothing is computed twice.

Where memory can be had for a layer and a range of rows, the forward's trace stays. It is copied
into a lease of training's memory and the allocator's own memory is freed, so that the pool knows
every byte; weights, rotary tables and saved inputs stay references (docs/internals/memory.md).

    forward    trace ── its tensors ► references (layer input, weights, tables), copies in the lease (the rest)
    backward   exactly the same rows, from the trace; once dropped: recomputed, in any split

Leases are taken and given back between quanta alone (``prepare``), a few for all layers: a quantum
may stand in a stream's span, where a lease would wait or edit SGLang's lists. How much a layer
needs is measured when the first rows of its kind go through it; those are recomputed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.layers.decoder_layer import LayerProgram
from sglang_harli.peft_trainer.layers.operators.plain import Operators
from sglang_harli.peft_trainer.layers.rotary import RotaryTable
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensor, SavedTensors
from sglang_harli.peft_trainer.memory.heap import obtain
from sglang_harli.train_memory import ALIGNMENT, Lease, Specs, TrainMemory, carved_bytes

LEASES = {"cuda": 4}  # of all layers together; elsewhere one a layer: less goes at a time under pressure
LOOSE = 2  # a lease so many times larger than what two micro-batches in a row needed is taken anew
_SMALL = 64  # bytes; what is smaller (scalars, states of random generators) stays where it is
_WIDTHS = 128  # of which a kind's needs are remembered

Kind = tuple[object, ...]  # of a layer: what its kernels depend on
Needs = tuple[tuple[int, torch.dtype], ...]  # (elements, dtype) of each flat copy, in order


@dataclass(slots=True)
class _KeptRange:
    """``count`` rows of one layer from row ``start`` on."""

    start: int
    count: int
    program: LayerProgram
    trace: SavedTensors


@dataclass(slots=True)
class _Group:
    """Layers that share a lease.

    Attributes:
        full: a range did not fit: no more is tried in this micro-batch.
        loose: the last micro-batch needed far less than the lease has.
    """

    layers: range
    lease: Lease | None = None
    full: bool = False
    loose: bool = False

    def give_back(self) -> bool:
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.give_back()
        return lease is not None


class KeptActivations:
    """The kept ranges of the micro-batch in flight, and their leases.

    Args:
        kinds: of each layer: what, beside the rows, its kernels depend on.
        operators: of the base's device.
        leases: at most so many; None: one a layer.
    """

    def __init__(
        self, memory: TrainMemory, kinds: Sequence[Kind], operators: Operators, leases: int | None = None
    ) -> None:
        self._memory, self._kinds, self._operators = memory, kinds, operators
        count = min(leases or len(kinds), len(kinds))
        edges = [len(kinds) * number // count for number in range(count + 1)]
        self._groups = [_Group(range(start, stop)) for start, stop in itertools.pairwise(edges)]
        self._ranges: dict[int, list[_KeptRange]] = {}  # by layer, rising
        self._needs: dict[Kind, dict[int, tuple[int, Needs]]] = {}  # by kind and width: of so many rows
        self._references: set[int] = set()
        self._rows: tuple[int, int] | None = None  # (rows, width) of the micro-batch
        self._pending: list[_Group] = []  # whose needs are not known yet
        self._begun = True  # of the micro-batch that was prepared
        self._refused = False  # no more is asked for
        self._dropped = False  # no more is kept

    # ---- between quanta
    def prepare(self, rows: int, width: int) -> None:
        """Hold leases for a micro-batch that comes next. May be repeated; only here, in
        ``prepare_more`` and where memory is given back does a lease come or go."""
        if not self._begun and self._rows == (rows, width):
            return
        self._end_ranges()
        self._begun, self._rows, self._pending = False, (rows, width), []
        self._refused = self._dropped = False
        wanted: list[tuple[_Group, Specs]] = []
        for group in reversed(self._groups):  # the layers whose backward comes first
            specs = self._specs_of(group)
            if specs is None:
                self._pending.insert(0, group)
            elif not self._keep_lease(group, specs):
                wanted.append((group, specs))
        for group, _ in wanted:
            group.give_back()  # first: both need not fit
        self._obtain(wanted)

    def prepare_more(self, layer: int) -> None:
        """As the forward reaches ``layer``: leases of groups whose needs were not known before."""
        if not self._pending or self._refused or self._dropped:
            return
        wanted: list[tuple[_Group, Specs]] = []
        for group in reversed(self._pending.copy()):
            specs = self._specs_of(group)
            if specs is not None:
                self._pending.remove(group)
                if group.layers.stop > layer and not self._keep_lease(group, specs):
                    wanted.append((group, specs))
        for group, _ in wanted:
            group.give_back()
        self._obtain(wanted)

    def _keep_lease(self, group: _Group, specs: Specs) -> bool:
        """Whether the group's lease serves for these too."""
        lease, needed = group.lease, sum(carved_bytes(shape, dtype) for shape, dtype in specs)
        if lease is None or lease.asked_bytes < needed:
            group.loose = False
            return False
        was_loose, group.loose = group.loose, lease.asked_bytes > LOOSE * needed
        return not (was_loose and group.loose)

    def _obtain(self, wanted: Sequence[tuple[_Group, Specs]]) -> None:
        for group, specs in wanted:
            if self._refused:
                return
            group.lease = obtain(self._memory, MemoryPurpose.KEPT, specs)
            group.loose = False
            self._refused = group.lease is None

    def _specs_of(self, group: _Group) -> Specs | None:
        """What all rows need in this group's layers; None: not known yet."""
        assert self._rows is not None
        specs: list[tuple[tuple[int], torch.dtype]] = []
        for layer in group.layers:
            needs = self._estimate(self._kinds[layer], *self._rows)
            if needs is None:
                return None
            specs += _specs(needs)
        return specs

    def _estimate(self, kind: Kind, rows: int, width: int) -> Needs | None:
        """Of so many rows in any split, from those of the next wider rows that were seen, or of the
        widest."""
        known = self._needs.get(kind)
        if not known:
            return None
        near = min((seen for seen in known if seen >= width), default=max(known))
        count, needs = known[near]
        tokens, seen = rows * width, count * near
        return tuple(
            (-(-elements * tokens // seen) + rows * ALIGNMENT // dtype.itemsize, dtype)
            for elements, dtype in needs
        )

    def _remember(self, kind: Kind, count: int, width: int, needs: Needs) -> None:
        widths = self._needs.setdefault(kind, {})
        known = widths.get(width)
        if known is not None and _bytes(known[1]) * count >= _bytes(needs) * known[0]:
            return
        if known is None and len(widths) >= _WIDTHS:
            del widths[next(iter(widths))]
        widths[width] = (count, needs)

    # ---- forward
    def begin(self, saved: Iterable[Tensor]) -> None:
        """The micro-batch with the layer inputs ``saved`` begins."""
        self._end_ranges()
        self._references = {_storage(tensor) for tensor in saved}
        self._begun = True
        for group in self._groups:
            group.full = False
            if group.lease is not None:
                group.lease.reset()

    @property
    def keeping(self) -> bool:
        """Whether the micro-batch may keep more."""
        return not self._dropped

    def forward(
        self, layer: int, start: int, program: LayerProgram, x: Tensor, rotary: RotaryTable, out: Tensor
    ) -> bool:
        """A layer's output for a range of rows into ``out``, kept if there is memory; False: not
        tried, as it is short. ``x``: ``[count, width, hidden]``, part of what ``begin`` was
        given."""
        group, kind, (count, width) = self._group_of(layer), self._kinds[layer], x.shape[:2]
        if self._dropped or (kind in self._needs and (group.full or group.lease is None)):
            return False
        trace = SavedTensors(kept=True)
        program.forward(x, rotary, trace, out=out)
        references = self._references | {_storage(t) for t in (*program.references, *rotary)}
        sources = _sources(
            [
                saved
                for saved in trace.all_saved()
                if saved.tensor.nbytes >= _SMALL and _storage(saved.tensor) not in references
            ]
        )
        needs = tuple((same[0].tensor.numel(), same[0].tensor.dtype) for same in sources)
        self._remember(kind, count, width, needs)
        places = None if group.lease is None or group.full else _carved(group.lease, needs)
        if places is not None:
            self._move(sources, places)
            self._ranges.setdefault(layer, []).append(_KeptRange(start, count, program, trace))
        elif group.lease is not None:
            group.full = True
        return True

    def _group_of(self, layer: int) -> _Group:
        return next(group for group in self._groups if layer in group.layers)

    def _move(self, sources: list[list[SavedTensor]], places: list[Tensor]) -> None:
        """Copy each memory once to its place; from there the backward reads, in the same layout."""
        flats, read = [], []
        with torch.no_grad():
            for same, flat in zip(sources, places, strict=True):
                first = same[0].tensor
                if not _dense(first):
                    same[0].tensor = flat.view(first.shape).copy_(first)
                    continue
                flats.append(flat)
                read.append(first.as_strided((first.numel(),), (1,)))
                for saved in same:
                    saved.tensor = flat.as_strided(saved.tensor.shape, saved.tensor.stride())
            self._operators.copy(flats, read)

    # ---- backward
    def next(self, layer: int) -> tuple[int, int] | None:
        """(first row, rows) of this layer's next kept range."""
        ranges = self._ranges.get(layer)
        return (ranges[0].start, ranges[0].count) if ranges else None

    def gradients(self, layer: int, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """``LayerProgram.gradients`` for the layer's next kept range; ``grad``: of its output."""
        kept = self._ranges[layer][0]
        grads = kept.program.gradients(kept.trace, grad)
        self.drop_next(layer)
        return grads

    # ---- giving back
    def drop_next(self, layer: int) -> None:
        """The layer's next kept range is kept no longer; its lease stays."""
        self._ranges[layer].pop(0)

    def _end_ranges(self) -> None:
        self._ranges.clear()

    def _holds(self, group: _Group) -> bool:
        return any(self._ranges.get(layer) for layer in group.layers)

    def give_back_spare(self) -> bool:
        """Return the leases that hold nothing; whether there were any."""
        given = [group.give_back() for group in self._groups if not self._holds(group)]
        return any(given)

    def drop(self, enough: Callable[[], bool] | None = None) -> bool:
        """Return what is spare and kept, and keep no more of this micro-batch; whether there was
        any. ``enough`` ends it early: layers go first whose backward comes last."""
        self._dropped = True
        gave = self.give_back_spare()
        for group in self._groups:
            if group.lease is None:
                continue
            if enough is not None and enough():
                break
            for layer in group.layers:
                self._ranges.pop(layer, None)
            gave = group.give_back() or gave
        return gave


def kept_for(base: FrozenBase, memory: TrainMemory) -> KeptActivations:
    """Those of a run: the first layer has no input to give a gradient to, and windows differ."""
    kinds = [(layer == 0, base.window(layer)) for layer in range(len(base.layers))]
    return KeptActivations(memory, kinds, base.operators, LEASES.get(base.device.type))


def _carved(lease: Lease, needs: Needs) -> list[Tensor] | None:
    """Places behind those that were carved before; None: they do not fit."""
    try:
        return [lease.carve((count,), dtype) for count, dtype in needs]
    except MemoryError:
        return None


def _bytes(needs: Needs) -> int:
    return sum(count * dtype.itemsize for count, dtype in needs)


def _specs(needs: Needs) -> list[tuple[tuple[int], torch.dtype]]:
    return [((count,), dtype) for count, dtype in needs]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # one for all views; contents, and an address, need not be there


def _sources(saved: list[SavedTensor]) -> list[list[SavedTensor]]:
    """Grouped by the memory that they name; all is alive, so each address has one meaning."""
    found: dict[tuple[object, ...], list[SavedTensor]] = {}
    for number, one in enumerate(saved):
        tensor = one.tensor
        own = None if _dense(tensor) else number
        key = (_storage(tensor), tensor.storage_offset(), tensor.numel(), tensor.dtype, own)
        found.setdefault(key, []).append(one)
    return list(found.values())


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
