"""``submit``: from a request's frames to a durable job, or to a refusal without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sglang_harli.config import ServiceConfig
from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError, HarliError, NotReadyError, ProtocolError, UnsupportedError
from sglang_harli.failpoints import Failpoint, WriteFailpoint, failpoint
from sglang_harli.names import adapter_name
from sglang_harli.protocol.public import (
    BUSY,
    MAX_INLINE_BYTES,
    CheckArgs,
    Hyperparameters,
    Job,
    SubmitArgs,
    UploadAnswer,
    UploadArgs,
    parse_hyperparameters,
)
from sglang_harli.service.data import batches, dataset, validation
from sglang_harli.service.data.dataset import DataSummary
from sglang_harli.service.data.report import data_report
from sglang_harli.service.data.token_store import TokenWriter
from sglang_harli.service.jobs import admission, record_encoding, transitions
from sglang_harli.service.jobs.folder import INCOMING, JobPaths, fsync_folder, fsync_tree
from sglang_harli.service.jobs.record import Asked
from sglang_harli.service.jobs.record_encoding import RecordError
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.transitions import JobRecord
from sglang_harli.service.links.scheduler_link import SchedulerLink
from sglang_harli.service.submit import evaluation, repeated_submit, resume_from
from sglang_harli.service.submit.evaluation import ValidationFile
from sglang_harli.service.submit.resume_from import Origin, Start
from sglang_harli.service.submit.uploads import Uploads, storage_error
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer

logger = logging.getLogger(__name__)

SETTLERS = 8


class _Incoming(NamedTuple):
    """The data of a submit or a check, an uploaded file or frames, on its way to ``folder``."""

    args: SubmitArgs
    hp: Hyperparameters
    longest: int | None
    source: Path | Sequence[bytes]
    folder: Path
    validation: ValidationFile | None = None


class Submission:
    """Takes a submit from its arguments to a durable job.  ``worker``: one thread, files are looked
    at one after the other; ``uploads``: files sent before the submit that names them."""

    def __init__(
        self,
        registry: JobRegistry,
        link: SchedulerLink,
        tokenizer: ModelTokenizer,
        config: ServiceConfig,
        worker: ThreadPoolExecutor,
        uploads: Uploads,
    ) -> None:
        self._registry = registry
        self._link = link
        self._tokenizer = tokenizer
        self._config = config
        self._worker = worker
        self._uploads = uploads
        # Folders reach the disk several at a time: the file system commits them together.
        self._settlers = ThreadPoolExecutor(SETTLERS, "settle")
        self._running: dict[str, tuple[asyncio.Task[JobRecord], Asked]] = {}  # by idempotency key
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let a scan in progress end soon; its client tries again."""
        self._stopping.set()

    def close(self) -> None:
        self._settlers.shutdown(wait=False, cancel_futures=True)

    async def upload(self, args: UploadArgs, frames: Sequence[bytes]) -> UploadAnswer:
        """A chunk of a file, for a submit to come."""
        return await self._uploads.add(args, frames)

    async def submit(self, args: SubmitArgs, frames: Sequence[bytes]) -> Job:
        """The job, durable; a repeated key gives the first one.  HarliError: none was created."""
        _check_frames(args, frames)
        evaluation.check_arguments(args)
        with self._answered(args.upload, args.validation_upload):
            return await self._submit(args, frames)

    async def _submit(self, args: SubmitArgs, frames: Sequence[bytes]) -> Job:
        key = args.idempotency_key
        task, first = self._running.get(key, (None, None)) if key else (None, None)
        if task is not None and first is not None:  # the job may be known already and not be durable yet
            self._check_same(args, "a submit that is under way", first, None)
            return self._registry.public(self._registry.get((await asyncio.shield(task)).id))
        known = self._registry.by_key(key) if key else None
        if known is not None:
            return self._again(known, args)
        task = asyncio.create_task(self._create(args, frames))
        if key:
            self._running[key] = task, repeated_submit.asked(args)
        try:
            return self._registry.public(await asyncio.shield(task))
        finally:
            if key:
                self._running.pop(key, None)

    def _again(self, record: JobRecord, args: SubmitArgs) -> Job:
        if record.asked is not None:
            self._check_same(
                args, f"job {record.id}", record.asked, record.hyperparameters, record.resumed_from
            )
        else:
            _conflict(args, f"job {record.id}", repeated_submit.differences_of_before(record, args))
        return self._registry.public(self._registry.get(record.id))

    def _check_same(
        self,
        args: SubmitArgs,
        owner: str,
        first: Asked,
        has: Hyperparameters | None,
        resumed_from: str | None = None,
    ) -> None:
        left_out: Hyperparameters | None = Hyperparameters()
        if began := first.resume_from or resumed_from:
            origin = self._registry.find(began)  # None: its record cannot be read any more
            left_out = origin.hyperparameters if origin is not None else None
        again = repeated_submit.asked(args)
        _conflict(args, owner, repeated_submit.differences(first, again, has, left_out))

    def _check_ready(self) -> None:
        if self._registry.journal.trouble:
            raise NotReadyError(self._registry.journal.trouble)
        if self._link.refusal is not None:
            raise UnsupportedError(f"this server cannot train: {self._link.refusal}")

    async def _create(
        self, args: SubmitArgs, frames: Sequence[bytes], given: SubmitArgs | None = None
    ) -> JobRecord:
        """``given``: the arguments as they came, where ``args`` say more."""
        self._check_ready()
        origin = None
        if args.resume_from is not None:
            origin = resume_from.find(self._registry, args)
            hp = origin.hyperparameters
        else:
            hp = parse_hyperparameters(args.hyperparameters)
        keeps = origin is not None and not origin.new_course and bool(origin.record.data.get("validation"))
        evaluation.check(hp, file=keeps or args.validation_upload is not None)
        admitted = self._link.limits is not None
        loop = asyncio.get_running_loop()
        job = self._registry.new_id()
        async with self._incoming(args, hp, frames, job) as incoming:
            summary, start = await loop.run_in_executor(self._worker, self._take_in, incoming, origin)
            await loop.run_in_executor(self._settlers, self._settle, incoming.folder, job)
        failpoint(Failpoint.DATA_STORED)
        record = self._record(job, args, hp, summary, admitted=admitted)
        if given is not None and given.idempotency_key:
            record = msgspec.structs.replace(record, asked=repeated_submit.asked(given))
        if origin is not None:
            record = resume_from.follow(record, origin, start)
        try:
            record_encoding.check(record)
        except RecordError as error:
            await loop.run_in_executor(
                self._settlers, self._remove, JobPaths(self._registry.run_dir, job).folder
            )
            raise ConfigError(f"the job cannot be kept: {error}") from error
        await self._registry.add(resume_from.with_origin(transitions.created(record, summary.text()), start))
        failpoint(Failpoint.JOB_CREATED)
        return record

    async def check(self, asked: CheckArgs, frames: Sequence[bytes]) -> dict[str, Any]:
        """What would become of the data (see ``data_report``); nothing of it stays.  Raises
        HarliError: a hyperparameter is not accepted, or the data did not come whole."""
        args = SubmitArgs(filename=asked.filename, size=asked.size, sha256=asked.sha256, upload=asked.upload)
        _check_frames(args, frames)
        with self._answered(args.upload):
            hp = parse_hyperparameters(asked.hyperparameters)
            async with self._incoming(args, hp, frames, self._registry.new_id()) as incoming:
                return await asyncio.get_running_loop().run_in_executor(self._worker, self._look, incoming)

    @contextlib.contextmanager
    def _answered(self, *uploads: str | None) -> Iterator[None]:
        """Forgets uploads that their request had no use for: a repeated submit, or a refused one.

        Not where the client is to ask again with it, or may still be sending it.
        """
        try:
            yield
        except HarliError as error:
            if error.code != BUSY and not isinstance(error, ProtocolError):
                for upload in uploads:
                    self._uploads.forget(upload)
            raise
        for upload in uploads:
            self._uploads.forget(upload)

    @contextlib.asynccontextmanager
    async def _incoming(
        self, args: SubmitArgs, hp: Hyperparameters, frames: Sequence[bytes], job: str
    ) -> AsyncIterator[_Incoming]:
        """The data and a folder for it, which is removed at the end if it is still there."""
        loop = asyncio.get_running_loop()
        longest = await loop.run_in_executor(self._settlers, self._longest, hp)
        incoming = self._registry.run_dir / f"{INCOMING}{job}"
        uploaded = evaluated = None
        taken: list[Path] = []
        try:
            if args.upload:
                uploaded = await self._uploads.take(args.upload, args.size, args.sha256)
                taken.append(uploaded.parent)
            if args.validation_upload:
                size, sha256 = args.validation_size, args.validation_sha256
                path = await self._uploads.take(args.validation_upload, size, sha256)
                taken.append(path.parent)
                evaluated = ValidationFile(path, args.validation_filename, sha256)
            yield _Incoming(args, hp, longest, uploaded or frames, incoming, evaluated)
        except OSError as error:
            raise storage_error(self._registry.run_dir, error) from error
        finally:
            for folder in (incoming, *taken):
                with contextlib.suppress(RuntimeError):  # the service ends; its next start removes it
                    await loop.run_in_executor(self._settlers, self._remove, folder)

    def _longest(self, hp: Hyperparameters) -> int | None:
        """The longest row accepted; by the model's own files before a hello."""
        limits = self._link.limits
        if limits is not None:
            admission.check_hyperparameters(hp, limits)
            longest: int | None = limits.max_seq_length
        else:
            longest = self._tokenizer.longest_row()
            if longest is not None:
                admission.check_length(hp, longest)
        return hp.max_seq_length if hp.max_seq_length is not None else longest

    def _record(
        self, job: str, args: SubmitArgs, hp: Hyperparameters, summary: DataSummary, *, admitted: bool
    ) -> JobRecord:
        return JobRecord(
            id=job,
            number=self._registry.next_number(),
            created_at=time.time(),  # stamp: of a job
            status=JobStatus.QUEUED,
            hyperparameters=hp,
            model=self._config.served_model_name,
            adapter_name=adapter_name(self._config.served_model_name, args.suffix, job),
            total_steps=batches.total_steps(summary.rows - summary.validation_rows, hp),
            data=summary.builtins() | {"bytes": args.size, "sha256": args.sha256},
            data_sha256=args.sha256,
            suffix=args.suffix,
            idempotency_key=args.idempotency_key,
            asked=repeated_submit.asked(args) if args.idempotency_key else None,
            priority=args.priority,
            metadata=args.metadata,
            base=self._link.hello.base if self._link.hello else None,
            admitted=admitted,
        )

    # ---- in the worker thread
    def _take_in(self, incoming: _Incoming, origin: Origin | None) -> tuple[DataSummary, Start]:
        """The folder of a job to be: its file, and what ``origin`` left."""
        start = resume_from.take_checkpoint(origin, incoming.folder) if origin is not None else Start()
        if origin is not None and not origin.new_course:
            summary = resume_from.take_data(origin, incoming.folder)
        else:
            summary = self._scan(incoming)
        limits = self._link.limits  # they may have come meanwhile
        if limits is not None:
            longest, line = summary.longest_row, summary.longest_line
            admission.check_data(incoming.hp, longest, line, summary.rows, limits, summary.unit)
            admission.check_validation(summary.validation, incoming.hp, summary.builtins(), limits)
        return summary, start

    def _scan(self, incoming: _Incoming) -> DataSummary:
        def scan(file: Path, folder: Path, name: str) -> DataSummary:
            summary = self._tokens(incoming, file, folder, name, incoming.longest)
            limits = self._link.limits
            if limits is not None and summary.longest_row > limits.max_seq_length:  # it came meanwhile
                summary = self._tokens(incoming, file, folder, name, limits.max_seq_length)
            return summary

        file = _keep(incoming)
        summary = scan(file, file.parent, incoming.args.filename)
        validation.hold_out(file.parent, incoming.hp, summary)
        if incoming.validation is not None:
            summary.validation = evaluation.take_in(incoming.validation, file.parent, scan)
        return summary

    def _tokens(
        self, incoming: _Incoming, file: Path, folder: Path, name: str, longest: int | None
    ) -> DataSummary:
        with TokenWriter(folder) as writer:
            return dataset.scan(
                file,
                self._tokenizer.get(),
                name=name,
                max_length=longest,
                on_overflow=incoming.hp.on_overflow,
                writer=writer,
                stop=self._stopping.is_set,
            )

    def _look(self, incoming: _Incoming) -> dict[str, Any]:
        return data_report(
            _keep(incoming),
            self._tokenizer.get(),
            name=incoming.args.filename,
            max_length=incoming.longest,
            on_overflow=incoming.hp.on_overflow,
            stop=self._stopping.is_set,
        )

    @staticmethod
    def _remove(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def _settle(self, incoming: Path, job: str) -> None:
        """The folder under its final name, durable."""
        failpoint(WriteFailpoint.SETTLE)
        fsync_tree(incoming)
        final = JobPaths(self._registry.run_dir, job).folder
        incoming.rename(final)
        try:
            fsync_folder(self._registry.run_dir)
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            raise


def _conflict(args: SubmitArgs, owner: str, differences: list[str]) -> None:
    if differences:
        raise ConfigError(
            f"idempotency_key {args.idempotency_key!r} belongs to {owner}; this submit has {', '.join(differences)}: "
            "give each submit a key of its own",
            code="idempotency_conflict",
            param="idempotency_key",
        )


def _check_frames(args: SubmitArgs, frames: Sequence[bytes]) -> None:
    if args.training_file is not None:
        if frames or args.upload or args.sha256 or args.size or args.validation_upload:
            raise ProtocolError(
                "submit names a training_file and brings data too: give one of the two", param="training_file"
            )
        return
    if args.validation_file is not None:
        raise ProtocolError("validation_file goes with a training_file", param="validation_file")
    if not args.sha256 and (args.resume_from is None or args.upload or frames or args.size):
        raise ProtocolError("submit needs the data's size and sha256, or resume_from alone", param="sha256")
    if args.upload and frames:
        raise ProtocolError(
            f"submit names an upload and brings {len(frames)} frames: give one of the two", param="upload"
        )
    size = sum(len(frame) for frame in frames)
    if size > MAX_INLINE_BYTES:
        raise ProtocolError(
            f"{args.filename}: {size} bytes came with the submit, at most {MAX_INLINE_BYTES} are accepted there: send "
            "a larger file by `upload` first",
            code="too_large",
            param="size",
        )


def _keep(incoming: _Incoming) -> Path:
    """The data as a file in its folder."""
    source, data = incoming.source, incoming.folder / "data"
    data.mkdir(parents=True)
    file = data / "train.jsonl"
    if isinstance(source, Path):
        source.replace(file)
    else:
        _store(incoming.args, source, file)
        if isinstance(source, list):
            source.clear()  # it is on the disk: memory need not hold it while it is looked at
    return file


def _store(args: SubmitArgs, frames: Sequence[bytes], path: Path) -> None:
    """Write the frames; ProtocolError if they are not what the header says."""
    size = sum(len(frame) for frame in frames)
    if size != args.size:
        raise ProtocolError(
            f"{args.filename}: the header says {args.size} bytes, {size} came",
            code="data_mismatch",
            param="size",
        )
    digest = hashlib.sha256()
    failpoint(WriteFailpoint.DATA)
    with path.open("wb") as file:
        for frame in frames:
            digest.update(frame)
            file.write(frame)
    if digest.hexdigest() != args.sha256:
        raise ProtocolError(
            f"{args.filename}: its sha256 is {digest.hexdigest()}, the header says {args.sha256}",
            code="data_mismatch",
            param="sha256",
        )


def remove_leftovers(run_dir: Path, known: set[str]) -> None:
    """Remove folders of submits that a crash cut off before they were acknowledged."""
    for path in run_dir.glob(f"{INCOMING}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in run_dir.glob("ftjob-*"):
        # job.json is written right after the commit: a folder with it belonged to an accepted job
        if path.name not in known and not (path / "job.json").exists():
            shutil.rmtree(path, ignore_errors=True)
