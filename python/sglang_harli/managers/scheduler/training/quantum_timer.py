"""How long quanta take, and how much launched training is still queued on the device.

On a CPU a quantum is over when it returns. On CUDA it runs on the stream of SGLang's forwards,
behind the batch in flight (strict alternation): until its events fire, its upper bound counts as
queued, so that the ledger charges it to the token it delays.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_harli.core import QuantumKind


@dataclass(frozen=True, slots=True)
class Work:
    """What a quantum did.

    Attributes:
        tokens: computed, padding included; 1 for kinds not cut by rows, 0: no cost line.
        row_tokens: of one padded row; first_of_shape: its time misleads.
    """

    kind: QuantumKind
    tokens: int
    row_tokens: int = 0
    first_of_shape: bool = False


class HostQuantumTimer:
    """For the CPU engine."""

    queued_s = 0.0

    def __init__(self) -> None:
        self._begin = 0.0
        self._measured: list[tuple[Work, float]] = []

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        """Around one quantum."""
        self._begin = time.perf_counter()
        yield

    def close(self, work: Work, upper_s: float) -> None:
        """The quantum in the span before did this."""
        self._measured.append((work, time.perf_counter() - self._begin))

    def take(self) -> list[tuple[Work, float]]:
        """Quanta that are over and have not been taken, with their seconds."""
        measured, self._measured = self._measured, []
        return measured

    def settle(self) -> None:
        """Idle: let the device catch up before the next quantum is launched."""


class DeviceQuantumTimer:
    """For CUDA.  ``stream``: the stream of SGLang's forwards."""

    def __init__(self, device_module: Any, stream: Any) -> None:
        self._device, self._stream = device_module, stream
        self._events: tuple[Any, Any] | None = None
        self._pending: deque[tuple[Any, Any, Work, float]] = deque()
        self._spare: list[tuple[Any, Any]] = []
        self._measured: list[tuple[Work, float]] = []

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        events = (
            self._spare.pop()
            if self._spare
            else tuple(self._device.Event(enable_timing=True) for _ in range(2))
        )
        with self._device.stream(self._stream):
            events[0].record(self._stream)
            yield
            events[1].record(self._stream)
        self._events = (events[0], events[1])

    def close(self, work: Work, upper_s: float) -> None:
        assert self._events is not None
        self._pending.append((*self._events, work, upper_s))
        self._events = None

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            first, last, work, _ = self._pending.popleft()
            self._measured.append((work, first.elapsed_time(last) / 1e3))
            self._spare.append((first, last))

    @property
    def queued_s(self) -> float:
        self._collect()
        return sum(entry[3] for entry in self._pending)

    def take(self) -> list[tuple[Work, float]]:
        self._collect()
        measured, self._measured = self._measured, []
        return measured

    def settle(self) -> None:
        # Two in flight keep the device busy while the host polls; a prompt waits for at most those.
        if len(self._pending) > 1:
            self._pending[-2][1].synchronize()


def make_timer(device: str, stream: Any) -> HostQuantumTimer | DeviceQuantumTimer:
    """The clock of a scheduler on ``device`` whose forwards run on ``stream``."""
    if device == "cpu":
        return HostQuantumTimer()
    import torch

    return DeviceQuantumTimer(torch.get_device_module(device), stream)
