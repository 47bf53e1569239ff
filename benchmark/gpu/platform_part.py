"""Part 1: is the platform what the pool's memory needs, and what do its calls cost?

Nothing of SGLang runs here. In a dry run the driver's double stands in for the driver, and what has
no double (graphs, kernels beside mapping, green contexts) is tried on the CPU or left out.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from gpu import pool_moves
from gpu.device import Bench, Timed, bench
from gpu.page import Page
from sglang_harli.mem_cache.backing import probe

CHUNKS, DRY_CHUNKS = 64, 4  # of one granule, mapped one behind the other
ROUNDS, DRY_ROUNDS = 10, 1
BUSY_MATMULS, WIDTH = 200, 8192


def run(page: Page, _options: Any) -> None:
    """Measure all of it, the most important first: what nothing needs that is built today comes
    last, where it can spoil nothing."""
    page.measure("platform", lambda: platform(page.dry))
    _memory(page)
    page.measure("green contexts", functools.partial(green_contexts, page.dry))


def _memory(page: Page) -> None:
    """What the pool's memory needs."""
    if not page.dry:  # as a server tries it before it chooses a backing
        reason = probe.refusal(torch.cuda.current_device())
        page.sections["remapping"] = {"possible": reason is None, "why_not": reason or "-"}
        if reason is not None:
            page.missing["what needs remapping"] = f"no memory can be remapped here: {reason}"
            page.write()
            return
    with bench(page.dry) as found:
        page.measure("maps", functools.partial(maps, found))
        page.measure("calls", functools.partial(calls, found, page.dry))
        page.measure("moves", functools.partial(pool_moves.moves, found, page.dry), needs_s=10)
        page.measure("graph", functools.partial(graph, found, page.dry), needs_s=5)
        if not page.dry:
            page.measure("beside kernels", functools.partial(beside_kernels, found), needs_s=5)


def platform(dry: bool) -> dict[str, Any]:
    """Versions, and the device as torch sees it."""
    found: dict[str, Any] = {"torch": torch.__version__, "torch's CUDA": torch.version.cuda}
    for name in ("sglang", "triton", "cuda-python", "cuda-bindings", "flash-attn", "peft", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if dry:
        return found
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return found | {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "SMs": device.multi_processor_count,
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "cuDNN": torch.backends.cudnn.version(),
        "attention priority": str(torch._C._get_sdp_priority_order()),
    }


def green_contexts(dry: bool) -> dict[str, Any]:
    """Whether torch can make a context with a part of the SMs, and work in it."""
    try:
        from torch.cuda.green_contexts import SUPPORTED, GreenContext
    except ImportError as error:
        return {"there": False, "why": str(error)}
    found: dict[str, Any] = {"there": True, "supported": bool(SUPPORTED)}
    if dry or not SUPPORTED:
        return found
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    found["matmul_us, all SMs"] = _device_us(lambda: a @ a)
    for share in (0.5, 0.25):
        name = f"matmul_us, {share:.0%} of the SMs"
        try:  # nothing that is built today needs them: what is refused is a finding
            context: Any = GreenContext.create(num_sms=int(whole * share) // 8 * 8, device_id=0)
            context.set_context()
            try:
                found[name] = _device_us(lambda: a @ a)
            finally:
                context.pop_context()
        except RuntimeError as error:
            found[name] = f"refused: {error}"
    return found


def maps(found: Bench) -> dict[str, Any]:
    """One handle at two addresses: what is written at one is read at the other.

    DriverError: a call was refused.
    """
    driver, size, stream = found.driver, found.driver.granularity, found.streams[0]
    handle = driver.create(size)
    ranges = [driver.reserve(size), driver.reserve(size)]
    for at in ranges:
        driver.map(at, size, handle)
        driver.set_access(at, size)
    driver.fill(ranges[0], 0x5A, size, stream)
    found.settle()
    same = bool((driver.tensor(ranges[1], size) == 0x5A).all())
    found.settle()
    for at in ranges:
        driver.unmap(at, size)
        driver.free_address(at, size)
    driver.release(handle)
    if not same:
        raise RuntimeError("what was written through one mapping was not read through the other")
    return {"granularity_mib": size / 2**20, "one handle at two addresses": same}


def calls(found: Bench, dry: bool) -> dict[str, Any]:
    """Host microseconds of each call of the driver that the pool makes."""
    chunks, rounds = (DRY_CHUNKS, DRY_ROUNDS) if dry else (CHUNKS, ROUNDS)
    driver, size, stream = Timed(found.driver), found.driver.granularity, found.streams[0]
    base = driver.reserve(chunks * size)
    handles = [driver.create(size) for _ in range(chunks)]
    event = driver.event()
    batches: dict[str, list[float]] = {}

    def batch(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        batches.setdefault(name, []).append(time.perf_counter() - began)

    for _ in range(rounds):
        for index, handle in enumerate(handles):
            driver.map(base + index * size, size, handle)
            driver.set_access(base + index * size, size)
        driver.fill(base, 0, chunks * size, stream)
        driver.record(event, stream)
        driver.done(event)
        driver.wait(found.streams[1], event)
        driver.synchronize(event)
        found.settle()
        for index in range(chunks):
            driver.unmap(base + index * size, size)
        for index, handle in enumerate(handles):
            found.driver.map(base + index * size, size, handle)
        batch("set_access of all chunks", lambda: found.driver.set_access(base, chunks * size))
        batch("unmap of all chunks", lambda: found.driver.unmap(base, chunks * size))
    driver.destroy_event(event)
    for handle in handles:
        driver.release(handle)
    driver.free_address(base, chunks * size)
    by_batch = {f"{name}_us": round(statistics.median(v) * 1e6, 1) for name, v in batches.items()}
    return {"chunk_mib": size / 2**20, "chunks": chunks, **by_batch, "rows": driver.costs()}


def graph(found: Bench, dry: bool) -> dict[str, Any]:
    """Kernels that were captured once replay over memory that has moved since."""
    geometry, stripes = pool_moves.plan(found, dry)
    rounds = {}
    for name, make in pool_moves.backings(found).items():
        backing = make(geometry, found.driver)
        try:
            rounds[name] = _replays(found, backing, list(range(1, stripes + 1)))
        finally:
            found.settle()
            backing.close()
    return {"right": all(rounds.values()), **rounds}


def _replays(found: Bench, backing: Any, stripes: list[int]) -> bool:
    """Kernels and no copies are captured: how a copy's node behaves is not documented."""
    geometry = backing.geometry
    kv = backing.kv_bytes(0).view(torch.bfloat16)
    width = geometry.row_bytes // 2
    row = geometry.slots_of(stripes[0]).start
    place = kv[row * width : (row + 1) * width]
    source, out = torch.ones_like(place), torch.empty_like(place)

    def kernels() -> None:
        torch.mul(source, 3, out=place)
        torch.add(place, source, out=out)

    replay = _captured(found, kernels)
    right = True
    for value in (1.0, 2.0, 3.0):
        source.fill_(value)
        found.settle()
        replay()
        found.settle()
        right = right and bool((out == 4 * value).all())
        extents = backing.lend(stripes)
        for extent in extents:
            extent.fill_(0xFF)
        backing.take_back(stripes, extents)
        found.settle()
        right = right and not bool(place.any())
    return right


def _captured(found: Bench, kernels: Callable[[], None]) -> Callable[[], object]:
    """A CUDA graph of these kernels; on a CPU they are called again."""
    if found.forward is None:
        return kernels
    kernels()
    found.settle()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=found.forward):
        kernels()

    def replay() -> None:
        with torch.cuda.stream(found.forward):
            captured.replay()

    return replay


def beside_kernels(found: Bench) -> dict[str, Any]:
    """Do mapping and unmapping wait for kernels that run?"""
    driver, size = found.driver, found.driver.granularity
    a = torch.randn(WIDTH, WIDTH, device=found.device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    torch.matmul(a, a, out=out)
    torch.cuda.synchronize()
    base, handle = driver.reserve(size), driver.create(size)
    times = []
    for _ in range(5):
        for _ in range(BUSY_MATMULS):
            torch.matmul(a, a, out=out)
        began = time.perf_counter()
        driver.map(base, size, handle)
        driver.set_access(base, size)
        mapped = time.perf_counter()
        driver.unmap(base, size)
        unmapped = time.perf_counter()
        torch.cuda.synchronize()
        times.append((mapped - began, unmapped - mapped, time.perf_counter() - unmapped))
    driver.release(handle)
    driver.free_address(base, size)
    names = ("map_and_access_us", "unmap_us", "kernels_ran_on_us")
    return {
        name: round(statistics.median(values) * 1e6, 1)
        for name, values in zip(names, zip(*times, strict=True), strict=True)
    }


def _device_us(work: Callable[[], object], rounds: int = 20) -> float:
    """Median device microseconds of ``work`` on the current stream."""
    work()
    torch.cuda.synchronize()
    found = []
    for _ in range(rounds):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) * 1e3)
    return round(statistics.median(found), 1)
