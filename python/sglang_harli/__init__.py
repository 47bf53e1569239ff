"""Finetune while you serve: LoRA jobs on the base weights that an SGLang server holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_harli.client.async_client import AsyncFinetuneClient as AsyncFinetuneClient
    from sglang_harli.client.blocking_client import FinetuneClient as FinetuneClient

    __version__: str


def __getattr__(name: str) -> Any:
    """The clients and the version, when asked for: importing the package imports nothing."""
    if name == "FinetuneClient":
        from sglang_harli.client.blocking_client import FinetuneClient

        return FinetuneClient
    if name == "AsyncFinetuneClient":
        from sglang_harli.client.async_client import AsyncFinetuneClient

        return AsyncFinetuneClient
    if name == "__version__":
        from importlib.metadata import version

        return version("sglang-harli")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
