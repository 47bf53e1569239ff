"""What torch hands out of pools of its own on a device, streams and the memory of graphs, by a
double that keeps its rules."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.graphs.capture import CudaCapture, capture_on

STREAMS = 32  # of each priority, handed out by turns
WORKSPACE = 32 << 20  # that cuBLAS keeps for a stream on which a product was captured


class TorchCuda:
    """In place of torch.cuda.

    Attributes:
        used: live captures of each pool of memory; workspaces: handles of streams that have one.
    """

    def __init__(self) -> None:
        self.turns: Counter[int] = Counter()
        self.used: Counter[tuple[int, int]] = Counter()
        self.ever: set[tuple[int, int]] = set()
        self.workspaces: set[tuple[int, int]] = set()
        self.current: Any = None
        self._handles = itertools.count(1)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("Stream", "stream", "graph_pool_handle", "mem_get_info"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))

    def Stream(self, device: object = None, priority: int = 0) -> tuple[int, int]:
        turn = self.turns[priority]
        self.turns[priority] += 1
        return priority, turn % STREAMS

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, next(self._handles)

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return (1 << 30) - WORKSPACE * len(self.workspaces), 1 << 30


class Graph:
    """See torch.cuda.CUDAGraph: a pool lives as long as a graph of it."""

    def __init__(self, cuda: TorchCuda) -> None:
        self.cuda, self.pool = cuda, (0, 0)

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        if pool in self.cuda.ever and not self.cuda.used[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.pool = pool
        self.cuda.ever.add(pool)
        self.cuda.used[pool] += 1

    def capture_end(self) -> None: ...

    def __del__(self) -> None:
        self.cuda.used[self.pool] -= 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchCuda]:
    made = TorchCuda()
    made.install(monkeypatch)
    kept = (device_calls.copy_stream, capture_on)
    for function in kept:
        function.cache_clear()
    yield made
    for function in kept:
        function.cache_clear()


def test_no_copy_of_the_state_runs_on_a_stream_of_the_servers(cuda: TorchCuda):
    device = torch.device("cuda", 0)
    served = {cuda.Stream(device) for _ in range(3)}  # of forwards, of the loop, of results
    for _ in range(STREAMS - len(served)):  # by others: the next one is that of forwards again
        cuda.Stream(device)
    drawn = {device_calls.copy_stream(device) for _ in range(3 * STREAMS)}
    assert len(drawn) == 1 and not drawn & served


def test_jobs_leave_no_workspaces_behind(cuda: TorchCuda):
    """Each has graphs of its own."""
    device = torch.device("cuda", 0)
    for _ in range(5):
        capture_on(device).capture(lambda: cuda.workspaces.add(cuda.current))
    assert len(cuda.workspaces) == 1


def test_graphs_are_made_again_after_the_last_one_has_gone(cuda: TorchCuda):
    """All went stale while requests ran, say."""
    capture = CudaCapture(torch.device("cuda", 0))
    first, _ = capture.capture(lambda: None)
    second, _ = capture.capture(lambda: None)
    assert max(cuda.used.values()) == 2, "they share a pool"
    del first, second
    third, nbytes = capture.capture(lambda: cuda.workspaces.add(cuda.current))
    assert nbytes == WORKSPACE and len(cuda.ever) == 2 and third is not None
