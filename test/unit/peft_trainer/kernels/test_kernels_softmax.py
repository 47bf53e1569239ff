"""The head's kernel against torch: losses, hits, and the gradient where the logits were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_harli.peft_trainer.kernels import softmax
from support.kernels.closeness import DTYPES, assert_near
from support.kernels.interpreter import interpreted


def reference(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    exact = logits.double().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(exact, targets, reduction="sum")
        (grad,) = torch.autograd.grad(loss, exact)
    found = logits.gather(1, targets[:, None])[:, 0]
    return loss.detach(), (found == logits.amax(1)).sum(), grad * factor


def head(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    logits = (torch.randn(tokens, vocabulary, generator=generator) * 4).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::2] = logits[::2].argmax(1)  # some are right
    return logits, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 7), (17, 96), (130, 33), (3, 4096), (3, 9001)])
def test_losses_hits_and_gradient(tokens, vocabulary, dtype):
    logits, targets = head(tokens, vocabulary, dtype)
    loss, hits, grad = reference(logits, targets, 1 / 32)
    with interpreted() as names:
        found_loss, found_hits = softmax.cross_entropy(logits, targets[:, None], 1 / 32)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert found_hits.item() == hits.item() >= (tokens + 1) // 2
    assert_near(logits, grad, steps=1 if dtype == torch.bfloat16 else 32)
    assert names == ["_rows", "_sums"]


def test_a_device_scalar_scales_and_rows_may_lie_apart():
    logits, targets = head(5, 100, torch.bfloat16)
    _, _, grad = reference(logits, targets, 1024.0)
    wide = torch.full((5, 160), torch.nan, dtype=torch.bfloat16)
    wide[:, :100] = logits
    with interpreted():
        softmax.cross_entropy(wide[:, :100], targets.int(), torch.tensor(1024.0))
    assert_near(wide[:, :100], grad, steps=1)
    assert wide[:, 100:].isnan().all()


def test_without_a_factor_the_logits_stay():
    logits, targets = head(6, 50, torch.float32)
    loss, _, _ = reference(logits, targets, 1.0)
    before = logits.clone()
    with interpreted():
        found, _ = softmax.cross_entropy(logits, targets, None)
    assert torch.equal(logits, before)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_order_of_programs_does_not_matter():
    results = []
    for seed in (None, 1, 2):
        logits, targets = head(9, 5000, torch.bfloat16)
        with interpreted(seed):
            loss, hits = softmax.cross_entropy(logits, targets, 0.5)
        results.append((logits, loss, hits))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_finite_shows_as_in_torch():
    logits, targets = head(4, 5000, torch.float32)
    logits[0, 3], logits[1, 4] = torch.inf, torch.nan
    logits[2, :4500] = -torch.inf  # a whole first block
    targets[2] = 4600
    with interpreted():
        loss, _ = softmax.cross_entropy(logits, targets, 1.0)
    assert loss.isnan()
    assert logits[0].isnan().any() and logits[1].isnan().any()
    assert logits[2:].isfinite().all()
