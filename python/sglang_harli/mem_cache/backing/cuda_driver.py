"""The calls of the CUDA driver that the pool's backing makes, each checked.

CUDA Driver API, "Virtual Memory Management": an address range is reserved, physical memory is a
handle, and a mapped handle is readable at its address once access is set. Addresses, handles,
streams and events are plain integers, so that a double can stand in for the driver.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from sglang_harli.errors import HarliError

FIXES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "lower --mem-fraction-static or --max-total-tokens",
    "CUDA_ERROR_NO_DEVICE": "the CUDA backing needs a GPU that this process may see (CUDA_VISIBLE_DEVICES)",
    "CUDA_ERROR_INVALID_DEVICE": "name a GPU that this process may see (CUDA_VISIBLE_DEVICES)",
    "CUDA_ERROR_NOT_SUPPORTED": "this GPU or its virtualisation cannot remap memory: set HARLI_POOL_BACKING=static",
    "CUDA_ERROR_NOT_PERMITTED": "this GPU or its virtualisation cannot remap memory: set HARLI_POOL_BACKING=static",
}
ANY_FIX = (
    "restart the server; HARLI_POOL_DEBUG=1 poisons memory that was given away and helps to find the cause"
)


class DriverError(HarliError, RuntimeError):
    """A call of the CUDA driver failed."""

    code = "cuda_driver"

    @classmethod
    def of(cls, call: str, status: str) -> DriverError:
        """From the driver's function and the name of its status."""
        return cls(f"{call} answered {status}: {FIXES.get(status, ANY_FIX)}")


class Driver(Protocol):
    """One device's driver.  Every method raises ``DriverError`` when the driver refuses."""

    granularity: int  # bytes; addresses and sizes of reservations, handles and mappings are multiples

    def reserve(self, nbytes: int) -> int:
        """An address range without memory."""
        ...

    def free_address(self, address: int, nbytes: int) -> None:
        """Give a whole reserved range back; nothing is mapped in it any more."""
        ...

    def create(self, nbytes: int) -> int:
        """A handle of physical memory; contents undefined. Slow: at start only."""
        ...

    def release(self, handle: int) -> None: ...

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map a whole handle at a free reserved address; it may be mapped at several."""
        ...

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap one or more whole mappings; nothing may touch them (not ordered with streams)."""
        ...

    def set_access(self, address: int, nbytes: int) -> None:
        """Make a wholly mapped range readable and writable."""
        ...

    def event(self) -> int:
        """A new event, which counts as done until it is recorded."""
        ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """The event is done when all that the stream was given until now is done."""
        ...

    def done(self, event: int) -> bool: ...

    def synchronize(self, event: int) -> None:
        """Wait on the host until the event is done."""
        ...

    def wait(self, stream: int, event: int) -> None:
        """What the stream is given from now on runs after the event."""
        ...

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        """Set bytes to ``value``, in the order of the stream."""
        ...

    def tensor(self, address: int, nbytes: int) -> Tensor:
        """uint8 ``[nbytes]`` over mapped memory, which it does not own."""
        ...


class CudaDriver:
    """The real one, by cuda-python's bindings.

    ``device``: ordinal of the GPU, whose primary context must be current on the calling thread, as
    it is wherever torch has used the device.

    Raises:
        DriverError: no driver, no such GPU, or one that cannot remap memory.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self._cuda = _bindings()
        self._call("cuInit", 0)
        if not self._remaps():
            raise DriverError.of("cuDeviceGetAttribute", "CUDA_ERROR_NOT_SUPPORTED")
        cuda = self._cuda
        self._property = cuda.CUmemAllocationProp()
        self._property.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._property.location = self._location()
        self._access = cuda.CUmemAccessDesc()
        self._access.location = self._location()
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._property, least))

    def _location(self) -> Any:
        location = self._cuda.CUmemLocation()
        location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = self.device
        return location

    def _remaps(self) -> bool:
        attribute = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        device = self._call("cuDeviceGet", self.device)
        return bool(self._call("cuDeviceGetAttribute", attribute, device))

    def _call(self, name: str, *arguments: Any) -> Any:
        """The call's value (None without one)."""
        status, *values = _asked(name, getattr(self._cuda, name), *arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise DriverError.of(name, status.name)
        return values[0] if values else None

    def reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, self.granularity, 0, 0))

    def free_address(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> int:
        return int(self._call("cuMemCreate", nbytes, self._property, 0))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._call("cuMemMap", address, nbytes, 0, handle, 0)

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)

    def set_access(self, address: int, nbytes: int) -> None:
        self._call("cuMemSetAccess", address, nbytes, [self._access], 1)

    def event(self) -> int:
        flags = self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return int(self._call("cuEventCreate", int(flags)))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def done(self, event: int) -> bool:
        (status,) = _asked("cuEventQuery", self._cuda.cuEventQuery, event)
        if status == self._cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise DriverError.of("cuEventQuery", status.name)
        return True

    def synchronize(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def wait(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", address, value, nbytes, stream)

    def tensor(self, address: int, nbytes: int) -> Tensor:
        try:
            found = torch.as_tensor(_Memory(address, nbytes), device=torch.device("cuda", self.device))
        except RuntimeError as error:
            raise DriverError(f"torch cannot use the memory at {address:#x} ({error}): {ANY_FIX}") from error
        if found.data_ptr() != address:
            raise DriverError(f"torch copied the memory at {address:#x} instead of using it: {ANY_FIX}")
        return found


def why_not(device: int) -> str | None:
    """Why this device's memory cannot be remapped, as the driver says; None: it can. Nothing is
    tried (``probe.refusal`` does)."""
    try:
        CudaDriver(device)
    except DriverError as error:
        return error.message
    return None


class _Memory:
    """Bytes at an address, as torch reads them (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "stream": None,
        }


@functools.cache
def _bindings() -> ModuleType:
    """Imported when a GPU is used, so that a host without one pays nothing."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DriverError(
            f"cuda-python cannot be imported ({error}): `pip install 'cuda-python>=13'`, as SGLang asks for it"
        ) from error


def _asked(name: str, function: Any, *arguments: Any) -> tuple[Any, ...]:
    """The binding's answer; where libcuda is missing it raises instead of answering."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise DriverError(
            f"{name} could not be called ({error}): install the NVIDIA driver, or serve with --device cpu"
        ) from error
