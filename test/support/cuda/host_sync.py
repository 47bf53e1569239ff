"""Refuses every copy between host and device that the host may have to wait for.

CUDA copies without the host only between a device and pinned memory, and only the same dtype in the
same dense layout: torch makes a pageable temporary of anything else, and waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.cuda.fake_cuda import FakeDevice

aten = torch.ops.aten


class HostWaits(AssertionError):
    """A copy between host and device blocks."""


class HostSyncChecker(TorchDispatchMode):
    """Entered inside ``fake_cuda``, whose ``device`` is given; ``copies``: those that were seen."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device, self.copies = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is aten.copy_.default:
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self._check(args[1], args[0], non_blocking)
        elif func is aten._to_copy.default:
            self._check(args[0], out, kwargs.get("non_blocking", False))
        elif func.overloadpacket is aten._foreach_copy_:
            for into, source in zip(args[0], args[1], strict=True):
                self._check(source, into, kwargs.get("non_blocking", False))
        return out

    def _check(self, source: Tensor, into: Tensor, non_blocking: bool) -> None:
        kinds = {source.device.type, into.device.type}
        if len(kinds) == 1 or not source.numel():
            return
        self.copies += 1
        host = source if source.device.type == "cpu" else into
        what = f"{source.device.type} to {into.device.type}, {tuple(source.shape)} {source.dtype}"
        if not non_blocking:
            raise HostWaits(f"a blocking copy, {what}")
        if not self.device.is_pinned(host):
            raise HostWaits(f"a copy of pageable memory, {what}")
        if source.dtype != into.dtype:
            raise HostWaits(f"a copy that converts to {into.dtype}, {what}")
        if source.stride() != into.stride() or not (source.is_contiguous() and into.is_contiguous()):
            raise HostWaits(f"a copy between layouts, {what}")
