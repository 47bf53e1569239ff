"""Harli's published fit for an RTX 6000 Ada (142 SMs) and an 8B model: the prototype's constants,
per SMs of decode.

``T1 = c + beta * batch + kappa * context tokens`` in milliseconds,
``T2 = T1 * (1 + rho * SMs of training)``.
"""

from __future__ import annotations

SHARES = (16, 28, 44, 56, 72, 84, 100, 116, 128, 142)
C_MS = (32.02, 19.73, 19.43, 18.04, 18.19, 17.95, 17.83, 18.18, 18.00, 18.23)
BETA_MS = (0.0557, 0.0976, 0.0530, 0.0622, 0.0476, 0.0523, 0.0605, 0.0492, 0.0447, 0.0459)
KAPPA_MS = tuple(k * 1e-4 for k in (2.213, 1.627, 1.531, 1.584, 1.510, 1.517, 1.503, 1.502, 1.492, 1.51))
RHO = tuple(r * 1e-3 for r in (1.90, 2.35, 2.74, 2.88, 4.29, 4.21, 6.09, 6.25, 6.59))
# The prototype's ladder: SMs of decode, SMs of training.
LADDER = ((128, 8), (116, 24), (100, 40), (84, 56), (72, 68), (56, 84), (44, 96), (28, 112))


def solo_s(share: int, batch: int, context_tokens: int) -> float:
    at = SHARES.index(share)
    return (C_MS[at] + BETA_MS[at] * batch + KAPPA_MS[at] * context_tokens) / 1e3


def corun_s(share: int, finetune_sms: int, batch: int, context_tokens: int) -> float:
    return solo_s(share, batch, context_tokens) * (1 + RHO[SHARES.index(share)] * finetune_sms)
