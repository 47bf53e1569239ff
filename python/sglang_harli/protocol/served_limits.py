"""What the served model allows a job, as the scheduler says it in its hello."""

from __future__ import annotations

from msgspec import Struct

from sglang_harli.protocol.public import Hyperparameters


class ServedLimits(Struct, frozen=True, kw_only=True):
    """What the served model allows a job; goes with the scheduler's hello.

    ``linear_sizes``: per target module the (in, out) features summed over nothing: one layer's; all
    layers are alike.  Bytes are of the training side.
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

    def trainable_parameters(self, hp: Hyperparameters) -> int:
        return self.num_layers * sum(hp.lora_r * sum(self.linear_sizes[m]) for m in hp.target_modules)

    def job_memory_bytes(self, hp: Hyperparameters, longest_row: int) -> int:
        """Upper estimate of a run's training memory: adapter (and its copy in the base's dtype), gradients
        (twice with accumulation), Adam's two moments (fp32 each), saved layer inputs of a micro-batch, one
        layer's working set, logits."""
        item = 4 if self.dtype == "float32" else 2
        copies = 4 * (5 if hp.gradient_accumulation_steps > 1 else 4) + (0 if item == 4 else item)
        state = self.trainable_parameters(hp) * copies
        saved = (self.num_layers + 2) * hp.batch_size * longest_row * self.hidden_size * item
        widest = sum(i + o for i, o in self.linear_sizes.values())
        working = 3 * longest_row * widest * item  # a quantum may be one row
        return state + saved + working + 3 * self.logits_bytes
