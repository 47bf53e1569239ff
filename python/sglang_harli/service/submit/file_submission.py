"""Jobs whose data are files of the service: accepted at once, looked at afterwards.

A job has its own reference to the bytes of its file from the beginning (a hard link), so that
deleting the file harms no job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sglang_harli.config import ServiceConfig
from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError, DataError, HarliError, NotReadyError, grouped
from sglang_harli.failpoints import Failpoint, FileFailpoint, failpoint
from sglang_harli.protocol import trouble
from sglang_harli.protocol.public import BUSY, Hyperparameters, SubmitArgs, parse_hyperparameters
from sglang_harli.service.data import batches, dataset, validation
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.token_store import TokenWriter
from sglang_harli.service.files.file_store import FileStore
from sglang_harli.service.files.records import FileRecord
from sglang_harli.service.jobs import admission, record_encoding, transitions
from sglang_harli.service.jobs.folder import INCOMING, JobPaths, fsync_tree
from sglang_harli.service.jobs.record_encoding import RecordError
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.transitions import EventDraft, JobRecord
from sglang_harli.service.links.scheduler_link import SchedulerLink
from sglang_harli.service.submit import evaluation, repeated_submit, resume_from
from sglang_harli.service.submit.evaluation import ValidationFile
from sglang_harli.service.submit.resume_from import Origin, Start
from sglang_harli.service.submit.submission import Submission
from sglang_harli.service.submit.uploads import Uploads, storage_error
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer

logger = logging.getLogger(__name__)

BAD_TOKENIZER = "bad_tokenizer"  # the code of a tokenizer that cannot be loaded
AGAIN_S = 5.0  # after files could not be looked at for the moment
REPORTED = 20  # events that name lines of a file that is not accepted


class _Taken(NamedTuple):
    """The files of a job to be."""

    training: FileRecord
    validation: FileRecord | None


class _Looked(NamedTuple):
    """What was found in a job's files."""

    summary: DataSummary
    admitted: bool


class FileSubmission(Submission):
    """Takes submits as ``Submission`` does, and those that name a ``training_file``."""

    def __init__(
        self,
        registry: JobRegistry,
        link: SchedulerLink,
        tokenizer: ModelTokenizer,
        config: ServiceConfig,
        worker: ThreadPoolExecutor,
        uploads: Uploads,
        files: FileStore,
    ) -> None:
        super().__init__(registry, link, tokenizer, config, worker, uploads)
        self._files = files
        self._wake = asyncio.Event()
        self._not_before: dict[str, float] = {}  # jobs that are tried again later
        registry.listeners.append(self._changed)

    # ---- accepting
    async def _create(
        self, args: SubmitArgs, frames: Sequence[bytes], given: SubmitArgs | None = None
    ) -> JobRecord:
        given, args = args, self._with_model(args)
        if args.training_file is None:
            return await super()._create(args, frames, given)
        self._check_ready()
        origin = resume_from.find(self._registry, args) if args.resume_from is not None else None
        hp = origin.hyperparameters if origin is not None else parse_hyperparameters(args.hyperparameters)
        evaluation.check(hp, file=args.validation_file is not None)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._settlers, self._longest, hp)  # refuses what cannot be trained here
        job = self._registry.new_id()
        incoming = self._registry.run_dir / f"{INCOMING}{job}"
        try:
            taken, start = await loop.run_in_executor(
                self._settlers, self._take_files, args, origin, incoming
            )
            await loop.run_in_executor(self._settlers, self._settle, incoming, job)
        except OSError as error:
            raise storage_error(self._registry.run_dir, error) from error
        finally:
            with contextlib.suppress(RuntimeError):  # the service ends; its next start removes it
                await loop.run_in_executor(self._settlers, self._remove, incoming)
        failpoint(Failpoint.DATA_STORED)
        record = msgspec.structs.replace(
            self._unvalidated(job, args, hp, taken),
            asked=repeated_submit.asked(given) if given.idempotency_key else None,
        )
        if origin is not None:
            record = resume_from.follow(record, origin, start)
        try:
            record_encoding.check(record)
        except RecordError as error:
            folder = JobPaths(self._registry.run_dir, job).folder
            await loop.run_in_executor(self._settlers, self._remove, folder)
            raise ConfigError(f"the job cannot be kept: {error}") from error
        await self._registry.add(resume_from.with_origin(transitions.received(record), start))
        failpoint(Failpoint.JOB_CREATED)
        return record

    def _with_model(self, args: SubmitArgs) -> SubmitArgs:
        """``model`` as the job whose adapter the new one begins with, where it names one."""
        served = self._config.served_model_name
        if args.model in (None, served):
            return args
        for record in self._registry.newest():
            if record.fine_tuned_model == args.model:
                resume_from.check_not_deleted(record, "model")
                if args.resume_from not in (None, record.id):
                    raise ConfigError(
                        f"model names the adapter of job {record.id}, resume_from another job: give one of the two",
                        param="model",
                    )
                return msgspec.structs.replace(args, resume_from=record.id)
        raise ConfigError(
            f"model={args.model!r} is not accepted: give {served}, or a fine-tuned model of this server",
            code="model_not_found",
            param="model",
        )

    def _unvalidated(self, job: str, args: SubmitArgs, hp: Hyperparameters, taken: _Taken) -> JobRecord:
        file, validation_file = taken
        record = self._record(job, args, hp, DataSummary(file=file.filename), admitted=False)
        noted = {"validation": _noted(validation_file)} if validation_file is not None else {}
        return msgspec.structs.replace(
            record,
            status=JobStatus.VALIDATING_FILES,
            validated=False,
            total_steps=0,
            data=_noted(file) | noted,
            data_sha256=file.sha256,
            training_file=file.id,
            validation_file=args.validation_file,
        )

    def _take_files(self, args: SubmitArgs, origin: Origin | None, folder: Path) -> tuple[_Taken, Start]:
        """In a thread: the folder of a job to be, with its files and what ``origin`` left."""
        data = folder / "data"
        data.mkdir(parents=True)

        def link(param: str, name: str, place: Path) -> FileRecord:
            try:
                return self._files.link(name, place)
            except HarliError as error:
                raise ConfigError(f"{param}: {error.message}", param=param) from error

        assert args.training_file is not None
        training = link("training_file", args.training_file, data / "train.jsonl")
        evaluated = None
        if args.validation_file is not None:
            evaluated = link("validation_file", args.validation_file, data / validation.FILE)
        start = resume_from.take_checkpoint(origin, folder) if origin is not None else Start()
        return _Taken(training, evaluated), start

    # ---- looking at files
    def _changed(self, record: JobRecord) -> None:
        if record.status == JobStatus.VALIDATING_FILES:
            self._wake.set()

    async def run(self) -> None:
        """Look at the files of jobs, one after the other, as long as the service runs."""
        while not self._stopping.is_set():
            self._wake.clear()
            record = self._next()
            if record is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), AGAIN_S if self._not_before else None)
                continue
            await self._validate(record)

    def _next(self) -> JobRecord | None:
        now = time.monotonic()
        waiting = [r for r in self._registry.all() if r.status == JobStatus.VALIDATING_FILES]
        self._not_before = {r.id: at for r in waiting if (at := self._not_before.get(r.id, 0.0)) > now}
        ready = [record for record in waiting if record.id not in self._not_before]
        return min(ready, key=lambda record: (-record.priority, record.number), default=None)

    async def _validate(self, record: JobRecord) -> None:
        job = record.id
        drafts: list[EventDraft] = []
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._worker, self._look_at, record)
        except (NotReadyError, OSError, MemoryError) as error:
            self._put_off(job, error)
            return
        except DataError as error:
            refusal: HarliError = error
            drafts = _lines(error.details, "validation file, " if error.param == "validation" else "")
        except HarliError as error:
            if error.code == BAD_TOKENIZER:  # of the environment: no verdict on the file
                self._put_off(job, error)
                return
            refusal = error
        except Exception as error:  # boundary: one job fails; the others are looked at
            logger.exception("the files of job %s cannot be looked at", job)
            refusal = HarliError(f"its files cannot be looked at ({type(error).__name__})", code="internal")
        else:
            self._accept(job, found)
            return
        if self._still(job):
            now = time.time()  # stamp: when the job failed
            record = self._registry.get(job)
            self._registry.apply(transitions.not_accepted(record, drafts, refusal, now))

    def _accept(self, job: str, found: _Looked) -> None:
        failpoint(FileFailpoint.VALIDATED)
        if not self._still(job):
            return
        record, summary = self._registry.get(job), found.summary
        data = summary.builtins() | {name: record.data[name] for name in ("bytes", "sha256")}
        steps = batches.total_steps(summary.rows - summary.validation_rows, record.hyperparameters)
        self._registry.apply(
            transitions.validated(record, data, steps, summary.text(), admitted=found.admitted)
        )

    def _put_off(self, job: str, error: Exception) -> None:
        """Not now: the job shows why, and its turn comes again."""
        if not self._still(job) or self._stopping.is_set():
            return
        if isinstance(error, NotReadyError) and error.code == BUSY:  # paused and resumed meanwhile
            return
        self._not_before[job] = time.monotonic() + AGAIN_S
        text = error.message if isinstance(error, HarliError) else f"its files cannot be read now ({error})"
        record = self._registry.get(job)
        if isinstance(error, OSError) and not isinstance(error, HarliError) and not trouble.passes(error):
            now = time.time()  # stamp: when the job failed
            refusal = HarliError(
                f"its files cannot be read ({error}): submit it again", code="bad_data_files"
            )
            self._registry.apply(transitions.not_accepted(record, [], refusal, now))
        elif record.reason != text:
            self._registry.apply(transitions.not_validated_yet(record, text))

    def _still(self, job: str) -> bool:
        """Whether the job still waits for this; it may be paused or cancelled."""
        record = self._registry.find(job)
        return record is not None and record.status == JobStatus.VALIDATING_FILES

    # ---- in the worker thread
    def _look_at(self, record: JobRecord) -> _Looked:
        """Token rows of the job's file, durable; a look that a crash ended is begun again."""
        limits, hp = self._link.limits, record.hyperparameters
        summary = self._rows_of(record, self._longest(hp))
        if limits is None and (limits := self._link.limits) is not None:  # they came meanwhile
            summary = self._rows_of(record, self._longest(hp))
        if limits is not None:
            longest, line = summary.longest_row, summary.longest_line
            admission.check_data(hp, longest, line, summary.rows, limits, summary.unit)
            admission.check_validation(summary.validation, hp, summary.builtins(), limits)
        fsync_tree(JobPaths(self._registry.run_dir, record.id).data)
        return _Looked(summary, limits is not None)

    def _rows_of(self, record: JobRecord, longest: int | None) -> DataSummary:
        folder = JobPaths(self._registry.run_dir, record.id).data

        def scan(file: Path, rows: Path, name: str) -> DataSummary:
            with TokenWriter(rows) as writer:
                return dataset.scan(
                    file,
                    self._tokenizer.get(),
                    name=name,
                    max_length=longest,
                    on_overflow=record.hyperparameters.on_overflow,
                    writer=writer,
                    stop=lambda: self._stopping.is_set() or not self._still(record.id),
                )

        summary = scan(folder / "train.jsonl", folder, record.data["file"])
        validation.hold_out(folder, record.hyperparameters, summary)
        if noted := record.data.get("validation"):
            found = ValidationFile(folder / validation.FILE, noted["file"], noted["sha256"])
            summary.validation = evaluation.take_in(found, folder, scan)
        return summary


def _noted(file: FileRecord) -> dict[str, Any]:
    return {"file": file.filename, "bytes": file.bytes, "sha256": file.sha256}


def _lines(details: list[dict[str, Any]], of: str) -> list[EventDraft]:
    """The lines at fault as events, neighbours of one reason together; ``of``: before each."""
    found = list(grouped(details))
    drafts = [
        EventDraft("data_invalid", f"{of}{where}: {reason}", level="error", data={"lines": count})
        for where, reason, count in found[:REPORTED]
    ]
    if len(found) > REPORTED:
        left = sum(count for *_, count in found[REPORTED:])
        drafts.append(
            EventDraft("data_invalid", f"{of}and {left} lines more", level="error", data={"lines": left})
        )
    return drafts
