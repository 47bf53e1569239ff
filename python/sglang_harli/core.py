"""The nouns that the whole package shares: frozen, small, standard library only."""

from __future__ import annotations

import enum
from dataclasses import dataclass

PROFILE_ROUTE = "/harli/profile"  # of the HTTP server: what it has measured of itself


class JobStatus(enum.StrEnum):
    """A job's state, in the words of the OpenAI fine-tuning API (plus ``paused``)."""

    VALIDATING_FILES = "validating_files"  # only jobs that come with an uploaded file
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class SubState(enum.StrEnum):
    """What a running job is doing; always shown together with a reason."""

    TRAINING = "training"
    YIELDING = "yielding"  # serving needs the device
    WAITING_DATA = "waiting_data"
    WAITING_MEMORY = "waiting_memory"
    CHECKPOINTING = "checkpointing"
    PUBLISHING = "publishing"


class MemoryPurpose(enum.StrEnum):
    """What training holds memory for, in the order of giving it back (docs/internals/memory.md)."""

    text: str  # in a sentence

    def __new__(cls, value: str, text: str) -> MemoryPurpose:
        purpose = str.__new__(cls, value)
        purpose._value_ = value
        purpose.text = text
        return purpose

    KEPT = "kept", "kept activations"  # save a recomputation
    MICRO_BATCH = (
        "micro_batch",
        "the next micro-batch",  # saved layer inputs, gradients of activations, logits: run again if dropped
    )
    STATE = "state", "the adapter and its optimizer"  # with gradients: moved to host memory last


class Reason(enum.StrEnum):
    """Why training runs, or does not, at one decision of the scheduler's policy.  The value is what
    ``harli status`` and the job's sub-state show; ``label`` the name in metrics, or ``other``."""

    label: str

    def __new__(cls, text: str, label: str = "other") -> Reason:
        reason = str.__new__(cls, text)
        reason._value_ = text
        reason.label = label
        return reason

    IDLE = "nothing is served"
    SLACK = "slack under the latency target"
    PROBE = "the smallest quantum runs once, to be measured: its estimate alone held training back"
    PREFILL_WAITING = "a prompt waits for prefill", "prompt"
    NO_SLACK_TPOT = "no slack under the TPOT target", "tpot"
    NO_SLACK_ITL = "no slack under --harli-max-itl-ms", "itl"
    NO_SLACK_TTFT = "no slack under the TTFT target", "ttft"
    NO_SLACK = "no slack", "none"
    CLAIM = "copies of its state and adapters have a share of the time, whatever waits"
    NO_CLOCK = (
        "it is not known when a running request got its first token, so neither what it may wait",
        "no_clock",
    )
    PAUSED = "generation is paused", "paused"
    MEMORY_RELEASED = (
        "SGLang has released its memory: training goes on after /resume_memory_occupation",
        "memory_released",
    )
    BANKING = "a larger quantum, which trains more per second, is to fit later", "banking"
    IDLE_COMES = "idle time was seen lately and costs requests nothing: training waits for it", "idle_comes"
    TOO_LONG = (
        "the smallest quantum exceeds --harli-max-quantum-ms: it trains while nothing is served",
        "too_long",
    )


class Claim(enum.Enum):
    """When a quantum may run."""

    POLICY = "policy"  # where the policy finds time for it
    SHARE = "share"  # besides, in a small share of the time, whatever waits
    EVERY_STEP = "every step"  # behind each step of serving, whatever waits: requests wait for it


class QuantumKind(enum.StrEnum):
    """The kinds of training work that the scheduler slots in (docs/internals/training-step.md)."""

    EMBED = "embed"
    FORWARD = "forward"
    HEAD = "head"  # final norm, logits and loss with their backward, over a chunk of target tokens
    HEAD_EVAL = "head_eval"  # the same without backward: an evaluation's loss and accuracy
    BACKWARD = "backward"  # one layer: recompute and backward
    BACKWARD_KEPT = "backward_kept"  # one layer whose activations were kept: backward alone
    ACCUMULATE = "accumulate"
    OPTIMIZER = "optimizer"
    COPY = "copy"  # a tensor of the state into, or out of, shared memory
    ADAPTER = "adapter"  # a slice of a finished adapter loaded into the serving side
    CHECK = "check"  # a part of the comparison of training with serving


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What serving is doing behind a batch.

    Attributes:
        running, context_tokens: requests in the running decode batch, and their lengths' sum.
        waiting: prompts that training stops for at once; a chunked prefill in progress is one.
        promised: prompts that wait under a deadline of their own, which the slack counts.
        unclocked: running requests whose first token's time is not known, so no deadline is.
    """

    running: int = 0
    context_tokens: int = 0
    waiting: int = 0
    promised: int = 0
    unclocked: int = 0

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.promised)


@dataclass(frozen=True, slots=True)
class LatencyEstimate:
    """Seconds: the expected value, and an upper bound that is seldom exceeded."""

    expected_s: float
    upper_s: float


@dataclass(frozen=True, slots=True)
class QuantumOffer:
    """The next quantum of the run and what each size of it would cost.

    Attributes:
        candidates: ``(rows, upper_s)`` in rising order of both; the first is the least that is
            worth running.  Kinds that are not cut by rows offer one candidate.
        fixed: the split is fixed (``--harli-quantum-rows``, or a kind that is not cut).
        claim: when it may run.
        doubt: factor on the first candidate's price where that price alone holds training back.
    """

    kind: QuantumKind
    candidates: tuple[tuple[int, float], ...]
    fixed: bool = False
    doubt: float = 1.0
    claim: Claim = Claim.POLICY


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy allows now: 0 or 1 ``quanta`` of at most ``rows`` rows, and why.  Below a
    slack of ``needs_s`` seconds a refusal stays what it is (0: unknown)."""

    quanta: int
    rows: int
    reason: Reason
    needs_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SmSplit:
    """How a device's streaming multiprocessors (SMs) are divided: a rung of the ladder."""

    decode: int
    finetune: int


@dataclass(frozen=True, slots=True)
class RungOffer:
    """What the next decode step would cost, and training would gain, at one rung.

    Attributes:
        alone_s: upper bound of the decode step on the rung's SMs with no training beside it (T1).
        beside_s: upper bound with training beside it throughout (T2).
        rate: predicted training throughput, in a unit that all offers share; 0 where it pauses.
    """

    split: SmSplit
    alone_s: float
    beside_s: float
    rate: float


@dataclass(frozen=True, slots=True)
class RungChoice:
    """How the next decode step is run, and why.

    Attributes:
        rung: index among the offers.
        train_s: seconds of training beside the step; the whole step where that is ``beside_s``.
        rate: predicted training throughput over the step.
    """

    rung: int
    train_s: float
    rate: float
    reason: Reason
