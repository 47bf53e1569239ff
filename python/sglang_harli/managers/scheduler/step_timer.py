"""How long batches take: on a CPU a loop turn, on CUDA event pairs that are queried later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BatchLoad:
    """What a batch computes, in the terms that its time depends on.

    Attributes:
        is_decode: a decode step; otherwise a prefill, mixed batches included.
        context_tokens: sum of the requests' context lengths after the batch; new_tokens: computed.
        pairs: of a new token and one of the context that it may attend to, over all requests.
        adapters: a request uses a LoRA adapter; after_training: quanta ran just before.
    """

    is_decode: bool
    requests: int
    context_tokens: int
    new_tokens: int
    pairs: int
    adapters: bool = False
    after_training: bool = False


def with_adapters(reqs: Iterable[Any]) -> bool:
    """Whether one of SGLang's requests uses a LoRA adapter."""
    return any(req.lora_id is not None for req in reqs)


def load_of(batch: Any, *, after_training: bool = False) -> BatchLoad:
    """The load of one of SGLang's ScheduleBatches, from what it holds on the host (no device wait).

    Leans on ScheduleBatch: forward_mode, reqs, seq_lens_cpu (None while it is known on the device
    only), extend_lens; Req: origin_input_ids, output_ids, lora_id.
    """
    requests = len(batch.reqs)
    lengths = batch.seq_lens_cpu
    if lengths is None:
        context = [len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs]
    else:
        context = lengths.tolist()
    total = sum(context)
    if batch.forward_mode.is_decode():
        return BatchLoad(True, requests, total, requests, total, with_adapters(batch.reqs), after_training)
    new = batch.extend_lens or ()
    pairs = sum(tokens * length for tokens, length in zip(new, context, strict=False))
    return BatchLoad(False, requests, total, sum(new), pairs, after_training=after_training)


class HostTimer:
    """For the CPU engine, whose ``run_batch`` returns when the batch is computed.

    A step is a loop turn: from behind one batch's result to behind the next one's, so that
    receiving, batching and handing out tokens count, which a client waits for too. The first batch
    after an idle turn counts from its ``run_batch`` on.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._turned: float | None = None
        self._begin = 0.0
        self._steps: list[tuple[BatchLoad, float, float]] = []

    def begin(self) -> None:
        self._begin = self._clock() if self._turned is None else self._turned
        self._turned = None

    def end(self, load: BatchLoad) -> None:
        self._steps.append((load, self._begin, self._clock()))

    @property
    def pending(self) -> bool:
        """Whether batches are measured that were not taken."""
        return bool(self._steps)

    def take(self) -> list[tuple[BatchLoad, float]]:
        """Behind a batch: load and seconds of the batches that are over."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        *before, (load, begin, _) = steps  # overlap: the second batch ran before the first was taken
        return [*((b, end - begin) for b, begin, end in before), (load, self._clock() - begin)]

    def turn(self) -> None:
        """The loop goes on to its next turn."""
        self._turned = self._clock()

    def drop(self) -> None:
        """Forget batches that were begun (the server went idle)."""
        self._steps.clear()
        self._turned = None


class EventTimer:
    """For CUDA: the batch runs after ``run_batch`` has returned, on what ``stream`` tells."""

    def __init__(self, device_module: Any, stream: Callable[[], Any]) -> None:
        self._device, self._stream = device_module, stream
        self._begun: Any = None
        self._pending: deque[tuple[Any, Any, BatchLoad]] = deque(maxlen=64)
        self._spare: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        pair = (
            self._spare.pop()
            if self._spare
            else tuple(self._device.Event(enable_timing=True) for _ in range(2))
        )
        pair[0].record(self._stream())
        self._begun = pair

    def end(self, load: BatchLoad) -> None:
        first, last = self._begun
        last.record(self._stream())
        self._pending.append((first, last, load))

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def take(self) -> list[tuple[BatchLoad, float]]:
        steps = []
        while self._pending and self._pending[0][1].query():
            first, last, load = self._pending.popleft()
            steps.append((load, first.elapsed_time(last) / 1e3))
            self._spare.append((first, last))
        return steps

    def turn(self) -> None:
        """The device's time is the batch's alone: the loop runs beside it."""

    def drop(self) -> None:
        self._pending.clear()


def make_timer(device: str, stream: Callable[[], Any] | None) -> HostTimer | EventTimer:
    """The timer of a scheduler on ``device``; ``stream``: see ``stream_of``."""
    if device == "cpu":
        return HostTimer()
    import torch

    module = torch.get_device_module(device)
    return EventTimer(module, stream or current_stream(module))


def stream_of(scheduler: Any) -> Callable[[], Any] | None:
    """Tells the stream that an SGLang scheduler's forwards run on, at each use; None: the current
    one, where the loop launches them without overlap.

    Leans on Scheduler: enable_overlap, forward_stream.
    """
    return (lambda: scheduler.forward_stream) if scheduler.enable_overlap else None


def current_stream(device_module: Any) -> Callable[[], Any]:
    """Tells the current stream of a device."""
    return lambda: device_module.current_stream()
