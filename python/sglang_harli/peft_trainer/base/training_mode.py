"""The mode in which quanta run on a thread that serves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Out of SGLang's inference mode, and autograd on this very thread: thread-local contexts, such
    as memory pools, would not hold on its own."""
    with torch.inference_mode(False), torch.no_grad(), torch.autograd.set_multithreading_enabled(False):
        yield
