"""Whether a job fits the served model: asked at submission, and again at its start.

The limits come with the scheduler's hello; a job accepted before it is checked when it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_harli.config import show_size
from sglang_harli.errors import ConfigError, UnsupportedError
from sglang_harli.protocol.internal import ServedLimits
from sglang_harli.protocol.public import Hyperparameters


def check_hyperparameters(hp: Hyperparameters, limits: ServedLimits) -> None:
    """Raise ConfigError unless rank, target modules and row length fit what is served."""
    if hp.lora_r > limits.max_lora_rank:
        raise ConfigError(
            f"lora_r={hp.lora_r} is not accepted: this server serves adapters of rank at most "
            f"{limits.max_lora_rank} (--max-lora-rank)",
            param="lora_r",
        )
    missing = [m for m in hp.target_modules if m not in limits.lora_target_modules]
    if missing:
        raise ConfigError(
            f"target_modules: {', '.join(missing)} not accepted: this server serves "
            f"{', '.join(limits.lora_target_modules)} (--lora-target-modules)",
            param="target_modules",
        )
    check_length(hp, limits.max_seq_length)


def check_length(hp: Hyperparameters, longest: int) -> None:
    if hp.max_seq_length is not None and hp.max_seq_length > longest:
        raise ConfigError(
            f"max_seq_length={hp.max_seq_length} is not accepted: the model's limit is {longest} tokens",
            param="max_seq_length",
        )


def check_data(
    hp: Hyperparameters,
    longest_row: int,
    longest_line: int,
    rows: int,
    limits: ServedLimits,
    unit: str = "line",
) -> None:
    """Raise ConfigError unless the longest row fits the model, and the job its training memory."""
    if longest_row > limits.max_seq_length:
        mend = (
            "shorten it, or submit with on_overflow=truncate or on_overflow=drop"
            if hp.on_overflow == "error"
            else f"the data was read before the limit was known; submit it again, and on_overflow={hp.on_overflow} "
            "applies to it"
        )
        raise ConfigError(
            f"{unit} {longest_line} has {longest_row} tokens and the model's limit is {limits.max_seq_length}: {mend}",
            param="max_seq_length",
        )
    need = limits.job_memory_bytes(hp, longest_row, rows)
    if need > limits.train_memory_bytes:
        largest = limits.largest_batch(hp, longest_row)
        fits = f"batch_size {largest} or less fits" if largest else "not even batch_size 1 fits"
        raise ConfigError(
            f"the job needs {show_size(need)} of training memory and at most {show_size(limits.train_memory_bytes)} "
            f"can ever be had: {fits} (now {hp.batch_size}); or lower max_seq_length (longest row: {longest_row} "
            f"tokens) or lora_r (now {hp.lora_r}), or raise --harli-max-train-mem where it is given, else the KV pool "
            "(--max-total-tokens, --mem-fraction-static)",
            code="memory_budget",
            param="batch_size",
        )


def check_vocabulary(largest_id: int, limits: ServedLimits) -> None:
    """The data's ids against the served model: a run directory may come from another model."""
    if largest_id >= limits.vocab_size:
        raise UnsupportedError(
            f"the data was tokenized with ids up to {largest_id}, the served model has {limits.vocab_size}: "
            "it is another model's job; submit it again"
        )


def check_validation(
    validation: Mapping[str, Any] | None, hp: Hyperparameters, data: Mapping[str, Any], limits: ServedLimits
) -> None:
    """The rows of a validation file (its summary; None: there is none) against the served model.

    Raise ConfigError: they are too long, or need memory that is never there; UnsupportedError: they
    are another model's."""
    if not validation:
        return
    file, longest = validation["file"], validation["longest_row"]
    if longest > limits.max_seq_length:
        raise ConfigError(
            f"{file}: line {validation['longest_line']} has {longest} tokens and the model's limit is "
            f"{limits.max_seq_length}: shorten it, or submit with on_overflow=truncate or on_overflow=drop",
            param="max_seq_length",
        )
    check_vocabulary(validation["largest_id"], limits)
    need = limits.job_memory_bytes(hp, data["longest_row"], data["rows"], longest)
    if need > limits.train_memory_bytes:
        raise ConfigError(
            f"{file}: evaluating {hp.batch_size} rows of {longest} tokens at once needs {show_size(need)} of training "
            f"memory and at most {show_size(limits.train_memory_bytes)} can ever be had: lower batch_size or "
            "max_seq_length",
            code="memory_budget",
            param="batch_size",
        )
