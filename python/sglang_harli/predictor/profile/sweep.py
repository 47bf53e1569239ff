"""The loads of a profile: a few tokens of each size of batch, which the server measures.  Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_harli.predictor.profile.profile_table import ProfileTable

BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
PROMPT_TOKENS = (64, 256, 1024, 4096)
TIMES = 8  # that the server measures each batch while its contexts grow
POOL_SHARE = 0.9  # of the KV cache that one load may need
NEAR = 1.5  # contexts whose ratio is below this count as the same load


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that are sent at once."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def context_tokens(self) -> float:
        """Of the whole batch, halfway through."""
        return self.batch * (self.prompt_tokens + self.new_tokens / 2)


def grid(limits: dict[str, int]) -> list[Load]:
    """The loads of a sweep that fit a server, the small ones first."""
    new_tokens = TIMES * limits["sampled"]
    loads = [Load(batch, prompt, new_tokens) for prompt in PROMPT_TOKENS for batch in BATCHES]
    return [
        load
        for load in loads
        if load.batch <= limits["requests"]
        and load.prompt_tokens + new_tokens < limits["row_tokens"]
        and load.batch * (load.prompt_tokens + new_tokens) <= POOL_SHARE * limits["slots"]
    ]


def missing(loads: Sequence[Load], table: ProfileTable | None) -> list[Load]:
    """Those of which the table has no decode step on the whole device."""
    known = [point for point in table.decode if not point.share] if table is not None else []
    return [
        load
        for load in loads
        if not any(
            point.batch == load.batch
            and abs(math.log(max(point.context_tokens, 1) / load.context_tokens)) < math.log(NEAR)
            for point in known
        )
    ]


def bodies(load: Load, vocab: int, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The request of a load: random tokens, others for each load, so that no prefix is cached;
    ``fields``: what the server wants in it besides."""
    rng = random.Random(f"{load.batch} {load.prompt_tokens}")
    prompts = [[rng.randrange(vocab) for _ in range(load.prompt_tokens)] for _ in range(load.batch)]
    return {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": load.new_tokens, "ignore_eos": True},
        **(fields or {}),
    }
