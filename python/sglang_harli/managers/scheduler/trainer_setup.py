"""Builds the scheduler's trainer: binds the weights, states the limits, opens the link.

Leans on SGLang: Scheduler.server_args, weight_updater.offload_tags,
token_to_kv_pool_allocator, schedule_stream, tree_cache, tp_worker.model_runner (model,
model_config, lora_manager, kv_cache_dtype, decode_cuda_graph_runner.capture_bs), ServerArgs
(model_path, tokenizer_path, served_model_name, max_lora_rank, lora_target_modules, device).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sglang_harli.architectures import ALL_LINEAR, FUSED
from sglang_harli.config import HarliOptions, show_size
from sglang_harli.errors import UnsupportedError
from sglang_harli.managers.scheduler import transfer_view
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.profile_setup import profile_key, starting_priors
from sglang_harli.managers.scheduler.service_link import ServiceLink
from sglang_harli.managers.scheduler.step_timer import stream_of
from sglang_harli.managers.scheduler.training import warm_up
from sglang_harli.managers.scheduler.training.adapter_loader import AdapterLoader
from sglang_harli.managers.scheduler.training.co_trainer import CoTrainer
from sglang_harli.managers.scheduler.training.parity import Parity
from sglang_harli.managers.scheduler.training.quantum_timer import make_timer
from sglang_harli.mem_cache.kv.prefix_eviction import evict_stripes
from sglang_harli.mem_cache.kv.slot_allocator import StripedFreeList
from sglang_harli.peft_trainer.base import base_print
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.base.frozen_base import bind as bind_base
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.memory.layout import memory_layout
from sglang_harli.platforms.cpu.defaults import host_memory_bytes
from sglang_harli.platforms.cpu.malloc import keep_freed_memory
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.profile import priors
from sglang_harli.predictor.profile.profile_table import ProfileKey
from sglang_harli.predictor.solo import Padding
from sglang_harli.protocol import internal
from sglang_harli.run_paths import scheduler_endpoint, shm_dir
from sglang_harli.sglang_versions.current import arguments, prefix_tree, weight_updates

logger = logging.getLogger(__name__)

# Cautious rates for the first guess of a quantum's cost, floating-point operations a second.
_PRIOR_FLOPS = {"cpu": 2e10, "cuda": 5e13}
# First guess of what one more request, and one more context token, add to a decode step (a share).
_PRIOR_SHARES = {"cpu": (0.1, 1e-4), "cuda": (0.01, 2e-5)}


def build_trainer(scheduler: Any, options: HarliOptions) -> tuple[CoTrainer, ServingState]:
    """What trains beside a scheduler, and what it knows of serving.

    Raises:
        UnsupportedError: finetuning is not possible here. It stops the server (it was asked for);
            ``--harli-finetune off`` serves without.
    """
    args = arguments.in_force(scheduler.server_args)
    runner = scheduler.tp_worker.model_runner
    try:
        base = bind_base(runner.model, runner.model_config.hf_config, KernelSwitches(options.kernel_switches))
    except UnsupportedError as error:
        raise UnsupportedError(f"{error.message}; serve without finetuning: --harli-finetune off") from error
    if base.device.type == "cpu":
        keep_freed_memory()
    pressure = training_memory(scheduler, base.device, options)
    limits = served_limits(base, args, runner, options, pressure)
    key = profile_key(limits, args)
    predictor = _predictor(limits, runner, key, options)
    side = ServingState(options, predictor, key, pressure, prefills=args.disaggregation_mode != "decode")
    streams = None if base.device.type == "cpu" else stream_of(scheduler)
    if warm_up.wanted(options.warm_up, base.device.type):
        # SGLang has captured its graphs, and the server is healthy only after this.
        slots = shm_dir(options.absolute_run_dir)
        warm_up.warm_up(
            base,
            logits_bytes=limits.logits_bytes,
            slots=slots,
            memory=pressure.memory,
            stream=streams and streams(),
        )
    trainer = CoTrainer(
        base,
        limits,
        functools.partial(ServiceLink, scheduler_endpoint(options.absolute_run_dir)),
        AdapterLoader(runner.lora_manager),
        side.predictor,
        make_timer(base.device.type, streams),
        pressure,
        quantum_rows=options.quantum_rows,
        parity=_parity(scheduler, base, limits, options),
        take_print=_print_of(base, args, runner.model_config),
        make_hello=lambda: internal.Hello(
            pid=os.getpid(), rank=0, limits=None, options=side.effective(), revision=side.revision
        ),
        set_options=side.set_options,
        status=side.status,
    )
    logger.info(
        "harli: finetuning is on: %s, %s on %s, adapters up to rank %d on %s, up to %s for training%s",
        limits.architecture,
        limits.dtype,
        limits.device,
        limits.max_lora_rank,
        ",".join(limits.lora_target_modules),
        show_size(limits.train_memory_bytes),
        " beside the KV pool" if pressure.pool is None else ", lent by the KV pool",
    )
    return trainer, side


def _print_of(base: FrozenBase, args: Any, model_config: Any) -> Callable[[], internal.BasePrint]:
    """Takes the print of what is served; after an update from disk under the path of that."""
    started = model_config.model_path  # SGLang's own copy of an object store's model, if it is one

    def take() -> internal.BasePrint:
        now = model_config.model_path
        return base_print.take(base, args.served_model_name, args.model_path if now == started else now)

    return take


def training_memory(scheduler: Any, device: torch.device, options: HarliOptions) -> MemoryPressure:
    """Training's memory: lent by the KV pool if that is ours, else of its own beside it."""
    cpu = device.type == "cpu"
    reserve = options.reserve_bytes(cpu)
    allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    if not isinstance(allocator, StripedFreeList):
        total = host_memory_bytes() if cpu else torch.cuda.get_device_properties(device).total_memory
        return MemoryPressure(
            None, device, fixed_bytes=options.train_bytes(total, cpu), reserve_bytes=reserve
        )

    pool = allocator.pool
    caches = prefix_tree.of(cache) is not None  # a decode server of a pair caches none by default
    prefix_tree.watch(cache)

    def evict(stripes: int, unused_since_s: float | None, among: Sequence[int] | None = None) -> int:
        return evict_stripes(
            cache, allocator, stripes, pool.quota.kept_prefix_slots(), unused_since_s, among=among
        )

    def schedule_stream() -> AbstractContextManager[Any]:
        """Slot lists are SGLang's: they are edited on its stream. On 0.5.16 its loop makes that,
        behind the warm-up, which edits them on the one on which they were made."""
        if cpu:
            return nullcontext()
        stream = getattr(scheduler, "schedule_stream", None)
        return torch.cuda.stream(torch.cuda.default_stream(device) if stream is None else stream)

    decodes = arguments.in_force(scheduler.server_args).disaggregation_mode == "decode"
    return MemoryPressure(
        pool,
        device,
        evict=None if decodes and not caches else evict,
        reserved=(lambda: transfer_view.reserved_slots(scheduler)) if decodes else None,
        edit_under=schedule_stream,
        reserve_bytes=reserve,
    )


def served_limits(
    base: FrozenBase, args: Any, runner: Any, options: HarliOptions, pressure: MemoryPressure
) -> internal.ServedLimits:
    """What the served model allows a job."""
    served = runner.lora_manager.target_modules  # SGLang's fused names
    logits_bytes = options.logits_bytes(base.device.type)
    targets = tuple(m for m in ALL_LINEAR if FUSED.get(m, m) in served)
    return internal.ServedLimits(
        architecture=base.config.architectures[0],
        model_path=args.model_path,
        tokenizer_path=args.tokenizer_path or args.model_path,
        served_model_name=args.served_model_name,
        dtype=str(base.dtype).removeprefix("torch."),
        device=base.device.type,
        vocab_size=base.config.vocab_size,
        hidden_size=base.config.hidden_size,
        num_layers=base.config.num_hidden_layers,
        linear_sizes=base.linear_sizes(),
        max_seq_length=min(
            runner.model_config.context_len, base.positions or runner.model_config.context_len
        ),
        max_lora_rank=runner.lora_manager.max_lora_rank,
        lora_target_modules=targets,
        train_memory_bytes=pressure.ever_bytes,
        logits_bytes=logits_bytes,
        layout=memory_layout(base, logits_bytes),
        space_bytes=pressure.space_bytes,
    )


def _parity(scheduler: Any, base: FrozenBase, limits: internal.ServedLimits, options: HarliOptions) -> Parity:
    """The comparison of training with serving that is to be made."""
    token_bytes = limits.vocab_size * torch.promote_types(base.dtype, torch.float32).itemsize
    kv_bytes = scheduler.tp_worker.model_runner.kv_cache_dtype.itemsize

    def released() -> bool:
        updater = scheduler.weight_updater
        return bool(updater.offload_tags) or weight_updates.unfinished(updater)

    mode = options.parity
    if arguments.in_force(scheduler.server_args).disaggregation_mode == "decode" and not options.prefill_url:
        if mode != "off":
            logger.warning(
                "harli: training is not compared with serving: a decode server computes no prompts, and without "
                "--harli-prefill-url there is none to ask"
            )
        mode = "off"
    return Parity(
        base,
        mode,
        head_tokens=max(1, limits.logits_bytes // token_bytes),
        rounds="a KV cache in 8 bits" if kv_bytes < base.dtype.itemsize else "",
        released=released,
    )


def _predictor(
    limits: internal.ServedLimits, runner: Any, key: ProfileKey, options: HarliOptions
) -> LatencyPredictor:
    """Starts from this server's profile, or from a cautious guess for such a model and device."""
    flops = _PRIOR_FLOPS[limits.device]
    guess = priors.first_guess(
        token_s=2 * sum(i * o for i, o in limits.linear_sizes.values()) / flops,
        pair_s=4 * limits.hidden_size / flops,  # scores and weighted values: two products of a head's width
        layers=limits.num_layers,
        decode_shares=_PRIOR_SHARES[limits.device],
    )
    graphs = getattr(runner, "decode_cuda_graph_runner", None)
    padding = Padding(getattr(graphs, "capture_bs", None) or ())
    return LatencyPredictor(starting_priors(options.profile_path, key, guess, padding), padding=padding)
