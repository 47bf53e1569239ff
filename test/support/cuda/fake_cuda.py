"""A CUDA device without one: tensors with shapes, dtypes and a device, and no contents.

torch's ``FakeTensorMode`` refuses what a device would have to be waited for (``item``, ``nonzero``,
boolean masks) and operands on different devices. What is no operator (pinned memory, events,
streams, generators) goes through ``peft_trainer.device_calls``, which is replaced here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase, from_transformers
from sglang_harli.peft_trainer.layers import attention

CUDA = torch.device("cuda", 0)


class FakeEvent:
    """Never over: what arrives on the host has no contents, and is not to be read."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise AssertionError("the host waits for the device")

    def wait(self, stream: Any = None) -> None:
        pass


class FakeStream:
    def wait_event(self, event: FakeEvent) -> None:
        pass

    def wait_stream(self, stream: FakeStream) -> None:
        pass


class FakeDevice:
    """In place of ``device_calls``; ``pinned``: the storages of all pinned memory."""

    def __init__(self) -> None:
        self.pinned: list[torch.UntypedStorage] = []

    def is_pinned(self, tensor: Tensor) -> bool:
        own = tensor.untyped_storage()._cdata
        return any(storage._cdata == own for storage in self.pinned)

    def make_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype)
        self.pinned.append(made.untyped_storage())
        return made

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def forbidden(device: torch.device) -> None:
            raise AssertionError("the host waits for the device")

        for name, call in {
            "capability": lambda device: (9, 0),
            "pinned": self.make_pinned,
            "event": FakeEvent,
            "copy_stream": lambda device: FakeStream(),
            "on_stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device: FakeStream(),
            "generator": lambda device: torch.Generator(),
            "synchronize": forbidden,
        }.items():
            assert hasattr(device_calls, name), name
            patch.setattr(device_calls, name, call)


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeDevice]:
    """Inside, ``CUDA`` is a device, and tensors have no contents."""
    device = FakeDevice()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        device.install(patch)
        attention._later.cache_clear()  # not of another mode
        yield device
        attention._later.cache_clear()


def fake_base(
    arch: str = "llama", dtype: torch.dtype = torch.bfloat16, *, fused: bool = True, **changes: Any
) -> FrozenBase:
    """A tiny model on the fake device; ``fused``: its weights adjoin as SGLang's do."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    config = AutoConfig.for_model(arch, **{**sizes, **changes})
    with CUDA:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if fused:
        for layer in model.model.layers:
            attend, mlp = layer.self_attn, layer.mlp
            _fuse([attend.q_proj, attend.k_proj, attend.v_proj])
            _fuse([mlp.gate_proj, mlp.up_proj])
    return from_transformers(model)


def _fuse(linears: list[nn.Linear]) -> None:
    sizes = [len(linear.weight) for linear in linears]
    whole = linears[0].weight.detach().new_empty(sum(sizes), linears[0].in_features)
    for linear, part in zip(linears, whole.split(sizes), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
