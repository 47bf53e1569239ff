"""The calls about a device that are no operators: pinned memory, streams, events. All in one place,
so that tests without a device can replace them (``test/support/cuda``).

None of them waits for the device but ``synchronize``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that a device copies from and into beside the host's own work; contents
    undefined. RuntimeError: the limit of locked memory."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def event() -> Any:
    """A new event, recorded on the current stream: ``query``, ``synchronize``."""
    made = torch.cuda.Event()
    made.record()
    return made


def generator(device: torch.device) -> torch.Generator:
    """Of random numbers on the device."""
    return torch.Generator(device=device)


@functools.cache
def copy_stream(device: torch.device) -> Any:
    """The stream of copies to the host, the same for the process's life.

    torch hands streams out of 32 by turns: one for each copy would soon be SGLang's own, whose
    results then stand behind the quanta that the copy waits for. SGLang takes none of this
    priority.
    """
    return torch.cuda.Stream(device, priority=-1)


def on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """What is launched inside goes to ``stream``."""
    return torch.cuda.stream(stream)


def current_stream(device: torch.device) -> Any:
    """The stream that launches go to now: ``wait_event``, ``wait_stream``."""
    return torch.cuda.current_stream(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    torch.cuda.synchronize(device)


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``; on CUDA through pinned memory, which does not block the host."""
    if device.type == "cpu":
        return tensor
    staged = pinned(tensor.shape, tensor.dtype)
    staged.copy_(tensor)
    return staged.to(device, non_blocking=True)  # torch reuses pinned memory only after the copy
