"""The adapter in training: the matrices of peft's LoRA over flat storage, one block a layer.

Each layer's A and B matrices lie one behind the other in flat tensors: the fp32 weights
(``master``), the copy in the base's dtype that is computed with, gradients and Adam's two moments.
A slice of the optimizer, a copy and an accumulation are then one or two calls a layer, whatever the
rank or targets. The tensor objects stay; where their data lies may change (``LayerBlock.lie_in``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn

from sglang_harli.architectures import INPUT_GROUPS
from sglang_harli.errors import ConfigError, TrainingError
from sglang_harli.peft_trainer import device_calls
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.layers.dropout import DropoutMasks
from sglang_harli.peft_trainer.layers.lora_linear import LinearGroup
from sglang_harli.protocol.public import Hyperparameters

_STATE_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Matrix:
    """One A or B: its ``key`` in PEFT's ``save_pretrained``, and its place in the layer's block."""

    key: str
    shape: tuple[int, int]
    offset: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def of(self, block: Tensor) -> Tensor:
        return block.narrow(0, self.offset, self.size).view(self.shape)


class LayerBlock:
    """One decoder layer's share of the adapter; shapes and dtypes without memory until ``lie_in``.

    Attributes:
        matrices: A, B, A, B ... in the order in which peft injects them. Within the block they lie
            by input group: its A's one behind the other, then its B's.
        master: fp32 weights (fp64 for an fp64 base), the ones that are trained and saved.
        compute: the same in the base's dtype; ``master`` itself where the dtypes agree.
        groups: the layer's linears by input, on views of ``compute``.
        grad: summed gradients of the optimizer step.
        partial: gradients of the micro-batch in flight; None where a step has one micro-batch only.
        flats: these and Adam's moments, each once, in the order in which memory is asked for.
        state: adapter/, exp_avg/ and exp_avg_sq/ of each matrix by PEFT's key, fp32.
    """

    def __init__(
        self, matrices: list[Matrix], base: FrozenBase, nowhere: Nowhere, *, accumulates: bool
    ) -> None:
        self.matrices = matrices
        self._nowhere = nowhere
        self.size = sum(m.size for m in matrices)
        exact = torch.promote_types(base.dtype, torch.float32)

        def block(dtype: torch.dtype) -> Tensor:
            return nowhere((self.size,), dtype)

        self.master = block(exact)
        self.compute = self.master if exact == base.dtype else block(base.dtype)
        self.grad = block(exact)
        self.partial = block(exact) if accumulates else None
        self.exp_avg = block(exact)
        self.exp_avg_sq = block(exact)
        flats = (self.master, self.compute, self.grad, self.partial, self.exp_avg, self.exp_avg_sq)
        self.flats = list({id(flat): flat for flat in flats if flat is not None}.values())
        self._views: list[tuple[Tensor, Tensor, Matrix]] = []  # view, the flat that it is of, its place
        parts = (("adapter", self.master), ("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq))
        self.state = [(f"{part}/{m.key}", self.view(flat, m)) for part, flat in parts for m in matrices]
        self.groups: list[LinearGroup] = []

    def view(self, flat: Tensor, matrix: Matrix, *, leaf: bool = False) -> Tensor:
        """A tensor that is ``matrix`` of ``flat`` wherever that lies; ``leaf``: a Parameter."""
        tensor = self._nowhere(matrix.shape, flat.dtype)
        if leaf:
            tensor = nn.Parameter(tensor)
        self._views.append((tensor, flat, matrix))
        return tensor

    def lie_in(self, places: list[Tensor]) -> None:
        """From now on the data lies in ``places``, one for each of ``flats``; nothing is copied."""
        for flat, place in zip(self.flats, places, strict=True):
            flat.data = place
        for view, flat, matrix in self._views:
            view.data = matrix.of(flat)

    def refresh_compute(self) -> None:
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    @property
    def pairs(self) -> int:
        """Of A and B."""
        return len(self.matrices) // 2

    def draw(self, pair: int, generator: torch.Generator, place: Tensor) -> None:
        """One A and B into ``place``, which lies as ``master`` does, on a CPU or not."""
        a, b = self.matrices[2 * pair : 2 * pair + 2]
        for shape in (a.shape, b.shape, a.shape):
            weight = torch.empty(shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        a.of(place).copy_(weight.to(self.compute.dtype))  # pyright: ignore[reportPossiblyUnboundVariable]
        b.of(place).zero_()

    def initialise(self, generator: torch.Generator) -> None:
        """Draw A as peft does under ``torch.manual_seed``; B and the moments are zero.

        peft makes two ``nn.Linear`` (each draws its weight), then draws A again on the CPU, and
        rounds to the base's dtype.
        """
        for pair in range(self.pairs):
            self.draw(pair, generator, self.master)
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()
        self.refresh_compute()


class Adapter:
    """A LoRA adapter on the frozen base, as peft makes it: its names, its order, its first weights.

    peft's own injection goes through the whole model several times, on a thread that serves
    (docs/internals/training-step.md); so its modules are not made. A test holds this to peft.

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
        self._nowhere = Nowhere(base.device)
        self._staged: list[Tensor] = []  # pinned: of the layer that is being filled
        self.blocks = [self._make_block(layer) for layer in range(len(base.layers))]

    def _make_block(self, layer: int) -> LayerBlock:
        """Lay out one layer's matrices."""
        linears = self.base.linears(layer)
        targets = [name for name in linears if name in self.hyperparameters.target_modules]
        rank, places, offset = self.hyperparameters.lora_r, dict[tuple[str, str], Matrix](), 0
        for group in INPUT_GROUPS:
            for part in ("lora_A", "lora_B"):
                for own in (own for own in group if own in targets):
                    path, linear = linears[own]
                    shape = (rank, linear.in_features) if part == "lora_A" else (linear.out_features, rank)
                    key = f"{_STATE_PREFIX}model.layers.{layer}.{path}.{part}.weight"
                    places[own, part] = Matrix(key, shape, offset)
                    offset += shape[0] * shape[1]
        matrices = [places[own, part] for own in targets for part in ("lora_A", "lora_B")]
        accumulates = self.hyperparameters.gradient_accumulation_steps > 1
        block = LayerBlock(matrices, self.base, self._nowhere, accumulates=accumulates)
        block.groups = [
            self._make_group(layer, [(name, linears[name][1]) for name in group], block, places)
            for group in INPUT_GROUPS
        ]
        return block

    def _make_group(
        self,
        layer: int,
        linears: list[tuple[str, nn.Linear]],
        block: LayerBlock,
        places: dict[tuple[str, str], Matrix],
    ) -> LinearGroup:
        names = [name for name, _ in linears]
        adapted = [i for i, name in enumerate(names) if (name, "lora_A") in places]
        a, b = None, []
        if adapted:
            parts = [places[names[i], "lora_A"] for i in adapted]
            rank, width = parts[0].shape
            stacked = Matrix("", (rank * len(parts), width), parts[0].offset)
            a = block.view(block.compute, stacked, leaf=True)
            b = [block.view(block.compute, places[names[i], "lora_B"], leaf=True) for i in adapted]
        return LinearGroup(
            names,
            [linear for _, linear in linears],
            adapted,
            a,
            list(b),
            scaling=self.hyperparameters.scaling,
            layer=layer,
            masks=self.masks,
            operators=self.base.operators,
        )

    # ---- first weights
    @property
    def pieces(self) -> int:
        """Calls of ``fill``: a layer each on a CPU, elsewhere a pair of A and B."""
        return sum(self._pieces_of(block) for block in self.blocks)

    def _pieces_of(self, block: LayerBlock) -> int:
        return 1 if self.base.device.type == "cpu" else block.pairs

    def fill(self, piece: int, source: Callable[[str], Tensor] | None) -> None:
        """A piece of the weights and moments: drawn (``source`` None), the pieces in order, or
        copied.

        A device gets a layer at once, from pinned memory, for which the host does not wait.
        ``source``: gives a tensor of the saved state by its name in ``LayerBlock.state``.

        Raises:
            TrainingError: ``bad_checkpoint``: another shape than this job's.
        """
        layer, part = divmod(piece, self._pieces_of(self.blocks[0]))
        block = self.blocks[layer]
        if self.base.device.type != "cpu":
            self._fill_staged(block, part, source)
        elif source is None:
            block.initialise(self.generator)
        else:
            for name, tensor in block.state:
                tensor.copy_(_saved(source, name, tensor), non_blocking=True)
            block.refresh_compute()

    def _fill_staged(self, block: LayerBlock, pair: int, source: Callable[[str], Tensor] | None) -> None:
        """One pair into pinned memory; the last one of a layer sends all of it."""
        flats = [block.master] if source is None else [block.master, block.exp_avg, block.exp_avg_sq]
        if not self._staged:
            self._staged = [device_calls.pinned(flat.shape, flat.dtype) for flat in flats]
        if source is None:
            block.draw(pair, self.generator, self._staged[0])
        else:
            for part, staged in enumerate(self._staged):
                for number in (2 * pair, 2 * pair + 1):
                    matrix, (name, tensor) = (
                        block.matrices[number],
                        block.state[part * len(block.matrices) + number],
                    )
                    matrix.of(staged).copy_(_saved(source, name, tensor))
        if pair + 1 < block.pairs:
            return
        for flat, staged in zip(flats, self._staged, strict=True):
            flat.copy_(staged, non_blocking=True)  # torch reuses pinned memory only after the copy
        self._staged = []
        if source is None:
            self.base.operators.zero([block.exp_avg, block.exp_avg_sq])
        block.refresh_compute()


def _saved(source: Callable[[str], Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of a saved state; TrainingError: another shape than ``like``."""
    saved = source(name)
    if saved.shape != like.shape:
        raise TrainingError(
            f"the saved {name} has shape {tuple(saved.shape)}, this job's {tuple(like.shape)}",
            code="bad_checkpoint",
        )
    return saved


class Nowhere:
    """Makes tensors of a shape without memory of their own: one zero of each dtype, seen
    everywhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zeros: dict[torch.dtype, Tensor] = {}

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        zero = self._zeros.get(dtype)
        if zero is None:
            zero = self._zeros[dtype] = torch.zeros((), dtype=dtype, device=self._device)
        tensor = torch.empty(0, dtype=dtype, device=self._device)
        tensor.data = zero.expand(shape)
        return tensor


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
