"""The nouns that every room shares: frozen, small, standard library only."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path


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
    """What training holds memory for; under pressure the first named goes first (design section 6)."""

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
    """Why training runs, or does not, at one decision of the scheduler's policy.

    The value is the text shown in ``harli status`` and in the job's sub-state; ``label`` is the short name in metrics
    (``other`` where there is none).
    """

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
    """The kinds of training work that the scheduler slots in (design section 5)."""

    EMBED = "embed"
    FORWARD = "forward"
    HEAD = "head"  # final norm, logits and loss with their backward, over a chunk of target tokens
    BACKWARD = "backward"  # one layer: recompute and backward
    BACKWARD_KEPT = "backward_kept"  # one layer whose activations were kept: backward alone
    ACCUMULATE = "accumulate"
    OPTIMIZER = "optimizer"
    COPY = "copy"  # a tensor of the state into, or out of, shared memory
    ADAPTER = "adapter"  # a slice of a finished adapter loaded into the serving side
    CHECK = "check"  # a part of the comparison of training with serving


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What serving is doing at point P.

    Attributes:
        running: requests in the running decode batch.
        context_tokens: sum of their context lengths.
        waiting: prompts that training stops for at once; a chunked prefill in progress counts as one.
        promised: prompts that wait under a deadline of their own, which the slack counts.
    """

    running: int = 0
    context_tokens: int = 0
    waiting: int = 0
    promised: int = 0

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
        kind: what the quantum does.
        candidates: ``(rows, upper_s)`` in rising order of both; the first is the least that is worth
            running.  Kinds that are not cut by rows offer one candidate.
        fixed: the split is fixed (``--harli-quantum-rows``, or a kind that is not cut).
        claim: when it may run.
        doubt: what the price of the first candidate may be multiplied with where that price alone holds training back.
    """

    kind: QuantumKind
    candidates: tuple[tuple[int, float], ...]
    fixed: bool = False
    doubt: float = 1.0
    claim: Claim = Claim.POLICY


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy allows now.

    Attributes:
        quanta, rows: 0 or 1, of at most so many rows.
        reason: why.
        needs_s: of a refusal: below this slack, in seconds, the answer stays what it is; 0: that is not known.
    """

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
        split: the rung.
        alone_s: upper bound of the decode step on the rung's SMs with no training beside it (T1).
        beside_s: upper bound with training beside it throughout (T2).
        rate: predicted training throughput while it runs, in any unit that all offers share; 0 where
            training pauses.
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
        train_s: training to launch beside the step, seconds of it; the whole step where that is ``beside_s``.
        rate: predicted training throughput over the step.
    """

    rung: int
    train_s: float
    rate: float
    reason: Reason


# ------------------------------------------------------------------ names and places
PROFILE_ROUTE = "/harli/profile"  # of the server's HTTP door: what it has measured of itself
ADAPTER_MARK = "-ft-"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
MAX_SOCKET_PATH = 107  # bytes of a unix socket's path
_LONGEST_SOCKET = "scheduler.sock"  # of those in ``ipc_dir``
SUFFIX_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}\Z"


def short_id(job_id: str) -> str:
    """The last eight characters of a job id: what adapter names carry."""
    return job_id[-8:]


def adapter_name(served_name: str, suffix: str | None, job_id: str) -> str:
    """The name under which a job's adapter is served: ``{base}-ft-{suffix}-{short id}``.

    ``base`` is the last path component of the served model's name; it never holds a colon, which
    SGLang would read as ``base:adapter``.
    """
    base = _UNSAFE.sub("-", served_name.rstrip("/").rsplit("/", 1)[-1]) or "model"
    middle = f"{suffix}-" if suffix else ""
    return f"{base}{ADAPTER_MARK}{middle}{short_id(job_id)}"


def colon_refusal(served_name: str, flag: str) -> str | None:
    """Why a name cannot be served, one sentence; None: it can.  SGLang asserts the same, a minute later."""
    if ":" not in served_name or served_name.lower().startswith(("s3://", "gs://", "az://")):
        return None
    fix = served_name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")
    return (
        f"{flag} {served_name!r} holds a colon, which SGLang reads as base:adapter in a model's name: give "
        f"--served-model-name {fix}"
    )


def looks_like_adapter(name: str) -> bool:
    """Whether a model name has the form of an adapter of ours (so that a miss is a 404)."""
    return ADAPTER_MARK in name


def run_key(run_dir: str) -> str:
    """A short word that is unique per run directory; names its sockets and shared memory."""
    return hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:16]


def private_tmp() -> Path:
    """This user's folder among temporary files (mode 0700 where ``open_private`` makes it).

    It lies in the first place where sockets' paths are short enough, that can be written and holds no such folder of
    another user's.  Each process of a server finds the same one, since all of them have one environment.
    """
    places = [
        *(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP", "XDG_RUNTIME_DIR")),
        "/tmp",
        "/var/tmp",
    ]
    folders = [Path(os.path.abspath(place), f"harli-{os.getuid()}") for place in places if place]
    short = [folder for folder in folders if fits_socket(f"{folder}/{run_key('')}/{_LONGEST_SOCKET}")]
    return next((folder for folder in short if _can_be_ours(folder)), short[0])


def ipc_dir(run_dir: str) -> Path:
    """The private folder (mode 0700) of the sockets between a server's processes.

    Not in the run directory itself: a unix socket's path is limited to 107 bytes.
    """
    return private_tmp() / run_key(run_dir)


def fits_socket(path: str) -> bool:
    """Whether a unix socket can have this path."""
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH


def _can_be_ours(folder: Path) -> bool:
    try:
        info = folder.lstat()
    except FileNotFoundError:
        return os.access(folder.parent, os.W_OK | os.X_OK)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()


def make_ipc_dir(run_dir: str) -> Path:
    """Create ``ipc_dir`` with mode 0700; refuse one that somebody else owns.

    Raises:
        PermissionError: the folder belongs to another user, or is a link.
        OSError: it cannot be made.
    """
    path = ipc_dir(run_dir)
    for folder in (path.parent, path):
        os.close(open_private(folder, make=True))
    return path


def open_private(folder: Path, *, make: bool = False) -> int:
    """A descriptor of a folder that is this user's alone.

    One of ours that is open to others (made under another umask) is closed to them.

    Args:
        make: make it, with mode 0700, where it is missing; its parent is there.

    Raises:
        PermissionError: it belongs to another user, or is a link or a file.
        OSError: it is missing, or cannot be made.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        found = f"it belongs to uid {info.st_uid}" if stat.S_ISDIR(info.st_mode) else "it is a link or a file"
        raise PermissionError(f"{folder} must be a folder of uid {os.getuid()}, and {found}: have it removed")
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if info.st_uid != os.getuid():
            raise PermissionError(
                f"{folder} is not the folder any more that it was a moment ago: have it removed"
            )
        if info.st_mode & 0o077:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


def scheduler_endpoint(run_dir: str) -> str:
    """Where the service listens for the scheduler (the service binds, the scheduler connects)."""
    return f"ipc://{ipc_dir(run_dir)}/scheduler.sock"


def http_endpoint(run_dir: str) -> str:
    """Where the service listens for the HTTP process (the service binds, the HTTP process connects)."""
    return f"ipc://{ipc_dir(run_dir)}/http.sock"


def shm_dir(run_dir: str) -> Path:
    """The folder in shared memory of this run directory's slots (checkpoints, adapters)."""
    return Path("/dev/shm") / f"harli-{os.getuid()}-{run_key(run_dir)}"
