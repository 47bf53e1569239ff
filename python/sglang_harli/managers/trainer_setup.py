"""Builds the scheduler's trainer: binds the weights, states the limits, opens the link.

Leans on SGLang 0.5.16: Scheduler.server_args, tp_worker.model_runner (model, model_config, lora_manager),
ServerArgs (model_path, tokenizer_path, served_model_name, max_lora_rank, lora_target_modules, device).
"""

from __future__ import annotations

import logging
import os
from typing import Any

import psutil
import torch

from sglang_harli.core import scheduler_endpoint
from sglang_harli.errors import UnsupportedError
from sglang_harli.managers.adapter_loader import AdapterLoader
from sglang_harli.managers.co_trainer import CoTrainer
from sglang_harli.managers.quantum_clock import make_clock
from sglang_harli.managers.quantum_costs import QuantumCosts
from sglang_harli.managers.service_link import ServiceLink
from sglang_harli.managers.serving_side import ServingSide
from sglang_harli.peft_trainer.frozen_base import FrozenBase
from sglang_harli.peft_trainer.frozen_base import bind as bind_base
from sglang_harli.protocol import internal
from sglang_harli.protocol.public import ALL_LINEAR

logger = logging.getLogger(__name__)

# Cautious rates for the first guess of a quantum's cost, floating-point operations a second.
_PRIOR_FLOPS = {"cpu": 2e10, "cuda": 5e13}

_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def build(scheduler: Any, side: ServingSide) -> tuple[CoTrainer | None, str | None]:
    """The trainer, or None and the one sentence that says why finetuning is not possible here.

    A refusal stops the server (it was asked for); ``--harli-finetune off`` serves without.
    """
    args = scheduler.server_args
    runner = scheduler.tp_worker.model_runner
    try:
        base = bind_base(runner.model, args.model_path, trust_remote_code=args.trust_remote_code)
    except UnsupportedError as error:
        return None, f"{error.message}; serve without finetuning: --harli-finetune off"
    limits = served_limits(base, args, runner, side)
    trainer: CoTrainer | None = None

    def hello() -> internal.Hello:
        run = trainer.run if trainer is not None else None
        message = internal.Hello(
            pid=os.getpid(), rank=0, limits=limits, options=side.effective(), revision=side.revision
        )
        if run is not None:
            message.job, message.attempt = run.spec.job, run.spec.attempt
            message.step, message.next_cursor = run.training.applied_step, run.training.next_cursor
        return message

    prior_token_s = 2 * _layer_parameters(limits) / _PRIOR_FLOPS[base.device.type]
    trainer = CoTrainer(
        base,
        limits,
        ServiceLink(scheduler_endpoint(side.options.absolute_run_dir), hello),
        AdapterLoader(runner.lora_manager),
        QuantumCosts(prior_token_s),
        make_clock(base.device.type, getattr(scheduler, "forward_stream", None)),
        quantum_rows=side.options.quantum_rows,
        set_options=side.set_options,
        status=side.status,
    )
    logger.info(
        "harli: finetuning is on: %s, %s on %s, adapters up to rank %d on %s, %.0f MiB for training",
        limits.architecture,
        limits.dtype,
        limits.device,
        limits.max_lora_rank,
        ",".join(limits.lora_target_modules),
        limits.train_memory_bytes / 2**20,
    )
    return trainer, None


def served_limits(base: FrozenBase, args: Any, runner: Any, side: ServingSide) -> internal.ServedLimits:
    """What the served model allows a job."""
    cpu = base.device.type == "cpu"
    total = (
        psutil.virtual_memory().total if cpu else torch.cuda.get_device_properties(base.device).total_memory
    )
    served = runner.lora_manager.target_modules  # SGLang's fused names
    targets = tuple(m for m in ALL_LINEAR if _FUSED.get(m, m) in served)
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
        max_seq_length=runner.model_config.context_len,
        max_lora_rank=runner.lora_manager.max_lora_rank,
        lora_target_modules=targets,
        train_memory_bytes=side.options.train_bytes(total, cpu),
        logits_bytes=side.options.logits_bytes,
    )


def _layer_parameters(limits: internal.ServedLimits) -> int:
    return sum(i * o for i, o in limits.linear_sizes.values())
