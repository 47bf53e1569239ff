"""Each family of our kernels against torch's own operators, on the device, before one is used.

Random inputs of the served model's sizes go through both. What a job may bring (ranks, evaluation,
a loss scale, rows in blocks) goes through too, so that every variant is compiled before the server
is healthy.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from sglang_harli.peft_trainer.layers.operators.plain import Gate, Heads, LoraPart
from sglang_harli.peft_trainer.layers.operators.torch_kernels import TorchOperators
from sglang_harli.peft_trainer.layers.rms_norm import RmsNorm
from sglang_harli.peft_trainer.layers.saved_tensors import SavedTensors

ROWS, WIDTH, WIDER = 2, 33, 40  # of the inputs; rows lie ``WIDER`` tokens apart
RANKS = (8, 16, 32, 64)  # one of each variant
STEPS = 4  # of the dtype, by which both may differ
_EXACT = 2.0**-14  # the same for fp32, whose sums differ in their order

Pair = tuple[str, Tensor, Tensor]  # what it is, ours, torch's


class Base(Protocol):
    """What of a frozen base says how large its tensors are."""

    @property
    def config(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Sizes:
    """Of a model; ``groups``: columns of the linears of each group."""

    hidden: int
    vocabulary: int
    epsilon: float
    heads: Heads
    gate: Gate
    groups: Sequence[Sequence[slice]]


def disagreement(
    family: str,
    ours: TorchOperators,
    theirs: TorchOperators,
    base: Base,
    heads: Heads,
    gate: Gate,
    groups: Sequence[Sequence[slice]],
) -> str | None:
    """Why a family is not to be used, in one sentence; None: both compute the same.

    Args:
        ours: with the family's kernels; theirs: torch's own.
        heads, gate, groups: of a layer: see ``Sizes``.
    """
    config = base.config
    sizes = Sizes(config.hidden_size, config.vocab_size, config.rms_norm_eps, heads, gate, groups)
    draw = _Draw(base.device, base.dtype)
    try:
        for what, found, wanted in CASES[family](ours, theirs, sizes, draw):
            off, most = _off(found, wanted), _most(found.dtype)
            if not off <= most:  # NaN too
                return (
                    f"the {family} kernels are not used, torch's are: {what} differs from torch's by {off:.2g} "
                    f"of its size (at most {most:.2g})"
                )
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError, _triton_error()) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the {family} kernels are not used, torch's are: they do not compile or run here ({text})"
    return None


def _triton_error() -> type[Exception]:
    from triton.errors import TritonError

    return TritonError


def _most(dtype: torch.dtype) -> float:
    return max(STEPS * torch.finfo(dtype).eps, _EXACT)


def _off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of a value's size or, where that is less, of a tenth of the
    largest."""
    if found.shape != wanted.shape or not wanted.numel():
        return float(found.shape != wanted.shape)
    exact = wanted.double()
    size = exact.abs().maximum(exact.abs().max() * 0.1).clamp_min(1e-30)
    return ((found.double() - exact).abs() / size).max().item()


class _Draw:
    """Random tensors, the same each time; a generator of its own."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device=device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self.dtype)

    def rows(self, hidden: int) -> Tensor:
        """``[ROWS, WIDTH, hidden]`` within longer rows."""
        return self(ROWS, WIDER, hidden)[:, :WIDTH]


def _norm(ours: TorchOperators, theirs: TorchOperators, sizes: Sizes, draw: _Draw) -> Iterator[Pair]:
    weight = draw(sizes.hidden)
    norm = RmsNorm("norm", SimpleNamespace(weight=weight, variance_epsilon=sizes.epsilon))
    x, grad, passed = draw.rows(sizes.hidden), draw(ROWS, WIDTH, sizes.hidden), draw.rows(sizes.hidden)
    added = draw(ROWS, WIDTH, sizes.hidden)
    results = []
    for operators in (ours, theirs):
        alone, summed, flat = SavedTensors(), SavedTensors(), SavedTensors()
        total, normed = operators.add_rms_norm(norm, x, added.clone(), summed)
        into = torch.cat((passed, passed), 1)[:, :WIDTH]
        results.append(
            [
                operators.rms_norm(norm, x, alone),
                total,
                normed,
                operators.rms_norm(norm, x[0], flat),
                operators.rms_norm_backward(norm, grad, alone, passed),
                operators.rms_norm_backward(norm, grad, summed, into, into),
                operators.rms_norm_backward(norm, grad[0], flat),
            ]
        )
    names = ["a norm", "a sum", "a norm of a sum", "the last norm", *["a norm's gradient"] * 3]
    yield from zip(names, *results, strict=True)


def _gated(ours: TorchOperators, theirs: TorchOperators, sizes: Sizes, draw: _Draw) -> Iterator[Pair]:
    width = sizes.gate.columns[-1].stop
    flat, grad = draw(WIDTH, width), draw(WIDTH, width // 2)
    traces = SavedTensors(), SavedTensors()
    found = [o.gated(flat, sizes.gate, trace) for o, trace in zip((ours, theirs), traces, strict=True)]
    yield "SwiGLU", found[0], found[1]
    pairs = zip((ours, theirs), traces, strict=True)
    found = [operators.gated_backward(grad.clone(), sizes.gate, trace) for operators, trace in pairs]
    yield "SwiGLU's gradient", found[0], found[1]


def _rotary(ours: TorchOperators, theirs: TorchOperators, sizes: Sizes, draw: _Draw) -> Iterator[Pair]:
    size, columns = sizes.heads.head_dim, sizes.heads.columns
    angles = torch.arange(WIDTH, device=draw.device)[:, None] / torch.arange(
        1, size // 2 + 1, device=draw.device
    )
    turn = torch.cat((angles, angles), -1)[None]
    rotary = turn.cos().to(draw.dtype), turn.sin().to(draw.dtype)
    flat = draw(ROWS * WIDTH, columns[-1].stop)
    shapes = [(ROWS, WIDTH, (part.stop - part.start) // size, size) for part in columns]
    query, key, value = (draw(*shape).transpose(1, 2) for shape in shapes)
    exact = torch.promote_types(draw.dtype, torch.float32)
    by_head = [x.to(exact).contiguous() for x in (key, value)]  # as of a row in blocks
    for table in (rotary, (turn.cos(), turn.sin())):
        traces = SavedTensors(), SavedTensors()
        found = [
            o.split_heads(flat, sizes.heads, table, t) for o, t in zip((ours, theirs), traces, strict=True)
        ]
        yield from zip(["a query", "a key", "a value"], *found, strict=True)
        for keys, values in ((key, value), by_head):
            pairs = zip((ours, theirs), traces, strict=True)
            back = [o.split_heads_backward(query, keys, values, sizes.heads, t) for o, t in pairs]
            yield "a head's gradient", back[0], back[1]


def _lora(ours: TorchOperators, theirs: TorchOperators, sizes: Sizes, draw: _Draw) -> Iterator[Pair]:
    for rank, columns in itertools.product(RANKS, sizes.groups):
        spans = [slice(i * rank, (i + 1) * rank) for i in range(len(columns))]
        parts = [LoraPart(r, c, draw(c.stop - c.start, rank)) for r, c in zip(spans, columns, strict=True)]
        out, low = draw(ROWS * WIDTH, columns[-1].stop), draw(ROWS * WIDTH, rank * len(columns))
        sums, grads = [], []
        for operators in (ours, theirs):
            sums.append(out.clone())
            operators.add_lora(sums[-1], low, parts)
            grad_b = [torch.empty_like(part.b) for part in parts]
            grads.append([operators.lora_backward(out, low, parts, 1.5, grad_b), *grad_b])
        yield f"a product of rank {rank}", *sums
        yield from ((f"a gradient of rank {rank}", *both) for both in zip(*grads, strict=True))


def _head(ours: TorchOperators, theirs: TorchOperators, sizes: Sizes, draw: _Draw) -> Iterator[Pair]:
    given = draw(WIDTH, sizes.vocabulary)
    targets = (torch.arange(WIDTH, device=draw.device) * 7919 % sizes.vocabulary)[:, None]
    targets[::2] = given[::2].argmax(1, keepdim=True)
    exact = torch.promote_types(draw.dtype, torch.float32)
    for factor in (0.25, torch.full((), 64.0, device=draw.device), None):
        sums, grads = [], []
        for operators in (ours, theirs):
            low = given.clone()
            logits = low if exact == draw.dtype else torch.empty_like(low, dtype=exact)
            if factor is None:
                sums.append(operators.losses(logits, low, targets))
            else:
                sums.append(operators.losses_and_gradient(logits, low, targets, factor))
                grads.append((low.gather(1, targets), low.scatter(1, targets, 0.0)))
        yield "the loss", *(loss.to(exact) for loss, _ in sums)
        yield "the count of correct predictions", *(correct.to(exact) for _, correct in sums)
        yield from zip(["a target's gradient", "the head's gradient"], *grads, strict=True) if grads else ()


CASES: dict[str, Callable[[TorchOperators, TorchOperators, Sizes, _Draw], Iterator[Pair]]] = {
    "head": _head,
    "gated": _gated,
    "norm": _norm,
    "rotary": _rotary,
    "lora": _lora,
}
