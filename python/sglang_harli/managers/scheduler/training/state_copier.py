"""Copies of a run's state into shared memory in quanta, and views back.

On a CPU a slice is one bounded copy. On CUDA the device copies it into a small pinned buffer behind
the training stream's work; once the event has fired, a later quantum moves the bytes on, so that
the scheduler's thread never waits for the device (docs/internals/run-protocol.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_harli.protocol import shared_memory
from sglang_harli.protocol.internal import SlotRef, TensorRef

SLICE_BYTES = 4 << 20


def state_layout(tensors: list[tuple[str, torch.Tensor]]) -> tuple[list[TensorRef], int]:
    """Places of the state's tensors in a slot, and the slot's size in bytes."""
    return shared_memory.layout(
        (name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size())
        for name, t in tensors
    )


@dataclass(slots=True)
class _Slice:
    """Bytes ``start`` to ``start + len(place)`` of a live tensor. Looked up when copied: the data
    moves when training's memory is taken back."""

    tensor: torch.Tensor
    start: int
    place: memoryview

    def read(self) -> torch.Tensor:
        flat = self.tensor.detach().view(-1).view(torch.uint8)
        return flat[self.start : self.start + len(self.place)]


class StateCopier:
    """One copy of all state tensors (live, contiguous) into a mapped slot, slice by slice."""

    def __init__(
        self, tensors: list[tuple[str, torch.Tensor]], slot: shared_memory.SharedBuffer, refs: list[TensorRef]
    ) -> None:
        self.refs = refs
        self._slot = slot
        places = {ref.name: slot.view(ref) for ref in refs}
        self._todo = [
            _Slice(tensor, start, places[name][start : start + SLICE_BYTES])
            for name, tensor in tensors
            for start in range(0, tensor.nbytes, SLICE_BYTES)
        ][::-1]
        self._staging: torch.Tensor | None = None  # pinned, once a tensor lies on a CUDA device
        self._flight: tuple[_Slice, torch.cuda.Event] | None = None

    @property
    def done(self) -> bool:
        return not self._todo and self._flight is None

    @property
    def waits(self) -> bool:
        """Whether the device has yet to do its part of what was begun."""
        return self._flight is not None and not self._flight[1].query()

    def run(self) -> int:
        """One copy quantum; returns the bytes moved (0: the device is not there yet)."""
        if self._flight is not None or (self._todo and self._todo[-1].tensor.is_cuda):
            return self._run_cuda()
        moved = 0
        while self._todo and moved < SLICE_BYTES and not self._todo[-1].tensor.is_cuda:
            piece = self._todo.pop()
            torch.frombuffer(piece.place, dtype=torch.uint8).copy_(piece.read())
            moved += len(piece.place)
        return moved

    def _run_cuda(self) -> int:
        if self._staging is None:
            self._staging = torch.empty(SLICE_BYTES, dtype=torch.uint8, pin_memory=True)
        moved = 0
        if self._flight is not None:
            piece, event = self._flight
            if not event.query():
                return 0
            torch.frombuffer(piece.place, dtype=torch.uint8).copy_(self._staging[: len(piece.place)])
            moved, self._flight = len(piece.place), None
        if self._todo:
            piece = self._todo.pop()
            staged = self._staging[: len(piece.place)]
            staged.copy_(piece.read(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._flight = (piece, event)
        return moved

    def finish(self) -> None:
        """All that is left, now (shutdown only: it waits for the device)."""
        while not self.done:
            if self._flight is not None:
                self._flight[1].synchronize()
            self.run()

    def ref(self) -> SlotRef:
        return self._slot.ref(self.refs)


def reader(slot: shared_memory.SharedBuffer, refs: list[TensorRef]) -> Callable[[str], torch.Tensor]:
    """Tensors of a restore slot by name, as views into it (KeyError: the checkpoint lacks it)."""
    places = {ref.name: ref for ref in refs}

    def get(name: str) -> torch.Tensor:
        ref = places[name]
        return torch.frombuffer(slot.view(ref), dtype=getattr(torch, ref.dtype)).view(ref.shape)

    return get
