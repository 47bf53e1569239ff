"""The one function that launches every kernel of ours. Triton is not imported here.

Who counts launches, interprets kernels without a device or records what would be compiled puts a
runner of their own in the place of the device's (``through``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Grid = tuple[int, ...]
# (kernel: what triton.jit made, programs by axis, arguments by position, those by name).
Runner = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None]


def _on_device(kernel: Any, grid: Grid, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """On the current device's current stream; compiled at the first launch of its kind."""
    kernel[grid](*args, **named)


_runner: Runner = _on_device


def launch(kernel: Any, grid: Grid, *args: Any, **named: Any) -> None:
    """Run ``kernel`` once for each program of ``grid``; ``named``: also Triton's own options."""
    _runner(kernel, grid, args, named)


@contextlib.contextmanager
def through(runner: Runner) -> Iterator[Runner]:
    """Launches go to ``runner`` meanwhile; gives the one that they went to before."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield before
    finally:
        _runner = before
