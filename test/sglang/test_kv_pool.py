"""SGLang's model runner on the unified pool: the same capacity, buffers and answers, and what stays
SGLang's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_harli.config import HarliOptions
from sglang_harli.core import MemoryPurpose
from support.model_runner import build_runner, server_args

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


def configurator(**changes: Any) -> Any:
    """A configurator's fields, as for a plain model on a CPU."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    args = SimpleNamespace(
        tp_size=1,
        pp_size=1,
        dcp_size=1,
        page_size=1,
        disaggregation_mode="null",
        kv_cache_dtype="auto",
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
        "model_config": SimpleNamespace(head_dim=16, v_head_dim=16, hf_config=hf_config),
    }
    for name, value in changes.items():
        if name in values:
            values[name] = value
        else:
            setattr(args, name, value)
    return SimpleNamespace(**values)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tp_size": 2}, "several devices"),
        ({"is_draft_worker": True}, "speculative decoding"),
        ({"disaggregation_mode": "decode"}, "disaggregation"),
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
