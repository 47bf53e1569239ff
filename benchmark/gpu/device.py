"""The device that part 1 looks at: a GPU through the CUDA driver, or the driver's double.

The double (``test/support/cuda/cuda_driver_double.py``) enforces the driver's rules on host memory,
so that a dry run makes the very calls.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_harli.mem_cache.backing.cuda_driver import CudaDriver, Driver


@dataclass
class Bench:
    """A driver, the device of its memory, and two streams: forwards' and another.

    Attributes:
        driver: real or double; streams: raw handles.
        settle: returns when both streams have done all they were given.
    """

    driver: Driver
    device: torch.device
    streams: list[int]
    settle: Callable[[], object]
    forward: Any = None  # torch's stream object; None: the double's streams are numbers


@contextmanager
def bench(dry: bool) -> Iterator[Bench]:
    """Open the device; DriverError: it has no memory that can be remapped."""
    if dry:
        import common.servers  # noqa: F401  (test/ is on the path from here on)
        from support.cuda.cuda_driver_double import DriverDouble

        double = DriverDouble()
        streams = [101, 102]

        def settle() -> None:
            for stream in streams:
                double.advance(stream)

        try:
            yield Bench(double, torch.device("cpu"), streams, settle)
        finally:
            double.close()
        return
    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(1, device=device)  # makes the context current
    forward, other = torch.cuda.Stream(), torch.cuda.Stream()
    handles = [forward.cuda_stream, other.cuda_stream, torch.cuda.default_stream(device).cuda_stream]
    yield Bench(CudaDriver(device.index), device, handles, torch.cuda.synchronize, forward)


class Timed:
    """A driver whose calls are counted and timed.

    Attributes:
        seconds: host seconds of each call, by name.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.granularity = driver.granularity
        self.seconds: dict[str, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._driver, name)
        if not callable(call):
            return call

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds.setdefault(name, []).append(time.perf_counter() - began)

        return timed

    def count(self) -> Counter[str]:
        return Counter({name: len(times) for name, times in self.seconds.items()})

    def costs(self) -> list[dict[str, Any]]:
        """Microseconds of each call: median and largest."""
        return [
            {"call": name, "calls": len(times), "p50_us": round(statistics.median(times) * 1e6, 2)}
            | {"max_us": round(max(times) * 1e6, 1)}
            for name, times in self.seconds.items()
        ]
