"""How long batches take: wall time on a CPU, event pairs on CUDA (queried later, never waited for)."""

from __future__ import annotations

import time
from collections import deque
from typing import Any


class HostTimer:
    """For the CPU engine, whose ``run_batch`` returns when the batch is computed."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._steps: list[tuple[bool, int, float]] = []

    def begin(self) -> None:
        self._begin = time.perf_counter()

    def end(self, is_decode: bool, batch_size: int) -> None:
        self._steps.append((is_decode, batch_size, time.perf_counter() - self._begin))

    def take(self) -> list[tuple[bool, int, float]]:
        """(decode or prefill, batch size, seconds) of the batches that are over."""
        steps, self._steps = self._steps, []
        return steps

    def drop(self) -> None:
        """Forget batches that were begun (the server went idle)."""
        self._steps.clear()


class EventTimer:
    """For CUDA: the batch runs on ``stream`` after ``run_batch`` has returned."""

    def __init__(self, device_module: Any, stream: Any) -> None:
        self._device, self._stream = device_module, stream
        self._begun: Any = None
        self._pending: deque[tuple[Any, Any, bool, int]] = deque(maxlen=64)
        self._spare: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        pair = (
            self._spare.pop()
            if self._spare
            else tuple(self._device.Event(enable_timing=True) for _ in range(2))
        )
        pair[0].record(self._stream)
        self._begun = pair

    def end(self, is_decode: bool, batch_size: int) -> None:
        first, last = self._begun
        last.record(self._stream)
        self._pending.append((first, last, is_decode, batch_size))

    def take(self) -> list[tuple[bool, int, float]]:
        steps = []
        while self._pending and self._pending[0][1].query():
            first, last, is_decode, batch_size = self._pending.popleft()
            steps.append((is_decode, batch_size, first.elapsed_time(last) / 1e3))
            self._spare.append((first, last))
        return steps

    def drop(self) -> None:
        self._pending.clear()


def make_timer(device: str, stream: Any) -> HostTimer | EventTimer:
    """The timer of a scheduler on ``device`` whose forwards run on ``stream``."""
    if device == "cpu":
        return HostTimer()
    import torch

    return EventTimer(torch.get_device_module(device), stream)
