"""Captures work on a CUDA device as a graph (torch.cuda.CUDAGraph).

torch's own context manager for a capture waits for the device, collects garbage and empties the
allocator's cache: hundreds of milliseconds on a thread that serves. Here the capture alone is done.
All graphs that are there share one private memory pool: they run one after the other on one stream,
and what they compute is copied out of the pool by their last kernels.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

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
        self._pool: Any = None  # torch's handle, which it names differently in each version
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # those that are there

    def capture(self, work: Callable[[], None]) -> tuple[Graph, int]:
        """See ``Capture``. The bytes are those by which the device's free memory has sunk."""
        before, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:  # torch refuses a pool whose last graph has gone
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):
            # Other threads' calls (a copy of SGLang's, say) must not end the capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        self._graphs.add(graph)
        after, _ = torch.cuda.mem_get_info(self._device)
        return graph, max(before - after, 0)


@functools.cache
def capture_on(device: torch.device) -> CudaCapture:
    """That of a device, the same for the process's life: torch keeps a workspace of cuBLAS, tens of
    MiB, for each stream on which a product was captured."""
    return CudaCapture(device)
