"""The pool's memory on a host: what the kernel says, and what the bytes are."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from support.pool_parts import small_geometry

MIB = 2**20


def resident_mib() -> float:
    """Of this process, as the kernel counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / MIB


def fill(backing: HostBacking, value: int = 7) -> None:
    for buffer in range(backing.geometry.buffers):
        backing.kv_bytes(buffer).fill_(value)


def rows(backing: HostBacking, stripe: int) -> list[torch.Tensor]:
    chunk = backing.geometry.chunk_bytes
    return [
        backing.kv_bytes(buffer).narrow(0, stripe * chunk, chunk)
        for buffer in range(backing.geometry.buffers)
    ]


def test_resident_memory_of_the_process_falls_and_rises_with_what_is_lent():
    geometry = PoolGeometry.plan(
        slots=8193, row_bytes=512, buffers=16, page_size=1, granularity=mmap.PAGESIZE
    )
    backing = HostBacking(geometry)
    fill(backing)
    stripes = list(geometry.lendable)[16:]  # three quarters of 64 MiB
    lent = len(stripes) * geometry.stripe_bytes / MIB
    gc.collect()
    full = resident_mib()
    extents = backing.lend(stripes)
    assert resident_mib() < full - 0.9 * lent
    extents[0].fill_(1)
    assert full - 0.1 * lent < resident_mib() < full + 0.1 * lent
    backing.take_back(stripes, extents)
    assert resident_mib() < full - 0.9 * lent
    fill(backing)
    assert resident_mib() > full - 0.1 * lent
    backing.close()
    assert resident_mib() < full - 0.9 * geometry.total_bytes / MIB


def test_resident_bytes_are_exact_and_never_above_the_budget():
    geometry = small_geometry()
    backing = HostBacking(geometry)
    budget = backing.resident_bytes()
    assert geometry.total_bytes <= budget < geometry.total_bytes + geometry.buffers * mmap.PAGESIZE
    extents = backing.lend([3, 9, 4])
    assert backing.resident_bytes() == budget - 3 * geometry.stripe_bytes
    extents[0].fill_(1)
    assert backing.resident_bytes() == budget
    backing.take_back([3, 9, 4], extents)
    assert backing.resident_bytes() == budget - 3 * geometry.stripe_bytes
    fill(backing)
    assert backing.resident_bytes() == budget


@pytest.mark.parametrize("populated_by", ["kernel", "writing"])
def test_the_kv_cache_is_in_memory_from_the_start(monkeypatch, populated_by):
    if populated_by == "writing":  # an older kernel refuses the advice
        monkeypatch.setattr("sglang_harli.mem_cache.backing.host.MADV_POPULATE_WRITE", -1)
    geometry = small_geometry()
    backing = HostBacking(geometry)
    assert backing.resident_bytes() >= geometry.total_bytes
    assert all((backing.kv_bytes(buffer) == 0).all() for buffer in range(geometry.buffers))


@pytest.mark.parametrize("debug", [False, True])
def test_only_what_is_lent_changes(debug):
    geometry = small_geometry()
    backing = HostBacking(geometry, debug=debug)
    fill(backing)
    address = backing.kv_bytes(1).data_ptr()
    extents = backing.lend([2, 5])
    assert sum(e.numel() for e in extents) == 2 * geometry.stripe_bytes
    for stripe in range(geometry.stripes):
        if stripe not in (2, 5):
            assert all((row == 7).all() for row in rows(backing, stripe))
    other = backing.lend([7])
    extents[0].fill_(3)
    other[0].fill_(4)
    backing.take_back([2, 5], extents)
    assert (other[0] == 4).all()
    assert all((row == 0).all() for stripe in (2, 5) for row in rows(backing, stripe))
    backing.take_back([7], other)
    assert backing.kv_bytes(1).data_ptr() == address
    tail = geometry.stripes * geometry.chunk_bytes
    assert (backing.kv_bytes(0)[tail:] == 7).all()


def test_rows_come_back_as_zeros_even_where_something_strayed_into_them():
    backing = HostBacking(small_geometry())
    extents = backing.lend([4])
    rows(backing, 4)[2].fill_(9)  # a forward in flight writes one more row
    backing.take_back([4], extents)
    assert all((row == 0).all() for row in rows(backing, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_debug_mode_poisons_both_sides_with_nan(dtype):
    backing = HostBacking(small_geometry(), debug=True)
    fill(backing)
    (extent,) = backing.lend([6])
    assert extent.view(dtype).isnan().all()
    assert all(row.view(dtype).isnan().all() for row in rows(backing, 6))


def test_a_window_in_pieces_is_said_and_changes_nothing():
    geometry = small_geometry(4)  # three to lend, six places
    backing = HostBacking(geometry)
    fill(backing)
    backing._places.allocate(2)
    backing._places.allocate(1)
    backing._places.release(0, 2)
    backing._places.allocate(1)
    backing._places.allocate(2)  # places 0, 2, 3, 4 are taken
    with pytest.raises(MemoryError, match="2 stripes in a row"):
        backing.lend([1, 2])
    assert all((row == 7).all() for stripe in (1, 2) for row in rows(backing, stripe))


def test_chunks_must_be_whole_pages():
    with pytest.raises(ValueError, match="plan the geometry with granularity="):
        HostBacking(PoolGeometry(slots=100, row_bytes=10, buffers=2, page_size=1, stripe_slots=10))


def test_a_pool_that_can_lend_nothing():
    backing = HostBacking(PoolGeometry(slots=30, row_bytes=64, buffers=2, page_size=1, stripe_slots=64))
    fill(backing)
    assert (backing.kv_bytes(1) == 7).all() and backing.kv_bytes(1).numel() == 30 * 64


def test_tensors_keep_the_mapping_alive():
    backing = HostBacking(small_geometry())
    kv = backing.kv_bytes(0)
    kv.fill_(5)
    del backing
    gc.collect()
    assert (kv == 5).all()
