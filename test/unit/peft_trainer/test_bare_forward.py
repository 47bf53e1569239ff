"""The row that the frozen base computes alone: as transformers computes it, in quanta, and in fp32
slice by slice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sglang_harli.errors import TrainingError, UnsupportedError
from sglang_harli.peft_trainer import bare_forward
from sglang_harli.peft_trainer.bare_forward import BareForward
from sglang_harli.peft_trainer.base.frozen_base import from_transformers
from sglang_harli.peft_trainer.layers.rotary import Rotary, ServedRotary
from support.trainer.trainer_oracle import EXTRA, VOCABULARY, one_thread, tiny_model

__all__ = ["one_thread"]  # a fixture

IDS = [token * 7 % VOCABULARY for token in range(40)]


def expected(model: Any) -> torch.Tensor:
    ids = torch.tensor([IDS])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def run(model: Any, head_tokens: int, *, exact: bool) -> tuple[torch.Tensor, int]:
    """Log-probabilities, and the quanta that they took."""
    forward = BareForward(from_transformers(model), IDS, head_tokens, exact=exact)
    count = 0
    while not forward.finished:
        assert forward.logprobs() is None
        forward.run()
        count += 1
    assert count == forward.whole
    found = forward.logprobs()
    assert found is not None and len(found) == len(IDS) - 1
    return torch.tensor(found), count


@pytest.mark.parametrize("arch", EXTRA)
def test_it_is_what_transformers_computes(arch: str) -> None:
    model = tiny_model(arch, torch.float32)
    right = expected(model)
    found, quanta = run(model, 7, exact=False)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert quanta == 1 + 2 + 6  # the embedding, two layers, 39 tokens by 7


@pytest.mark.parametrize("arch", EXTRA)
def test_in_fp32_by_slices_of_sixteen_bit_weights(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is taken in several slices, the last of them a shorter one."""
    model = tiny_model(arch, torch.bfloat16)
    monkeypatch.setattr(bare_forward, "SLICE", 32 * 25)
    found, quanta = run(model, 7, exact=True)
    torch.testing.assert_close(found, expected(model.float()), rtol=1e-3, atol=3e-3)  # tables are in bf16
    assert quanta == 1 + 2 * 2 + 4  # 90 rows of the head by 25


def test_rounding_shows_between_the_two() -> None:
    model = tiny_model("qwen2", torch.bfloat16)
    (rounded, _), (exact, _) = run(model, 64, exact=False), run(model, 64, exact=True)
    assert 1e-4 < (rounded - exact).abs().mean() < 0.1


def test_frequencies_that_change_with_the_input_are_refused_of_transformers() -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedError, match="rope_type dynamic"):
        from_transformers(model)


class _Served(nn.Module):
    """A rotary embedding as SGLang has it: so much of it is read."""

    def __init__(self, positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.randn(positions, 8).to(dtype))


def test_a_served_table_goes_as_far_as_it_goes() -> None:
    served = ServedRotary(_Served(11, torch.float32), torch.bfloat16)
    rotary = Rotary(served.table, 11)
    for width in (1, 5, 11, 3):
        cos, sin = rotary.upto(width)
        rows = served.cache[:width].to(torch.bfloat16)
        assert cos.shape == sin.shape == (1, width, 8)
        assert torch.equal(cos[0], torch.cat([rows[:, :4]] * 2, -1))
        assert torch.equal(sin[0], torch.cat([rows[:, 4:]] * 2, -1))
    with pytest.raises(
        TrainingError, match="a row of 12 tokens: the served model has 11 positions"
    ) as raised:
        rotary.upto(12)
    assert raised.value.code == "row_too_long"
