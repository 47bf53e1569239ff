"""AdamW with clipping by the global norm, in slices of layers (docs/internals/training-step.md).

A step is a list of slices: first the gradients' norms, then the updates. Slices allocate next to
nothing, so that a step once begun can always be finished; the arithmetic is torch.optim.AdamW's.
Whether an update may be applied (finite loss and gradients) is decided on the device: no waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_harli.device_sizes import sizes_of
from sglang_harli.peft_trainer.adapter import LayerBlock
from sglang_harli.peft_trainer.layers.operators.plain import Operators
from sglang_harli.protocol.public import Hyperparameters

# fp16 only: loss scaling as torch.amp.GradScaler's, starting low: a job may have few steps.
_FIRST_SCALE = 1024.0
_GROWTH_INTERVAL = 2000
SMALLEST_SCALE = 2.0**-10  # below it the gradients themselves are at fault, not the scale


def layer_slices(blocks: list[LayerBlock]) -> list[range]:
    """Ranges of layers that hold about as many weights as a slice is to have (``device_sizes``), at
    least one layer."""
    elements = sizes_of(blocks[0].master.device.type).optimizer_elements
    layers = max(1, elements // max(1, blocks[0].size))
    return [range(i, min(i + layers, len(blocks))) for i in range(0, len(blocks), layers)]


class SlicedAdamW:
    """The optimizer over all layer blocks; ``dtype``, ``operators``: the base's; fp16 gets a loss
    scale."""

    def __init__(
        self,
        blocks: list[LayerBlock],
        hyperparameters: Hyperparameters,
        dtype: torch.dtype,
        operators: Operators,
    ) -> None:
        self.blocks = blocks
        self._operators = operators
        self.max_norm = hyperparameters.max_grad_norm
        self.slices = layer_slices(blocks)
        device = blocks[0].master.device
        self._adam = torch.optim.AdamW(
            [block.master for block in blocks],
            lr=hyperparameters.learning_rate,
            weight_decay=hyperparameters.weight_decay,
            fused=True,
        )
        for block in blocks:
            self._adam.state[block.master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": block.exp_avg,
                "exp_avg_sq": block.exp_avg_sq,
            }
        self.scaled = dtype == torch.float16
        self.scale = torch.full((), _FIRST_SCALE if self.scaled else 1.0, dtype=torch.float32, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        self._norms = torch.zeros(len(blocks), dtype=blocks[0].master.dtype, device=device)
        self._skip = torch.zeros((), dtype=torch.float32, device=device)
        self._factor = torch.zeros((), dtype=blocks[0].master.dtype, device=device)
        self._norm = torch.zeros((), dtype=blocks[0].master.dtype, device=device)

    @property
    def operations(self) -> int:
        """Slices of one step: norms, then updates."""
        return 2 * len(self.slices)

    def run(self, operation: int, rate: float, loss: Tensor) -> None:
        """Slice ``operation`` of the step, at learning rate ``rate``. ``loss``: the step's, a
        device scalar; not finite: the step is skipped."""
        if operation < len(self.slices):
            layers = self.slices[operation]
            grads = [self.blocks[layer].grad for layer in layers]
            self._operators.norms(grads, self._norms[layers.start : layers.stop])
            return
        index = operation - len(self.slices)
        if index == 0:
            self._decide(loss)
        self._update(self.slices[index], rate)

    def _decide(self, loss: Tensor) -> None:
        """Factor on all gradients: torch's clip_grad_norm_, with the loss scale undone."""
        torch.linalg.vector_norm(self._norms, out=self._norm)
        self._norm.div_(self.scale)
        if self.max_norm > 0:
            torch.div(self.max_norm, self._norm + 1e-6, out=self._factor)
            self._factor.clamp_(max=1.0)
        else:
            self._factor.fill_(1.0)
        self._factor.div_(self.scale)
        self._skip.copy_(~(torch.isfinite(loss) & torch.isfinite(self._norm)))

    def _update(self, layers: range, rate: float) -> None:
        self._adam.param_groups[0]["lr"] = rate
        blocks = self.blocks[layers.start : layers.stop]
        self._operators.scale([block.grad for block in blocks], self._factor)
        for block in blocks:
            block.master.grad = block.grad
        self._adam.found_inf = self._skip  # type: ignore[attr-defined]  # read by the fused kernel, as GradScaler's
        self._adam.step()  # only parameters that have a gradient
        for block in blocks:
            block.master.grad = None
        own = [block for block in blocks if block.compute is not block.master]
        if own:
            self._operators.copy([block.compute for block in own], [block.master for block in own])

    def finish(self, loss: Tensor) -> Tensor:
        """After the last slice: sets the next loss scale; gives, in float64 and on the device,
        ``[loss, grad norm, skipped, loss scale, Adam steps, growth]``."""
        adam_steps = self._adam.state[self.blocks[0].master]["step"]
        if self.scaled:
            torch._amp_update_scale_(self.scale, self._growth, self._skip, 2.0, 0.5, _GROWTH_INTERVAL)
        parts = (loss, self._norm, self._skip, self.scale, adam_steps, self._growth)
        return torch.stack([part.double() for part in parts])

    # ---- state
    def load(self, *, adam_steps: float, scale: float | None, growth: float) -> None:
        """Counters of a saved run; the adapter copies the moments, layer by layer."""
        for block in self.blocks:
            self._adam.state[block.master]["step"].fill_(adam_steps)
        if scale is not None:
            self.scale.fill_(scale)
        self._growth.fill_(int(growth))
