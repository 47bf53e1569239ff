"""Activations kept from forward to backward, so that nothing is computed twice.

Where memory can be had for a layer and a range of rows, the forward's trace stays. It is copied
into a lease of training's memory and the allocator's own memory is freed, so that the pool knows
every byte; weights, rotary tables and saved inputs stay references (docs/internals/memory.md).

    forward    trace ── its tensors ► references (layer input, weights, tables), copies in the lease (the rest)
    backward   exactly the same rows, from the trace; once dropped: recomputed, in any split
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.peft_trainer.layers.decoder_layer import LayerProgram
from sglang_harli.peft_trainer.layers.operators.plain import Operators
from sglang_harli.peft_trainer.layers.rotary import RotaryTable
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensor, SavedTensors
from sglang_harli.peft_trainer.memory.heap import obtain
from sglang_harli.train_memory import Lease, TrainMemory

_SMALL = 64  # bytes; what is smaller (scalars, states of random generators) stays where it is
_SHAPES = 256  # shapes of ranges whose needs are remembered

Needs = tuple[tuple[int, torch.dtype], ...]  # (elements, dtype) of each flat copy, in order


@dataclass(slots=True)
class _KeptRange:
    """``count`` rows of one layer from row ``start`` on."""

    start: int
    count: int
    program: LayerProgram
    trace: SavedTensors
    lease: Lease


class KeptActivations:
    """The kept ranges of the micro-batch in flight, a lease each, and spare leases."""

    def __init__(self, memory: TrainMemory, operators: Operators) -> None:
        self._memory, self._operators = memory, operators
        self._ranges: dict[int, list[_KeptRange]] = {}  # by layer, rising
        self._spare: list[Lease] = []
        self._idle: set[Lease] = set()  # spare ones that no range of this micro-batch has needed
        self._needs: dict[tuple[object, ...], Needs] = {}  # by what the kernels may depend on
        self._references: set[int] = set()
        self._refused = False

    def begin(self, saved: Iterable[Tensor]) -> None:
        """A micro-batch with the layer inputs ``saved`` begins; unneeded leases are given back."""
        self._end_ranges()
        self._references = {_storage(tensor) for tensor in saved}
        self._refused = False
        for lease in self._idle:
            self._spare.remove(lease)
            lease.give_back()
        self._idle = set(self._spare)

    # ---- forward
    def forward(
        self, layer: int, start: int, program: LayerProgram, x: Tensor, rotary: RotaryTable, out: Tensor
    ) -> bool:
        """A layer's output for a range of rows into ``out``, kept if there is memory; False: not
        tried, as it is short. ``x``: ``[count, width, hidden]``, part of what ``begin`` was
        given."""
        if self._refused:
            return False
        key = (layer == 0, program.attend.window, *x.shape[:2])
        known, lease = self._needs.get(key), None
        if known is not None and (lease := self._obtain(known)) is None:
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
        if needs != known:  # the first of its shape
            self._remember(key, needs)
            lease = self._obtain(needs)
        if lease is not None:
            self._spare.remove(lease)
            self._idle.discard(lease)
            self._move(sources, lease.carve_all(_specs(needs)))
            kept = _KeptRange(start, x.shape[0], program, trace, lease)
            self._ranges.setdefault(layer, []).append(kept)
        return True

    def _remember(self, key: tuple[object, ...], needs: Needs) -> None:
        if len(self._needs) >= _SHAPES:
            del self._needs[next(iter(self._needs))]
        self._needs[key] = needs

    def _obtain(self, needs: Needs) -> Lease | None:
        """A spare or new lease for these; None ends keeping for this micro-batch."""
        specs = _specs(needs)
        fitting = [lease for lease in self._spare if lease.holds(specs)]
        if fitting:
            return min(fitting, key=lambda lease: lease.asked_bytes)
        lease = obtain(self._memory, MemoryPurpose.KEPT, specs)
        if lease is None and self.give_back_spare():
            lease = obtain(self._memory, MemoryPurpose.KEPT, specs)
        self._refused = lease is None
        if lease is not None:
            self._spare.append(lease)
        return lease

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
        """The layer's next kept range is kept no longer; its lease stays for others."""
        self._spare.append(self._ranges[layer].pop(0).lease)

    def _end_ranges(self) -> None:
        for ranges in self._ranges.values():
            self._spare += [kept.lease for kept in ranges]
        self._ranges.clear()

    def give_back_spare(self) -> bool:
        """Return the leases that hold nothing; whether there were any."""
        leases, self._spare = self._spare, []
        self._idle.clear()
        for lease in leases:
            lease.give_back()
        return bool(leases)

    def drop(self, enough: Callable[[], bool] | None = None) -> bool:
        """Return what is spare and kept, and keep no more of this micro-batch; whether there was
        any. ``enough`` ends it early: ranges go first whose backward comes last."""
        self._refused = True
        gave = self.give_back_spare()
        for layer in sorted(self._ranges):
            ranges = self._ranges[layer]
            while ranges:
                if enough is not None and enough():
                    return gave
                ranges.pop().lease.give_back()
                gave = True
        return gave


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
