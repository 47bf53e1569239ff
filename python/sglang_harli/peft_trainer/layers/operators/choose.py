"""Which operators a device runs; looked up once for a base."""

from __future__ import annotations

import torch

from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.layers.operators.plain import Operators
from sglang_harli.peft_trainer.layers.operators.torch_kernels import TorchOperators

_FLASH_FROM = (8, 0)  # compute capability


def operators_for(device: torch.device) -> Operators:
    """Those of the tensors of one base."""
    if device.type == "cpu":
        return Operators()
    return TorchOperators(flash=device_calls.capability(device) >= _FLASH_FROM)


def with_kernels(operators: Operators, dtype: torch.dtype, switches: KernelSwitches) -> Operators:
    """A device's with kernels of ours, where ``switches`` may want some; ``dtype``: of the base.
    Triton is loaded only then."""
    if not (isinstance(operators, TorchOperators) and switches.any):
        return operators
    from sglang_harli.peft_trainer.layers.operators.triton_kernels import TritonOperators

    return TritonOperators(flash=operators.flash, dtype=dtype, switches=switches)
