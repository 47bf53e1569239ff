"""SGLang's model runner on the unified pool: the same capacity, buffers and answers, and what stays
SGLang's."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_harli.config import HarliOptions
from sglang_harli.core import MemoryPurpose
from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from support.cuda.cuda_driver_double import DriverDouble
from support.model_runner import NEWEST, build_runner, server_args

CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
HOOKS = {
    "_profile_available_bytes": "leave_room",
    "_build_mha_kv_pool": "build_kv_pool",
    "_build_token_to_kv_pool_allocator": "build_allocator",
}


@pytest.fixture
def unify(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts the table's three rows in place for the runners that this test builds from then on."""

    def put_in_place() -> None:
        from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
        from sglang.srt.server_args import ServerArgs

        from sglang_harli.managers.scheduler.memory import pool_setup

        for name, hook in HOOKS.items():
            ours = functools.partial(getattr(pool_setup, hook), getattr(KVCacheConfigurator, name))
            monkeypatch.setattr(KVCacheConfigurator, name, functools.partialmethod(_call, ours))
        monkeypatch.setattr(ServerArgs, "harli_options", lambda self: HarliOptions(), raising=False)

    return put_in_place


def _call(configurator: Any, ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return ours(configurator, *args, **kwargs)


def test_the_table_has_these_rows():
    from sglang_harli.plugin import TABLE

    rows = {row.target: (row.hook, row.kind, row.main) for row in TABLE}
    for name, hook in HOOKS.items():
        assert rows[f"{CONFIGURATOR}.{name}"] == (
            f"sglang_harli.managers.scheduler.memory.pool_setup:{hook}",
            "around",
            False,
        )


@pytest.mark.parametrize(("page_size", "backing"), [(1, "host"), (16, "host"), (1, "static")])
def test_capacity_buffers_and_answers_are_sglangs(
    page_size, backing, tiny_model, sglang_runner, greedy_tokens, unify, monkeypatch
):
    monkeypatch.setenv("HARLI_POOL_BACKING", backing)
    prompts = [list(range(3, 3 + length)) for length in (5, 17, 40)]
    expected = greedy_tokens(sglang_runner(tiny_model()), prompts, 8)
    unify()
    runner = build_runner(server_args(tiny_model(), page_size=page_size, max_total_tokens=1024))
    slots = runner.token_to_kv_pool_allocator
    pool = slots.pool
    assert (
        pool.backing is runner.token_to_kv_pool.harli_backing
        and pool.backing.name == backing
        and pool.slots is slots
        and pool.geometry.stripes >= 32
    )
    assert runner.max_total_num_tokens == slots.available_size() == 1024
    keys, values = runner.token_to_kv_pool.get_kv_buffer(1)
    assert keys.shape == values.shape == (1024 + page_size, 2, 16) and keys.dtype == torch.float32
    assert keys.data_ptr() == pool.backing.kv_bytes(2).data_ptr()
    assert values.data_ptr() == pool.backing.kv_bytes(3).data_ptr()

    assert greedy_tokens(runner, prompts, 8) == expected
    slots.clear()
    lease = pool.lease(MemoryPurpose.STATE, "half", len(pool.geometry.lendable) // 2)
    assert lease is not None
    for extent in lease.extents:
        extent.fill_(0xFF)  # NaN: an answer that reads it shows
    assert greedy_tokens(runner, prompts, 8) == expected
    pool.lend_to(lambda stripes: lease.give_back(), None)
    slots.clear()
    assert slots.alloc(1024) is not None and lease.revoked
    assert all(not pool.backing.kv_bytes(n)[-page_size * 256 :].any() for n in range(4)), "zeros come back"


def backings(geometry: PoolGeometry) -> dict[str, Backing]:
    """One of each kind; CUDA's on the driver's double."""
    driver = DriverDouble(granularity=mmap.PAGESIZE)
    return {
        "host": HostBacking(geometry),
        "static": StaticBacking(geometry, "cpu"),
        "remapped": CudaBacking(geometry, torch.device("cpu"), driver, lambda: [1]),
        "aliased": AliasedBacking(geometry, torch.device("cpu"), driver, lambda: [1]),
    }


@pytest.mark.skipif(not NEWEST, reason="0.5.16 has no such check")
@pytest.mark.parametrize("kind", ["host", "static", "remapped", "aliased"])
@pytest.mark.parametrize(
    ("page_size", "heads", "head_dim", "slots"), [(16, 2, 16, 1040), (1, 3, 80, 1024), (64, 1, 72, 64 * 33)]
)
def test_trtllm_reaches_values_from_the_keys_of_their_layer(kind, page_size, heads, head_dim, slots):
    """SGLang's own check, on our buffers: else each prefill would copy its batch's pages, as it
    does of values in an allocation of their own, below the keys or not whole pages behind them."""
    from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend

    def inputs_of(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor) -> Any:
        metadata = SimpleNamespace(fmha_v2_block_tables=None, fmha_v2_copy_rows=None)
        seen = SimpleNamespace(forward_metadata=metadata)
        seen._fmha_v2_paged_kv = functools.partial(TRTLLMHAAttnBackend._fmha_v2_paged_kv, seen)
        return TRTLLMHAAttnBackend._fmha_v2_paged_inputs(seen, torch.zeros(1), keys, values, pages)  # type: ignore[arg-type]

    row_bytes = 2 * heads * head_dim
    geometry = PoolGeometry.plan(
        slots=slots, row_bytes=row_bytes, buffers=4, page_size=page_size, granularity=mmap.PAGESIZE
    )
    backing = backings(geometry)[kind]
    try:
        for layer in range(2):
            keys, values = (
                backing.kv_bytes(2 * layer + part).view(torch.bfloat16).view(-1, page_size, heads, head_dim)
                for part in (0, 1)
            )
            marks = torch.arange(slots // page_size).to(torch.bfloat16)
            values[:, 0, 0, 0] = marks
            pages = torch.tensor([[3, 1], [0, slots // page_size - 1]], dtype=torch.int32)
            inputs, tables = inputs_of(keys, values, pages)
            assert inputs[1][0] is keys and inputs[1][1] is values, "no copy"
            assert torch.equal(tables[:, 0], pages)
            base, size = keys.data_ptr(), page_size * row_bytes
            for page, block in zip(pages.flatten(), tables[:, 1].flatten(), strict=True):
                mark = (ctypes.c_uint16).from_address(base + int(block) * size).value
                assert torch.tensor(mark, dtype=torch.uint16).view(torch.bfloat16) == marks[page]
            below, above = sorted((values.clone(), values.clone()), key=torch.Tensor.data_ptr)
            both = torch.empty(2 * values.numel() + 8, dtype=values.dtype)
            parts = both[: values.numel()], both[values.numel() + 8 :]
            for apart in ((above, below), tuple(part.view_as(values) for part in parts)):
                (_, copy), tables = inputs_of(*apart, pages)
                assert isinstance(copy, torch.Tensor) and copy.shape[1] == 2, "a copy of both"
                assert tables is pages
    finally:
        backing.close()


def configurator(**changes: Any) -> Any:
    """A configurator's fields, as for a plain model on a CPU."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    args = SimpleNamespace(
        tp_size=1,
        pp_size=1,
        dcp_size=1,
        disaggregation_mode="null",
        disaggregation_transfer_backend="mooncake",
        disaggregation_decode_host_receive_threshold=1,
        radix_cache_backend=None,
        **dict.fromkeys(
            (
                "prefill_only_disable_kv_cache",
                "enable_page_major_kv_layout",
                "enable_unified_memory",
                "enable_memory_saver",
                "enable_hierarchical_cache",
                "enable_hisparse",
                "enable_lmcache",
                "enable_flexkv",
                "enable_unified_cache_external_linker",
                "disaggregation_decode_enable_offload_kvcache",
            ),
            False,
        ),
    )
    hf_config = SimpleNamespace(architectures=["LlamaForCausalLM"])
    values: dict[str, Any] = {
        "server_args": args,
        "device": "cpu",
        "gpu_id": 0,
        "is_draft_worker": False,
        "spec_algorithm": SpeculativeAlgorithm.NONE,
        "use_mla_backend": False,
        "is_hybrid_swa": False,
        "mambaish_config": None,
        "post_capture_kv_active": False,
        "kv_cache_dtype": torch.bfloat16,
        "kv_cache_dtype_str": "auto",
        "kv_shard_rank": None,
        "page_size": 1,
        "model_config": SimpleNamespace(head_dim=16, v_head_dim=16, hf_config=hf_config),
    }
    for name, value in changes.items():
        if name in values:
            values[name] = value
        else:
            setattr(args, name, value)
    args.kv_cache_dtype = values["kv_cache_dtype_str"]
    return SimpleNamespace(**values)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tp_size": 2}, "several devices"),
        ({"is_draft_worker": True}, "speculative decoding"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill"),
        ({"disaggregation_decode_enable_offload_kvcache": True}, "enable-offload-kvcache"),
        ({"dcp_size": 2}, "decode context parallelism"),
        ({"use_mla_backend": True}, "MLA"),
        ({"is_hybrid_swa": True}, "sliding-window"),
        ({"mambaish_config": object()}, "state-space"),
        ({"model_config": SimpleNamespace(head_dim=16, v_head_dim=8, hf_config=SimpleNamespace(architectures=["X"]))}, "sizes"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"enable_memory_saver": True}, "--enable-memory-saver"),
        ({"enable_hisparse": True}, "--enable-hisparse"),
        ({"enable_lmcache": True}, "--enable-lmcache"),
        ({"radix_cache_backend": "flexkv"}, "--radix-cache-backend"),
        ({"post_capture_kv_active": True}, "graph capture"),
        ({"device": "xpu"}, "cuda and cpu"),
        ({"kv_cache_dtype_str": "mxfp8"}, "MXFP8"),
        *(
            [
                ({"kv_shard_rank": 0}, "--enable-kv-cache-sharding"),
                ({"enable_unified_cache_external_linker": True}, "external-linker"),
                ({"disaggregation_decode_host_receive_threshold": 0.5}, "host-receive-threshold"),
            ]
            if NEWEST
            else []
        ),
    ],
)  # fmt: skip
def test_what_is_not_supported_stays_sglangs_with_one_sentence(changes, what, caplog):
    from sglang_harli.managers.scheduler.memory import pool_setup

    assert pool_setup.why_plain(configurator()) is None
    asked: list[dict[str, Any]] = []
    with caplog.at_level("INFO", logger="sglang_harli.managers.scheduler.memory.pool_setup"):
        result = pool_setup.build_kv_pool(
            lambda c, **kwargs: asked.append(kwargs) or "SGLang's own",
            configurator(**changes),
            max_total_num_tokens=64,
            mha_pool_class=object,
        )
    assert result == "SGLang's own" and asked == [{"max_total_num_tokens": 64, "mha_pool_class": object}]
    (record,) = caplog.records
    assert what in record.getMessage() and "fixed memory" in record.getMessage()


def test_what_is_read_of_a_real_configurator_is_in_force(tiny_model, sglang_runner, unify, monkeypatch):
    """Each row asks a real configurator, and the page size is the pool's own."""
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    from sglang_harli.managers.scheduler.memory import pool_setup

    unify()
    seen: list[tuple[Any, dict[str, bool]]] = []
    build = KVCacheConfigurator._build_mha_kv_pool

    def note(self: Any, **kwargs: Any) -> Any:
        pool = build.__get__(self)(**kwargs)
        seen.append((pool, {what: has(self) for what, has in pool_setup._PLAIN}))
        assert self.page_size == pool.page_size == pool.harli_backing.geometry.page_size
        choice = pool_setup._choose(self)
        assert (choice.name, choice.why) == ("host", "the CPU engine's")
        geometry = pool_setup._geometry(self, kwargs["max_total_num_tokens"], choice)
        assert geometry == pool.harli_backing.geometry
        asked: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(pool_setup.backing_choice, "choose", lambda *given: asked.append(given))
            pool_setup._choose(self)
        assert asked[0][1:3] == ("cpu", ["torch_native", "torch_native"])  # of prefill and of decode
        return pool

    monkeypatch.setattr(KVCacheConfigurator, "_build_mha_kv_pool", note)
    build_runner(server_args(tiny_model(), page_size=16, max_total_tokens=1024))
    ((pool, answers),) = seen
    assert pool.page_size == 16
    assert not any(answers.values()), answers


def test_a_layout_that_the_environment_chooses_stays_sglangs(monkeypatch):
    from sglang_harli.managers.scheduler.memory import pool_setup

    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    assert pool_setup.why_plain(configurator()) == "SGLANG_USE_HND_KVCACHE"


def test_on_a_gpu_only_the_reserve_stays_out_of_a_unified_pool(monkeypatch):
    from sglang_harli.managers.scheduler.memory import pool_setup

    gib = 2**30
    device = SimpleNamespace(get_device_properties=lambda gpu: SimpleNamespace(total_memory=80 * gib))
    monkeypatch.setattr(torch, "get_device_module", lambda name: device)

    def left(options: HarliOptions, **changes: Any) -> int:
        changes = {"device": "cuda", "harli_options": lambda: options} | changes
        return pool_setup.leave_room(lambda c: 60 * gib, configurator(**changes))

    assert left(HarliOptions()) == 59 * gib
    assert left(HarliOptions(train_reserve="2GiB", max_train_mem="20GiB")) == 58 * gib
    assert left(HarliOptions(), is_hybrid_swa=True) == (60 - 1 - 8) * gib, "training has its own beside it"
    assert left(HarliOptions(max_train_mem="20GiB"), is_hybrid_swa=True) == (60 - 1 - 20) * gib
    assert left(HarliOptions(), device="cpu") == 60 * gib


def test_another_allocator_is_left_alone():
    from sglang_harli.managers.scheduler.memory import pool_setup

    def original(c: Any, **kwargs: Any) -> str:
        return "SGLang's own"

    assert pool_setup.build_allocator(original, configurator(), token_to_kv_pool=object()) == "SGLang's own"
