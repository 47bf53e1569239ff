"""Aliased memory on a real GPU: both addresses show the same bytes, moves are ordered with streams
and wait for nothing, graphs stay valid; how long a move takes.

pytest test/gpu/test_cuda_aliased_memory.py -s
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
import torch

from sglang_harli.mem_cache.backing import probe
from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.cuda_driver import CudaDriver
from sglang_harli.mem_cache.geometry import PoolGeometry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

ROW_BYTES = 2048  # 8 KV heads of 128 in bf16
CYCLES = 50_000_000  # of a kernel that only waits
ROUNDS = 50


class Rig:
    """A backing with its streams."""

    def __init__(self, *, layers: int = 4, stripes: int = 8, debug: bool = False) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=self.device)  # makes the context current
        driver = CudaDriver(self.device.index)
        self.forward, self.schedule = torch.cuda.Stream(), torch.cuda.Stream()
        self.geometry = PoolGeometry.plan(
            slots=stripes * driver.granularity // ROW_BYTES + 17,
            row_bytes=ROW_BYTES,
            buffers=2 * layers,
            page_size=1,
            granularity=driver.granularity,
        )
        self.backing = AliasedBacking(self.geometry, self.device, driver, self.streams, debug=debug)

    def streams(self) -> list[int]:
        streams = (self.forward, self.schedule, torch.cuda.current_stream())
        return [stream.cuda_stream for stream in streams]

    def rows(self, buffer: int, stripe: int) -> torch.Tensor:
        size = self.geometry.chunk_bytes
        return self.backing.kv_bytes(buffer)[stripe * size : (stripe + 1) * size]


@pytest.fixture(params=[False, True], ids=["plain", "debug"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(debug=request.param)
    yield rig
    torch.cuda.synchronize()
    rig.backing.close()


def test_the_probe_maps_what_a_pool_maps():
    torch.empty(1, device="cuda")
    assert probe.refusal(torch.cuda.current_device()) is None


def test_both_addresses_show_the_same_bytes(rig: Rig):
    (extent,) = rig.backing.lend([3, 4])
    with torch.cuda.stream(rig.forward):
        extent.fill_(7)
        seen = [rig.rows(b, s).clone() for b in range(rig.geometry.buffers) for s in (3, 4)]
    torch.cuda.synchronize()
    assert all(bool((part == 7).all()) for part in seen)
    rig.backing.take_back([3, 4], [extent])
    torch.cuda.synchronize()
    assert not any(bool(rig.rows(b, s).any()) for b in range(rig.geometry.buffers) for s in (3, 4))


@pytest.mark.parametrize("late", ["forward", "schedule"])
def test_work_in_flight_on_any_stream_comes_before_training_and_clearing(rig: Rig, late: str):
    stream = getattr(rig, late)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        rig.rows(1, 5).fill_(77)  # a slot that is freed under this forward
    (extent,) = rig.backing.lend([5])
    with torch.cuda.stream(rig.forward):
        extent.fill_(9)
    torch.cuda.synchronize()
    assert bool((extent == 9).all())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        extent.fill_(5)
    rig.backing.take_back([5], [extent])
    for other in (rig.forward, rig.schedule):
        with torch.cuda.stream(other):
            seen = rig.rows(1, 5).clone()
        torch.cuda.synchronize()
        assert not bool(seen.any())


def test_the_host_waits_for_nothing():
    rig = Rig()
    rig.backing.take_back([1], rig.backing.lend([1]))  # makes the events
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    with torch.cuda.stream(rig.forward):
        torch.cuda._sleep(20 * CYCLES)
        done.record()
    extents = rig.backing.lend([2, 3])
    rig.backing.take_back([2, 3], extents)
    assert not done.query(), "a move has waited for what was in flight"
    torch.cuda.synchronize()
    rig.backing.close()


def test_a_cuda_graph_replays_over_memory_that_was_lent(rig: Rig):
    rows = rig.rows(0, 3).view(torch.bfloat16)
    out = torch.empty_like(rows)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=rig.forward):
        rows.add_(1)
        torch.mul(rows, 2, out=out)
    for _ in range(3):
        with torch.cuda.stream(rig.forward):
            graph.replay()
        (extent,) = rig.backing.lend([3])
        with torch.cuda.stream(rig.forward):
            extent.fill_(0xFF)
        rig.backing.take_back([3], [extent])
        torch.cuda.synchronize()
        assert bool((out == 2).all()), "it began from zeros"


def test_reclaim_latency(capsys: pytest.CaptureFixture[str]):
    """Prints what a move costs; asserts nothing about time."""
    lines = []
    for layers, stripes in ((4, 1), (32, 1), (32, 8)):
        rig = Rig(layers=layers, stripes=stripes + 2)
        wanted, host_ms, device_ms = list(range(1, stripes + 1)), [], []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            rig.backing.take_back(wanted, rig.backing.lend(wanted))
            host_ms.append(1e3 * (time.perf_counter() - began))
            torch.cuda.synchronize()
            device_ms.append(1e3 * (time.perf_counter() - began))
        moved = stripes * rig.geometry.stripe_bytes / 2**20
        lines.append(
            f"aliased, {layers} layers, {moved:.0f} MiB to training and back: host {statistics.median(host_ms):.3f} ms, "
            f"until cleared {statistics.median(device_ms):.3f} ms (p50 of {ROUNDS})"
        )
        rig.backing.close()
    with capsys.disabled():
        print("\n" + "\n".join(lines))
