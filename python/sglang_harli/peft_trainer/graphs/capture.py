"""Captures work on a CUDA device as a graph (torch.cuda.CUDAGraph).

torch's own context manager for a capture waits for the device, collects garbage and empties the
allocator's cache: hundreds of milliseconds on a thread that serves. Here the capture alone is done.
All graphs share one private memory pool: they run one after the other on one stream, and what
they compute is copied out of the pool by their last kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sglang_harli.peft_trainer.graphs.cache import Graph


class Capture(Protocol):
    """Makes graphs on one device."""

    def capture(self, work: Callable[[], None]) -> tuple[Graph, int]:
        """A graph of what ``work`` launches, and the bytes of device memory that it holds. The
        work itself is not done.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        ...


class CudaCapture:
    """Captures on a stream of its own; on no other one is work refused meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> tuple[Graph, int]:
        """See ``Capture``. The bytes are those by which the device's free memory has sunk."""
        before, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads' calls (a copy of SGLang's, say) must not end the capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        after, _ = torch.cuda.mem_get_info(self._device)
        return graph, max(before - after, 0)
