"""A family is compared with torch's own on the device before it is used, or refused."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from sglang_harli.config import KERNEL_FAMILIES
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, from_transformers
from sglang_harli.peft_trainer.base.kernel_checks import CHECKS, check_family
from sglang_harli.peft_trainer.kernels import gated
from sglang_harli.peft_trainer.kernels.launch import through
from sglang_harli.peft_trainer.layers.operators import comparison
from sglang_harli.peft_trainer.layers.operators.kernel_switches import KernelSwitches
from sglang_harli.peft_trainer.layers.operators.plain import Operators
from sglang_harli.peft_trainer.layers.operators.torch_kernels import TorchOperators
from sglang_harli.peft_trainer.layers.operators.triton_kernels import TritonOperators
from support.cuda.reference_kernels import ReferenceKernels
from support.kernels.interpreter import interpreted
from support.project_files import package_files, parse, relative
from support.trainer.trainer_oracle import tiny_model

LOADED_LATE = ("triton_kernels", "comparison")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base on a CPU takes a device's operators; few tokens and ranks, for the interpreter."""
    monkeypatch.setattr(
        "sglang_harli.peft_trainer.base.frozen_base.operators_for", lambda device: TorchOperators(flash=True)
    )
    monkeypatch.setattr(comparison, "WIDTH", 5)
    monkeypatch.setattr(comparison, "WIDER", 7)
    monkeypatch.setattr(comparison, "RANKS", (8, 16))


def base_of(arch: str, dtype: torch.dtype, **switches: str) -> FrozenBase:
    base = from_transformers(tiny_model(arch, dtype, head_dim=16))
    return dataclasses.replace(base, kernels=KernelSwitches(switches))


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
@pytest.mark.parametrize(("arch", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16)], ids=str)
def test_what_agrees_is_used(arch: str, dtype: torch.dtype, family: str, small: None) -> None:
    base = base_of(arch, dtype, **{family: "auto"})
    assert isinstance(base.operators, TritonOperators) and not base.kernels.used
    with ReferenceKernels(), interpreted() as names:
        assert check_family(base, family) is None
    assert names and base.kernels.used == {family} and not base.kernels.open
    with interpreted() as names:
        assert check_family(base, family) is None  # it is known
    assert not names


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_what_differs_is_refused_with_how_much(family: str, small: None) -> None:
    """A kernel that leaves its results as they are, undefined, or zero."""
    base = base_of("llama", torch.bfloat16, **{family: "auto"})

    def nothing(kernel: Any, grid: Any, args: Any, named: Any) -> None:
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.mul_(1.25)

    with ReferenceKernels(), through(nothing):
        note = check_family(base, family)
    assert note is not None and note.startswith(f"the {family} kernels are not used, torch's are: ")
    assert "differs from torch's by" in note and "\n" not in note
    assert not base.kernels.used and not base.kernels.open


def test_what_does_not_compile_is_refused_with_the_first_line(small: None) -> None:
    base = base_of("llama", torch.bfloat16, gated="auto")

    def fail(*_: Any) -> None:
        raise triton.runtime.errors.PTXASError("no such instruction\nsecond line")

    with through(fail):
        note = check_family(base, "gated")
    assert note is not None and "do not compile or run here (" in note
    assert "no such instruction" in note and "second line" not in note
    assert not base.kernels.used


def test_switched_off_or_on_nothing_is_compared(small: None) -> None:
    base = base_of("llama", torch.float32, gated="on", head="off")
    with mock.patch.object(gated, "swiglu", side_effect=AssertionError):
        assert [check(base) for check in CHECKS] == [None] * len(KERNEL_FAMILIES)
    assert base.kernels.used == {"gated"}


def test_another_dtype_than_the_compared_one_is_torchs(small: None) -> None:
    """The comparison with serving runs the layers in fp32 too."""
    base = base_of("llama", torch.bfloat16, norm="on", head="on")
    low = torch.randn(3, 40)
    with interpreted() as names:
        base.operators.losses(low, low, torch.zeros(3, 1, dtype=torch.int64))
    assert not names


def test_a_cpu_compares_nothing_and_loads_no_triton() -> None:
    base = base_of("llama", torch.float64, norm="on", head="auto")
    assert type(base.operators) is Operators
    assert [check(base) for check in CHECKS] == [None] * len(KERNEL_FAMILIES)
    assert base.kernels.open == {"head"}
    wrong = [
        f"{relative(path)}: {name}"
        for path in package_files()
        for node in parse(path).body  # at the top: what a function imports is loaded when it is called
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if (name.rpartition(".")[2] in LOADED_LATE and path.parent.name not in ("kernels", "operators"))
        or (name.partition(".")[0] == "triton" and path.parent.name != "kernels")
    ]
    assert not wrong, f"these load Triton where there may be no device: {wrong}"
