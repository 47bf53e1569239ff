"""The stand-in for sgl_kernel: its ops give what their names say, through SGLang's own callers
too."""

from __future__ import annotations

import importlib

import pytest
import sgl_kernel
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harli.platforms.cpu import engine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_stand_in_is_what_is_imported():
    assert sgl_kernel.__file__.startswith(str(engine.STAND_IN))


def test_sglang_sees_the_cpu_engine_without_amx():
    from sglang.srt.utils import common

    assert common.is_cpu()
    assert not common.cpu_has_amx_support(), "AMX would repack the weights that training views"
    if not common.is_host_cpu_arm64():
        assert not common.is_shm_available(torch.float32, 2, 2), (
            "ranks would reduce by an op that is not there"
        )
    for name in ("convert_weight_packed", "shm_allreduce", "init_cpu_threads_env", "silu_and_mul_cpu"):
        assert not hasattr(torch.ops.sgl_kernel, name)


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "qwen2"])
def test_what_sglangs_models_import_can_be_imported(name):
    """Whatever of it the stand-in has not raises when it is called, not before."""
    importlib.import_module(f"sglang.srt.models.{name}")
    importlib.import_module("sglang.srt.managers.scheduler")


# ------------------------------------------------------------------ the token table
@st.composite
def spans(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Rows without repetition, with a start and an end each, and the table's width."""
    width = draw(st.integers(1, 12))
    rows = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True))
    ends = [draw(st.integers(0, width)) for _ in rows]
    return rows, [draw(st.integers(0, end)) for end in ends], ends, width


@settings(max_examples=60, deadline=None)
@given(spans())
def test_new_slots_are_written_to_their_spans_and_gathered_back(case):
    from sglang.srt.mem_cache.allocation import assign_req_to_token_pool_func

    rows, starts, ends, width = case
    table = torch.full((7, width), -1, dtype=torch.int32)
    total = sum(end - start for start, end in zip(starts, ends, strict=True))
    slots = torch.arange(100, 100 + total)
    index = torch.tensor(rows), table, torch.tensor(starts), torch.tensor(ends)
    assign_req_to_token_pool_func(*index, slots, len(rows))

    expected = torch.full((7, width), -1, dtype=torch.int32)
    taken = iter(range(100, 100 + total))
    for row, start, end in zip(rows, starts, ends, strict=True):
        for position in range(start, end):
            expected[row, position] = next(taken)
    assert torch.equal(table, expected)

    gathered = torch.full((total + 2,), -7)
    sgl_kernel.assign_extend_cache_locs_cpu(*index, gathered, width)
    assert gathered[:total].tolist() == slots.tolist()
    assert gathered[total:].tolist() == [-7, -7], "what lies behind the last span is left alone"


def test_sglang_gathers_equal_spans():
    from sglang.kernels.ops.speculative.cache_locs import assign_extend_cache_locs_func

    table = torch.arange(24, dtype=torch.int32).view(4, 6)
    found = assign_extend_cache_locs_func(
        req_pool_indices=torch.tensor([3, 1]),
        req_to_token=table,
        start_offset=torch.tensor([2, 0]),
        end_offset=torch.tensor([4, 2]),
        batch_size=2,
        draft_token_num=2,
        device="cpu",
    )
    assert found.tolist() == [20, 21, 6, 7]


def test_a_wrong_table_width_is_an_error():
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="CPU engine: pool_len is 5"):
        sgl_kernel.assign_req_to_token_pool_cpu(one, torch.zeros(1, 4, dtype=torch.int32), one, one, one, 5)


# ------------------------------------------------------------------ KV rows
@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_rows_are_copied_in_every_layer_even_where_they_overlap(dtype):
    from sglang.kernels.ops.kvcache.cache_move import copy_all_layer_kv_cache_func

    torch.manual_seed(0)
    buffers = [torch.randn(9, 2, heads).to(dtype) for heads in (4, 4, 3)]
    before = [buffer.clone() for buffer in buffers]
    target, source = torch.tensor([1, 2, 3, 8]), torch.tensor([2, 3, 1, 0])  # a cycle, and one more
    copy_all_layer_kv_cache_func(
        torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64),
        torch.tensor([buffer[0].nbytes for buffer in buffers]),
        torch.cat([target, torch.tensor([5])]),  # behind num_locs: not to be copied
        torch.cat([source, torch.tensor([6])]),
        num_locs=4,
        num_locs_upper=8,
        kv_copy_config={},
    )
    for buffer, old in zip(buffers, before, strict=True):
        old[target] = old[source].clone()
        assert torch.equal(buffer, old)


def test_copying_nothing_touches_nothing():
    none = torch.tensor([], dtype=torch.int64)
    sgl_kernel.copy_all_layer_kv_cache_cpu(torch.tensor([8]), torch.tensor([4]), none, none)
    with pytest.raises(ValueError, match="1 rows to read but 0 to write"):
        sgl_kernel.copy_all_layer_kv_cache_cpu(torch.tensor([8]), torch.tensor([4]), none, torch.tensor([0]))


# ------------------------------------------------------------------ norms and activations
@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_is_torchs_in_fp32(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64).mul(3).to(dtype), torch.randn(64).to(dtype)
    expected = torch.nn.functional.rms_norm(x.float(), (64,), weight.float(), 1e-5).to(dtype)
    out = torch.empty_like(x)
    assert sgl_kernel.rmsnorm(x, weight, 1e-5, out=out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(sgl_kernel.rmsnorm(x, weight, 1e-5), expected)


def test_fused_add_rmsnorm_changes_both_in_place():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    total = x + residual
    sgl_kernel.fused_add_rmsnorm(x, residual, weight, 1e-5)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(x, torch.nn.functional.rms_norm(total, (64,), weight, 1e-5))


@pytest.mark.parametrize(
    ("op", "activation"),
    [
        ("silu_and_mul", torch.nn.functional.silu),
        ("gelu_and_mul", torch.nn.functional.gelu),
        ("gelu_tanh_and_mul", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_gated_activations(op, activation):
    x = torch.randn(3, 8)
    expected = activation(x[:, :4]) * x[:, 4:]
    out = torch.empty(3, 4)
    assert getattr(sgl_kernel, op)(x, out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(getattr(sgl_kernel, op)(x), expected)


# ------------------------------------------------------------------ everything else
@pytest.mark.parametrize("op", ["gptq_gemm", "verify_tree_greedy_cpu", "an_op_of_tomorrow"])
def test_any_other_op_can_be_imported_and_names_itself_when_called(op):
    found = getattr(sgl_kernel, op)
    assert found.__name__ == op
    with pytest.raises(NotImplementedError, match=rf"sgl_kernel\.{op} is not available on the CPU engine"):
        found(torch.zeros(1), alpha=2)


def test_dunder_names_are_no_ops():
    with pytest.raises(AttributeError, match="stand-in"):
        _ = sgl_kernel.__wrapped__
