"""Moving memory between KV cache and training by each backing of the pool: contents, calls and
time."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from gpu.device import Bench, Timed
from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.backing.interface import Backing
from sglang_harli.mem_cache.backing.static import StaticBacking
from sglang_harli.mem_cache.geometry import PoolGeometry

MOVED_BYTES = 1 << 30
ROW_BYTES, LAYERS = 2048, 32  # 8 KV heads of 128 in bf16; an 8B model
OTHERS = 4  # stripes that stay with the KV cache
ROUNDS, DRY_ROUNDS = 20, 2

Make = Callable[[PoolGeometry, Any], Backing]


def backings(bench: Bench) -> dict[str, Make]:
    """Each backing that this device can have, by its name in the pool's status."""

    def mapped(kind: type[AliasedBacking] | type[CudaBacking]) -> Make:
        return lambda geometry, driver: kind(geometry, bench.device, driver, lambda: bench.streams)

    return {
        AliasedBacking.name: mapped(AliasedBacking),
        CudaBacking.name: mapped(CudaBacking),
        StaticBacking.name: lambda geometry, _driver: StaticBacking(
            geometry, bench.device, stream=bench.forward
        ),
    }


def plan(bench: Bench, dry: bool) -> tuple[PoolGeometry, int]:
    """A pool, and how many of its stripes are lent: 1 GiB of an 8B model's."""
    granularity = bench.driver.granularity
    row, layers = (256, 2) if dry else (ROW_BYTES, LAYERS)
    stripe = granularity * 2 * layers
    lent = 2 if dry else MOVED_BYTES // stripe
    geometry = PoolGeometry.plan(
        slots=(lent + OTHERS) * granularity // row + 17,
        row_bytes=row,
        buffers=2 * layers,
        page_size=1,
        granularity=granularity,
    )
    return geometry, max(1, min(lent * stripe // geometry.stripe_bytes, len(geometry.lendable) - 1))


def moves(bench: Bench, dry: bool) -> dict[str, Any]:
    """For each backing: microseconds to lend and to take back 1 GiB, the calls, and whether the
    contents were right."""
    geometry, stripes = plan(bench, dry)
    rows = []
    for name, make in backings(bench).items():
        rows.append({"backing": name} | _moved(bench, geometry, stripes, make, DRY_ROUNDS if dry else ROUNDS))
    return {"moved_mib": stripes * geometry.stripe_bytes / 2**20, "stripes": stripes, "rows": rows}


def _moved(bench: Bench, geometry: PoolGeometry, stripes: int, make: Make, rounds: int) -> dict[str, Any]:
    driver = Timed(bench.driver)
    began = time.perf_counter()
    backing = make(geometry, driver)
    bench.settle()
    built_s = time.perf_counter() - began
    wanted = list(range(stripes, 0, -1))
    times: dict[str, list[float]] = {"lend": [], "lent": [], "take_back": [], "taken": []}
    calls: dict[str, Counter[str]] = {}
    right = True
    try:
        for _ in range(rounds):
            right = _mark(backing, wanted, bench) and right
            extents, calls["lend"] = _timed(
                driver, bench, times, "lend", "lent", lambda: backing.lend(wanted)
            )
            for extent in extents:
                extent.fill_(0xFF)
            bench.settle()
            _, calls["take_back"] = _timed(
                driver, bench, times, "take_back", "taken", lambda e=extents: backing.take_back(wanted, e)
            )
            right = _right(backing, wanted) and right
    finally:
        bench.settle()
        backing.close()
    medians = {f"{name}_us": round(statistics.median(values) * 1e6, 1) for name, values in times.items()}
    return {
        "contents_right": right,
        "built_s": round(built_s, 3),
        **medians,
        "calls_lend": _words(calls["lend"]),
        "calls_take_back": _words(calls["take_back"]),
    }


def _timed(
    driver: Timed,
    bench: Bench,
    times: dict[str, list[float]],
    host: str,
    device: str,
    work: Callable[[], Any],
) -> tuple[Any, Counter[str]]:
    """Host seconds of ``work``, seconds until the device has done it, and the calls it made."""
    before, began = driver.count(), time.perf_counter()
    found = work()
    times[host].append(time.perf_counter() - began)
    calls = driver.count() - before
    bench.settle()
    times[device].append(time.perf_counter() - began)
    return found, calls


def _mark(backing: Backing, stripes: list[int], bench: Bench) -> bool:
    """Write to rows that stay and rows that go; whether those that go were zeros."""
    zeros = not any(bool(_rows(backing, 0, stripe).any()) for stripe in stripes)
    for stripe in (*stripes, 0):
        _rows(backing, 0, stripe).fill_(7)
    bench.settle()
    return zeros


def _right(backing: Backing, stripes: list[int]) -> bool:
    cleared = not any(
        bool(_rows(backing, buffer, stripe).any())
        for buffer in range(backing.geometry.buffers)
        for stripe in stripes
    )
    return cleared and bool((_rows(backing, 0, 0) == 7).all())


def _rows(backing: Backing, buffer: int, stripe: int) -> torch.Tensor:
    size = backing.geometry.chunk_bytes
    return backing.kv_bytes(buffer)[stripe * size : (stripe + 1) * size]


def _words(calls: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in calls.most_common()) or "none"
