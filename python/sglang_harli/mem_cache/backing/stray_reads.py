"""Attention back ends of which the sources show that no read past a sequence's end counts.

With ``AliasedBacking`` rows that are lent hold training's bits, NaN among them. A kernel reads such
rows only where it loads a whole tile past the end of a sequence, or entries of a page table that
are old; then scores are replaced by -inf, which a NaN in K survives, but a weight of 0 times a NaN
in V is NaN. So both have to be masked *as they are loaded*, or V's rest of a tile filled with
zeros. Rows of a page that a request holds are never lent, and came back as zeros, so that reads
within its last page are harmless; and so are those of slot 0, which CUDA graphs pad with (SGLang
keeps row 0 of ``req_to_token`` for that) and which is never lent.

Back ends that are not listed are served by ``CudaBacking``: what is not shown is not claimed.
``trtllm_mha``, ``fa4`` and ``cutlass`` are missing because their kernels come compiled, or were not
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Masked:
    """Where it is read.  ``kernels``: source and version; ``keys``, ``values``: what becomes of
    those past the end."""

    kernels: str
    keys: str
    values: str


MASKED: dict[str, Masked] = {
    "triton": Masked(
        "sglang/kernels/ops/attention/decode_attention.py and extend_attention.py of SGLang 0.5.16 and 0.5.23 "
        "(every tl.load of K_Buffer and V_Buffer: test_triton_masks_what_it_loads looks at the installed ones)",
        keys="tl.load(mask=offs_n < split_kv_end, other=0.0), in extend mask_n",
        values="the same mask, other=0.0; the slot itself too, from kv_indices, other=0",
    ),
    "fa3": Masked(
        "sgl-project/sgl-attn, hopper/paged_kv.h and mainloop_fwd_sm90_tma_gmma_ws.hpp, read at 203b9b3 "
        "(sglang-kernel builds a later commit of it)",
        keys="PagedKVManager.load_K skips rows from seqlen_k on, load_page_table reads entry 0 for them; scores are masked",
        values="load_V: cp.async with ZFILL, predicate row < seqlen_k, for the last tile (Seqlenk_mask); pages of a "
        "tile or more go by TMA, which reads no other page than the sequence's last",
    ),
    "flashinfer": Masked(
        "flashinfer 0.6.14 and 0.7.2, include/flashinfer/attention/decode.cuh, prefill.cuh, page.cuh (fa2, which SGLang "
        "asks for) and hopper/sparse_mainloop.cuh",
        keys="predicate kv_idx < kv_len; protective_get_k_ptr reads no entry past last_indptr; scores are masked",
        values="SharedMemFillMode::kFillZero with the same predicate; on Hopper cp_async_zfill of the last tile",
    ),
}


def unmasked(backends: Sequence[str | None]) -> list[str]:
    """Those of these attention back ends that are not listed, by name."""
    return sorted({backend or "an unnamed one" for backend in backends if backend not in MASKED})
