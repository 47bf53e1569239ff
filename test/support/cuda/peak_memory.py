"""Memory of a device that is none: the most that is alive at once, and one that has little.

What torch's flash kernel takes for itself is added by its own source: the query's gradient in fp32,
rows rounded to 128 tokens and heads to 32 values; gradients of key and value for each query head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class PeakMemory(TorchDispatchMode):
    """``peak``: bytes of what was made while it was entered, leases (flat uint8) left out."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {_storage(x)._cdata for x in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = _storage(tensor)
            if storage._cdata not in known and tensor.dtype != torch.uint8:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        own = _workspace(*args[:3]) if func.overloadpacket is aten._flash_attention_backward else 0
        self.peak = max(self.peak, own + sum(nbytes for _, nbytes in self._alive.values()))
        return out


def _workspace(grad: Tensor, query: Tensor, key: Tensor) -> int:
    rows, queries, heads, size = query.shape
    nbytes = rows * -(-queries // 128) * 128 * heads * (-(-size // 32) * 32 + 1) * 4
    if key.shape[2] != heads:
        nbytes += 2 * rows * key.shape[1] * heads * size * key.element_size()
    return nbytes


class LittleMemory(TorchDispatchMode):
    """Nothing that takes more than ``limit`` bytes by itself can be had, leases excepted."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.refused = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {_storage(x)._cdata for x in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            fresh = _storage(tensor)._cdata not in known and tensor.dtype != torch.uint8
            if fresh and tensor.nbytes > self.limit:
                self.refused += 1
                raise torch.OutOfMemoryError(f"no room for {tensor.nbytes} bytes")
        return out


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
