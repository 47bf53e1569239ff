"""Puts the unified pool in the place of SGLang's KV pool and slot allocator, where it can be.

AROUND hooks on KVCacheConfigurator (sglang/srt/mem_cache/kv_cache_configurator.py): the KV pool's
size, its class, and its slot allocator. A pool of a kind that is not supported yet stays SGLang's
own: one sentence is logged, and training has a memory of its own beside it.

Leans on SGLang for the configurator's fields, ``environ``, ``platforms`` and the classes
that it names.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.configs.model_config import is_deepseek_v4, is_minimax_sparse
from sglang.srt.environ import envs
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.common import is_float4_e2m1fn_x2

from sglang_harli.config import POOL_DEBUG_ENV
from sglang_harli.managers.scheduler.memory import backing_choice, registered_memory
from sglang_harli.managers.scheduler.memory.backing_choice import POOL_BACKING_ENV, Choice
from sglang_harli.mem_cache.backing import probe
from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.backing.cuda_driver import CudaDriver
from sglang_harli.mem_cache.backing.host import HostBacking
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from sglang_harli.mem_cache.kv.kv_pool import HarliMHATokenToKVPool
from sglang_harli.mem_cache.kv.slot_allocator import HarliPagedAllocator, HarliTokenAllocator
from sglang_harli.mem_cache.unified_pool import SlotSource, UnifiedPool
from sglang_harli.sglang_versions.current import arguments, kv_pool

logger = logging.getLogger(__name__)

# (what, whether this configurator's server has it): SGLang's own pool serves these.
_PLAIN: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("several devices", lambda c: _args(c).tp_size > 1 or _args(c).pp_size > 1),
    ("speculative decoding", lambda c: c.is_draft_worker or not c.spec_algorithm.is_none()),
    ("--disaggregation-mode prefill", lambda c: _args(c).disaggregation_mode == "prefill"),
    (
        "--disaggregation-decode-enable-offload-kvcache",
        lambda c: _args(c).disaggregation_decode_enable_offload_kvcache,
    ),
    ("SGLANG_DISAGG_STAGING_BUFFER", lambda c: envs.SGLANG_DISAGG_STAGING_BUFFER.get()),
    ("decode context parallelism", lambda c: _args(c).dcp_size > 1),
    ("latent attention (MLA)", lambda c: c.use_mla_backend or is_deepseek_v4(c.model_config.hf_config)),
    ("sliding-window layers", lambda c: c.is_hybrid_swa),
    ("state-space layers", lambda c: c.mambaish_config is not None),
    ("sparse attention", lambda c: is_minimax_sparse(c.model_config.hf_config)),
    ("keys and values of different sizes", lambda c: c.model_config.head_dim != c.model_config.v_head_dim),
    ("a KV cache in FP4 or MXFP8", lambda c: _is_quantised(c)),
    ("--prefill-only-disable-kv-cache", lambda c: _args(c).prefill_only_disable_kv_cache),
    ("--enable-page-major-kv-layout", lambda c: _args(c).enable_page_major_kv_layout),
    ("--enable-unified-memory", lambda c: _args(c).enable_unified_memory),
    ("--enable-memory-saver", lambda c: _args(c).enable_memory_saver),
    ("--enable-hierarchical-cache", lambda c: _args(c).enable_hierarchical_cache),
    ("--enable-hisparse", lambda c: _args(c).enable_hisparse),
    ("--enable-lmcache", lambda c: _args(c).enable_lmcache),
    ("--enable-flexkv", lambda c: _args(c).enable_flexkv),
    ("--radix-cache-backend", lambda c: _args(c).radix_cache_backend is not None),
    *kv_pool.OTHER_KINDS,
    ("sizing of the KV cache after graph capture", lambda c: c.post_capture_kv_active),
    ("SGLANG_USE_HND_KVCACHE", lambda c: envs.SGLANG_USE_HND_KVCACHE.get()),
    ("SGLANG_AITER_KV_CACHE_LAYOUT", lambda c: envs.SGLANG_AITER_KV_CACHE_LAYOUT.get().lower() != "nhd"),
    ("SGLANG_MOONCAKE_CUSTOM_MEM_POOL", lambda c: envs.SGLANG_MOONCAKE_CUSTOM_MEM_POOL.get() is not None),
    ("a platform of a plugin", lambda c: current_platform.is_out_of_tree()),
    (f"{POOL_BACKING_ENV}={backing_choice.OFF}", lambda c: _asked() == backing_choice.OFF),
    ("a device other than cuda and cpu", lambda c: torch.device(c.device).type not in ("cuda", "cpu")),
)


def _args(configurator: Any) -> Any:
    return arguments.in_force(configurator.server_args)


def why_plain(configurator: Any) -> str | None:
    """What keeps the unified pool out of this server; None: nothing does."""
    return next((what for what, has in _PLAIN if has(configurator)), None)


def _is_quantised(configurator: Any) -> bool:
    return kv_pool.dtype_name(configurator) == "mxfp8" or is_float4_e2m1fn_x2(configurator.kv_cache_dtype)


# ------------------------------------------------------------------ how large
def leave_room(original: Callable[..., int], configurator: Any, *args: Any, **kwargs: Any) -> int:
    """Bytes for the KV pool: on a GPU, where SGLang takes all that is free, less training's outside
    it. On the CPU engine --max-total-tokens caps the pool and nothing is subtracted."""
    available = original(configurator, *args, **kwargs)
    if configurator.device == "cpu":
        return available
    options = configurator.server_args.harli_options()
    outside = options.reserve_bytes(cpu=False)
    if why_plain(configurator) is not None:
        device = torch.get_device_module(configurator.device)
        total = device.get_device_properties(configurator.gpu_id).total_memory
        outside += options.train_bytes(total, cpu=False)
    logger.info("harli: %.1f GiB of device memory stay outside the KV pool for training", outside / 2**30)
    return available - outside


# ------------------------------------------------------------------ what holds it
def build_kv_pool(original: Callable[..., Any], configurator: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's pool, ours where that is possible."""
    reason = why_plain(configurator)
    if reason is None and kwargs.get("mha_pool_class") is not MHATokenToKVPool:
        reason = "another class of KV pool"
    if reason is None and kwargs.get("quant_method") is not None:
        reason = "a quantised KV cache"
    choice = _choose(configurator) if reason is None else Choice(backing_choice.OFF, "")
    if reason is None and not _geometry(configurator, kwargs["max_total_num_tokens"], choice).lendable:
        reason = "a pool of fewer than two stripes"
    if reason is not None:
        logger.info(
            "harli: the KV cache stays SGLang's own and training uses a fixed memory beside it, as one pool for both "
            "does not support %s yet",
            reason,
        )
        return original(configurator, *args, **kwargs)
    make_backing = functools.partial(_make_backing, configurator, choice)
    kwargs["mha_pool_class"] = functools.partial(HarliMHATokenToKVPool, make_backing=make_backing)
    return original(configurator, *args, **kwargs)


def _geometry(configurator: Any, tokens: int, choice: Choice) -> PoolGeometry:
    """As ``HarliMHATokenToKVPool`` will ask for it."""
    model, page_size = configurator.model_config, configurator.page_size
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
    row_bytes = heads * model.head_dim * configurator.kv_cache_dtype.itemsize
    buffers = 2 * configurator.layer_info.num_effective_layers
    return _plan(configurator, choice, tokens + page_size, row_bytes, buffers, page_size)


def _plan(
    configurator: Any, choice: Choice, slots: int, row_bytes: int, buffers: int, page_size: int
) -> PoolGeometry:
    mapped = choice.name in (backing_choice.ALIASED, backing_choice.REMAPPED)
    granularity = CudaDriver(configurator.gpu_id).granularity if mapped else mmap.PAGESIZE
    return PoolGeometry.plan(
        slots=slots, row_bytes=row_bytes, buffers=buffers, page_size=page_size, granularity=granularity
    )


def _make_backing(
    configurator: Any, choice: Choice, slots: int, row_bytes: int, buffers: int, page_size: int
) -> Backing:
    geometry = _plan(configurator, choice, slots, row_bytes, buffers, page_size)
    backing = _backing_of(configurator, choice, geometry)
    options = configurator.server_args.harli_options()
    logger.info(
        "harli: one pool of %.2f GiB for the KV cache and for training, %d stripes of %d slots and %.1f MiB, on the "
        "%s backing (%s); training may borrow up to %.2f GiB",
        geometry.total_bytes / 2**30,
        geometry.stripes,
        geometry.stripe_slots,
        geometry.stripe_bytes / 2**20,
        backing.name,
        choice.why,
        min(geometry.lendable_bytes, options.max_train_bytes or geometry.lendable_bytes) / 2**30,
    )
    return backing


def _backing_of(configurator: Any, choice: Choice, geometry: PoolGeometry) -> Backing:
    device = torch.device(configurator.device)
    debug = os.environ.get(POOL_DEBUG_ENV) == "1"
    if choice.name == backing_choice.HOST:
        return HostBacking(geometry, debug=debug)
    if device.type == "cuda":
        device = torch.device("cuda", configurator.gpu_id)
    if choice.name == backing_choice.STATIC:
        overlaps = device.type == "cuda" and not _args(configurator).disable_overlap_schedule
        stream = configurator.forward_stream if overlaps else None
        return StaticBacking(geometry, device, stream=stream, debug=debug)
    kind = AliasedBacking if choice.name == backing_choice.ALIASED else CudaBacking
    streams = functools.partial(_streams, configurator, device)
    return kind(geometry, device, CudaDriver(configurator.gpu_id), streams, debug=debug)


def _asked() -> str | None:
    return os.environ.get(POOL_BACKING_ENV)


def _choose(configurator: Any) -> Choice:
    args = _args(configurator)
    return backing_choice.choose(
        _asked(),
        torch.device(configurator.device).type,
        [
            args.prefill_attention_backend or args.attention_backend,
            args.decode_attention_backend or args.attention_backend,
        ],
        functools.partial(probe.refusal, configurator.gpu_id),
        registered_memory.transport_of(
            args.disaggregation_mode, args.disaggregation_transfer_backend, os.environ
        ),
    )


def _streams(configurator: Any, device: torch.device) -> Sequence[int]:
    """Streams that may touch KV rows or leases, the one that forwards run on first."""
    current = torch.cuda.current_stream(device)
    forward = configurator.forward_stream
    first = current if _args(configurator).disable_overlap_schedule else forward
    streams = (first, forward, current, torch.cuda.default_stream(device))
    return list(dict.fromkeys(stream.cuda_stream for stream in streams))


# ------------------------------------------------------------------ who hands out its slots
def build_allocator(original: Callable[..., Any], configurator: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's allocator, ours over a pool of ours."""
    buffers = kwargs.get("token_to_kv_pool")
    if not isinstance(buffers, HarliMHATokenToKVPool) or kwargs.get("token_to_kv_pool_allocator") is not None:
        return original(configurator, *args, **kwargs)
    backing, options = buffers.harli_backing, configurator.server_args.harli_options()
    size, page_size = kwargs["sizes"].max_total_num_tokens, backing.geometry.page_size
    dtype, device = configurator.kv_cache_dtype, configurator.device

    def make_pool(slots: SlotSource) -> UnifiedPool:
        limits = {"max_train_bytes": options.max_train_bytes, "prefix_keep": options.prefix_keep}
        return UnifiedPool(backing.geometry, backing, slots, **limits)

    if page_size == 1:
        return HarliTokenAllocator(size, dtype, device, buffers, make_pool)
    return HarliPagedAllocator(size, page_size, dtype, device, buffers, make_pool)
