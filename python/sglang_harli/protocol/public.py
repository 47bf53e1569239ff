"""The public wire between clients and the finetune service, over ZMQ (docs/jobs.md).

A message is one JSON frame (``Request`` or ``Reply``); ``submit`` and ``upload`` add raw frames
with the data file.  ``Event`` replies to a subscription come under the id of its request.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta, Struct, field

from sglang_harli.architectures import ALL_LINEAR
from sglang_harli.core import JobStatus
from sglang_harli.errors import SHOWN, ConfigError, ProtocolError, shown
from sglang_harli.names import SUFFIX_PATTERN
from sglang_harli.protocol import accepted

VERSION = 1
VERBS = (
    "submit",
    "upload",
    "list",
    "get",
    "events",
    "pause",
    "resume",
    "cancel",
    "prioritize",
    "status",
    "set",
    "unsubscribe",
    "check",
)
MAX_HEADER_BYTES = 1 << 20
MAX_DATA_BYTES = 4 << 30
MAX_FRAME_BYTES = 1 << 20  # of a data frame; a larger file comes by `upload`, in chunks of this size
MAX_INLINE_BYTES = 16 << 20  # of the data frames behind one `submit`
BUSY = "busy"  # the code of a refusal that clients answer by trying again

Priority = Annotated[int, Meta(ge=-100, le=100)]
UploadId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z"), accepted.words("32 hex digits")]  # of the client
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z"), accepted.words("64 hex digits")]
ObjectId = Annotated[str, Meta(min_length=1, max_length=128)]  # of a file
Metadata = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=64)],
        Annotated[str, Meta(max_length=512)],
    ],
    Meta(max_length=16),
    accepted.words("an object of at most 16 texts of 512 characters, with names of 1 to 64"),
]
Suffix = Annotated[
    str,
    Meta(pattern=SUFFIX_PATTERN),
    accepted.words("1 to 40 of A-Z a-z 0-9 . _ - beginning with a letter or digit"),
]

SCHEDULERS = ("linear", "cosine", "constant")
OVERFLOWS = ("error", "truncate", "drop")
DEFAULT_EVAL_STEPS = 50  # where there is validation data
OR_NONE = ("max_seq_length", "eval_steps", "eval_rows", "early_stopping_patience")


class Hyperparameters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job may choose, with the defaults of ``harli submit --help``; ``batch_size``: rows of
    a micro-batch, of which a step has ``gradient_accumulation_steps``."""

    n_epochs: Annotated[int, Meta(ge=1, le=10_000)] = 3
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 2e-4
    lr_scheduler: str = "linear"
    warmup_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.0
    batch_size: Annotated[int, Meta(ge=1, le=4096)] = 4
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=4096)] = 1
    lora_r: Annotated[int, Meta(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Meta(gt=0, le=65536)] = 32.0
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ALL_LINEAR
    max_seq_length: Annotated[int, Meta(ge=2), accepted.most(10_000_000)] | None = (
        None  # None: the model's limit
    )
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0
    max_grad_norm: Annotated[float, Meta(ge=0), accepted.most(10**9)] = 1.0  # 0 turns clipping off
    # Optimizer steps; 0: on pause and at the end only.
    checkpoint_every: Annotated[int, Meta(ge=0), accepted.most(10**9)] = 50
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 42
    on_overflow: str = "error"
    # Optimizer steps between evaluations; 0: at the end only; None: DEFAULT_EVAL_STEPS.
    eval_steps: Annotated[int, Meta(ge=0), accepted.most(10**9)] | None = None
    eval_rows: Annotated[int, Meta(ge=1), accepted.most(10**9)] | None = None  # None: all
    validation_split: Annotated[float, Meta(ge=0, le=0.5)] = 0.0  # share of the training rows
    # Evaluations in a row without improvement; None: off.
    early_stopping_patience: Annotated[int, Meta(ge=1), accepted.most(10**6)] | None = None
    early_stopping_min_delta: Annotated[float, Meta(ge=0), accepted.most(10**6)] = 0.0
    publish_best: bool = False  # the checkpoint of the lowest valid_loss, not the last one

    def check(self) -> None:
        """Raise ConfigError naming the field and the accepted values."""
        parse_hyperparameters({name: getattr(self, name) for name in self.__struct_fields__})

    @property
    def scaling(self) -> float:
        """The factor on B·A: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        return self.lora_alpha / (self.lora_r**0.5 if self.use_rslora else self.lora_r)


_HYPERPARAMETERS = {f.name: f.type for f in msgspec.structs.fields(Hyperparameters)}


def parse_hyperparameters(pairs: dict[str, Any]) -> Hyperparameters:
    """Hyperparameters from ``key=value`` strings (command line) or JSON values (wire).
    ConfigError: unknown key (the known ones are listed) or a value out of bounds."""
    for name in pairs:
        if name not in _HYPERPARAMETERS:
            raise ConfigError(
                f"unknown hyperparameter {shown(name)}; accepted: {', '.join(sorted(_HYPERPARAMETERS))}",
                param=name[:SHOWN],
            )
    return Hyperparameters(**{name: _hyperparameter(name, given) for name, given in pairs.items()})


def _hyperparameter(name: str, given: Any) -> Any:
    choices = {"lr_scheduler": SCHEDULERS, "on_overflow": OVERFLOWS}.get(name)
    if choices is not None and given not in choices:
        raise accepted.refused(name, given, f"one of {', '.join(choices)}")
    if name == "target_modules":
        return _target_modules(given)
    if name in OR_NONE and isinstance(given, str) and given.lower() in ("none", ""):
        return None
    return accepted.value(name, given, _HYPERPARAMETERS[name], lax=True)


def _target_modules(given: Any) -> tuple[str, ...]:
    """From a list, or a text with commas."""
    if given in ("all", "all-linear"):
        return ALL_LINEAR
    names = given.split(",") if isinstance(given, str) else given
    listed = isinstance(names, list | tuple) and bool(names) and all(name in ALL_LINEAR for name in names)
    if not listed or len(set(names)) != len(names):
        raise accepted.refused(
            "target_modules", given, f"one or more of {', '.join(ALL_LINEAR)}, each once, or all"
        )
    return tuple(names)


class JobError(Struct, frozen=True):
    code: str
    message: str
    param: str | None = None


class Slo(Struct, kw_only=True):
    """The latency targets that serving keeps while jobs train, in milliseconds."""

    tpot_slo_ms: float
    ttft_slo_ms: float | None = None
    max_itl_ms: float | None = None


class Job(Struct, kw_only=True, omit_defaults=False):
    """The job object that every API shows (OpenAI's field names where they exist)."""

    id: str
    object: str = "fine_tuning.job"
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    status: JobStatus
    sub_state: str | None = None
    reason: str | None = None
    model: str | None = None
    suffix: str | None = None
    fine_tuned_model: str | None = None
    step: int = 0
    total_steps: int = 0
    trained_tokens: int = 0
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    attempt: int = 0
    hyperparameters: Hyperparameters
    data: dict[str, Any] = field(
        default_factory=dict
    )  # file, rows, tokens, target_tokens, truncated, dropped
    error: JobError | None = None
    run_dir: str | None = None
    priority: int = 0
    resumed_from: str | None = None
    base: str | None = None  # served name and place of the weights that it is trained on
    training_file: str | None = None
    validation_file: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None  # the last one: step, valid_loss, ... (``eval_metrics``)
    best_step: int | None = None  # of the lowest valid_loss so far
    best_valid_loss: float | None = None
    result_files: list[str] = field(default_factory=list)  # ids of files with the metrics of its steps
    deleted_models: list[str] = field(default_factory=list)  # names of its models that were deleted
    slo: Slo | None = None  # in force now, of a job that has not ended


class Event(Struct, kw_only=True):
    """One line of a job's events.jsonl; ``id`` rises without gaps within a job."""

    id: int
    job: str
    created_at: float
    level: str  # info, warn, error
    type: str  # see EVENT_TYPES
    message: str
    data: dict[str, Any] = field(default_factory=dict)


EVENT_TYPES = (
    "job_created",
    "data_validated",
    "validating",
    "data_invalid",
    "queued",
    "prioritized",
    "started",
    "step_metrics",
    "eval_metrics",
    "early_stopped",
    "checkpoint_saved",
    "paused",
    "resumed",
    "sub_state",
    "adapter_saved",
    "adapter_published",
    "warning",
    "failed",
    "cancelled",
    "succeeded",
    "model_deleted",
)


class Request(Struct, kw_only=True):
    """First frame of a client's message.  ``args`` by verb: docs/jobs.md."""

    v: int
    id: Annotated[str, Meta(min_length=1, max_length=128)]
    verb: str
    args: dict[str, Any] = field(default_factory=dict)


class ErrorBody(Struct, kw_only=True):
    code: str
    message: str
    param: str | None = None
    details: list[dict[str, Any]] = field(default_factory=list)


class Reply(Struct, kw_only=True):
    """Answer to one request.  Exactly one of ``result``, ``error`` and ``event`` counts."""

    v: int = VERSION
    id: str
    ok: bool
    result: Any = None
    error: ErrorBody | None = None
    event: Event | None = None  # pushed under a subscription's id


class SubmitArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``submit``: raw frames with the data file follow the header; none with ``upload``, which
    names an upload, or ``resume_from``, a job whose data is taken (``sha256`` is empty then).
    ``validation_...``: of a validation file, which comes by ``upload``.

    With ``training_file``, a file of the service, the answer comes before that is looked at: the
    job is ``validating_files``.  ``validation_file`` goes with it.  ``model``: the served name, or
    the finished adapter that the new one begins with.
    """

    filename: Annotated[str, Meta(max_length=1024)] = ""
    size: Annotated[int, Meta(ge=0, le=MAX_DATA_BYTES)] = 0
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z"), accepted.words("64 hex digits")] = ""
    suffix: Suffix | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    idempotency_key: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    priority: Priority = 0
    resume_from: str | None = None
    upload: UploadId | None = None
    training_file: ObjectId | None = None
    validation_file: ObjectId | None = None
    metadata: Metadata = field(default_factory=dict)
    model: Annotated[str, Meta(max_length=1024)] | None = None
    validation_upload: UploadId | None = None
    validation_filename: Annotated[str, Meta(max_length=1024)] = ""
    validation_size: Annotated[int, Meta(ge=0, le=MAX_DATA_BYTES)] = 0
    validation_sha256: Annotated[
        str, Meta(pattern=r"^([0-9a-f]{64})?\Z"), accepted.words("64 hex digits")
    ] = ""


class CheckArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``check``: as a ``submit`` that makes no job; the answer is what would become of its data."""

    filename: Annotated[str, Meta(max_length=1024)] = ""
    size: Annotated[int, Meta(ge=0, le=MAX_DATA_BYTES)] = 0
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z"), accepted.words("64 hex digits")] = ""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    upload: UploadId | None = None


class UploadArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``upload``: one data frame follows, the file's bytes from ``offset`` on."""

    upload: UploadId
    filename: Annotated[str, Meta(max_length=1024)] = ""
    size: Annotated[int, Meta(ge=1)]  # above MAX_DATA_BYTES the refusal names the limit
    sha256: Sha256
    offset: Annotated[int, Meta(ge=0)]


class UploadAnswer(Struct, kw_only=True):
    """``offset``: bytes of the file that have been received, from its beginning."""

    offset: int


class EventsArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``events``: those with id above ``after``; ``follow`` subscribes (renew within 30 s)."""

    job: str
    after: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 1000
    follow: bool = False


class JobArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``get``, ``pause``, ``resume``, ``cancel``."""

    job: str


class PrioritizeArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``prioritize``: higher ones leave the queue first; a running job is not preempted."""

    job: str
    priority: Priority


class ListArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 100
    after: str | None = None
    status: str | None = None
    # Jobs that have these pairs; None: those that have none at all.
    metadata: dict[str, str] | None = field(default_factory=dict)


class SetArgs(Struct, kw_only=True, forbid_unknown_fields=True):
    """``set``: live options; ``if_revision``: only at that revision (else stale)."""

    values: dict[str, float | str | None]  # milliseconds; a size such as "512MiB"; null clears one
    if_revision: int | None = None


class SetAnswer(Struct, kw_only=True):
    """``outcome``: applied, deferred (in force once the scheduler is up, or training has given back
    what is above ``max_train_mem``), stale (``if_revision`` is not the current one) or conflict
    (the values contradict each other, or what runs); ``effective`` is what is in force."""

    outcome: str
    revision: int
    effective: dict[str, Any]
    message: str = ""


class StatusAnswer(Struct, kw_only=True):
    """``status``: the service, the queue, and the scheduler's view of serving, training, memory."""

    service: dict[str, Any]
    serving: dict[str, Any] | None
    training: dict[str, Any] | None
    jobs: dict[str, int]
    options: dict[str, Any]
    revision: int
    pool: dict[str, Any] | None = None


# What encoding or decoding a value raises that JSON, msgpack or a struct cannot hold.
CODING_ERRORS = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)


def encode(message: Any) -> bytes:
    """JSON bytes by orjson; one of CODING_ERRORS for what JSON cannot hold."""
    return orjson.dumps(msgspec.to_builtins(message))


def decode(data: bytes, kind: type[Any]) -> Any:
    """JSON bytes as ``kind``; ProtocolError: not JSON, or not of that shape; it names the path."""
    if len(data) > MAX_HEADER_BYTES and kind is Request:
        raise ProtocolError(f"the header has {len(data)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    try:
        return msgspec.convert(orjson.loads(data), kind)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"not JSON: {error}") from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise ProtocolError(f"not a valid {kind.__name__}: {error}") from error


def convert_args(args: dict[str, Any], kind: type[Any]) -> Any:
    """A request's ``args`` as ``kind``; ProtocolError names the field."""
    try:
        return accepted.convert(args, kind)
    except ConfigError as error:
        raise ProtocolError(error.message, param=error.param) from error
