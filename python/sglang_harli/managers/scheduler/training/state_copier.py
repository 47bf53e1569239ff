"""Copies of a run's state into shared memory in quanta, and views back.

On a CPU a slice is one bounded copy. On CUDA slices go through pinned buffers on a stream of their
own, several at once, beside the training that goes on: a quantum moves the bytes of one that has
arrived and sends the next, so that the scheduler's thread never waits for the device. The caller
sees to it that no step changes the state meanwhile (docs/internals/run-protocol.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang_harli.device_sizes import DeviceSizes, sizes_of
from sglang_harli.peft_trainer import device_calls
from sglang_harli.protocol import shared_memory
from sglang_harli.protocol.internal import SlotRef, TensorRef


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


@dataclass(slots=True)
class _Flight:
    """A slice on its way; ``event``: it has arrived in ``staged``, which is pinned."""

    piece: _Slice
    staged: torch.Tensor
    event: Any


def on_device(tensor: torch.Tensor) -> bool:
    """Whether a live tensor does not lie in host memory, where it may go at any time."""
    return tensor.device.type != "cpu"


class StateCopier:
    """One copy of all state tensors (live, contiguous) into a mapped slot, slice by slice."""

    def __init__(
        self, tensors: list[tuple[str, torch.Tensor]], slot: shared_memory.SharedBuffer, refs: list[TensorRef]
    ) -> None:
        self.refs = refs
        self._slot = slot
        self._sizes: DeviceSizes = sizes_of("cuda" if on_device(tensors[0][1]) else "cpu")
        step, places = self._sizes.snapshot_bytes, {ref.name: slot.view(ref) for ref in refs}
        self._todo = [
            _Slice(tensor, start, places[name][start : start + step])
            for name, tensor in tensors
            for start in range(0, tensor.nbytes, step)
        ][::-1]
        self._flights: deque[_Flight] = deque()
        self._spare: list[torch.Tensor] = []  # pinned buffers that hold nothing
        self._stream: Any = None  # of the copies, from the first one on
        self._seen: dict[int, int] = {}  # address of each tensor behind whose writes the stream stands

    @property
    def done(self) -> bool:
        return not self._todo and not self._flights

    @property
    def beside(self) -> bool:
        """Whether training may go on while this copy is under way: the device copies."""
        return bool(self._flights) or (bool(self._todo) and on_device(self._todo[-1].tensor))

    @property
    def ready(self) -> bool:
        """Whether ``run`` would move or send anything now."""
        if not self.beside:
            return not self.done
        return self._sends or (bool(self._flights) and self._flights[0].event.query())

    @property
    def _sends(self) -> bool:
        """Whether another slice may be on its way."""
        waits = bool(self._todo) and on_device(self._todo[-1].tensor)
        return waits and len(self._flights) < self._sizes.snapshot_buffers

    def run(self) -> int:
        """One copy quantum; returns the bytes moved (0: the device is not there yet)."""
        if self.beside:
            return self._run_beside()
        moved = 0
        while self._todo and moved < self._sizes.snapshot_bytes and not on_device(self._todo[-1].tensor):
            piece = self._todo.pop()
            torch.frombuffer(piece.place, dtype=torch.uint8).copy_(piece.read())
            moved += len(piece.place)
        return moved

    def _run_beside(self) -> int:
        """Moves the bytes of one slice that has arrived; sends as many as there are buffers."""
        moved = 0
        if self._flights and self._flights[0].event.query():
            flight = self._flights.popleft()
            place = flight.piece.place
            torch.frombuffer(place, dtype=torch.uint8).copy_(flight.staged[: len(place)])
            self._spare.append(flight.staged)
            moved = len(place)
        while self._sends:
            self._send(self._todo.pop())
        return moved

    def _send(self, piece: _Slice) -> None:
        source = piece.read()
        if self._stream is None:
            self._stream = device_calls.copy_stream(source.device)
        if self._seen.get(id(piece.tensor)) != piece.tensor.data_ptr():
            # Behind what training has written there so far, and no later work of its stream.
            for tensor in {id(one.tensor): one.tensor for one in (*self._todo, piece)}.values():
                self._seen[id(tensor)] = tensor.data_ptr()
            self._stream.wait_event(device_calls.event())
        staged = self._spare.pop() if self._spare else self._buffer()
        with device_calls.on_stream(self._stream):
            staged[: len(source)].copy_(source, non_blocking=True)
            self._flights.append(_Flight(piece, staged, device_calls.event()))

    def _buffer(self) -> torch.Tensor:
        return device_calls.pinned((self._sizes.snapshot_bytes,), torch.uint8)

    def finish(self) -> None:
        """All that is left, now (shutdown only: it waits for the device)."""
        while not self.done:
            if self._flights:
                self._flights[0].event.synchronize()
            self.run()

    def abandon(self) -> None:
        """The copy is not wanted any more: what follows on the current stream comes behind what is
        on its way, so that the state's memory may go."""
        if self._flights:
            device = self._flights[-1].piece.tensor.device
            device_calls.current_stream(device).wait_event(self._flights[-1].event)
        self._todo.clear()
        self._flights.clear()

    def ref(self) -> SlotRef:
        return self._slot.ref(self.refs)


def reader(slot: shared_memory.SharedBuffer, refs: list[TensorRef]) -> Callable[[str], torch.Tensor]:
    """Tensors of a restore slot by name, as views into it (KeyError: the checkpoint lacks it)."""
    places = {ref.name: ref for ref in refs}

    def get(name: str) -> torch.Tensor:
        ref = places[name]
        return torch.frombuffer(slot.view(ref), dtype=getattr(torch, ref.dtype)).view(ref.shape)

    return get
