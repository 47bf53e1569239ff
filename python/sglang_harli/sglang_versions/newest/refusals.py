"""What finetuning does not work with, of what only SGLang 0.5.23 has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.environ import envs

# (option, what it asks for, whether these arguments ask for it)
REFUSED: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    # Its requests never come to a Python process, where our routes and adapters' names are.
    ("SGLANG_RUST_SERVER=1", "SGLang's HTTP server in Rust", lambda _: envs.SGLANG_RUST_SERVER.get()),
    (
        "--enable-pd-role-switch",
        "a server that becomes a prefill server",
        lambda a: bool(a.enable_pd_role_switch),
    ),
)
