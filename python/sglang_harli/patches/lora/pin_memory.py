"""Runtime half of ``patches/01-lora-pin-memory``: LoRA serving on the CPU engine.

Leans on: ``srt.lora.lora_manager.LoRAManager.__init__``, the global name ``torch`` in
``srt.lora.layers`` and ``srt.lora.backend.torch_backend``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

MODULES = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")
# What those modules call ``pin_memory`` on, or with.
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones_like",
    "repeat_interleave",
    "tensor",
    "unique_consecutive",
    "zeros",
    "zeros_like",
)


def _before_manager(manager: Any, base_model: Any, *args: Any, **kwargs: Any) -> None:
    if next(base_model.parameters()).device.type == "cpu":
        install()


def install() -> None:
    """Give the LoRA modules the pageable ``torch``; repeating it changes nothing."""
    for name in MODULES:
        names = vars(importlib.import_module(name))
        if not isinstance(names["torch"], PageableTorch):
            names["torch"] = pageable_torch()


@functools.cache
def pageable_torch() -> PageableTorch:
    """The one proxy of this process."""
    import torch

    class Pageable(torch.Tensor):
        """A plain tensor, as ``nn.Parameter`` is one; operations return ordinary tensors."""

        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

        def pin_memory(self, device: Any = None) -> Any:
            return self  # there is nothing to pin for

    return PageableTorch(torch, Pageable)


class PageableTorch(ModuleType):
    """``torch`` without ``pin_memory=True`` in factories and ``.pin_memory()`` of tensors."""

    def __init__(self, torch: ModuleType, tensor_class: type) -> None:
        super().__init__("torch")
        self.__dict__["_torch"] = torch
        for name in _FACTORIES:
            self.__dict__[name] = _pageable(getattr(torch, name), torch.Tensor, tensor_class)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_torch"], name)


def _pageable(factory: Callable[..., Any], plain: type, tensor_class: type) -> Callable[..., Any]:
    def give(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(give(part) for part in value)
        return value.as_subclass(tensor_class) if isinstance(value, plain) else value

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return give(factory(*args, **kwargs))

    return call


HOOKS = (("sglang.srt.lora.lora_manager.LoRAManager.__init__", _before_manager, "before"),)
