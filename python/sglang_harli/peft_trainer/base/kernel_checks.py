"""The comparisons of our kernels with torch's own that a start makes for a served base."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

from sglang_harli.architectures import INPUT_GROUPS
from sglang_harli.config import KERNEL_FAMILIES
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.layers.operators.plain import Gate, Heads
from sglang_harli.peft_trainer.layers.operators.torch_kernels import TorchOperators
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm

Check = Callable[[FrozenBase], str | None]


def check_family(base: FrozenBase, family: str) -> str | None:
    """Compare a family whose switch is ``auto``: used from now on where both agree; else why not,
    in one sentence. None also where there is nothing to compare. Waits for the device."""
    if family not in base.kernels.open or not isinstance(base.operators, TorchOperators):
        return None
    from sglang_harli.peft_trainer.layers.operators.comparison import disagreement
    from sglang_harli.peft_trainer.layers.operators.triton_kernels import TritonOperators

    flash, switches = base.operators.flash, KernelSwitches({family: "on"})
    ours = TritonOperators(flash=flash, dtype=base.dtype, switches=switches)
    note = disagreement(family, ours, TorchOperators(flash=flash), base, *_layer_of(base))
    if note is None:
        base.kernels.allow(family)
    else:
        base.kernels.refuse(family)
    return note


def _layer_of(base: FrozenBase) -> tuple[Heads, Gate, list[list[slice]]]:
    """Heads and activation of the first layer, and the columns of each of its groups of linears."""
    layer, sizes = cast(Any, base.layers[0]), base.linear_sizes()
    attention = layer.self_attn
    groups = []
    for names in INPUT_GROUPS:
        ends = itertools.accumulate((sizes[name][1] for name in names), initial=0)
        groups.append([slice(*span) for span in itertools.pairwise(ends)])
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        norms = RmsNorm("q norm", attention.q_norm), RmsNorm("k norm", attention.k_norm)
    return Heads(groups[0], attention.head_dim, norms), Gate(groups[2], layer.mlp.act_fn), groups


def _check(family: str) -> Check:
    def check(base: FrozenBase) -> str | None:
        return check_family(base, family)

    check.__name__ = f"{family} kernels"
    return check


# One for each family, for the start (``managers.scheduler.training.warm_up``).
CHECKS: tuple[Check, ...] = tuple(_check(family) for family in KERNEL_FAMILIES)
