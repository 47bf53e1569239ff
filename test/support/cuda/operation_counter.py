"""Counts what a quantum launches: kernels, memsets and copies; views and allocations are none.

Read off the calls of torch's operators. Some are several kernels, by torch's own sources:

    _flash_attention_backward    sums of rows, gradients, conversion of the query's; grouped queries: two sums more
    norms                        a copy more for each input that is not contiguous
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_NO_LAUNCH = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "is_pinned",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "set_",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
_NORMS = (aten._fused_rms_norm, aten._fused_rms_norm_backward)


class OperationCounter(TorchDispatchMode):
    """``found``: launches by operator, of what touches ``device`` (a type)."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device, self.found = device, Counter[str]()

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in _tensors((args, out)) if x.device.type == self.device]
        if name not in _NO_LAUNCH and func.namespace != "prim" and any(x.numel() for x in tensors):
            self.found[name] += _launches(func, args)
        return out


def _launches(func: Any, args: Any) -> int:
    if func.overloadpacket is aten._flash_attention_backward:
        _, query, key = args[:3]
        return 3 if query.shape[2] == key.shape[2] else 5
    if func.overloadpacket in _NORMS:
        inputs = args[:1] if func.overloadpacket is aten._fused_rms_norm else args[:2]
        return 1 + sum(not x.is_contiguous() for x in inputs)
    return 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
