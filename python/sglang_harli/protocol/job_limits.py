"""What the served model allows a job, as the scheduler says it in its hello."""

from __future__ import annotations

from msgspec import Struct

from sglang_harli.protocol.public import Hyperparameters
from sglang_harli.train_memory import aligned


class MemoryLayout(Struct, frozen=True, kw_only=True):
    """The bytes of a run's tensors, as the trainer lays them out.

    Attributes:
        parameter_bytes: of each tensor of a layer's adapter state, per trainable parameter.
        accumulated_bytes: of one tensor more, where a step has several micro-batches.
        inputs, input_bytes: micro-batch tensors of a value per token and hidden unit; its bytes.
        logit_bytes: of each tensor of logits, per token and word of the vocabulary.
        head_tokens: most target tokens that have logits at once.
    """

    parameter_bytes: tuple[int, ...]
    accumulated_bytes: int
    inputs: int
    input_bytes: int
    logit_bytes: tuple[int, ...]
    head_tokens: int


class ServedLimits(Struct, frozen=True, kw_only=True):
    """What the served model allows a job; goes with the scheduler's hello.

    Attributes:
        linear_sizes: (in, out) features of each target module in one layer; all layers are alike.
        train_memory_bytes: training's most; logits_bytes: of the largest logits tensor.
        layout: what the tensors of a run take.
        space_bytes: each lease of a run (its state, a micro-batch) takes whole multiples of these.
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
    layout: MemoryLayout
    space_bytes: int = 1

    def trainable_parameters(self, hp: Hyperparameters) -> int:
        return self.num_layers * sum(hp.lora_r * sum(self.linear_sizes[m]) for m in hp.target_modules)

    def job_memory_bytes(
        self, hp: Hyperparameters, longest_row: int, rows: int, longest_evaluated: int = 0
    ) -> int:
        """Training memory of a job: the adapter's state, and a micro-batch of ``rows`` longest
        rows, to the byte, without a quantum's working set and kept activations.
        ``longest_evaluated``: of the rows of a validation file."""
        batch = min(hp.batch_size, rows)
        micro_batch = self._micro_batch_bytes(batch, longest_row)
        if longest_evaluated:
            evaluated = self._micro_batch_bytes(hp.batch_size, longest_evaluated, evaluated=True)
            micro_batch = max(micro_batch, evaluated)
        return self._leased(self._state_bytes(hp)) + self._leased(micro_batch)

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

    def _leased(self, nbytes: int) -> int:
        return -(-nbytes // self.space_bytes) * self.space_bytes

    def _state_bytes(self, hp: Hyperparameters) -> int:
        layer, layout = self.trainable_parameters(hp) // self.num_layers, self.layout
        more = (layout.accumulated_bytes,) if hp.gradient_accumulation_steps > 1 else ()
        return self.num_layers * sum(aligned(each * layer) for each in (*layout.parameter_bytes, *more))

    def _micro_batch_bytes(self, rows: int, width: int, *, evaluated: bool = False) -> int:
        layout = self.layout
        inputs = (1 if evaluated else layout.inputs) * aligned(
            rows * width * self.hidden_size * layout.input_bytes
        )
        logits = min(rows * (width - 1), layout.head_tokens) * self.vocab_size
        return inputs + sum(aligned(each * logits) for each in layout.logit_bytes)
