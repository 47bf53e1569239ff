"""Cases that run the real driver class under cuda-python's own bindings on a libcuda of ours.

A process of its own runs them all: a library called libcuda.so.1 would mislead torch, and every
other test of the process. ``python -m support.cuda.libcuda_cases LIBRARY`` prints one JSON object:
case -> null or the traceback. The library is loaded before the bindings are, whose dlopen of
libcuda.so.1 then finds it by its SONAME.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from sglang_harli.mem_cache.backing import probe
from sglang_harli.mem_cache.backing.aliased import AliasedBacking
from sglang_harli.mem_cache.backing.cuda import CudaBacking
from sglang_harli.mem_cache.backing.cuda_driver import CudaDriver, DriverError, why_not
from sglang_harli.mem_cache.geometry import PoolGeometry

MIB = 2**20
DEVICE, FORWARD, SCHEDULE = 3, 0xF00, 0x5C0
OUT_OF_MEMORY, NOT_PERMITTED, NOT_READY, ILLEGAL_ADDRESS = 2, 800, 600, 700
BUFFERS, STRIPES = 4, 4

library: ctypes.CDLL


class HostDriver(CudaDriver):
    """The real one, but for tensors: this torch sees no GPU."""

    def tensor(self, address: int, nbytes: int) -> Tensor:
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


def refuse(call: str, after: int = 0, status: int = OUT_OF_MEMORY) -> None:
    library.fake_refuse(call.encode(), after, status)


def calls() -> list[str]:
    """What was called since the last time, with arguments."""
    log = library.fake_log().decode().splitlines()
    library.fake_clear()
    return log


def names(log: list[str]) -> list[str]:
    return [line.partition("(")[0] for line in log]


def make(kind: type[AliasedBacking] | type[CudaBacking] = AliasedBacking) -> AliasedBacking | CudaBacking:
    geometry = PoolGeometry(STRIPES * 1024 + 5, 2048, BUFFERS, page_size=1, stripe_slots=1024)
    return kind(geometry, torch.device("cpu"), HostDriver(DEVICE), lambda: [FORWARD, SCHEDULE])


def rows(backing: AliasedBacking | CudaBacking, buffer: int, stripe: int) -> Tensor:
    size = backing.geometry.chunk_bytes
    return backing.kv_bytes(buffer)[stripe * size : (stripe + 1) * size]


CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


@case
def every_call_marshals_its_arguments() -> None:
    driver = CudaDriver(DEVICE)
    assert driver.granularity == 2 * MIB
    at, handle = driver.reserve(4 * MIB), driver.create(2 * MIB)
    driver.map(at, 2 * MIB, handle)
    driver.set_access(at, 2 * MIB)
    event = driver.event()
    driver.record(event, FORWARD)
    assert driver.done(event)
    driver.wait(SCHEDULE, event)
    driver.synchronize(event)
    driver.fill(at, 0xAB, 2 * MIB, FORWARD)
    assert ctypes.string_at(at, 3) == b"\xab\xab\xab"
    driver.destroy_event(event)
    driver.unmap(at, 2 * MIB)
    driver.release(handle)
    driver.free_address(at, 4 * MIB)
    assert calls() == [
        "cuInit(0)",
        f"cuDeviceGet({DEVICE})",
        f"cuDeviceGetAttribute(102, {DEVICE})",  # virtual memory management
        f"cuMemGetAllocationGranularity(type 1, location 1 {DEVICE}, option 0)",
        f"cuMemAddressReserve({4 * MIB}, {2 * MIB}, 0, 0)",
        f"cuMemCreate({2 * MIB}, type 1, location 1 {DEVICE}, 0)",
        f"cuMemMap({at:x}, {2 * MIB}, 0, {handle}, 0)",
        f"cuMemSetAccess({at:x}, {2 * MIB}, location 1 {DEVICE}, flags 3, 1)",
        "cuEventCreate(2)",
        f"cuEventRecord({event:#x}, {FORWARD:#x})",
        f"cuEventQuery({event:#x})",
        f"cuStreamWaitEvent({SCHEDULE:#x}, {event:#x}, 0)",
        f"cuEventSynchronize({event:#x})",
        f"cuMemsetD8Async({at:x}, 171, {2 * MIB}, {FORWARD:#x})",
        f"cuEventDestroy_v2({event:#x})",
        f"cuMemUnmap({at:x}, {2 * MIB})",
        f"cuMemRelease({handle})",
        f"cuMemAddressFree({at:x}, {4 * MIB})",
    ]
    assert library.fake_left() == 0


@case
def an_event_that_is_not_done_is_no_error() -> None:
    driver = CudaDriver(DEVICE)
    library.fake_events(NOT_READY)
    assert driver.done(driver.event()) is False
    library.fake_events(ILLEGAL_ADDRESS)
    try:
        driver.done(1)
    except DriverError as error:
        assert error.message.startswith("cuEventQuery answered CUDA_ERROR_ILLEGAL_ADDRESS"), error.message
    else:
        raise AssertionError("a fault of the device was taken for an answer")


@case
def the_aliased_backing_lends_and_takes_back() -> None:
    backing = make()
    assert not any(bool(backing.kv_bytes(b).any()) for b in range(BUFFERS))
    rows(backing, 1, 2).fill_(7)
    calls()
    backing.take_back([1], backing.lend([1]))  # makes the events
    calls()
    (extent,) = backing.lend([2, 3])
    assert names(calls()) == ["cuEventRecord", "cuStreamWaitEvent"]
    assert bool((extent.view(2, BUFFERS, -1)[0, 1] == 7).all())
    extent.fill_(9)
    assert bool((rows(backing, 3, 3) == 9).all())
    backing.take_back([2, 3], [extent])
    log = calls()
    assert names(log) == [
        *("cuEventRecord", "cuStreamWaitEvent"),
        "cuMemsetD8Async",
        *("cuEventRecord", "cuStreamWaitEvent"),
    ]
    assert log[2].endswith(f", 0, {2 * backing.geometry.stripe_bytes}, {FORWARD:#x})")
    assert not rows(backing, 3, 3).any() and not rows(backing, 1, 2).any()
    backing.close()
    assert library.fake_left() == 0


@case
def the_remapped_backing_lends_and_takes_back() -> None:
    backing = make(CudaBacking)
    rows(backing, 1, 2).fill_(7)
    (extent,) = backing.lend([2])
    assert bool((extent.view(BUFFERS, -1)[1] == 7).all()) and not rows(backing, 1, 2).any()
    extent.fill_(9)
    assert not rows(backing, 0, 2).any()
    backing.take_back([2], [extent])
    assert not rows(backing, 1, 2).any()
    backing.lend([1, 3])
    backing.close()
    assert library.fake_left() == 0


@case
def a_pool_that_is_refused_leaves_nothing_behind() -> None:
    for kind in (AliasedBacking, CudaBacking):
        for call in ("cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"):
            refuse(call, 1)
            try:
                make(kind)
            except DriverError as error:
                assert error.message.startswith(f"{call} answered CUDA_ERROR_OUT_OF_MEMORY"), error.message
            else:
                raise AssertionError(f"{kind.name}: {call} was not called")
            assert library.fake_left() == 0, (kind.name, call)


@case
def a_refused_move_moves_nothing() -> None:
    backing = make()
    for call in ("cuEventRecord", "cuStreamWaitEvent"):
        refuse(call)
        try:
            backing.lend([1])
        except MemoryError as error:
            assert call in str(error)
        assert not backing.lent
    extents = backing.lend([1])
    for call in ("cuEventRecord", "cuStreamWaitEvent", "cuMemsetD8Async"):
        refuse(call)
        try:
            backing.take_back([1], extents)
        except DriverError as error:
            assert error.message.startswith(call)
        assert backing.lent == {1}
    backing.take_back([1], extents)
    backing.close()
    assert library.fake_left() == 0


@case
def the_probe_maps_aliases_and_leaves_nothing() -> None:
    assert probe.refusal(DEVICE, HostDriver) is None
    log = calls()
    assert names(log).count("cuMemMap") == 3 and names(log).count("cuMemCreate") == 2
    assert [line for line in log if line.startswith("cuMemUnmap") and f", {4 * MIB})" in line], "two at once"
    assert library.fake_left() == 0


@case
def the_probe_names_each_call_that_is_refused() -> None:
    """An attribute that promises what a call refuses: seen under virtualisation."""
    probe.refusal(DEVICE, HostDriver)
    made = list(dict.fromkeys(names(calls())))
    assert len(made) >= 17, made
    for call in made:
        refuse(call, status=NOT_PERMITTED)
        said = probe.refusal(DEVICE, HostDriver)
        name = call.removesuffix("_v2")
        assert said is not None and said.startswith(f"{name} answered CUDA_ERROR_NOT_PERMITTED"), (call, said)
        assert "HARLI_POOL_BACKING=static" in said
        calls()
        # What was refused on its way out is left; everything else is not.
        ends = ("cuMemRelease", "cuMemUnmap", "cuMemAddressFree", "cuEventDestroy_v2")
        assert call in ends or library.fake_left() == 0, call
        if call in ends:
            library.fake_forget()


@case
def a_device_that_says_it_cannot_is_believed() -> None:
    library.fake_remaps(0)
    assert "CUDA_ERROR_NOT_SUPPORTED" in str(why_not(DEVICE))
    library.fake_remaps(0)
    assert "CUDA_ERROR_NOT_SUPPORTED" in str(probe.refusal(DEVICE, HostDriver))


def run(path: str) -> dict[str, str | None]:
    """Each case by name: None, or why it failed."""
    global library
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    library.fake_log.restype = ctypes.c_char_p
    found: dict[str, str | None] = {}
    for name, function in CASES.items():
        library.fake_clear()
        library.fake_forget()
        try:
            function()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    return found


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
