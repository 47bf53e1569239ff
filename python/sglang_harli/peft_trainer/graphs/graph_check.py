"""Graphs of quanta, where they compute on this device what the same operators do when launched one
by one."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_harli.config import GRAPHS
from sglang_harli.peft_trainer.adapter import Adapter
from sglang_harli.peft_trainer.base.first_layers import first_layers
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.base.training_mode import training_mode
from sglang_harli.peft_trainer.graphs.capture import Capture, capture_on
from sglang_harli.peft_trainer.graphs.layer_graphs import MOST_BYTES, LayerGraphs
from sglang_harli.peft_trainer.layers.decoder_layer import LayerProgram
from sglang_harli.peft_trainer.memory.adapter_state import StateMemory
from sglang_harli.peft_trainer.memory.heap import HeapMemory
from sglang_harli.protocol.public import Hyperparameters

ROWS, WIDTH = 2, 48  # padded to a bucket
TRIES = 3  # the same graph on other contents
# Of the norm: kernels for the padded width may be others, and add in another order.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-9}


def check(base: FrozenBase) -> str | None:
    """Compare, where the switch is ``auto``: graphs are used from now on where both agree; else why
    not, in one sentence."""
    if GRAPHS not in base.kernels.open or base.device.type != "cuda":
        return None
    note = differs(base, capture_on(base.device))
    if note is None:
        base.kernels.allow(GRAPHS)
    else:
        base.kernels.refuse(GRAPHS)
    return note


def graphs_of(base: FrozenBase, most_bytes: int = MOST_BYTES) -> LayerGraphs | None:
    """Those of a run on ``base``, of at most so many bytes; None: they are not used."""
    used = GRAPHS in base.kernels.used and base.device.type == "cuda"
    return LayerGraphs.of(base, capture_on(base.device), most_bytes) if used else None


def differs(base: FrozenBase, capture: Capture) -> str | None:
    """One sentence where a graph of the first layer gives something else, or cannot be made; None:
    it may be used. Waits for the device."""
    small = first_layers(base, 1)
    with training_mode():
        adapter = Adapter(small, Hyperparameters(lora_r=8))
        state = StateMemory(adapter.blocks, HeapMemory(base.device))
        state.obtain()
        state.carve()
        try:
            return _compared(small, adapter, LayerGraphs.of(small, capture))
        finally:
            state.release()


def _compared(base: FrozenBase, adapter: Adapter, graphs: LayerGraphs) -> str | None:
    block, rotary = adapter.blocks[0], base.rotary()
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...], scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(base.device, base.dtype)

    block.compute.copy_(drawn((block.size,), 0.02))
    program = LayerProgram(base.layers[0], block.groups, base.window(0), base.operators, wants_x=True)
    graphs.begin(idle=True)
    shape = (ROWS, WIDTH, base.config.hidden_size)
    for attempt in range(1 + TRIES):
        x, grad = drawn(shape, 1.0), drawn(shape, 1.0)
        out, below = torch.empty_like(x), grad.clone()
        replayed = graphs.forward(0, program, x, rotary, out)
        leaves = graphs.gradients(0, program, x, below, rotary)
        if graphs.failed:
            return graphs.failed
        if not attempt:
            continue  # a shape is captured when it comes again
        if not replayed or leaves is None:
            return "quanta run without CUDA graphs: none was made of a small one"
        expected = program.forward(x, rotary.upto(WIDTH))
        gradients, _ = program.gradients(program.recompute(x, rotary.upto(WIDTH)), grad)
        pairs = {
            "output": (out, expected),
            "input's gradient": (below, grad),
            "weights' gradient": (leaves, gradients),
        }
        for name, (found, wanted) in pairs.items():
            off = float((found - wanted).norm() / wanted.norm())
            if not off <= TOLERANCE[base.dtype]:
                return f"quanta run without CUDA graphs: a layer's {name} differs by {off:.1e} of its norm"
    return None
