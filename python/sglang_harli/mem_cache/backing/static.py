"""The pool's memory as plain tensors: training gets the very bytes of the KV rows, as extents.

For devices whose memory cannot, or must not, be remapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing.host import POISON
from sglang_harli.mem_cache.geometry import PoolGeometry, runs_of


class StaticBacking:
    """The pool's memory in plain tensors, lent in place.

    Args:
        stream: on CUDA that of forwards and quanta, where memory is cleared; None: the current. It
            and the caller's stream wait for each other at every move.
        debug: memory on its way to training is filled with NaN.
        module: torch's module of the device; None: by the device.
    """

    name = "static"
    contiguous = False

    def __init__(
        self,
        geometry: PoolGeometry,
        device: torch.device | str,
        *,
        stream: Any = None,
        debug: bool = False,
        module: Any = None,
    ) -> None:
        self.geometry, self.debug = geometry, debug
        self.device = torch.device(device)
        self.stream, self._module = stream, module
        self._lent: set[int] = set()
        self._cleared: Any = (
            None  # an event behind the latest clearing; None: there was none since ``settle``
        )
        self._spare: Any = None
        to_value, nbytes = geometry.value_offset(), geometry.buffer_bytes
        layers = [
            torch.zeros(2 * to_value, dtype=torch.uint8, device=self.device)
            for _ in range(geometry.buffers // 2)
        ]
        self._buffers = [layer.narrow(0, start, nbytes) for layer in layers for start in (0, to_value)]

    @property
    def lent(self) -> set[int]:
        return set(self._lent)

    def kv_bytes(self, buffer: int) -> Tensor:
        """Buffer's bytes, uint8 ``[buffer_bytes]``."""
        return self._buffers[buffer]

    def extent_bytes(self, stripes: Sequence[int]) -> list[int]:
        chunk, buffers = self.geometry.chunk_bytes, self.geometry.buffers
        return [len(run) * chunk for run in runs_of(stripes) for _ in range(buffers)]

    def lend(self, stripes: Sequence[int]) -> list[Tensor]:
        """One extent for each run of adjacent stripes and buffer."""
        chunk = self.geometry.chunk_bytes
        self._lent |= set(stripes)
        extents = [
            flat.narrow(0, run.start * chunk, len(run) * chunk)
            for run in runs_of(stripes)
            for flat in self._buffers
        ]
        with self._in_line():
            if self.debug:
                for extent in extents:
                    extent.fill_(POISON)
        return extents

    def take_back(self, stripes: Sequence[int], extents: Sequence[Tensor]) -> None:
        """Zero the KV rows, behind training's last work on them, before any later forward."""
        self._lent -= set(stripes)
        with self._in_line():
            for extent in extents:
                extent.zero_()
            if self.device.type == "cuda":
                self._cleared = self._spare or self._torch().Event()
                self._cleared.record()

    def settle(self) -> None:
        """See ``Backing``."""
        event, self._cleared = self._cleared, None
        if event is not None:
            if not event.query():
                event.synchronize()
            self._spare = event

    def _torch(self) -> Any:
        return self._module or torch.get_device_module(self.device)

    @contextmanager
    def _in_line(self) -> Iterator[None]:
        """On the stream of forwards and quanta, behind the caller's work and before what it does
        next."""
        if self.stream is None:
            yield
            return
        module = self._torch()
        current = module.current_stream()
        self.stream.wait_stream(current)
        with module.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def resident_bytes(self) -> int:
        """All of it, always."""
        return self.geometry.total_bytes

    def close(self) -> None:
        """Let go of the buffers; their memory goes with the last tensor over it."""
        self._buffers = []
