"""SGLang's answers that ours stand before, where only one version has them: 0.5.16's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Response


def ready() -> Callable[[], Awaitable[Response]] | None:
    """To ``GET /ready``: there is none."""
    return None
