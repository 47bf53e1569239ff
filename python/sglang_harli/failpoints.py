"""Named points at every durable step, where a test can stop a process or make a write fail.

Off unless the environment variable ``HARLI_FAULT_POINTS`` names a folder; then ``failpoint(point)``
looks for a file of the point's name in it, armed at any time.  Its content is one line:

    stop [N]           at the N-th failpoint (default 1): rename the file to POINT.hit (this process's pid in it)
                       and hold this thread until POINT.go appears; the test kills what it wants
                       meanwhile
    error ERRNO [N]    the next N reaches (default 1) raise OSError(ERRNO), for example ENOSPC or EROFS
    hang SECONDS       hold this thread so long, once: a process that stops answering without dying

Standard library only.
"""

from __future__ import annotations

import enum
import errno
import os
import time
from pathlib import Path

FAULT_POINTS_ENV = "HARLI_FAULT_POINTS"
_folder: Path | None = Path(text) if (text := os.environ.get(FAULT_POINTS_ENV)) else None
_LOOK_EVERY_S = 0.01


class Failpoint(enum.StrEnum):
    """Durable steps, in the order in which a job passes them; behind each, who reaches it."""

    DATA_STORED = "data-stored"  # service: the data's folder has its final name, the store knows no job yet
    JOB_CREATED = "job-created"  # service: the job is in the store, its client has no answer yet
    MICRO_BATCH_FED = "micro-batch-fed"  # service: a micro-batch went to the scheduler
    STEP_APPLIED = "step-applied"  # scheduler: the optimizer has run, no message has gone out
    EVALUATED = "evaluated"  # scheduler: an evaluation's result is there, no message has gone out
    SNAPSHOT_COPIED = "snapshot-copied"  # scheduler: the state lies in shared memory, no message has gone out
    FILE_WRITTEN = "file-written"  # service: the checkpoint's files stand under a temporary name
    RENAMED = "renamed"  # service: the checkpoint has its name, the store does not know
    STORE_COMMITTED = "store-committed"  # service: the store knows the checkpoint, the scheduler does not
    ACKNOWLEDGED = "acknowledged"  # scheduler: it has heard that its snapshot is durable
    ADAPTER_EXPORTED = "adapter-exported"  # service: the PEFT folder has its name
    TENSORS_SHARED = "tensors-shared"  # service: the adapter lies in shared memory, nobody was asked
    LOADED = "loaded"  # HTTP process: the scheduler has loaded the adapter, no name answers yet
    REGISTERED = "registered"  # HTTP process: the name answers, the service does not know


class FileFailpoint(enum.StrEnum):
    """Durable steps of files that come over HTTP, of jobs on them and of their models, all of the
    service; ``test/unit/service/files`` and the tests of models kill it at each."""

    FILE_STORED = "file-stored"  # a file's bytes have their name, the store does not know the file
    PART_STORED = "part-stored"  # the same of a part of an upload
    UPLOAD_COMPLETED = "upload-completed"  # the parts are one file, the store has the parts yet
    VALIDATED = "validated"  # rows of a file that was named are stored, the store does not know it
    CHECKPOINT_NOTED = "checkpoint-noted"  # the store knows that a checkpoint is about to answer
    MODEL_DELETED = "model-deleted"  # a model is deleted in the store, its name may still answer
    RESULT_STORED = "result-stored"  # a job's result file is in the store, the job does not have it


class WriteFailpoint(enum.StrEnum):
    """Writes that a full or read-only disk, or a full shared memory, can refuse."""

    DATA = "write-data"  # the submitted file
    FILE = "write-file"  # a file or a part that comes over HTTP
    TOKENS = "write-tokens"
    SETTLE = "write-settle"  # fsync and rename of a job's folder
    STORE = "write-store"  # a transaction of the job store
    MIRROR = "write-mirror"  # job.json, events.jsonl, metrics.jsonl
    STATE = "write-state"  # a checkpoint's tensors
    META = "write-meta"  # a checkpoint's plain values
    RENAME = "write-rename"  # fsync and rename of a checkpoint or an adapter folder
    ADAPTER = "write-adapter"
    SLOT = "write-slot"  # a new slot in shared memory
    TOKENIZER = "write-tokenizer"  # the server's tokenizer and chat template, for the service


class ReadFailpoint(enum.StrEnum):
    """Reads that a disk can keep waiting."""

    DATA = "read-data"  # service: a job's rows, when its run is prepared
    ROWS = "read-rows"  # service: those of a micro-batch


def failpoint(point: Failpoint | FileFailpoint | WriteFailpoint | ReadFailpoint) -> None:
    """Do what a test has armed at this point (which may be an OSError); nothing otherwise."""
    if _folder is not None:
        _act(_folder / point)


def _act(file: Path) -> None:
    try:
        kind, *rest = file.read_text().split()
    except (OSError, ValueError):  # not armed, being armed just now, or a test has taken the file descriptors
        return
    if kind == "error":
        left = int(rest[1]) if len(rest) > 1 else 1
        _replace(file, f"error {rest[0]} {left - 1}" if left > 1 else None)
        number = getattr(errno, rest[0])
        raise OSError(number, f"{os.strerror(number)} (a test armed {file.name})")
    if kind == "hang":
        _replace(file, None)
        time.sleep(float(rest[0]))
        return
    left = int(rest[0]) if rest else 1
    if left > 1:
        _replace(file, f"stop {left - 1}")
        return
    hit = file.with_suffix(".hit")
    _replace(hit, str(os.getpid()))
    file.unlink()
    while not file.with_suffix(".go").exists():
        time.sleep(_LOOK_EVERY_S)


def _replace(file: Path, text: str | None) -> None:
    if text is None:
        file.unlink(missing_ok=True)
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, file)
