"""The driver's calls: known to cuda-python, and errors that say which call, what it answered and
what to do."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from sglang_harli.mem_cache.backing import cuda_driver
from sglang_harli.mem_cache.backing.cuda_driver import CudaDriver, DriverError, why_not

bindings = pytest.importorskip("cuda.bindings.driver")


class Recorder:
    """Bindings whose enumerations and structures are cuda-python's own, and whose calls answer what
    they are told once their arguments fit the real binding's signature."""

    def __init__(self, answers: dict[str, tuple[Any, ...]]) -> None:
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        real = getattr(bindings, name)
        if not re.match(r"cu[A-Z]", name):
            return real

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.asked.append((name, arguments))
            inspect.signature(real).bind(*arguments)
            return self.answers.get(name, (bindings.CUresult.CUDA_SUCCESS, 1))

        return call


def driver_with(monkeypatch: pytest.MonkeyPatch, **answers: tuple[Any, ...]) -> tuple[CudaDriver, Recorder]:
    recorder = Recorder({name: (getattr(bindings.CUresult, a[0]), *a[1:]) for name, a in answers.items()})
    monkeypatch.setattr(cuda_driver, "_bindings", lambda: recorder)
    return CudaDriver(3), recorder


def test_every_call_fits_its_binding(monkeypatch: pytest.MonkeyPatch):
    granularity = ("CUDA_SUCCESS", 2 << 20)
    driver, recorder = driver_with(monkeypatch, cuMemGetAllocationGranularity=granularity)
    assert driver.granularity == 2 << 20
    driver.map(driver.reserve(2 << 20), 2 << 20, driver.create(2 << 20))
    driver.set_access(1, 2 << 20)
    driver.unmap(1, 2 << 20)
    driver.release(1)
    driver.free_address(1, 2 << 20)
    event = driver.event()
    driver.record(event, 5)
    driver.wait(6, event)
    driver.synchronize(event)
    driver.fill(1, 0, 2 << 20, 5)
    driver.destroy_event(event)
    asked = dict(recorder.asked)
    assert asked["cuMemMap"] == (1, 2 << 20, 0, 1, 0)
    assert asked["cuMemsetD8Async"] == (1, 0, 2 << 20, 5)
    (access,) = asked["cuMemSetAccess"][2]
    assert access.location.id == 3
    assert access.flags == bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


@pytest.mark.parametrize(("status", "done"), [("CUDA_SUCCESS", True), ("CUDA_ERROR_NOT_READY", False)])
def test_an_event_that_is_not_done_is_no_error(monkeypatch: pytest.MonkeyPatch, status: str, done: bool):
    driver, _ = driver_with(monkeypatch, cuEventQuery=(status,))
    assert driver.done(1) is done


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", "lower --mem-fraction-static or --max-total-tokens"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", "restart the server; HARLI_POOL_DEBUG=1"),
    ],
)
def test_errors_name_call_status_and_fix(monkeypatch: pytest.MonkeyPatch, status: str, fix: str):
    driver, _ = driver_with(monkeypatch, cuMemCreate=(status, 0), cuEventQuery=(status,))
    with pytest.raises(DriverError, match=f"^cuMemCreate answered {status}: {re.escape(fix)}"):
        driver.create(2 << 20)
    with pytest.raises(DriverError, match=f"^cuEventQuery answered {status}"):
        driver.done(1)


def test_a_device_that_cannot_remap_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DriverError, match="HARLI_POOL_BACKING=static"):
        driver_with(monkeypatch, cuDeviceGetAttribute=("CUDA_SUCCESS", 0))
    assert why_not(3) is not None


def test_why_not_is_none_where_memory_can_be_remapped(monkeypatch: pytest.MonkeyPatch):
    driver_with(monkeypatch)
    assert why_not(3) is None


def test_without_a_driver_the_error_says_so(monkeypatch: pytest.MonkeyPatch):
    recorder = Recorder({})

    def missing(*_: Any) -> tuple[Any, ...]:
        raise RuntimeError("libcuda.so.1: cannot open shared object file")

    recorder.cuInit = missing  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(cuda_driver, "_bindings", lambda: recorder)
    assert "install the NVIDIA driver" in str(why_not(0))


def test_what_torch_cannot_use_is_the_driver_s_error(monkeypatch: pytest.MonkeyPatch):
    """Then the probe says so, and the pool is not mapped."""
    driver, _ = driver_with(monkeypatch)

    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the pointer is of no CUDA device")

    monkeypatch.setattr(cuda_driver.torch, "as_tensor", refuses)
    with pytest.raises(DriverError, match=r"torch cannot use the memory at 0x10 .*of no CUDA device"):
        driver.tensor(16, 4)
