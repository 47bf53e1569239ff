"""The pool's memory on a real GPU: chunks move, graphs stay valid, nothing foreign is read; how
long a move takes.

pytest test/gpu/test_cuda_backing.py -s
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
import torch

from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.cuda import CudaBacking, overhead_bytes
from sglang_harli.mem_cache.backing.cuda_driver import CudaDriver
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.train_arena import TrainArena
from sglang_harli.mem_cache.unified_pool import UnifiedPool
from support.pool_parts import IdleSlots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

STRIPES, LAYERS, ROW_BYTES = 8, 4, 2048  # 8 KV heads of 128 in bf16
ROUNDS = 50


class Rig:
    """A backing with its streams."""

    def __init__(self, *, layers: int = LAYERS, stripes: int = STRIPES, debug: bool = False) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=self.device)  # makes the context current
        self.driver = CudaDriver(self.device.index)
        self.forward, self.schedule = torch.cuda.Stream(), torch.cuda.Stream()
        self.geometry = PoolGeometry.plan(
            slots=stripes * self.driver.granularity // ROW_BYTES + 17,
            row_bytes=ROW_BYTES,
            buffers=2 * layers,
            page_size=1,
            granularity=self.driver.granularity,
        )
        self.backing = CudaBacking(self.geometry, self.device, self.driver, self.streams, debug=debug)

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


def test_the_device_has_the_granularity_that_pools_are_planned_with(rig: Rig):
    assert rig.geometry.chunk_bytes % rig.driver.granularity == 0
    assert rig.geometry.stripes == STRIPES


def test_memory_is_taken_once_and_given_back_at_the_end():
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    rig = Rig()
    taken = before - torch.cuda.mem_get_info()[0]
    expected = rig.geometry.total_bytes + overhead_bytes(rig.geometry, rig.driver.granularity)
    assert rig.backing.resident_bytes() == expected
    assert expected <= taken <= expected + (64 << 20)  # page tables
    extents = rig.backing.lend([1, 2, 3])
    assert before - torch.cuda.mem_get_info()[0] <= taken + (16 << 20)
    rig.backing.take_back([1, 2, 3], extents)
    del extents
    torch.cuda.synchronize()
    rig.backing.close()
    assert before - torch.cuda.mem_get_info()[0] <= 64 << 20


def test_contents_follow_the_handles_and_come_back_as_zeros(rig: Rig):
    for buffer in range(rig.geometry.buffers):
        assert not rig.backing.kv_bytes(buffer).any()
        rig.rows(buffer, 5).fill_(buffer + 1)
        rig.rows(buffer, 1).fill_(100)
    addresses = [rig.backing.kv_bytes(b).data_ptr() for b in range(rig.geometry.buffers)]
    extents = rig.backing.lend([6, 5])
    (extent,) = extents
    if not rig.backing._debug:
        chunks = extent.view(2, rig.geometry.buffers, -1)[1]
        assert (
            [int(c.min()) for c in chunks]
            == [int(c.max()) for c in chunks]
            == [b + 1 for b in range(rig.geometry.buffers)]
        )
    extent.fill_(0xFF)
    torch.cuda.synchronize()
    lent = rig.rows(3, 6)
    assert lent.view(torch.bfloat16).isnan().all() if rig.backing._debug else not lent.any()
    rig.backing.take_back([6, 5], extents)
    for buffer in range(rig.geometry.buffers):
        assert not rig.rows(buffer, 5).any()
        assert not rig.rows(buffer, 6).any()
        assert (rig.rows(buffer, 1) == 100).all()
        assert rig.backing.kv_bytes(buffer).data_ptr() == addresses[buffer]


def test_training_computes_in_a_lease(rig: Rig):
    extents = rig.backing.lend([2, 3, 4])
    flat = extents[0].view(torch.bfloat16)
    a, b = flat[: 512 * 512].view(512, 512), flat[512 * 512 : 2 * 512 * 512].view(512, 512)
    a.normal_()
    b.normal_()
    torch.testing.assert_close(a @ b, a.clone() @ b.clone())
    rig.backing.take_back([2, 3, 4], extents)


def test_a_forward_in_flight_ends_before_training_gets_its_memory(rig: Rig):
    row = rig.rows(0, 4)
    with torch.cuda.stream(rig.forward):
        torch.cuda._sleep(50_000_000)
        row.fill_(77)
    extents = rig.backing.lend([4])
    assert (extents[0].view(rig.geometry.buffers, -1)[0] == (0xFF if rig.backing._debug else 77)).all()
    rig.backing.take_back([4], extents)
    assert not row.any()


def test_a_quantum_in_flight_ends_before_its_memory_goes(rig: Rig):
    extents = rig.backing.lend([4])
    with torch.cuda.stream(rig.forward):
        torch.cuda._sleep(50_000_000)
        extents[0].fill_(0xFF)
    rig.backing.take_back([4], extents)
    with torch.cuda.stream(rig.schedule):
        found = [int(rig.rows(b, 4).max()) for b in range(rig.geometry.buffers)]
    assert found == [0] * rig.geometry.buffers


def test_a_cuda_graph_replays_over_chunks_that_moved(rig: Rig):
    kv = rig.backing.kv_bytes(0).view(torch.bfloat16)
    row = rig.geometry.slots_of(3).start
    width = ROW_BYTES // 2
    source = torch.ones(width, dtype=torch.bfloat16, device=rig.device)
    out = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    place = kv[row * width : (row + 1) * width]
    # Kernels: a copy is a node of its own kind, of which nobody says what remapping does to it.
    torch.mul(place, 1, out=out)  # what is loaded at first use is loaded before
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=rig.forward):
        torch.mul(source, 1, out=place)
        torch.mul(place, 2, out=out)
    for value in (1.0, 2.0, 3.0):
        source.fill_(value)
        torch.cuda.synchronize()
        with torch.cuda.stream(rig.forward):
            graph.replay()
        extents = rig.backing.lend([3, 4])
        extents[0].fill_(0xFF)
        rig.backing.take_back([3, 4], extents)
        assert (out == 2 * value).all()
        assert not place.any()


def test_reclaim_latency(capsys: pytest.CaptureFixture[str]):
    """Prints what a move costs; asserts nothing about time."""
    lines = []
    for layers, stripes in ((4, 1), (32, 1), (32, 4)):
        rig = Rig(layers=layers, stripes=stripes + 4)
        wanted = list(range(stripes, 0, -1))
        lend_ms, back_ms = [], []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            extents = rig.backing.lend(wanted)
            lent = time.perf_counter()
            rig.backing.take_back(wanted, extents)
            torch.cuda.synchronize()
            lend_ms.append(1e3 * (lent - began))
            back_ms.append(1e3 * (time.perf_counter() - lent))
        moved = stripes * rig.geometry.stripe_bytes / 2**20
        lines.append(
            f"{layers} layers, {stripes} stripes, {moved:.0f} MiB: lend {statistics.median(lend_ms):.2f} ms, "
            f"take back {statistics.median(back_ms):.2f} ms (p50 of {ROUNDS}; max {max(back_ms):.2f} ms)"
        )
        rig.backing.close()
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_the_pool_lends_and_reclaims_device_memory():
    rig = Rig(stripes=16)
    pool = UnifiedPool(rig.geometry, rig.backing, IdleSlots(rig.geometry))
    lease = TrainArena(pool).obtain(MemoryPurpose.MICRO_BATCH, [((1024, 1024), torch.float32)])
    assert lease is not None
    tensor = lease.carve((1024, 1024), torch.float32)
    tensor.fill_(1)
    assert float(tensor.sum()) == 1024 * 1024
    pool.lend_to(lambda _: lease.give_back(), None)
    assert pool.reclaim(1) > 0
    assert pool.lent_slots == 0
    torch.cuda.synchronize()
    rig.backing.close()
