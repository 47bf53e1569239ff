"""Where the adapter's state lies: in a lease of training's memory or, last resort, in host memory.

    nowhere ── obtain ── in its lease ── spill ── in host memory ── obtain ── coming back, layer by layer ── in its lease

Tensors keep their identity (``LayerBlock.lie_in``), so what holds one, a copy of the state into a
checkpoint or an optimizer in the middle of a step, goes on with the same values wherever they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_harli.core import MemoryPurpose
from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.adapter import LayerBlock
from sglang_harli.peft_trainer.memory.heap import obtain
from sglang_harli.train_memory import Lease, TrainMemory, carved_bytes


class StateMemory:
    """The flat tensors of all layers' ``blocks`` (state, gradients), in one lease of ``memory``."""

    def __init__(self, blocks: list[LayerBlock], memory: TrainMemory) -> None:
        self._blocks, self._memory = blocks, memory
        self._tensors = [((block.size,), flat.dtype) for block in blocks for flat in block.flats]
        self.nbytes = sum(carved_bytes(shape, dtype) for shape, dtype in self._tensors)
        self._lease: Lease | None = None
        self._places: list[list[Tensor]] = []  # by layer, in the lease; empty until they are carved
        self._host: dict[int, list[Tensor]] = {}  # layers in host memory

    @property
    def spilled(self) -> bool:
        """Whether some layer lies in host memory."""
        return bool(self._host)

    def obtain(self) -> bool:
        """Hold a lease: False when there is none now."""
        if self._lease is None:
            self._lease = obtain(self._memory, MemoryPurpose.STATE, self._tensors)
        return self._lease is not None

    def carve(self) -> None:
        """Let the tensors lie in the lease, except spilled layers; contents are undefined. Apart
        from ``obtain`` because that only counts: this belongs on the stream that trains."""
        if self._places:
            return
        assert self._lease is not None
        for layer, block in enumerate(self._blocks):
            self._places.append([self._lease.carve((block.size,), flat.dtype) for flat in block.flats])
            if layer not in self._host:
                block.lie_in(self._places[layer])

    def bring_back(self) -> None:
        """One spilled layer from host memory into the lease."""
        self.carve()
        layer = min(self._host)
        places = self._places[layer]
        for place, kept in zip(places, self._host[layer], strict=True):
            place.copy_(kept, non_blocking=True)  # torch reuses pinned memory only after the copy
        self._blocks[layer].lie_in(places)
        del self._host[layer]

    def spill(self) -> bool:
        """Copy everything to host memory and give the lease back. Waits for the device: the last
        resort. False: no lease to give back, or no host memory to go to; nothing has changed."""
        if self._lease is None:
            return False
        if self._places:
            device = self._places[0][0].device
            leaving = [layer for layer in range(len(self._blocks)) if layer not in self._host]
            try:
                host = {layer: [_host_like(flat) for flat in self._blocks[layer].flats] for layer in leaving}
            except (MemoryError, RuntimeError):  # torch's allocators raise either
                return False
            if device.type == "cuda":
                device_calls.synchronize(device)  # quanta may still be writing, on another stream than this
            for layer, copies in host.items():
                for copy, flat in zip(copies, self._blocks[layer].flats, strict=True):
                    copy.copy_(flat)
                self._blocks[layer].lie_in(copies)
            self._host.update(host)
        self._give_back()
        return True

    def _give_back(self) -> None:
        lease, self._lease = self._lease, None
        self._places = []
        if lease is not None:
            lease.give_back()

    def release(self) -> None:
        """The run is over: let all of it go."""
        self._host.clear()
        self._give_back()


def _host_like(flat: Tensor) -> Tensor:
    """Host memory for ``flat``; pinned, where that can be had, if the device copies into it."""
    if flat.is_cuda:
        try:
            return device_calls.pinned(flat.shape, flat.dtype)
        except RuntimeError:  # the limit of locked memory: pageable memory is slower and does as well
            pass
    return torch.empty(flat.shape, dtype=flat.dtype)
