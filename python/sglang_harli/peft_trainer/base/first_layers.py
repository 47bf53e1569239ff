"""A frozen base of the first layers of another, on the very same modules."""

from __future__ import annotations

import copy

from torch import nn

from sglang_harli.peft_trainer.base.frozen_base import FrozenBase


def first_layers(base: FrozenBase, count: int) -> FrozenBase:
    """``base`` with its first ``count`` layers alone: embedding, norm, head, weights and what was
    chosen for its device are shared, nothing of ``base`` is changed."""
    model, inner = _shallow(base.model), _shallow(base.model.model)
    inner._modules["layers"] = nn.ModuleList(list(base.layers)[:count])
    model._modules["model"] = inner
    other = copy.copy(base)
    object.__setattr__(other, "model", model)  # it is frozen
    return other


def _shallow(module: nn.Module) -> nn.Module:
    """The same module with a table of its own for its modules."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other
