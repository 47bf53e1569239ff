"""The sources of the installed attention kernels say what ``stray_reads`` claims of them."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from sglang_harli.mem_cache.backing.stray_reads import MASKED


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.mark.parametrize("name", ["decode_attention", "extend_attention"])
def test_triton_masks_what_it_loads(name: str):
    """Each load of a key, a value or a slot has a mask by position, and zeros for the rest."""
    assert "triton" in MASKED
    source = (folder_of("sglang") / "kernels/ops/attention" / f"{name}.py").read_text()
    found = dict.fromkeys(("K_Buffer", "V_Buffer", "kv_indices"), 0)
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"):
            continue
        base = ast.unparse(node.args[0]).split(" ")[0]
        if base not in found:
            continue
        found[base] += 1
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        by_position = any(part in given.get("mask", "") for part in ("offs_n", "mask_n"))
        assert by_position and given.get("other") in ("0", "0.0"), ast.unparse(node)
    assert all(found.values()), found


def test_flashinfer_fills_values_past_the_end_with_zeros():
    assert "flashinfer" in MASKED
    include = folder_of("flashinfer") / "data/include/flashinfer"
    prefill = (include / "attention/prefill.cuh").read_text()
    assert "produce_v ? SharedMemFillMode::kFillZero : SharedMemFillMode::kNoFill" in prefill
    assert "produce_kv<true, SharedMemFillMode::kNoFill" not in prefill, "values, and not filled"
    assert "load_128b_async<fill_mode>(*smem_offset, gptr, kv_idx < kv_len)" in prefill
    decode = (include / "attention/decode.cuh").read_text()
    loads = decode.split("cp_async::pred_load<")[1:]
    values = [load for load in loads if "v_smem" in load.split(";")[0]]
    assert values and all("kFillZero" in load.split(">")[0] for load in values)
    hopper = (include / "attention/hopper/sparse_mainloop.cuh").read_text()
    assert "cp_async_zfill" in hopper and "!use_predicate || kv_idx < kv_len" in hopper
    assert "if (page_iter < last_indptr)" in (include / "page.cuh").read_text()


def test_row_0_of_the_table_of_slots_is_for_padding():
    """A padded row of a CUDA graph reads slot 0, not the slots of a request that is over."""
    source = (folder_of("sglang") / "srt/mem_cache/memory_pool.py").read_text()
    pool = source[source.index("class ReqToTokenPool") :]
    assert "self.free_slots = list(range(1, self._alloc_size))" in pool[: pool.index("def clear") + 400]
