"""The static backing: the KV rows themselves, in separate extents."""

from __future__ import annotations

import pytest
import torch

from sglang_harli.mem_cache.backing.static import StaticBacking
from support.pool_parts import small_geometry

GEOMETRY = small_geometry()


def test_extents_are_the_rows_of_each_run_and_buffer():
    backing = StaticBacking(GEOMETRY, "cpu")
    extents = backing.lend([5, 2, 3])
    assert [e.numel() for e in extents] == backing.extent_bytes([5, 2, 3])
    chunk = GEOMETRY.chunk_bytes
    assert extents[1].data_ptr() == backing.kv_bytes(1).data_ptr() + 2 * chunk
    assert extents[GEOMETRY.buffers].data_ptr() == backing.kv_bytes(0).data_ptr() + 5 * chunk


def test_what_comes_back_is_zero_and_the_rest_untouched():
    backing = StaticBacking(GEOMETRY, "cpu")
    for buffer in range(GEOMETRY.buffers):
        backing.kv_bytes(buffer).fill_(7)
    extents = backing.lend([3, 4])
    for extent in extents:
        extent.fill_(9)
    backing.take_back([3, 4], extents)
    chunk = GEOMETRY.chunk_bytes
    for buffer in range(GEOMETRY.buffers):
        flat = backing.kv_bytes(buffer)
        assert (flat[3 * chunk : 5 * chunk] == 0).all()
        assert (flat[: 3 * chunk] == 7).all() and (flat[5 * chunk :] == 7).all()
    assert backing.resident_bytes() == GEOMETRY.total_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_debug_mode_poisons_with_nan(dtype):
    backing = StaticBacking(GEOMETRY, "cpu", debug=True)
    assert all(extent.view(dtype).isnan().all() for extent in backing.lend([6]))
    assert (backing.kv_bytes(0)[: 6 * GEOMETRY.chunk_bytes] == 0).all()
