"""The operators of a device, on CPU tensors: torch's kernels there are stood in for by their
arithmetic (``support.cuda.reference_kernels``), everything around them is the real code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_harli.core import QuantumKind
from sglang_harli.device_sizes import sizes_of
from sglang_harli.errors import UnsupportedError
from sglang_harli.peft_trainer.layers.attention import CausalAttention
from sglang_harli.peft_trainer.layers.operators import choose, device_attention
from sglang_harli.peft_trainer.layers.operators.device_attention import DeviceAttention
from sglang_harli.peft_trainer.layers.operators.torch_kernels import ACTIVATIONS, TorchOperators
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors
from support.cuda.reference_kernels import ReferenceKernels
from support.trainer.trainer_oracle import (
    EXTRA,
    Step,
    at_random,
    cut,
    drive,
    everything,
    feed,
    hyperparameters,
    make_run,
    one_thread,
    random_steps,
    run_oracle,
    tiny_model,
)

__all__ = ["one_thread"]  # a fixture

BLOCK = sizes_of("cpu").token_block
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # transformers rounds its norms to fp32 on the way


@pytest.fixture
def device_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base on a CPU takes a device's operators."""
    monkeypatch.setattr(
        "sglang_harli.peft_trainer.base.frozen_base.operators_for", lambda device: TorchOperators(flash=True)
    )


def trained(steps: list[Step], choose: Any = everything, keep: bool = True, **changes: Any) -> Any:
    arch, hp = changes.pop("arch"), changes.pop("hp")
    run = make_run(tiny_model(arch, **changes), hp, steps, keep=keep)
    feed(run, steps)
    return drive(run, choose)


@pytest.mark.parametrize("arch", EXTRA)
@pytest.mark.parametrize(
    ("kernel", "keep"), [("flash", False), ("flash", True), ("efficient", True), ("products", False)]
)
def test_a_run_is_the_oracles_with_each_attention(
    kernel: str, arch: str, keep: bool, device_operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, which no kernel takes: they are made to."""
    monkeypatch.setattr(device_attention, "flash_serves", lambda dtype, size: kernel == "flash")
    monkeypatch.setattr(device_attention, "efficient_serves", lambda dtype, size: kernel == "efficient")
    steps = random_steps(2, 3, 2, longest=12)
    hp = hyperparameters(gradient_accumulation_steps=2, lora_dropout=0.1 if keep else 0.0)
    changes = {"head_dim": 8} if kernel == "flash" else {}
    expected = run_oracle(tiny_model(arch, **changes), hp, steps)
    with ReferenceKernels() as kernels:
        found = trained(steps, at_random(3), keep, arch=arch, hp=hp, **changes)
    windowed = arch == "mistral" and kernel == "efficient"  # rows as short as its window
    wanted = {"flash", "efficient"} & {kernel}
    called = {name.split("_")[1] for name in kernels.calls if "attention" in name}
    assert called == wanted or windowed
    assert kernels.calls["_fused_rms_norm_backward"] > 0
    torch.testing.assert_close(found.losses, expected.losses, **CLOSE)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
def test_rows_in_blocks_are_the_oracles(
    arch: str, device_operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_attention, "flash_serves", lambda dtype, size: True)
    rows = [([3 + i % 80 for i in range(n)], [5] * n) for n in (2 * BLOCK + 9, BLOCK + 3)]
    steps, hp = [Step(rows, [[0, 1]])], hyperparameters(warmup_ratio=0.0)
    model = tiny_model(arch, head_dim=8)
    expected = run_oracle(model, hp, steps)
    run = make_run(model, hp, steps)
    feed(run, steps)
    with ReferenceKernels():
        while (shape := run.peek()) is not None:
            if shape.kind in (QuantumKind.FORWARD, QuantumKind.BACKWARD, QuantumKind.BACKWARD_KEPT) and cut(
                run
            ):
                continue
            run.run(shape.rows if shape.fixed else 1)
    (metrics,) = run.take_metrics()
    assert metrics.loss == pytest.approx(expected.losses[0], rel=1e-6)
    found = {name.removeprefix("adapter/"): t for name, t in run.state_tensors() if "adapter/" in name}
    torch.testing.assert_close(found, expected.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 80), (90, 90), (9, 100)])
@pytest.mark.parametrize(
    ("dtype", "size", "expected"),
    [
        (torch.bfloat16, 64, "flash"),
        (torch.float16, 256, "flash"),
        (torch.bfloat16, 12, "products"),
        (torch.float32, 12, "efficient"),
        (torch.float32, 7, "products"),
        (torch.bfloat16, 264, "efficient"),
    ],
)
def test_each_kernel_has_the_calls_that_it_takes(
    dtype: torch.dtype,
    size: int,
    expected: str,
    queries: int,
    keys: int,
    repeats: int,
    window: int | None,
) -> None:
    """With heads that are slices of token-major memory, against the products of a CPU."""
    torch.manual_seed(0)
    heads = torch.randn(2, keys, 4 * repeats + 4, size, dtype=dtype)
    query = heads[:, keys - queries :, : 4 * repeats].transpose(1, 2)
    key, value = heads[:, :, -4:-2].repeat_interleave(2, 2).transpose(1, 2), heads[:, :, -4:].transpose(1, 2)
    grad = torch.randn(2, queries, 4 * repeats * size, dtype=dtype)
    mine, plain = DeviceAttention(0.3, repeats, window, flash=True), CausalAttention(0.3, repeats, window)
    cuts = window is not None and keys > window
    results = []
    with ReferenceKernels() as kernels:
        for attend, inputs in (
            (mine, (query, key, value)),
            (plain, [x.contiguous() for x in (query, key, value)]),
        ):
            trace = SavedTensors()
            out = attend.forward(*inputs, trace)
            torch.testing.assert_close(attend.forward(*inputs, None), out)
            results.append([x.double() for x in (out, *attend.backward(grad, trace))])
    called = {name.split("_")[1] for name in kernels.calls} or {"products"}
    assert called == {"products" if expected == "efficient" and cuts else expected}
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for found, right in zip(*results, strict=True):
        assert found.shape == right.shape
        assert (found - right).norm() <= tolerance * (1 + right.norm())


def test_a_device_without_flash_takes_the_efficient_kernel() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.bfloat16)
    with ReferenceKernels() as kernels:
        DeviceAttention(0.3, 1, None, flash=False).forward(query, key, value, SavedTensors())
    assert list(kernels.calls) == ["_efficient_attention_forward"]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_operators_go_by_the_device(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_harli.peft_trainer.device_calls.capability", lambda device: capability)
    found = choose.operators_for(torch.device("cuda"))
    assert isinstance(found, TorchOperators) and found.flash == (capability >= (8, 0))
    assert not isinstance(choose.operators_for(torch.device("cpu")), TorchOperators)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gradients_of_activations_are_explicit(activation: str, device_operators: None) -> None:
    steps, hp = random_steps(1, 2, 1), hyperparameters(warmup_ratio=0.0)
    expected = run_oracle(tiny_model("llama", hidden_act=activation), hp, steps)
    with ReferenceKernels():
        found = trained(steps, arch="llama", hp=hp, hidden_act=activation)
    torch.testing.assert_close(found.losses, expected.losses, **CLOSE)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-6)


def test_an_activation_without_one_is_refused(device_operators: None) -> None:
    assert "Mish" not in ACTIVATIONS
    with pytest.raises(UnsupportedError, match="activation Mish"):
        make_run(tiny_model("llama", hidden_act="mish"), hyperparameters(), random_steps(1, 1, 1))
