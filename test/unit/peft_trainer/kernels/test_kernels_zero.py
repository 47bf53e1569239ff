"""Many ranges zeroed in one launch, and nothing beside them."""

from __future__ import annotations

import pytest
import torch

from sglang_harli.peft_trainer.kernels.zero import RangeTable
from support.kernels.interpreter import interpreted

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "ranges",
    [[(16, 32)], [(0, 70_000), (80_000, 16), (90_000, 40_000)], [(3, 5), (4097, 9000)], [(8, 8), (64, 0)]],
)
def test_ranges_and_nothing_else(ranges):
    memory = torch.full((140_000,), 0x5A, dtype=torch.uint8)
    begin = memory.data_ptr()
    assert begin % 16 == 0
    wanted = memory.clone()
    for offset, size in ranges:
        wanted[offset : offset + size] = 0
    table = RangeTable([(begin + offset, size) for offset, size in ranges], CPU)
    with interpreted(seed=1) as names:
        table.zero()
    assert torch.equal(memory, wanted)
    assert names == ["_zero"]


def test_no_ranges_launch_nothing():
    with interpreted() as names:
        RangeTable([], CPU).zero()
    assert names == []
