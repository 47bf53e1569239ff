"""Latency models that a simulation runs on: decode steps, prefills and training quanta, in seconds.

The spatial model has the published form (Harli, two-stage latency predictor): at a rung with ``s``
decode and ``f`` finetune SMs, a batch of ``b`` requests with ``x`` context tokens takes

    T2 = (c_s + beta_s * b + kappa_s * x) * (1 + rho_s * f)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from sglang_harli.core import SmSplit
from sglang_harli.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of a ladder and its decode step, solo, per step, per request and per context token.
    ``stretch``: co-run factor of the step, 1 without training."""

    split: SmSplit
    base_s: float
    request_s: float
    token_s: float
    stretch: float

    def alone_s(self, batch: int, context_tokens: int) -> float:
        """T1: no training beside the step."""
        return self.base_s + self.request_s * batch + self.token_s * context_tokens

    def step_s(self, batch: int, context_tokens: int) -> float:
        """T2: training beside it throughout."""
        return self.alone_s(batch, context_tokens) * self.stretch


# Fitted by the published prototype for an RTX 6000 Ada (142 SMs) and a model like Llama-3-8B:
# decode SMs: c [ms], beta [ms per request], kappa [1e-4 ms per context token], rho [1e-3 per
# finetune SM].
_ADA = {
    16: (32.02, 0.0557, 2.213, 1.90),
    28: (19.73, 0.0976, 1.627, 2.35),
    44: (19.43, 0.0530, 1.531, 2.74),
    56: (18.04, 0.0622, 1.584, 2.88),
    72: (18.19, 0.0476, 1.510, 4.29),
    84: (17.95, 0.0523, 1.517, 4.21),
    100: (17.83, 0.0605, 1.503, 6.09),
    116: (18.18, 0.0492, 1.502, 6.25),
    128: (18.00, 0.0447, 1.492, 6.59),
    142: (18.23, 0.0459, 1.510, 0.0),
}
# Its ladder, from the most decode to the most training.
_ADA_LADDER = ((128, 8), (116, 24), (100, 40), (84, 56), (72, 68), (56, 84), (44, 96), (28, 112))
ADA_SMS = 142
# Not published: 2 FLOPs for each of 8e9 weights and each token, at half of the card's 364 TFLOP/s
# in bf16, and 5 ms a batch, on the whole device.
ADA_PREFILL_TOKEN_S = 2 * 8e9 / (0.5 * 364e12)
ADA_PREFILL_S = 5e-3
# One layer's forward or backward over a few hundred tokens on some fifty SMs; not published.
ADA_QUANTUM_S = 5e-3


def ada_rung(decode: int, finetune: int) -> Rung:
    """A rung of the published card."""
    c, beta, kappa, rho = _ADA[decode]
    return Rung(SmSplit(decode, finetune), c / 1e3, beta / 1e3, kappa / 1e7, 1 + rho / 1e3 * finetune)


def ada_rungs() -> tuple[Rung, ...]:
    """The rung on which training pauses, and the published ladder behind it."""
    return (ada_rung(ADA_SMS, 0), *(ada_rung(decode, finetune) for decode, finetune in _ADA_LADDER))


# ------------------------------------------------------------------ how fast training runs
PROPORTIONAL, SATURATING = "proportional", "saturating"
SATURATES_AT = 56  # SMs
RATE_MODELS = (PROPORTIONAL, SATURATING)


def finetune_rate(model: str, split: SmSplit) -> float:
    """Training throughput at a rung, in SMs' worth of work (SM seconds per second)."""
    if model not in RATE_MODELS:
        raise ConfigError(
            f"rate model {model!r} is not known: give one of {', '.join(RATE_MODELS)}", param="rate"
        )
    return float(split.finetune if model == PROPORTIONAL else min(split.finetune, SATURATES_AT))


# ------------------------------------------------------------------ devices
@dataclass
class Noise:
    """What separates true times from the model's: ``sigma`` of the logarithm of each step's random
    factor (0: none), and ``error``, a share of the predicted time on top of it."""

    sigma: float = 0.0
    error: float = 0.0
    seed: int = 0
    _rng: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < 1 or not -0.9 < self.error < 10:
            raise ConfigError(
                f"noise {self.sigma:g} and error {self.error:g} are not accepted: give a noise from 0 to below 1 and an "
                "error above -0.9 and below 10",
                param="noise",
            )
        self._rng = random.Random(self.seed)

    @property
    def exact(self) -> bool:
        return not self.sigma and not self.error

    def true(self, predicted_s: float) -> float:
        factor = 1 + self.error
        if self.sigma:
            factor *= self._rng.lognormvariate(0.0, self.sigma)
        return predicted_s * factor


@dataclass(frozen=True)
class SpatialDevice:
    """A device whose SMs are divided between decode and training.

    Attributes:
        rungs: every split that a policy may choose; index 0 lets training pause.
        decode_only: prompts are prefilled elsewhere and their KV cache arrives (the published
            set-up); else prefill runs here, between decode steps, on the decode SMs.
        quantum_s: of one training quantum, the grain of what is launched beside a step.
        sms: of the device: training has all rungs' most while nothing is served.
    """

    rungs: tuple[Rung, ...] = field(default_factory=ada_rungs)
    noise: Noise = field(default_factory=Noise)
    decode_only: bool = True
    sms: int = ADA_SMS
    quantum_s: float = ADA_QUANTUM_S
    prefill_s: float = ADA_PREFILL_S
    prefill_token_s: float = ADA_PREFILL_TOKEN_S
    max_prefill_tokens: int = 16384

    def predicted_s(self, rung: int, batch: int, context_tokens: int, train_s: float = math.inf) -> float:
        """A decode step with so much training beside it, at most a whole step of it.  While
        training runs, decode advances at ``1 / stretch`` of its pace on the same SMs."""
        line = self.rungs[rung]
        alone_s = line.alone_s(batch, context_tokens)
        return alone_s + min(train_s, alone_s * line.stretch) * (1 - 1 / line.stretch)

    def predicted_prefill_s(self, rung: int, tokens: int) -> float:
        """Compute-bound: it takes longer in proportion to the SMs it does not have."""
        share = self.rungs[rung].split.decode / self.sms
        return (self.prefill_s + self.prefill_token_s * tokens) / share


@dataclass(frozen=True)
class TimeSharedDevice:
    """A device that decodes and trains by turns, such as a CPU.

    The defaults have the shape of two CPU cores and a 25M model (docs/internals/training-step.md).
    ``solo``: line of a decode step; ``sizes``: rows that a quantum may take.
    """

    solo: Rung = field(default_factory=lambda: Rung(SmSplit(1, 0), 9e-3, 0.6e-3, 0.5e-6, 1.0))
    noise: Noise = field(default_factory=Noise)
    decode_only: bool = False
    prefill_s: float = 4e-3
    prefill_token_s: float = 60e-6
    max_prefill_tokens: int = 16384
    quantum_s: float = 4e-3
    quantum_token_s: float = 50.8e-6
    row_tokens: int = 256
    sizes: tuple[int, ...] = (1, 2, 3, 4)

    def predicted_s(self, batch: int, context_tokens: int) -> float:
        return self.solo.step_s(batch, context_tokens)

    def predicted_prefill_s(self, tokens: int) -> float:
        return self.prefill_s + self.prefill_token_s * tokens

    def predicted_quantum_s(self, rows: int) -> float:
        return self.quantum_s + self.quantum_token_s * self.row_tokens * rows

    @property
    def best_rate(self) -> float:
        """Tokens per second of the largest quantum, the most that training alone reaches."""
        rows = max(self.sizes)
        return rows * self.row_tokens / self.predicted_quantum_s(rows)
