"""What a layer's backward needs of its forward, by name; the tensors may be moved.

Most of a layer is differentiated by hand (``decoder_layer``, ``lora_linear``, ``attention``). What
is not is a piece: a function that autograd differentiates, entered and left by plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks


class SavedTensor:
    """Holds one tensor; code that moves its contents puts the new one here."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensors:
    """One layer's forward over a range of tokens. ``kept``: it lives long: dropout masks are drawn
    again, for which their rows must be set."""

    __slots__ = ("kept", "masks", "pieces", "saved")

    def __init__(self, *, kept: bool = False) -> None:
        self.kept = kept
        self.saved: dict[str, SavedTensor] = {}
        self.masks: dict[str, list[Tensor]] = {}
        self.pieces: dict[str, AutogradSegment] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.saved[name] = SavedTensor(tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self.saved[name].tensor

    def __contains__(self, name: str) -> bool:
        return name in self.saved

    def run(self, name: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, remembered as a piece."""
        piece = self.pieces[name] = AutogradSegment()
        return piece.run(function, *inputs)

    def all_saved(self) -> list[SavedTensor]:
        """Of everything that is held, masks excepted."""
        return [*self.saved.values(), *(one for piece in self.pieces.values() for one in piece.saved)]


class AutogradSegment:
    """A function that autograd differentiates; its graph holds memory through ``saved`` alone."""

    __slots__ = ("_edge", "_entries", "saved")

    def __init__(self) -> None:
        self.saved: list[SavedTensor] = []

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.enable_grad(), saved_tensors_hooks(self._pack, _unpack):
            entrance = torch.zeros((), device=inputs[0].device).requires_grad_()
            entered = _Enter.apply(entrance, *inputs)
            self._entries = [get_gradient_edge(tensor) for tensor in entered]
            out = function(*entered)
            self._edge = get_gradient_edge(out)
        return out.detach()

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Of each input its gradient; once only."""
        return torch.autograd.grad([self._edge], self._entries, [grad])

    def _pack(self, tensor: Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        self.saved.append(saved)
        return saved


def _unpack(saved: SavedTensor) -> Tensor:
    return saved.tensor


class _Enter(torch.autograd.Function):
    """Hands tensors into a graph without a leaf that would hold them."""

    @staticmethod
    def forward(ctx: Any, entrance: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise AssertionError("gradients are taken at the entries")
