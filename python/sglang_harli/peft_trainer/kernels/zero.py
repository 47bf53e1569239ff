"""Many ranges of memory zeroed in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_harli.peft_trainer.kernels.launch import launch

BLOCK = 4096  # words of a program
_WORD = 8  # bytes of a store where everything is aligned
_ALIGNED = 16


class RangeTable:
    """Ranges on a device that are zeroed together, as often as wanted.

    Args:
        ranges: (address, bytes) of each, on ``device``; they do not overlap.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], device: torch.device) -> None:
        table = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
        if device.type == "cuda":  # from pinned memory the copy does not block the host
            table = table.pin_memory()
        self._table: Tensor = table.to(device, non_blocking=True)
        aligned = all(address % _ALIGNED == 0 and size % _ALIGNED == 0 for address, size in ranges)
        self._word = _WORD if aligned else 1
        self._count, self._longest = len(ranges), max((size for _, size in ranges), default=0)

    def zero(self) -> None:
        """All of them."""
        if not self._longest:
            return
        blocks = triton.cdiv(self._longest, self._word * BLOCK)
        grid = (self._count * blocks,)
        launch(_zero, grid, self._table, blocks, WORD=self._word, BLOCK=BLOCK, num_warps=8)


@triton.jit(do_not_specialize=["blocks"])
def _zero(table, blocks, WORD: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    table += 2 * (program // blocks)
    address = tl.load(table)
    size = tl.load(table + 1)
    at = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if WORD == 8:
        words = tl.multiple_of(address, 16).to(tl.pointer_type(tl.int64))
        tl.store(words + at, tl.zeros([BLOCK], dtype=tl.int64), mask=at < tl.multiple_of(size // 8, 2))
    else:
        single = address.to(tl.pointer_type(tl.int8))
        tl.store(single + at, tl.zeros([BLOCK], dtype=tl.int8), mask=at < size)
