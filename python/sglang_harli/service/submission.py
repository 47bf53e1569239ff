"""``submit``: from a request's frames to a durable job, or to a refusal that leaves nothing behind."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_harli.config import ServiceConfig
from sglang_harli.core import JobStatus, adapter_name
from sglang_harli.errors import ConfigError, HarliError, NotReadyError, ProtocolError
from sglang_harli.fault_points import Point, Write, reach
from sglang_harli.protocol.public import Hyperparameters, Job, SubmitArgs, parse_hyperparameters
from sglang_harli.service import admission, dataset, feeder, jobs
from sglang_harli.service.dataset import DataSummary
from sglang_harli.service.desk import JobDesk
from sglang_harli.service.job_files import INCOMING, JobPaths, fsync_folder, fsync_tree
from sglang_harli.service.jobs import JobRecord
from sglang_harli.service.model_tokenizer import ModelTokenizer
from sglang_harli.service.scheduler_link import SchedulerLink
from sglang_harli.service.token_store import TokenWriter

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 4 << 30  # of data in submits that are being looked at


class Submission:
    """Args:
    desk, link, tokenizer, config: of this service.
    worker: one thread; files are looked at one after the other.
    """

    def __init__(
        self,
        desk: JobDesk,
        link: SchedulerLink,
        tokenizer: ModelTokenizer,
        config: ServiceConfig,
        worker: ThreadPoolExecutor,
    ) -> None:
        self._desk = desk
        self._link = link
        self._tokenizer = tokenizer
        self._config = config
        self._worker = worker
        self._running: dict[str, asyncio.Task[JobRecord]] = {}
        self._pending_bytes = 0
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let a scan in progress end soon; its client tries again."""
        self._stopping.set()

    async def submit(self, args: SubmitArgs, frames: Sequence[bytes]) -> Job:
        """The job, durable.  A repeated key gives the job that the first submit made.

        Raises:
            HarliError: a refusal; no job was created.
        """
        key = args.idempotency_key
        known = self._desk.by_key(key) if key else None
        if known is not None:
            return self._again(known, args)
        task = self._running.get(key) if key else None
        if task is not None:
            return self._again(await asyncio.shield(task), args)
        if self._pending_bytes and self._pending_bytes + args.size > MAX_PENDING_BYTES:
            raise NotReadyError("other submits are being looked at: try again in a moment")
        task = asyncio.create_task(self._create(args, frames))
        if key:
            self._running[key] = task
        self._pending_bytes += args.size
        try:
            return self._desk.public(await asyncio.shield(task))
        finally:
            self._pending_bytes -= args.size
            if key:
                self._running.pop(key, None)

    def _again(self, record: JobRecord, args: SubmitArgs) -> Job:
        if record.data_sha256 != args.sha256 or record.suffix != args.suffix:
            raise ConfigError(
                f"idempotency_key {args.idempotency_key!r} belongs to job {record.id}, which has other data: "
                "give each submit a key of its own",
                code="idempotency_conflict",
                param="idempotency_key",
            )
        return self._desk.public(self._desk.get(record.id))

    async def _create(self, args: SubmitArgs, frames: Sequence[bytes]) -> JobRecord:
        hp = parse_hyperparameters(args.hyperparameters)
        if self._desk.journal.trouble:
            raise NotReadyError(self._desk.journal.trouble)
        admission.require_trainable(self._link.refusal)
        longest = self._longest(hp)
        job = self._desk.new_id()
        incoming = self._desk.run_dir / f"{INCOMING}{job}"
        loop = asyncio.get_running_loop()
        try:
            summary = await loop.run_in_executor(
                self._worker, self._prepare, args, frames, incoming, hp, longest
            )
            limits = self._link.limits
            if limits is not None:
                admission.check_data(hp, summary.longest_row, summary.longest_line, limits)
            await loop.run_in_executor(self._worker, self._settle, incoming, job)
        except OSError as error:
            raise HarliError(
                f"the data cannot be stored in {self._desk.run_dir} ({error}): make room, then submit again",
                code="storage",
            ) from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        reach(Point.DATA_STORED)
        record = self._record(job, args, hp, summary)
        await self._desk.add(jobs.created(record, summary.text()))
        reach(Point.JOB_CREATED)
        return record

    def _longest(self, hp: Hyperparameters) -> int | None:
        """The longest row that is accepted; by the model's own files where no hello has come yet."""
        limits = self._link.limits
        if limits is not None:
            admission.check_hyperparameters(hp, limits)
            longest: int | None = limits.max_seq_length
        else:
            longest = admission.model_length(self._config.model_path)
            if longest is not None:
                admission.check_length(hp, longest)
        return hp.max_seq_length if hp.max_seq_length is not None else longest

    def _record(self, job: str, args: SubmitArgs, hp: Hyperparameters, summary: DataSummary) -> JobRecord:
        return JobRecord(
            id=job,
            number=self._desk.next_number(),
            created_at=time.time(),
            status=JobStatus.QUEUED,
            hyperparameters=hp,
            model=self._config.served_model_name,
            adapter_name=adapter_name(self._config.served_model_name, args.suffix, job),
            total_steps=feeder.total_steps(summary.rows, hp),
            data=summary.builtins() | {"bytes": args.size, "sha256": args.sha256},
            data_sha256=args.sha256,
            suffix=args.suffix,
            idempotency_key=args.idempotency_key,
        )

    # ---- in the worker thread
    def _prepare(
        self,
        args: SubmitArgs,
        frames: Sequence[bytes],
        folder: Path,
        hp: Hyperparameters,
        longest: int | None,
    ) -> DataSummary:
        data = folder / "data"
        data.mkdir(parents=True)
        _store(args, frames, data / "train.jsonl")
        tokenizer = self._tokenizer.get()
        with TokenWriter(data) as writer:
            return dataset.scan(
                data / "train.jsonl",
                tokenizer,
                name=args.filename,
                max_length=longest,
                on_overflow=hp.on_overflow,
                writer=writer,
                stop=self._stopping.is_set,
            )

    def _settle(self, incoming: Path, job: str) -> None:
        """The folder under its final name, durable."""
        reach(Write.SETTLE)
        fsync_tree(incoming)
        incoming.rename(JobPaths(self._desk.run_dir, job).folder)
        fsync_folder(self._desk.run_dir)


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
    reach(Write.DATA)
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
