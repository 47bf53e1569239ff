"""The error of a failed run in words, and whether it passes."""

from __future__ import annotations

import gc

import torch

from sglang_harli.errors import HarliError

# Of a CPU; of CUDA outside of torch's allocator (pinned memory, graphs); of cuBLAS.
_LACKED = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def lacked_memory(error: Exception) -> bool:
    """Whether the device, or the host, had no memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LACKED)


def passes(error: Exception) -> bool:
    """Whether a run that it ended is worth trying again: memory or a mapping was lacking."""
    return isinstance(error, OSError) or describe(error)[0] == "out_of_memory"


def describe(error: Exception) -> tuple[str, str]:
    """A stable code and a message that says what to change, as the job shows them."""
    if isinstance(error, HarliError):
        return error.code, error.message
    if lacked_memory(error):
        return "out_of_memory", (
            f"training ran out of memory ({error}): lower batch_size, max_seq_length or lora_r, "
            "or leave more outside the KV pool for training with --harli-train-reserve"
        )
    return "internal", f"{type(error).__name__}: {error}"


def forget(error: Exception, device: torch.device) -> None:
    """Free the memory of a failed run's tensors: the frames of the traceback hold them."""
    error.__traceback__ = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
