"""A double of CUDA graphs that computes: a capture records operations, a replay does them again.

Operations run on the very tensors that they were recorded with, so a replay reads what its inputs
hold then and writes where the capture wrote. What the device would refuse in a capture is refused
here: a value read by the host. As on a device a captured operation has no effect of its own: what
it made is poisoned when the capture ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"}


@dataclass(eq=False)
class Recorded:
    """One operation; ``made``: the tensors that it gave."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[torch.Tensor]

    @property
    def is_view(self) -> bool:
        returns = self.function._schema.returns
        return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)

    @property
    def writes(self) -> bool:
        return self.function._schema.is_mutable

    @property
    def allocates(self) -> bool:
        return "empty" in self.function._schema.name


class _Recorder(TorchDispatchMode):
    def __init__(self, operations: list[Recorded]) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in HOST_READS:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.operations.append(Recorded(func, args, kwargs or {}, made))
        return result


class ReplayedGraph:
    """What a capture recorded."""

    def __init__(self, operations: list[Recorded]) -> None:
        self.operations = operations
        self.replays = 0
        for operation in operations:
            if not (operation.is_view or operation.writes):
                for tensor in operation.made:
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)

    @property
    def launches(self) -> int:
        return sum(not (operation.is_view or operation.allocates) for operation in self.operations)

    def replay(self) -> None:
        self.replays += 1
        for operation in self.operations:
            if operation.is_view or operation.allocates:
                continue
            again = operation.function(*operation.args, **operation.kwargs)
            if not operation.writes:
                found = [leaf for leaf in tree_leaves(again) if isinstance(leaf, torch.Tensor)]
                for place, value in zip(operation.made, found, strict=True):
                    place.copy_(value)


@dataclass
class CaptureDouble:
    """See ``peft_trainer.graphs.capture.Capture``.

    Attributes:
        nbytes: that each graph is said to hold; fails: the capture raises; graphs: those made.
    """

    nbytes: int = 1000
    fails: str = ""
    graphs: list[ReplayedGraph] = field(default_factory=list)

    def capture(self, work: Callable[[], None]) -> tuple[ReplayedGraph, int]:
        if self.fails:
            raise RuntimeError(self.fails)
        operations: list[Recorded] = []
        with _Recorder(operations):
            work()
        graph = ReplayedGraph(operations)
        self.graphs.append(graph)
        return graph, self.nbytes
