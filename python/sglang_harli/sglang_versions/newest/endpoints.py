"""SGLang's answers that ours stand before, where only one version has them: 0.5.23's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Response


def ready() -> Callable[[], Awaitable[Response]] | None:
    """To ``GET /ready``."""
    from sglang.srt.entrypoints import http_server

    return http_server.ready
