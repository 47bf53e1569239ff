"""Runtime half of ``patches/13-cpu-sampling``: a request's sampling options work on the CPU engine.

Leans on: ``srt.sampling.penaltylib.repetition_penalty.apply_scaling_penalties``,
``srt.layers.sampler.multinomial_with_seed``, ``torch.compile``'s ``_torchdynamo_orig_callable``,
``srt.constrained.xgrammar_backend`` (``XGrammarGrammar.apply_vocab_mask``,
``XGrammarGrammarBackend.apply_vocab_mask``) and ``xgrammar.apply_token_bitmask_inplace``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_GRAMMAR = "sglang.srt.constrained.xgrammar_backend"


def _uncompiled_on_cpu(original: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
    plain = getattr(original, "_torchdynamo_orig_callable", original)
    return (plain if tensor.device.type == "cpu" else original)(tensor, *args, **kwargs)


def _mask_of_one(original: Callable[..., None], grammar: Any, logits: Any, vocab_mask: Any) -> None:
    _mask(lambda *args: original(grammar, *args), logits, vocab_mask)


def _mask(original: Callable[..., None], logits: Any, vocab_mask: Any) -> None:
    if logits.device.type != "cpu":
        original(logits, vocab_mask)
        return
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)


HOOKS = (
    (
        "sglang.srt.sampling.penaltylib.repetition_penalty.apply_scaling_penalties",
        _uncompiled_on_cpu,
        "around",
    ),
    ("sglang.srt.layers.sampler.multinomial_with_seed", _uncompiled_on_cpu, "around"),
    (f"{_GRAMMAR}.XGrammarGrammar.apply_vocab_mask", _mask_of_one, "around"),
    (f"{_GRAMMAR}.XGrammarGrammarBackend.apply_vocab_mask", _mask, "around"),
)
