"""A stand-in for ``sgl_kernel`` in processes that run SGLang's CPU engine.

The published wheel loads a CUDA driver at import, while SGLang's CPU engine imports its names.
Here every op that serving Llama, Mistral, Qwen2 or Qwen3 touches is a plain torch implementation
with the wheel's signature; any other raises NotImplementedError when called, not when imported:
SGLang imports the ops of features that it then does not use.

``torch.ops.sgl_kernel`` stays empty on purpose: with its ``convert_weight_packed``, a CPU with AMX
tiles would make SGLang repack its weights, and training could no longer view them, and ranks would
reduce by ``shm_allreduce``.  It serves SGLang 0.5.23 and 0.5.16, which call the same ops alike.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NoReturn

import torch

__all__ = [
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fused_add_rmsnorm",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "rmsnorm",
    "silu_and_mul",
]
__version__ = "0+harli.cpu"  # of no wheel; SGLang compares the wheel's on CUDA alone


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new KV slots into its row of the token table.

    Args:
        req_pool_indices: row of each request, int, shape [requests].
        req_to_token: the table, int32, shape [rows, pool_len]; changed in place.
        start_offset, end_offset: first position, and one past the last, int, shape [requests].
        out_cache_loc: slots of all requests in a row, int, shape [sum(end - start)].
    """
    taken = 0
    for row, start, end in _spans(req_pool_indices, start_offset, end_offset, req_to_token, pool_len):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Gather each request's KV slots out of its row of the token table, in the requests' order.

    The inverse of :func:`assign_req_to_token_pool_cpu`, with the same arguments; ``out_cache_loc``
    is changed in place; what lies behind the last span stays.
    """
    taken = 0
    for row, start, end in _spans(req_pool_indices, start_offset, end_offset, req_to_token, pool_len):
        out_cache_loc[taken : taken + end - start] = req_to_token[row, start:end].to(out_cache_loc.dtype)
        taken += end - start


def _spans(
    rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, table: torch.Tensor, pool_len: int
) -> list[tuple[int, int, int]]:
    if table.shape[1] != pool_len:
        raise ValueError(f"CPU engine: pool_len is {pool_len}, but req_to_token has rows of {table.shape[1]}")
    return list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy KV rows ``src_loc`` onto rows ``tgt_loc`` in every layer's buffer.

    All rows are read before any is written, so that they may overlap.

    Args:
        data_ptrs: address of each buffer, uint64 or int64, shape [buffers].
        strides: bytes of one row of each buffer, int, shape [buffers].
        tgt_loc, src_loc: rows, int, shape [n].
    """
    if tgt_loc.numel() != src_loc.numel():
        raise ValueError(f"CPU engine: {src_loc.numel()} rows to read but {tgt_loc.numel()} to write")
    if src_loc.numel() == 0:
        return
    target, source = tgt_loc.long(), src_loc.long()
    rows = int(torch.maximum(target.max(), source.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        # The caller owns the buffers and passes addresses only: view the rows that are touched.
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, stride)
        buffer[target] = buffer[source]  # indexing on the right copies first


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Root mean square normalisation over ``hidden``, computed in fp32; ``input``: [tokens, hidden]
    of any float dtype, as the result; ``weight``: [hidden]; ``enable_pdl``: ignored (CUDA's)."""
    x = input.float()
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    return _into(out, normal.to(input.dtype))


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """``residual += input``, ``input = rmsnorm(residual)``, in place (shapes as in rmsnorm)."""
    total = input.float() + residual.float()
    residual.copy_(total)
    normal = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
    input.copy_(normal)


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(input[..., :d]) * input[..., d:]``, d half of the last dimension; shape [..., d]."""
    gate, up = input.chunk(2, dim=-1)
    return _into(out, torch.nn.functional.silu(gate) * up)


def gelu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``gelu(input[..., :d]) * input[..., d:]``, d half of the last dimension; shape [..., d]."""
    gate, up = input.chunk(2, dim=-1)
    return _into(out, torch.nn.functional.gelu(gate) * up)


def gelu_tanh_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """As :func:`gelu_and_mul`, with the tanh approximation of gelu."""
    gate, up = input.chunk(2, dim=-1)
    return _into(out, torch.nn.functional.gelu(gate, approximate="tanh") * up)


def _into(out: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if out is None else out.copy_(value)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(f"module 'sgl_kernel' (CPU engine stand-in) has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is not available on the CPU engine: turn off the SGLang option that uses it, "
            "or serve on a CUDA device"
        )

    missing.__name__ = missing.__qualname__ = name
    return missing
