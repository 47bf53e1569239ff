"""How far a request's prompt is computed, on SGLang 0.5.23 (``Req.prefix_len``, ``extend_end``)."""

from __future__ import annotations

from typing import Any


def cached(req: Any) -> int:
    """Tokens that the prefix cache was last found to hold."""
    return req.prefix_len


def prefilled(req: Any) -> int:
    """Of a prompt in chunks: tokens before the end of the chunk that was launched last."""
    return req.extend_end
