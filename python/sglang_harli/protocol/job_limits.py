"""What the served model allows a job, as the scheduler says it in its hello."""

from __future__ import annotations

from msgspec import Struct

from sglang_harli.protocol.public import Hyperparameters

ALIGNMENT = 256  # bytes; of every tensor in training's memory


def carved(nbytes: int) -> int:
    """Bytes that a tensor of ``nbytes`` takes of training's memory."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ServedLimits(Struct, frozen=True, kw_only=True):
    """What the served model allows a job; goes with the scheduler's hello.

    ``linear_sizes``: per target module the (in, out) features summed over nothing: one layer's; all
    layers are alike.  Bytes are of the training side: ``train_memory_bytes`` can ever be had, and each space of
    a run (its state, a micro-batch) takes whole multiples of ``space_bytes`` of it.
    """

    architecture: str
    model_path: str
    tokenizer_path: str
    served_model_name: str
    dtype: str  # float32, bfloat16, float16
    device: str  # cpu, cuda
    vocab_size: int
    hidden_size: int
    num_layers: int
    linear_sizes: dict[str, tuple[int, int]]
    max_seq_length: int
    max_lora_rank: int
    lora_target_modules: tuple[str, ...]
    train_memory_bytes: int
    logits_bytes: int
    space_bytes: int = 1

    def trainable_parameters(self, hp: Hyperparameters) -> int:
        return self.num_layers * sum(hp.lora_r * sum(self.linear_sizes[m]) for m in hp.target_modules)

    def job_memory_bytes(self, hp: Hyperparameters, longest_row: int, rows: int) -> int:
        """Training memory of a job of so many rows: the adapter's state, and a micro-batch of its longest rows.  What
        the trainer asks for, to the byte; the working set of a quantum and kept activations are not in it."""
        batch = min(hp.batch_size, rows)
        return self._leased(self._state_bytes(hp)) + self._leased(self._micro_batch_bytes(batch, longest_row))

    def largest_batch(self, hp: Hyperparameters, longest_row: int) -> int:
        """The largest ``batch_size`` with which a job ever fits; 0: not even one row does."""
        left = self.train_memory_bytes - self._leased(self._state_bytes(hp))
        fits, too_large = 0, 1
        while self._leased(self._micro_batch_bytes(too_large, longest_row)) <= left:
            fits, too_large = too_large, 2 * too_large
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            if self._leased(self._micro_batch_bytes(middle, longest_row)) <= left:
                fits = middle
            else:
                too_large = middle
        return fits

    @property
    def _item(self) -> int:
        """Bytes of a weight or an activation; the exact values beside them have 4."""
        return 4 if self.dtype == "float32" else 2

    def _leased(self, nbytes: int) -> int:
        return -(-nbytes // self.space_bytes) * self.space_bytes

    def _state_bytes(self, hp: Hyperparameters) -> int:
        """Each layer's weights (and their copy in the base's dtype), gradients (twice with accumulation), two moments."""
        layer = self.trainable_parameters(hp) // self.num_layers
        exact = 5 if hp.gradient_accumulation_steps > 1 else 4
        copy = 0 if self._item == 4 else carved(layer * self._item)
        return self.num_layers * (exact * carved(4 * layer) + copy)

    def _micro_batch_bytes(self, rows: int, width: int) -> int:
        """The inputs of all layers and of the head, a gradient, and the logits (in 16 bits with a copy)."""
        activations = (self.num_layers + 2) * carved(rows * width * self.hidden_size * self._item)
        tokens = min(rows * (width - 1), self.logits_bytes // (4 * self.vocab_size))
        logits = tokens * self.vocab_size
        return activations + carved(4 * logits) + (0 if self._item == 4 else carved(self._item * logits))
