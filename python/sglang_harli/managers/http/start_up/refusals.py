"""What finetuning does not work with yet, refused at start-up in one sentence with the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_harli import names
from sglang_harli.architectures import BY_NAME
from sglang_harli.errors import UnsupportedError
from sglang_harli.peft_trainer.base import model_math
from sglang_harli.sglang_versions.current import arguments, refusals

WAY_OUT = "drop it, or serve without finetuning by --harli-finetune off"

# (flag, what it asks for, whether these arguments ask for it); of both versions of SGLang
_FLAGS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("--dp-size", "data parallelism", lambda a: a.dp_size > 1),
    ("--tp-size", "tensor parallelism", lambda a: a.tp_size > 1),
    ("--pp-size", "pipeline parallelism", lambda a: a.pp_size > 1),
    ("--ep-size", "expert parallelism", lambda a: a.ep_size > 1),
    ("--nnodes", "several nodes", lambda a: a.nnodes > 1),
    ("--enable-dp-attention", "data-parallel attention", lambda a: bool(a.enable_dp_attention)),
    ("--attn-cp-size", "context parallelism", lambda a: (a.attn_cp_size or 1) > 1),
    ("--tokenizer-worker-num", "several tokenizer workers", lambda a: a.tokenizer_worker_num > 1),
    ("--speculative-algorithm", "speculative decoding", lambda a: a.speculative_algorithm is not None),
    ("--encoder-only", "disaggregation", lambda a: bool(a.encoder_only)),
    ("--quantization", "quantised weights", lambda a: a.quantization not in (None, "unquant")),
    ("--enable-pdmux", "multiplexed prefill and decode", lambda a: bool(a.enable_pdmux)),
    ("--dllm-algorithm", "diffusion language models", lambda a: a.dllm_algorithm is not None),
    ("--cpu-offload-gb", "weights kept off the device", lambda a: a.cpu_offload_gb > 0),
    ("--use-ray", "Ray actors", lambda a: bool(a.use_ray)),
    ("--smg-grpc-mode", "the gRPC server", lambda a: bool(a.smg_grpc_mode or a.grpc_mode)),
    ("--is-embedding", "embedding models", lambda a: bool(a.is_embedding)),
)


PREFILL = (
    "--disaggregation-mode prefill does not train: a prefill server computes prompts back to back, promises their "
    "first tokens, and has no decode steps between which there is time; train on the decode server of the pair, and "
    "start this one with --harli-finetune off"
)


def refuse_flags(server_args: Any) -> None:
    """Check SGLang's arguments as given; UnsupportedError names the flag and the way out."""
    if server_args.disaggregation_mode == "prefill":
        raise UnsupportedError(PREFILL, param="--disaggregation-mode")
    for flag, what, asked in (*_FLAGS, *refusals.REFUSED):
        if asked(server_args):
            raise UnsupportedError(
                f"{flag} ({what}) does not work with finetuning yet: {WAY_OUT}", param=flag
            )
    served = server_args.served_model_name
    flag, name = ("--served-model-name", served) if served else ("--model-path", server_args.model_path)
    reason = names.colon_refusal(name, flag)
    if reason is not None:
        raise UnsupportedError(reason, param=flag)
    device = (server_args.device or "cuda").split(":")[0]
    if device not in ("cuda", "cpu"):
        raise UnsupportedError(
            f"--device {device} does not work with finetuning yet (accepted: cuda, cpu): {WAY_OUT}",
            param="--device",
        )


def refuse_model(server_args: Any) -> None:
    """Check the model behind SGLang's resolved arguments; UnsupportedError names the architecture,
    the quantisation or the config's field, and the way out."""
    config = arguments.model_config(server_args).hf_config
    architectures = list(getattr(config, "architectures", None) or ["unknown"])
    if architectures[0] not in BY_NAME:
        raise UnsupportedError(
            f"{server_args.model_path} is a {architectures[0]}, which cannot be finetuned yet "
            f"(accepted: {', '.join(BY_NAME)}): serve it without finetuning by --harli-finetune off",
            param="--model-path",
        )
    quantisation = getattr(config, "quantization_config", None)
    method = arguments.in_force(server_args).quantization or _method(quantisation)
    if method is not None:
        raise UnsupportedError(
            f"{server_args.model_path} has quantised weights ({method}), which cannot be finetuned yet: take "
            "the unquantised model, or serve without finetuning by --harli-finetune off",
            param="--model-path",
        )
    model_math.check(config)


def _method(quantisation: Any) -> str | None:
    if not quantisation:
        return None
    if isinstance(quantisation, dict):
        return str(quantisation.get("quant_method", "unknown method"))
    return str(getattr(quantisation, "quant_method", "unknown method"))
