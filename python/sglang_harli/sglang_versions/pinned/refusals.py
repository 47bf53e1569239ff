"""What finetuning does not work with, of what only SGLang 0.5.16 has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# (option, what it asks for, whether these arguments ask for it)
REFUSED: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("--torchao-config", "quantised weights", lambda a: bool(a.torchao_config)),
)
