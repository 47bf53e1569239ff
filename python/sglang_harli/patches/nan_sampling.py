"""Runtime half of ``patches/12-nan-sampling``: NaN probabilities spoil one answer, not the server.

Leans on: ``srt.layers.sampler.sampling_from_probs_torch`` and
``top_k_top_p_min_p_sampling_from_probs_torch``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_SAMPLER = "sglang.srt.layers.sampler"


def _sample(original: Callable[..., Any], probs: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(probs, *args, **kwargs)
    except RuntimeError:
        mended, rows = mend(probs)
        if not rows:
            raise
        logger.error("the probabilities of %d requests are no numbers: each gets its first token", rows)
        return original(mended, *args, **kwargs)


def mend(probs: Any) -> tuple[Any, int]:
    """Probabilities [requests, tokens] that can be sampled from, and how many rows were not."""
    import torch

    bad = ~torch.isfinite(probs).all(-1) | (probs < 0).any(-1) | (probs.sum(-1) <= 0)
    first = torch.zeros_like(probs)
    first[:, 0] = 1
    return torch.where(bad.unsqueeze(-1), first, probs), int(bad.sum())


HOOKS = (
    (f"{_SAMPLER}.sampling_from_probs_torch", _sample, "around"),
    (f"{_SAMPLER}.top_k_top_p_min_p_sampling_from_probs_torch", _sample, "around"),
)
