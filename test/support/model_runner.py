"""SGLang's ``ModelRunner`` on its CPU engine: the model and its LoRA serving, without a server
around them.

The caller has set the CPU engine's environment before the first import of sglang
(``platforms.cpu.engine``) and has applied our patches.
"""

from __future__ import annotations

from typing import Any

from sglang_harli.sglang_versions import supported

NEWEST = supported.folder() == "newest"
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def server_args(model_path: str, **options: Any) -> Any:
    """SGLang's arguments for a small model; the dtype is the one that the model was saved in.

    Args:
        options: fields of ServerArgs; ``enable_lora`` adds LoRA serving (rank 16, all seven
            modules, 4 slots).
    """
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "model_path": model_path,
        "device": "cpu",
        "dtype": str(AutoConfig.from_pretrained(model_path).dtype).removeprefix("torch."),
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "max_total_tokens": 2048,
        "max_running_requests": 16,
        "mem_fraction_static": 0.1,
        "skip_tokenizer_init": True,
        "log_level": "error",
    }
    if options.get("enable_lora"):
        values.update(
            lora_backend="torch_native",
            max_lora_rank=16,
            max_loras_per_batch=4,
            lora_target_modules=list(ALL_MODULES),
        )
    values.update(options)
    args = ServerArgs(**values)
    check_lora(args)
    return args


def check_lora(args: Any) -> None:
    """SGLang's own check of the LoRA options, which normalises ``lora_paths``."""
    if NEWEST:
        from sglang.srt.arg_groups.lora_hook import check_lora_server_args

        check_lora_server_args(args)
    else:
        args.check_lora_server_args()


def publish(args: Any, role: str = "scheduler") -> None:
    """Make them this process's, as those of a process of this role."""
    if NEWEST:
        from sglang.srt.runtime_context import SpawnRanks
        from sglang.srt.runtime_context import publish as publish_args

        publish_args(args, role=role, ranks=SpawnRanks(world_rank=0, gpu_id=0))
    else:
        from sglang.srt.server_args import set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(args)


def build_runner(args: Any) -> Any:
    """A runner that has loaded the model and allocated its pools."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import PortArgs

    publish(args)
    port = PortArgs.init_new(args).nccl_port
    config = ModelConfig.from_server_args(args)
    runner = ModelRunner(
        model_config=config,
        mem_fraction_static=args.mem_fraction_static,
        gpu_id=0,
        nccl_port=port,
        server_args=args,
        **_groups(args, config, port),
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


def _groups(args: Any, config: Any, port: int) -> dict[str, Any]:
    """Groups of one process, and what the constructor asks for of them."""
    if not NEWEST:
        from sglang.srt.distributed.parallel_state import destroy_model_parallel
        from sglang.srt.distributed.parallel_state_wrapper import ParallelState

        destroy_model_parallel()  # of the runner before: each builds its own groups of one
        return {"ps": ParallelState.trivial(dp_rank=None, moe_dp_rank=None)}
    from sglang.srt.distributed import bootstrap

    if not bootstrap._PARALLEL_INITIALISED:
        bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=config)
    return {}
