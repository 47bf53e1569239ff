"""How far a request's prompt is computed, on SGLang 0.5.16 (``Req.prefix_indices``,
``extend_range``)."""

from __future__ import annotations

from typing import Any


def cached(req: Any) -> int:
    """Tokens that the prefix cache was last found to hold."""
    return len(req.prefix_indices)


def prefilled(req: Any) -> int:
    """Of a prompt in chunks: tokens before the end of the chunk that was launched last."""
    return req.extend_range.end
