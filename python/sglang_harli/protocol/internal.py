"""Messages between the finetune service, the scheduler and the HTTP process
(docs/internals/run-protocol.md).

Frame 0 is a msgpack header (one of the structs below, tagged by its name); arrays follow as raw
frames (int32, C order).  Every message carries the sender's sequence number.  A run is named by
(job, attempt); a receiver drops messages of an older attempt.  Any message may be lost or come
twice; the page's table "Service and scheduler" says what then happens.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import Struct, field

from sglang_harli.protocol.base_print import BasePrint as BasePrint
from sglang_harli.protocol.job_limits import ServedLimits as ServedLimits
from sglang_harli.protocol.public import Hyperparameters

EVALUATION = "evaluation"  # in a checkpoint's plain values: the EvaluationState


class Message(Struct, kw_only=True, tag=True):
    seq: int = 0


# ------------------------------------------------------------------ shared nouns
class TensorRef(Struct, frozen=True):
    """One tensor in a slot: numpy/torch dtype name (``float32``), offset in bytes (64-aligned)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SlotRef(Struct, frozen=True, kw_only=True):
    """A file in the run's folder of shared memory, faulted in by its maker, and what lies in it."""

    path: str
    nbytes: int
    tensors: list[TensorRef] = field(default_factory=list)


class RunSpec(Struct, frozen=True, kw_only=True):
    """What the scheduler needs to know of a job to train it.  ``memory_bytes``: upper estimate
    (``ServedLimits.job_memory_bytes``); 0: not known."""

    job: str
    attempt: int
    hyperparameters: Hyperparameters
    total_steps: int
    memory_bytes: int = 0


class BatchCursor(Struct, frozen=True, kw_only=True):
    """``step``: optimizer steps from 1 over the whole run; ``index``: micro-batches within it."""

    epoch: int
    step: int
    index: int


class EvaluationBatches(Struct, frozen=True, kw_only=True):
    """The micro-batches that are evaluated behind an optimizer step.

    Attributes:
        count: of them; their indices in the step begin behind those of the training micro-batches.
        sampled: the first so many give ``valid_loss``, all of them ``full_valid_loss``.
        whole: they are all of the validation rows; else there is no ``full_valid_loss``.
    """

    count: int
    sampled: int
    whole: bool


class EvaluationState(Struct, frozen=True, kw_only=True):
    """What a run's evaluations have come to; it goes with each of its checkpoints.

    Attributes:
        step: optimizer step of the last one (0: there was none).
        best_step, best_loss: of the lowest ``valid_loss`` so far (0, None: none was finite).
        stale: evaluations in a row that did not improve on the best one by the minimal delta.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0

    def after(self, step: int, loss: float, min_delta: float) -> EvaluationState:
        """Behind the evaluation of ``step``.  As in transformers' EarlyStoppingCallback the best
        loss is the lowest one, by however little, and the minimal delta counts for patience."""
        best, known = self.best_loss, math.isfinite(loss)
        improved = known and (best is None or loss < best)
        enough = known and (best is None or best - loss > min_delta)
        return EvaluationState(
            step=step,
            best_step=step if improved else self.best_step,
            best_loss=loss if improved else best,
            stale=0 if enough else self.stale + 1,
        )

    def stops(self, patience: int | None, total_steps: int) -> bool:
        """Whether training ends early behind ``step``."""
        return patience is not None and self.stale >= patience and 0 < self.step < total_steps


def state_in(meta: dict[str, Any]) -> EvaluationState:
    """The state in a checkpoint's plain values; one of before has none."""
    return msgspec.convert(meta.get(EVALUATION) or {}, EvaluationState)


# ------------------------------------------------------------------ scheduler -> service
class Hello(Message):
    """On every (re)connection, and where something that it says has changed.  ``job``, ``attempt``,
    ``step``, ``next_cursor`` and ``taken`` (as in Pulse): of the run in progress.  ``hold``: why no
    run is to start now ("": it may); the next hello may lift it.  ``base``: the print of the served
    weights, after so many ``updates`` of them since the start.
    """

    pid: int
    rank: int
    limits: ServedLimits | None  # None: finetuning is not possible here, `refusal` says why
    refusal: str | None = None
    job: str | None = None
    attempt: int = 0
    step: int = 0
    next_cursor: BatchCursor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    revision: int = 0
    hold: str = ""
    base: BasePrint | None = None
    updates: int = 0
    taken: BatchCursor | None = None


class Pulse(Message):
    """While a run is held, about every two seconds: where it stands, to find what was lost.

    ``taken``: the first micro-batch that is not done (``BatchesTaken``).  ``state_bytes``: 0 until
    the adapter is there.  ``snapshot``: the step of the snapshot in the slot that waits for its
    SnapshotSaved (-1: none).  ``stopping``: a StopRun has come.
    """

    job: str
    attempt: int
    step: int
    next_cursor: BatchCursor
    state_bytes: int
    has_slot: bool
    snapshot: int
    stopping: bool
    taken: BatchCursor | None = None


class BatchesTaken(Message):
    """Within a step: micro-batches before ``cursor`` are done, and there is room for others."""

    job: str
    attempt: int
    cursor: BatchCursor


class RunStarted(Message):
    """The run's tensors exist; a snapshot needs ``state_bytes``: answer with SnapshotSlot."""

    job: str
    attempt: int
    step: int
    state_bytes: int


class StepDone(Message):
    """Kept in the scheduler's bounded ring until acknowledged, as are RunStarted, EvaluationDone,
    SnapshotReady, RunStopped and RunFailed.

    ``after``, here and in those: the step of the StepDone sent before; ``evaluated``: of the
    EvaluationDone.  A service that lacks one of them drops this message without an Ack, and gets
    both again.  ``total_tokens``: so far.
    """

    job: str
    attempt: int
    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int  # run through the model, padding not counted
    target_tokens: int
    seconds: float  # wall time since the step before
    total_tokens: int = 0
    after: int = 0
    evaluated: int = 0
    train_mean_token_accuracy: float | None = None


class EvaluationDone(Message):
    """The rows behind ``step`` were evaluated; ``rows``, ``target_tokens``: of those of the loss.
    ``full_...``: of all validation rows; None: not all were evaluated.  ``state``: what the run's
    evaluations have come to with this one."""

    job: str
    attempt: int
    step: int
    epoch: int
    valid_loss: float
    valid_mean_token_accuracy: float
    rows: int
    target_tokens: int
    state: EvaluationState
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    after: int = 0


class SnapshotReady(Message):
    """The state after ``step`` is in the slot; ``meta``: plain values (schedule, RNG, cursor).
    ``train_loss``, ``train_mean_token_accuracy``: of that step, if they have reached the host."""

    job: str
    attempt: int
    step: int
    slot: SlotRef
    meta: dict[str, Any]
    reason: str  # every, best, pause, shutdown, final
    after: int = 0
    evaluated: int = 0
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None


class RunStopped(Message):
    """Answer to StopRun: the run's memory is returned; ``step`` is the last one applied.
    ``reason``: why it ended unasked ("": it was asked): the job goes on from its checkpoint."""

    job: str
    attempt: int
    step: int
    after: int = 0
    reason: str = ""
    evaluated: int = 0


class RunFailed(Message):
    """``passing``: the environment's fault, not the job's: it is queued again after a pause."""

    job: str
    attempt: int
    step: int
    code: str
    message: str
    after: int = 0
    passing: bool = False
    evaluated: int = 0


class Progress(Message):
    """Sub-state changes and, about once a second while a run is held, progress within the step."""

    job: str
    attempt: int
    step: int
    sub_state: str
    reason: str
    tokens: int  # of the run so far, the micro-batch in flight included


class StatusReport(Message):
    """Answer to StatusRequest; plain values for ``harli status``."""

    request: int
    serving: dict[str, Any]
    training: dict[str, Any] | None
    pool: dict[str, Any] | None = None


class OptionsSet(Message):
    """Answer to SetOptions."""

    request: int
    outcome: str  # applied, deferred, stale, conflict
    revision: int
    effective: dict[str, Any]
    text: str = ""


# ------------------------------------------------------------------ service -> scheduler
class Welcome(Message):
    """The service is there.  ``answers``: the ``seq`` of the Hello it read; 0: say hello again."""

    pid: int
    answers: int = 0


class StartRun(Message):
    """``restore``: checkpoint ``step`` in a slot, which the scheduler unmaps after RunStarted.

    ``scheduler``: pid of the answered hello; another process drops the message (0: none does), and
    so does that one after an update of its weights (``updates``).  ``begin``: the first micro-batch
    that will come, which may be one of the evaluation of ``step``.
    """

    spec: RunSpec
    scheduler: int = 0
    updates: int = 0
    step: int = 0
    restore: SlotRef | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    begin: BatchCursor | None = None


class MicroBatch(Message):
    """Frames: ids, places and targets, int32, as ``micro_batches.Padded`` has them.

    ``lengths`` fall; ``rows`` are the rows' positions within the step.  ``step_target_tokens``:
    targets of the whole optimizer step, the divisor of its loss (a row's first label never counts).

    ``evaluation``: what is evaluated behind this step, if anything.  Its micro-batches are those
    with an index from ``micro_batches`` on; ``step_target_tokens`` are then the evaluation's.
    """

    job: str
    attempt: int
    cursor: BatchCursor
    micro_batches: int  # in this step
    lengths: list[int]
    rows: list[int]
    step_target_tokens: int
    evaluation: EvaluationBatches | None = None

    @property
    def evaluates(self) -> bool:
        """Whether its rows are evaluated, not trained."""
        return self.cursor.index >= self.micro_batches

    @property
    def last(self) -> bool:
        """Whether it is the step's last one, or its evaluation's."""
        behind = self.evaluation.count if self.evaluation is not None else 0
        return self.cursor.index + 1 == self.micro_batches + behind


class SnapshotSlot(Message):
    """A faulted-in slot of at least RunStarted.state_bytes; the scheduler's until SnapshotReady,
    and again after SnapshotSaved."""

    job: str
    attempt: int
    slot: SlotRef


class SnapshotSaved(Message):
    """The snapshot of ``step`` is durable (or gave up: ``ok`` false); the slot is free again."""

    job: str
    attempt: int
    step: int
    ok: bool = True


class StopRun(Message):
    """Pause or cancel: stop at the next quantum; ``snapshot``: save the last applied step first."""

    job: str
    attempt: int
    snapshot: bool


class Ack(Message):
    """The scheduler's messages of these ``seq`` are durable, or no longer of use.  One by one: a
    later one does not acknowledge a lost message."""

    seqs: list[int]


class StatusRequest(Message):
    request: int


class SetOptions(Message):
    request: int
    values: dict[str, float | str | None]  # milliseconds, sizes, or none
    if_revision: int | None = None


# ------------------------------------------------------------------ HTTP process <-> service
class HttpHello(Message):
    """From the HTTP process once it can publish; ``tokenizer``: fingerprint of the tokenizer and
    chat template in the run directory (tokenizer_state.py), or ""."""

    pid: int
    served_model_name: str
    tokenizer: str = ""


class ServiceState(Message):
    """From the service: on change, in answer to HttpHello, and every few seconds, a sign of life.

    ``endpoint_bound``: the public socket is bound.  ``scheduler_seen``: a hello has been read; both
    gate /health_generate.  ``adapters``: names of the succeeded jobs' adapters, loaded on demand
    (AdapterWanted); a sign of life names none.  ``others``: by reason, adapters of another base,
    not served: a request for one gets the reason (None: as before).  ``jobs``: how many there are
    by status.  ``greeted_by``: pid of the HTTP process whose hello has been read (0: none); another
    process then says hello again.  ``tokenizer_lost``: the named tokenizer could not be read; it is
    written again, and named again.
    """

    pid: int
    endpoint_bound: bool
    scheduler_seen: bool
    refusal: str | None = None
    adapters: list[str] = field(default_factory=list)
    jobs: dict[str, int] = field(default_factory=dict)
    greeted_by: int = 0
    others: dict[str, list[str]] | None = None
    tokenizer_lost: bool = False


class PublishAdapter(Message):
    """Make the tensors in ``slot`` servable under ``name`` (PEFT state-dict keys; ``config``:
    PEFT's adapter_config as SGLang reads it; ``folder``: its files, for prefill servers).  May be
    repeated: a served name answers ok.  ``request`` tells this question's answer from an earlier
    one's."""

    request: int
    job: str
    name: str
    config: dict[str, Any]
    slot: SlotRef
    folder: str = ""


class AdapterPublished(Message):
    """Answer to PublishAdapter ``request``.  ``passing``: no fault of the adapter: ask again."""

    request: int
    job: str
    name: str
    ok: bool
    code: str = ""
    text: str = ""
    passing: bool = False


class AdapterWanted(Message):
    """An evicted adapter is requested.  Answer: PublishAdapter or AdapterRefused."""

    name: str


class PrefillState(Message):
    """From the HTTP process of a decode server, on change: its prefill servers, for the status."""

    servers: list[dict[str, Any]]


class AdapterRefused(Message):
    """Answer to an AdapterWanted: the requests that wait for the adapter end with ``text``."""

    name: str
    code: str
    text: str


SchedulerMessage = (
    Hello
    | Pulse
    | BatchesTaken
    | RunStarted
    | StepDone
    | EvaluationDone
    | SnapshotReady
    | RunStopped
    | RunFailed
    | Progress
    | StatusReport
    | OptionsSet
)
ServiceMessage = (
    Welcome
    | StartRun
    | MicroBatch
    | SnapshotSlot
    | SnapshotSaved
    | StopRun
    | Ack
    | StatusRequest
    | SetOptions
)
HttpMessage = HttpHello | AdapterPublished | AdapterWanted | PrefillState
ToHttpMessage = ServiceState | PublishAdapter | AdapterRefused

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    "scheduler": msgspec.msgpack.Decoder(SchedulerMessage),
    "service": msgspec.msgpack.Decoder(ServiceMessage),
    "http": msgspec.msgpack.Decoder(HttpMessage),
    "to_http": msgspec.msgpack.Decoder(ToHttpMessage),
}


def encode(message: Message) -> bytes:
    """The msgpack header of a message."""
    return _encoder.encode(message)


def decode(header: bytes | memoryview, source: str) -> Any:
    """A message of ``source``: ``scheduler`` or ``http`` (to the service), ``service`` or
    ``to_http`` (from it).  msgspec.ValidationError, DecodeError: a bug or a version mix."""
    return _decoders[source].decode(header)
