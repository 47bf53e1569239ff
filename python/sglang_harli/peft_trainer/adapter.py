"""The adapter in training: peft's LoRA modules over flat storage, one block per decoder layer.

Each layer's A and B matrices lie one behind the other in flat tensors: the fp32 weights (``master``),
the copy in the base's dtype that is computed with, gradients and Adam's two moments.  A slice of the
optimizer, a copy and an accumulation are then one or two calls a layer, whatever the rank or targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from sglang_harli.errors import ConfigError
from sglang_harli.peft_trainer.dropout import DropoutMasks
from sglang_harli.peft_trainer.frozen_base import FrozenBase
from sglang_harli.peft_trainer.lora_linear import LoraForward
from sglang_harli.protocol.public import Hyperparameters

_NAME = "default"
_STATE_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Matrix:
    """One A or B: ``key`` as PEFT's ``save_pretrained`` writes it, and its place in the layer's block."""

    key: str
    shape: tuple[int, int]
    offset: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def of(self, block: Tensor) -> Tensor:
        return block.narrow(0, self.offset, self.size).view(self.shape)


class LayerBlock:
    """One decoder layer's share of the adapter.

    Attributes:
        matrices: A, B, A, B ... in the order of peft's injection.
        master: fp32 weights (fp64 for an fp64 base), the ones that are trained and saved.
        compute: the same in the base's dtype; ``master`` itself where the dtypes agree.
        leaves: views of ``compute`` that autograd differentiates for.
        grad: summed gradients of the optimizer step.
        partial: gradients of the micro-batch in flight; None where a step has one micro-batch only.
        exp_avg, exp_avg_sq: Adam's moments.
    """

    def __init__(self, matrices: list[Matrix], base: FrozenBase, *, accumulates: bool) -> None:
        self.matrices = matrices
        self.size = sum(m.size for m in matrices)
        exact = torch.promote_types(base.dtype, torch.float32)

        def block(dtype: torch.dtype) -> Tensor:
            return torch.zeros(self.size, dtype=dtype, device=base.device)

        self.master = block(exact)
        self.compute = self.master if exact == base.dtype else block(base.dtype)
        self.grad = block(exact)
        self.partial = block(exact) if accumulates else None
        self.exp_avg = block(exact)
        self.exp_avg_sq = block(exact)
        self.leaves = [nn.Parameter(m.of(self.compute)) for m in matrices]

    def refresh_compute(self) -> None:
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw A as peft does under ``torch.manual_seed``; B is zero.

        peft makes two ``nn.Linear`` (each draws its weight), then draws A again, and rounds to the
        base's dtype.  The generator is on the CPU, as peft's draws are.
        """
        for a, b in zip(self.matrices[::2], self.matrices[1::2], strict=True):
            for shape in (a.shape, b.shape, a.shape):
                weight = torch.empty(shape, dtype=torch.float32)
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            a.of(self.master).copy_(weight.to(self.compute.dtype))  # pyright: ignore[reportPossiblyUnboundVariable]
            b.of(self.master).zero_()
        self.refresh_compute()


class Adapter:
    """peft's LoRA modules injected into the frozen base; ``remove`` takes them out again.

    Args:
        base: gets the modules; one adapter at a time.
        hyperparameters: rank, alpha, rsLoRA, dropout, targets, seed, accumulation.

    Raises:
        ConfigError: a target module that the model does not have.
    """

    def __init__(self, base: FrozenBase, hyperparameters: Hyperparameters) -> None:
        self.base = base
        self.hyperparameters = hp = hyperparameters
        sizes = base.linear_sizes()
        for target in hp.target_modules:
            if target not in sizes:
                raise ConfigError(
                    f"target module {target!r} is not in this model: give some of {', '.join(sorted(sizes))}",
                    param="target_modules",
                )
        self.masks = (
            DropoutMasks(hp.lora_dropout, hp.seed, base.device, base.dtype) if hp.lora_dropout > 0 else None
        )
        self.generator = torch.Generator().manual_seed(hp.seed)
        # Weights on the meta device: drawing them takes long on a large model and is done layer by layer.
        self._tuner: Any = LoraModel(base.model, lora_config(hp), _NAME, low_cpu_mem_usage=True)
        self.blocks: list[LayerBlock] = []
        try:
            found = self._modules_by_layer()
            for layer in range(len(base.layers)):
                self.blocks.append(self._make_block(layer, found[layer]))
        except BaseException:
            self.remove()
            raise

    def _modules_by_layer(self) -> list[list[tuple[str, Any]]]:
        found: list[list[tuple[str, Any]]] = [[] for _ in self.base.layers]
        for name in self._tuner.targeted_module_names:
            # model.layers.N.self_attn.q_proj
            found[int(name.split(".")[2])].append((name, self.base.model.get_submodule(name)))
        return found

    def _make_block(self, layer: int, modules: list[tuple[str, Any]]) -> LayerBlock:
        matrices: list[Matrix] = []
        offset = 0
        for name, module in modules:
            for part in ("lora_A", "lora_B"):
                linear = getattr(module, part)[_NAME]
                shape = (linear.out_features, linear.in_features)
                matrices.append(Matrix(f"{_STATE_PREFIX}{name}.{part}.weight", shape, offset))
                offset += shape[0] * shape[1]
        block = LayerBlock(
            matrices, self.base, accumulates=self.hyperparameters.gradient_accumulation_steps > 1
        )
        for i, (name, module) in enumerate(modules):
            a, b = block.leaves[2 * i], block.leaves[2 * i + 1]
            module.lora_A[_NAME].weight = a
            module.lora_B[_NAME].weight = b
            module.forward = LoraForward(
                module.base_layer, a, b, module.scaling[_NAME], layer, name.rsplit(".", 1)[-1], self.masks
            )
        return block

    def tensors(self, layer: int) -> list[tuple[str, Tensor]]:
        """One layer's state by name: adapter/, exp_avg/ and exp_avg_sq/ of each matrix, fp32 views."""
        block = self.blocks[layer]
        parts = (("adapter", block.master), ("exp_avg", block.exp_avg), ("exp_avg_sq", block.exp_avg_sq))
        return [(f"{part}/{m.key}", m.of(flat)) for part, flat in parts for m in block.matrices]

    def remove(self) -> None:
        """Take peft's modules out of the base model and let the tensors go; may be repeated."""
        if self._tuner is not None:
            # peft's unload() does just this, behind a progress bar on stderr.
            for name in self._tuner.targeted_module_names:
                owner, _, leaf = name.rpartition(".")
                setattr(
                    self.base.model.get_submodule(owner), leaf, self.base.model.get_submodule(name).base_layer
                )
            del self.base.model.peft_config
            self._tuner = None
        self.base.model.requires_grad_(False)
        self.blocks.clear()  # the list is shared


def lora_config(hyperparameters: Hyperparameters) -> LoraConfig:
    """peft's config of a job."""
    return LoraConfig(
        r=hyperparameters.lora_r,
        lora_alpha=hyperparameters.lora_alpha,  # type: ignore[arg-type]  # peft divides, whatever the type
        lora_dropout=hyperparameters.lora_dropout,
        use_rslora=hyperparameters.use_rslora,
        target_modules=list(hyperparameters.target_modules),
        task_type="CAUSAL_LM",
    )
