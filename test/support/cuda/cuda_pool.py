"""A small pool on the driver's double."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.geometry import PoolGeometry
from support.cuda.cuda_driver_double import DriverDouble

FORWARD, SCHEDULE, COPY = 11, 12, 13
BUFFERS = 4
STRIPES = 6
TAIL_SLOTS = 3
ROW_BYTES = 512


def plan(driver: DriverDouble, *, tail: int = TAIL_SLOTS) -> PoolGeometry:
    stripe_slots = driver.granularity // ROW_BYTES
    slots = STRIPES * stripe_slots + tail
    return PoolGeometry(slots, ROW_BYTES, BUFFERS, page_size=1, stripe_slots=stripe_slots)


def make(driver: DriverDouble, *, debug: bool = False, tail: int = TAIL_SLOTS) -> CudaBacking:
    return CudaBacking(
        plan(driver, tail=tail),
        torch.device("cpu"),
        driver,
        lambda: [FORWARD, SCHEDULE, FORWARD],
        debug=debug,
    )


def rows(backing: CudaBacking, buffer: int, stripe: int) -> Tensor:
    size = backing.geometry.chunk_bytes
    return backing.kv_bytes(buffer)[stripe * size : (stripe + 1) * size]


def is_all(tensor: Tensor, value: int) -> bool:
    return bool((tensor == value).all())
