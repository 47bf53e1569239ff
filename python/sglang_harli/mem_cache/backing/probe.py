"""Whether this device's memory can be mapped, aliased and unmapped: found out by doing it.

The driver's attribute says that it has virtual memory management; under some virtualisation a call
is refused all the same, and then the server would end in SGLang's constructor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

from sglang_harli.mem_cache.backing.cuda_driver import CudaDriver, Driver, DriverError

STREAM = 0  # the default one
VALUE = 0x5A
Undo = list[Callable[[], object]]


def refusal(device: int, make: Callable[[int], Driver] = CudaDriver) -> str | None:
    """What this device's driver refuses of what a pool does with it; None: nothing.

    Takes two granules of memory for a moment. ``make``: the driver of a device.
    """
    try:
        driver = make(device)
    except DriverError as error:
        return error.message
    undo: Undo = []
    try:
        _try_out(driver, undo)
        while undo:
            undo.pop()()
    except DriverError as error:
        while undo:
            with contextlib.suppress(DriverError):
                undo.pop()()
        return error.message
    return None


def _try_out(driver: Driver, undo: Undo) -> None:
    """The calls that a pool makes; ``undo``: those that let everything go, the last one first."""
    size = driver.granularity
    row, alias = _reserved(driver, 2 * size, undo), _reserved(driver, size, undo)
    handles = [_created(driver, size, undo) for _ in range(2)]
    driver.map(row, size, handles[0])
    undo.append(partial(driver.unmap, row, size))
    driver.map(row + size, size, handles[1])
    undo[-1] = partial(driver.unmap, row, 2 * size)  # two mappings by one call
    driver.map(alias, size, handles[1])
    undo.append(partial(driver.unmap, alias, size))
    driver.set_access(row, 2 * size)
    driver.set_access(alias, size)
    event = driver.event()
    undo.append(partial(driver.destroy_event, event))
    driver.fill(alias, VALUE, size, STREAM)
    driver.record(event, STREAM)
    driver.wait(STREAM, event)
    driver.done(event)
    driver.synchronize(event)
    if not bool((driver.tensor(row + size, size) == VALUE).all()):
        raise DriverError("a handle that is mapped at two addresses does not show the same bytes at both")


def _reserved(driver: Driver, nbytes: int, undo: Undo) -> int:
    address = driver.reserve(nbytes)
    undo.append(partial(driver.free_address, address, nbytes))
    return address


def _created(driver: Driver, nbytes: int, undo: Undo) -> int:
    handle = driver.create(nbytes)
    undo.append(partial(driver.release, handle))
    return handle
