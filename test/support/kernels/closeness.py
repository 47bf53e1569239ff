"""How near two results are, in the steps of a dtype."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def assert_near(found: Tensor, wanted: Tensor, *, steps: float = 2.0) -> None:
    """Each value within ``steps`` of the found dtype's steps at its own size, or at a tenth of
    the largest value's where it is smaller."""
    assert found.shape == wanted.shape
    exact = wanted.double()
    size = exact.abs().clamp_min(exact.abs().max() * 0.1)
    off = ((found.double() - exact).abs() / size.clamp_min(1e-30)).max().item()
    step = torch.finfo(found.dtype).eps
    assert off <= steps * step, f"off by {off / step:.2f} steps of {found.dtype}"
