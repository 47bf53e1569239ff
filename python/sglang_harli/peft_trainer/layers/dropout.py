"""Dropout masks that depend on what is dropped, never on when or in which company.

A mask is drawn from a generator seeded by (seed, step, row, layer, module), so that it is the same
when a layer is recomputed, when a micro-batch is run again, and however its rows are split.
"""

from __future__ import annotations

import hashlib
import struct

import torch

from sglang_harli.peft_trainer import device_calls


def mask_seed(seed: int, step: int, row: int, layer: int, module: str) -> int:
    """The generator seed of one mask: 64 bits of a hash of its five keys.

    ``seed``: the job's; ``step`` counts from 1; ``row``: within the step, not the micro-batch;
    ``module``: the adapted linear's own name, such as ``q_proj``.
    """
    key = struct.pack("<qqqq", seed, step, row, layer) + module.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)


class DropoutMasks:
    """Draws the masks of one run; the rows at hand are set before each quantum. ``probability``: of
    dropping a value, in (0, 1); ``device``, ``dtype``: of the activations."""

    def __init__(self, probability: float, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.probability = probability
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self._generator = device_calls.generator(device)
        self._step = 0
        self._rows: list[tuple[int, int]] = []
        self._width = 0
        self._columns: slice | None = None
        self.off = False  # an evaluation's rows: nothing is dropped

    def set_rows(
        self, step: int, rows: list[tuple[int, int]], width: int, columns: slice | None = None
    ) -> None:
        """The activations that follow are ``[len(rows), width, features]`` of optimizer step
        ``step``.

        Args:
            rows: (position within the step, length in tokens) of each row; width: padded length.
            columns: tokens that are computed; None: all. Masks do not depend on it.
        """
        self._step, self._rows, self._width, self._columns = step, rows, width, columns
        self.off = False

    def draw(self, layer: int, module: str, features: int) -> torch.Tensor:
        """``[tokens, features]``: 0 or 1/(1 - probability); 0 on padding."""
        mask = torch.zeros(len(self._rows), self._width, features, dtype=self.dtype, device=self.device)
        keep = 1.0 - self.probability
        for i, (row, length) in enumerate(self._rows):
            self._generator.manual_seed(mask_seed(self.seed, self._step, row, layer, module))
            mask[i, :length].bernoulli_(keep, generator=self._generator)
        if self._columns is not None:
            mask = mask[:, self._columns].contiguous()
        return mask.view(-1, features).div_(keep)
