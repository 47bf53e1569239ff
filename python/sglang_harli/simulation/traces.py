"""Traces of requests (arrivals, prompt and output lengths), from a seed or from published files.

Three workloads, each with the source of its figures.  Lengths are drawn from tables of quantiles,
interpolated in their logarithms; prompt and output independently (their correlation in the Azure
files is -0.11 and 0.00).  Arrivals are a Gamma renewal process whose rate swings.  Standard library
only: ``random`` keeps its streams from version to version, so a seed always gives the same trace.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from dataclasses import dataclass

from sglang_harli.errors import ConfigError

Quantiles = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: seconds from the trace's beginning, and lengths in tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests (at least one) in the order of their arrival; ``name`` is for tables."""

    name: str
    requests: tuple[TraceRequest, ...]

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s

    def mean_batch(self, tpot_s: float) -> float:
        """Requests in a server that emits each one's tokens at exactly the target: tokens offered
        per second times the target.  It depends on no server and no policy."""
        tokens = sum(request.output_tokens - 1 for request in self.requests)
        return tokens * tpot_s / self.duration_s if self.duration_s else math.inf


@dataclass(frozen=True, slots=True)
class Workload:
    """Statistics of a published trace.

    Attributes:
        gap_shape: shape of the Gamma distribution of the gaps between arrivals; 1 is Poisson, less
            is bursty (the coefficient of variation is ``shape ** -0.5``).
        swing: amplitude of the rate's sinusoid, as a share of its mean.
        prompt, output: quantiles of the lengths in tokens.
    """

    name: str
    gap_shape: float
    swing: float
    prompt: Quantiles
    output: Quantiles
    source: str


_LEVELS = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def _quantiles(*lengths: int) -> Quantiles:
    return tuple(zip(_LEVELS, lengths, strict=True))


CONVERSATION = Workload(
    name="azure-conv",
    gap_shape=0.96,
    swing=0.35,
    prompt=_quantiles(7, 29, 207, 396, 1020, 1189, 2735, 4142, 14050),
    output=_quantiles(8, 16, 54, 85, 129, 395, 424, 601, 1000),
    source=(
        "AzureLLMInferenceTrace_conv.csv (Azure LLM inference trace 2023, 19,366 requests in 58 minutes; Splitwise, ISCA "
        "2024): quantiles counted in the file (medians 1,020 and 129, means 1,155 and 211 tokens); coefficient of variation "
        "of the gaps within a minute 1.02 (median over minutes), of the requests per minute 0.25, which a sinusoid of "
        "amplitude 0.35 has. The ends of the tables below the first percentile are ours."
    ),
)
CODE = Workload(
    name="azure-code",
    gap_shape=0.025,
    swing=0.35,
    prompt=_quantiles(3, 17, 147, 578, 1469, 2745, 5194, 7436, 7437),
    output=_quantiles(6, 6, 7, 9, 13, 24, 55, 252, 1899),
    source=(
        "AzureLLMInferenceTrace_code.csv (8,819 requests in 57 minutes): quantiles counted in the file (medians 1,469 and "
        "13, means 2,048 and 28 tokens); coefficient of variation of the gaps within a minute 6.3. The swing is that of the "
        "conversation trace: the requests per minute vary more than a sinusoid can (0.76)."
    ),
)
BURSTGPT = Workload(
    name="burstgpt",
    gap_shape=0.5,
    swing=0.35,
    prompt=((0.0, 17), (0.25, 97), (0.5, 549), (0.75, 1327), (1.0, 1840)),
    output=((0.0, 18), (0.25, 215), (0.5, 349), (0.75, 477), (0.97, 716), (1.0, 1656)),
    source=(
        "BurstGPT (arXiv 2401.17644): Gamma shape 0.5 is the default of the generator published beside it. Lengths: the "
        "first 31 answered conversation rows of BurstGPT_1.csv; the whole file could not be had, so its tails (up to 31,400 "
        "and 12,500 tokens) are missing and these quantiles are not verified. The swing within a trace is that of the Azure "
        "conversation trace; its figures show the hourly count of conversations falling to a few per cent of the peak at "
        "night, which --swing 0.95 --swing-period-s 86400 follows."
    ),
)
WORKLOADS = {workload.name: workload for workload in (CONVERSATION, CODE, BURSTGPT)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a committed trace is made: the arguments of ``generate``."""

    workload: str
    mean_batch: float
    swing: float | None = None
    seed: int = 1
    duration_s: float = 120.0
    tpot_s: float = 0.040

    def make(self) -> Trace:
        return generate(
            workload(self.workload),
            seed=self.seed,
            duration_s=self.duration_s,
            mean_batch=self.mean_batch,
            tpot_s=self.tpot_s,
            swing=self.swing,
        )


# File by file, in simulation/trace_data.  At a mean batch of 64 the full swing's peaks are more
# than the published card can serve alone within 40 ms per token.
COMMITTED = {
    "conv-04": Recipe("azure-conv", 4),
    "conv-08": Recipe("azure-conv", 8),
    "conv-16": Recipe("azure-conv", 16),
    "conv-32": Recipe("azure-conv", 32),
    "conv-48": Recipe("azure-conv", 48),
    "conv-64": Recipe("azure-conv", 64, swing=0.15),
    "burst-16": Recipe("burstgpt", 16),
    "burst-32": Recipe("burstgpt", 32),
}


def workload(name: str) -> Workload:
    """The workload; ConfigError lists those that are known."""
    found = WORKLOADS.get(name)
    if found is None:
        raise ConfigError(
            f"workload {name!r} is not known: give one of {', '.join(WORKLOADS)}", param="workload"
        )
    return found


def draw(quantiles: Quantiles, u: float) -> int:
    """The length at quantile ``u`` of 0 to 1, in tokens."""
    place = min(bisect.bisect_right(quantiles, (u, math.inf)), len(quantiles) - 1)
    (low, a), (high, b) = quantiles[place - 1], quantiles[place]
    share = (u - low) / (high - low)
    return max(1, round(math.exp(math.log(a) + share * (math.log(b) - math.log(a)))))


def mean_length(quantiles: Quantiles) -> float:
    """Mean of what ``draw`` gives, tokens: by its integral over each piece of the table."""
    total = 0.0
    for (low, a), (high, b) in itertools.pairwise(quantiles):
        total += (high - low) * ((b - a) / math.log(b / a) if b > a else a)
    return total


def generate(
    kind: Workload,
    *,
    seed: int,
    duration_s: float,
    mean_batch: float,
    tpot_s: float,
    swing: float | None = None,
    swing_period_s: float | None = None,
) -> Trace:
    """A trace with the workload's statistics; ConfigError: a value that is not accepted.

    Args:
        duration_s: about how long; the rate is what has to fit.
        mean_batch: as ``Trace.mean_batch`` counts it, exactly; ``tpot_s`` is its target.
        swing: amplitude in place of the workload's; swing_period_s: default: the duration.
    """
    checks = {
        "duration-s": duration_s,
        "mean-batch": mean_batch,
        "tpot-ms": tpot_s,
        "swing-period-s": swing_period_s,
    }
    for name, value in checks.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name} {value:g} is not accepted: give a number above 0", param=name)
    amplitude = kind.swing if swing is None else swing
    if not 0 <= amplitude < 1:
        raise ConfigError(
            f"--swing {amplitude:g} is not accepted: give a share from 0 to below 1", param="swing"
        )
    rng = random.Random(f"{kind.name}/{seed}")
    gaps = mean_length(kind.output) - 1
    count = max(2, round(mean_batch * duration_s / (tpot_s * gaps)))
    lengths = [
        (draw(kind.prompt, rng.random()), max(2, draw(kind.output, rng.random()))) for _ in range(count)
    ]
    tokens = sum(output - 1 for _, output in lengths)
    length_s = tokens * tpot_s / mean_batch  # so that the mean batch is exact
    period = (swing_period_s or duration_s) / length_s
    masses = [0.0]
    for _ in range(count - 1):
        masses.append(masses[-1] + rng.gammavariate(kind.gap_shape, 1 / kind.gap_shape))
    requests = (
        TraceRequest(round(length_s * _unswing(mass / masses[-1], amplitude, period), 4), prompt, output)
        for mass, (prompt, output) in zip(masses, lengths, strict=True)
    )
    return Trace(f"{kind.name} batch {mean_batch:g} seed {seed}", tuple(requests))


def _unswing(share: float, amplitude: float, period: float) -> float:
    """When a share (0 to 1) of arrivals has come, at rate ``1 + amplitude * sin(2πt / period)``."""

    def came(at: float) -> float:
        return at + amplitude * period / math.tau * (1 - math.cos(math.tau * at / period))

    low, high, wanted = 0.0, 1.0, share * came(1.0)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if came(middle) < wanted else (low, middle)
    return high
