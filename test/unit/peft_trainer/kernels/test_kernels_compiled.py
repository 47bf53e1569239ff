"""Each kernel compiles without a device, for the generations that are served on, and spills no
register."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.kernels.compiler import CAPABILITIES, Launch, compile_launch
from support.kernels.variants import record

SHARED = 96 * 1024  # bytes of shared memory that every generation from sm_80 on has for a program
SPILLED_EXACT = 32  # bytes that a kernel in fp32 may spill, which few models are served in
LAUNCHES = record(torch.bfloat16, ranks=(16,))


def check(launch: Launch, capability: int, cache: Path) -> None:
    done = compile_launch(launch, capability, cache)
    most = SPILLED_EXACT if launch.args[0].dtype == torch.float32 else 0
    assert done.spilled <= most, f"{launch.name} spills {done.spilled} bytes on sm_{capability}"
    assert done.shared <= SHARED
    assert ".tf32" not in done.ptx or "float32" not in str(launch.args[0].dtype)


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.name)
def test_compiled_for_sm_90(launch, tmp_path):
    check(launch, 90, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_for_every_generation(capability, dtype, tmp_path):
    for number, launch in enumerate(record(dtype, ranks=(8, 16, 32, 64))):
        check(launch, capability, tmp_path / str(number))


def test_sixteen_bytes_at_once_where_memory_is_the_bound(tmp_path):
    """Known alignment shows in the loads; where a stride is not specialised it is lost."""
    for launch in LAUNCHES:
        if launch.name in ("softmax._rows", "gated._forward", "norm._forward", "heads._rotate"):
            ptx = compile_launch(launch, 90, tmp_path).ptx
            assert "ld.global.v4.b32" in ptx or "ld.global.v2.b64" in ptx, launch.name
