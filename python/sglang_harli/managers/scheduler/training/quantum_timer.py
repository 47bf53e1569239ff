"""How long quanta take, and how much launched training is still queued on the device.

On a CPU a quantum is over when it returns. On CUDA it runs on the stream of SGLang's forwards,
behind the batch in flight (strict alternation): until its events fire, its bound counts as queued,
so that the ledger charges it to the token it delays. Its launch takes the host's time, and its
kernels the device's: both are measured, since either may be the longer one.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sglang_harli.core import LatencyEstimate, QuantumKind
from sglang_harli.managers.scheduler.step_timer import current_stream


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


@dataclass(frozen=True, slots=True)
class Measured:
    """How long a quantum took.

    Attributes:
        seconds: from its first kernel's turn to its last one's end; on a CPU from call to return.
        launch_s: until the host had launched it; 0 on a CPU, which computes it meanwhile.
        starved: its turn had come before the launch was over, so that the device waited for the
            host: alone it takes between ``seconds - launch_s`` and ``seconds``.
    """

    work: Work
    seconds: float
    launch_s: float = 0.0
    starved: bool = False


class HostQuantumTimer:
    """For the CPU engine.

    Attributes:
        depth: quanta that are launched before the first is over, while nothing is served.
    """

    depth = 1
    queued_s = expected_queued_s = 0.0

    def __init__(self) -> None:
        self._begin = 0.0
        self._measured: list[Measured] = []

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Around what a run does outside of a quantum."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        """Around one quantum."""
        self._begin = time.perf_counter()
        yield

    def close(self, work: Work, estimate: Callable[[], LatencyEstimate]) -> None:
        """The quantum in the span before did this; ``estimate``: of what a device has yet to do."""
        self._measured.append(Measured(work, time.perf_counter() - self._begin))

    def take(self) -> list[Measured]:
        """Quanta that are over and have not been taken."""
        measured, self._measured = self._measured, []
        return measured

    def settle(self, most_s: float | None = None) -> None:
        """Idle: let the device catch up until another quantum may be launched (one is left, or
        less where that takes more than ``most_s``)."""


@dataclass(frozen=True, slots=True)
class _Queued:
    first: Any
    last: Any
    work: Work
    estimate: LatencyEstimate
    launch_s: float
    starved: bool


class DeviceQuantumTimer:
    """For CUDA.

    Args:
        stream: tells the stream that SGLang's forwards run on now.
        now: seconds.
    """

    depth = 2  # keeps the device busy while the host polls

    def __init__(
        self,
        device_module: Any,
        stream: Callable[[], Any],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device, self._stream, self._now = device_module, stream, now
        self._spanned: tuple[Any, Any, float] | None = None
        self._pending: deque[_Queued] = deque()
        self._spare: list[tuple[Any, Any]] = []
        self._measured: list[Measured] = []

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Around what a run does outside of a quantum: tensors belong to the stream that they were
        made on, and are free for its next work when they go; work is in the order of quanta."""
        return self._device.stream(self._stream())

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        first, last = (
            self._spare.pop()
            if self._spare
            else tuple(self._device.Event(enable_timing=True) for _ in range(2))
        )
        stream = self._stream()
        with self._device.stream(stream):
            begin_s = self._now()
            first.record(stream)
            yield
            last.record(stream)
        self._spanned = first, last, self._now() - begin_s

    def close(self, work: Work, estimate: Callable[[], LatencyEstimate]) -> None:
        assert self._spanned is not None
        first, last, launch_s = self._spanned
        self._spanned = None
        self._pending.append(_Queued(first, last, work, estimate(), launch_s, first.query()))

    def _collect(self) -> None:
        while self._pending and self._pending[0].last.query():
            over = self._pending.popleft()
            seconds = over.first.elapsed_time(over.last) / 1e3
            self._measured.append(Measured(over.work, seconds, over.launch_s, over.starved))
            self._spare.append((over.first, over.last))

    @property
    def queued_s(self) -> float:
        """Sum of the bounds of what is launched and not over: for what must not be exceeded."""
        self._collect()
        return sum(each.estimate.upper_s for each in self._pending)

    @property
    def expected_queued_s(self) -> float:
        """The same of what is expected: bounds add up to more than is ever seen."""
        self._collect()
        return sum(each.estimate.expected_s for each in self._pending)

    def take(self) -> list[Measured]:
        self._collect()
        measured, self._measured = self._measured, []
        return measured

    def settle(self, most_s: float | None = None) -> None:
        while len(self._pending) >= self.depth or (
            most_s is not None and self._pending and self.queued_s > most_s
        ):
            self._pending[0].last.synchronize()
            self._collect()


def make_timer(
    device: str, stream: Callable[[], Any] | None, now: Callable[[], float] = time.perf_counter
) -> HostQuantumTimer | DeviceQuantumTimer:
    """The timer of a scheduler on ``device``; ``stream``: see ``step_timer.stream_of``."""
    if device == "cpu":
        return HostQuantumTimer()
    import torch

    module = torch.get_device_module(device)
    return DeviceQuantumTimer(module, stream or current_stream(module), now)
