"""The finetune service, ``python -m sglang_harli.service.app``: started by the HTTP process.

It owns the job store, the data, the checkpoints, the event log and the public socket, and imports
neither torch nor sglang.  Its configuration is JSON in the environment (``config.SERVICE_ENV``).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvloop
import zmq.asyncio

from sglang_harli import run_paths
from sglang_harli.config import SERVICE_ENV, ServiceConfig
from sglang_harli.errors import HarliError
from sglang_harli.protocol import internal, public
from sglang_harli.protocol.calls import files, fine_tuning
from sglang_harli.protocol.escaping import escaped
from sglang_harli.service import run_dir_modes
from sglang_harli.service.endpoint.file_verbs import FileVerbs
from sglang_harli.service.endpoint.job_verbs import JobVerbs
from sglang_harli.service.endpoint.live_options import SETTING, LiveOptions
from sglang_harli.service.endpoint.router import PublicRouter
from sglang_harli.service.endpoint.subscriptions import Subscriptions
from sglang_harli.service.endpoint.verbs import Caller, Verbs
from sglang_harli.service.files.all_files import Files
from sglang_harli.service.jobs.registry import JobRegistry
from sglang_harli.service.jobs.store import STORE_FILE, JobStore, sqlite_url
from sglang_harli.service.links.http_link import HttpLink
from sglang_harli.service.links.scheduler_link import SchedulerLink
from sglang_harli.service.pacing import lower_priority
from sglang_harli.service.publish.adapter_names import AdapterNames
from sglang_harli.service.publish.publication import PublicationQueue
from sglang_harli.service.run.driver import RunDriver
from sglang_harli.service.run.why_none_starts import why_none_starts
from sglang_harli.service.submit.file_submission import FileSubmission
from sglang_harli.service.submit.submission import remove_leftovers
from sglang_harli.service.submit.uploads import Uploads
from sglang_harli.service.tokenizer import hidden_torch
from sglang_harli.service.tokenizer.model_tokenizer import ModelTokenizer

logger = logging.getLogger("harli.service")

SETTLE_S = 4.0  # after SIGTERM, for a run's state; the supervisor kills after five seconds


class App:
    """The parts of the service, wired together; made inside the running event loop.

    Raises HarliError: the store cannot be opened or the endpoint bound; OSError or zmq.ZMQError: a
    folder cannot be made, or no socket opened.
    """

    def __init__(self, config: ServiceConfig) -> None:
        run_dir = _make_folders(Path(config.options.absolute_run_dir))
        shm = run_paths.shm_dir(str(run_dir))
        self._context = zmq.asyncio.Context()
        # Threads: files of submits, one by one; the tokenizer; checkpoints and slots; event reads.
        self._worker = ThreadPoolExecutor(1, "data", initializer=lower_priority, initargs=(10,))
        self._loader = ThreadPoolExecutor(1, "tokenizer")
        self._disk = ThreadPoolExecutor(3, "disk", initializer=lower_priority, initargs=(19,))
        self._readers = ThreadPoolExecutor(1, "reader")
        self._store = JobStore(sqlite_url(run_dir / STORE_FILE))
        self._tokenizer = ModelTokenizer(config, run_dir)
        self._scheduler = SchedulerLink(self._context, run_paths.scheduler_endpoint(str(run_dir)))
        self._registry = JobRegistry(
            self._store,
            run_dir,
            config.options.keep_checkpoints,
            functools.partial(why_none_starts, self._scheduler, self._tokenizer),
            lambda: self._options.slo(),
        )
        remove_leftovers(
            run_dir, {record.id for record in self._registry.all()} | set(self._registry.unreadable)
        )
        self._named_tokenizer = ""  # by the last hello of the HTTP process
        self._taking: asyncio.Future[bool] | None = None
        self._http = HttpLink(
            self._context,
            run_paths.http_endpoint(str(run_dir)),
            self._state,
            lambda name: self._publication.want_name(name),
            self._take_tokenizer,
        )
        self._files = Files(run_dir, self._registry, config.options, self._readers)
        self._names = AdapterNames(self._registry)
        self._publication = self._make_publication(config, shm)
        self._driver = RunDriver(
            self._registry, self._publication, self._disk, shm, self._tokenizer, self._scheduler
        )
        self._options = LiveOptions(
            config.options,
            self._scheduler,
            self._store.setting(SETTING),
            lambda text: self._registry.durable(self._registry.journal.put(settings={SETTING: text})),
        )
        self._uploads = Uploads(run_dir)
        self._submission = self._make_submission(config)
        self._router, self._inner_router = self._make_routers(config, run_dir)
        self._subscriptions = Subscriptions(self._store, self._readers, self._router.push)
        self._registry.committed.extend((self._subscriptions.committed, self._tell_new_adapters))
        self._told = 0
        self._verbs, self._file_verbs = self._make_verbs(config, run_dir), FileVerbs(self._files)
        self._job_verbs = JobVerbs(self._registry, self._names, self._readers)

    def _make_publication(self, config: ServiceConfig, shm: Path) -> PublicationQueue:
        return PublicationQueue(
            self._registry,
            self._http,
            self._disk,
            shm,
            config.model_path,
            self._names,
            self._files.results.before_end,
        )

    def _make_submission(self, config: ServiceConfig) -> FileSubmission:
        return FileSubmission(
            self._registry,
            self._scheduler,
            self._tokenizer,
            config,
            self._worker,
            self._uploads,
            self._files.store,
        )

    def _make_routers(self, config: ServiceConfig, run_dir: Path) -> tuple[PublicRouter, PublicRouter]:
        """The public endpoint's, and that of the HTTP process."""
        options, inner = config.options, run_paths.verbs_endpoint(str(run_dir))
        return (
            PublicRouter(self._context, options.finetune_endpoint, self.handle, options.absolute_curve_keys),
            PublicRouter(self._context, inner, self.handle_inner, name="the inner endpoint"),
        )

    def _make_verbs(self, config: ServiceConfig, run_dir: Path) -> Verbs:
        return Verbs(
            registry=self._registry,
            submission=self._submission,
            publication=self._publication,
            options=self._options,
            scheduler=self._scheduler,
            http=self._http,
            subscriptions=self._subscriptions,
            readers=self._readers,
            about={
                "endpoint": config.options.finetune_endpoint,
                "run_dir": str(run_dir),
                "model": config.served_model_name,
            },
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work)
                for work in (
                    self._driver.run(),
                    self._publication.run(),
                    self._scheduler.run(self._hello, self._driver.on_message),
                    self._http.run(),
                    self._http.beat(),
                    self._subscriptions.run(),
                    self._router.run(),
                    self._inner_router.run(),
                    self._files.run(),
                    self._submission.run(),
                    self._uploads.run(),
                    self._warm_up(),
                    self._watch_journal(),
                )
            ]
            logger.info("finetune service ready, pid %d", os.getpid())
            await stop.wait()
            self._submission.stop()
            self._driver.stop()
            await self._settle()
            for task in tasks:
                task.cancel()

    async def handle(self, caller: Caller, header: bytes, frames: Sequence[bytes]) -> public.Reply:
        """One public request; whatever goes wrong becomes its reply."""
        return await self._handle(caller, header, lambda request: self._verbs.do(caller, request, frames))

    async def handle_inner(self, caller: Caller, header: bytes, frames: Sequence[bytes]) -> public.Reply:
        """One request of the HTTP process, which may also ask about files."""

        def do(request: public.Request) -> Awaitable[Any]:
            if request.verb in files.VERBS:
                return self._file_verbs.do(request, frames)
            if request.verb in fine_tuning.VERBS:
                return self._job_verbs.do(request, frames)
            return self._verbs.do(caller, request, frames)

        return await self._handle(caller, header, do)

    async def _handle(
        self, caller: Caller, header: bytes, do: Callable[[public.Request], Awaitable[Any]]
    ) -> public.Reply:
        try:
            result = await do(public.decode(header, public.Request))
            return public.Reply(id=caller.request, ok=True, result=result)
        except HarliError as error:
            body = public.ErrorBody(
                code=error.code, message=error.message, param=error.param, details=error.details
            )
        except Exception as error:  # boundary: one request gets an error reply; the service goes on
            logger.exception("a request failed")
            body = public.ErrorBody(
                code="internal",
                message=f"the service failed at this request ({type(error).__name__}): see its log",
            )
        return public.Reply(id=caller.request, ok=False, error=body)

    # ---- glue
    def _hello(self, hello: internal.Hello) -> None:
        self._options.on_hello(hello)
        self._driver.on_hello(hello)
        self._http.tell_state()

    def _state(self) -> internal.ServiceState:
        self._told = self._names.revision
        return internal.ServiceState(
            pid=os.getpid(),
            endpoint_bound=True,
            scheduler_seen=self._scheduler.hello is not None,
            refusal=self._scheduler.refusal,
            adapters=self._publication.names(),
            jobs=self._registry.counts(),
            greeted_by=self._http.pid or 0,
            others=self._publication.others(),
            tokenizer_lost=self._tokenizer.lost,
        )

    def _take_tokenizer(self, fingerprint: str) -> None:
        """At each hello of the HTTP process: a thread reads the tokenizer that it names."""
        self._named_tokenizer = fingerprint
        if self._taking is not None and not self._taking.done():
            return
        loop = asyncio.get_running_loop()
        self._taking = loop.run_in_executor(self._loader, self._tokenizer.take, fingerprint)
        self._taking.add_done_callback(lambda taken: self._took_tokenizer(taken, fingerprint))

    def _took_tokenizer(self, taken: asyncio.Future[bool], fingerprint: str) -> None:
        if taken.cancelled():
            return
        if taken.result():
            self._driver.wake()
            self._http.tell_state()
        if self._named_tokenizer != fingerprint:
            self._take_tokenizer(self._named_tokenizer)

    def _tell_new_adapters(self, _jobs: set[str]) -> None:
        if self._names.revision != self._told:
            self._http.tell_state()

    async def _warm_up(self) -> None:
        """Load the tokenizer before the first submit asks for it; a submit gets the error."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, self._tokenizer.get)
        except HarliError as error:
            logger.error("%s", error)

    async def _watch_journal(self) -> None:
        await asyncio.shield(self._registry.journal.ended)
        raise HarliError("the journal has ended: the store is not written any more", code="store")

    async def _settle(self) -> None:
        """Let a state that is being saved reach the disk."""
        end = asyncio.get_running_loop().time() + SETTLE_S
        while self._driver.active and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        self._registry.committed.clear()  # no answers to what is still written: the sockets are closing
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._submission.close()
        self._driver.close()
        self._uploads.close()
        self._files.close()
        self._disk.shutdown(wait=True, cancel_futures=True)
        self._registry.journal.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._store.close()
        self._router.close()
        self._inner_router.close()
        self._scheduler.peer.close()
        self._http.peer.close()
        self._context.term()


def _make_folders(run_dir: Path) -> Path:
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_dir_modes.close_to_others(run_dir)
    run_paths.make_ipc_dir(str(run_dir))
    return run_dir


async def _main(config: ServiceConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # Ctrl-C reaches the whole group of processes; the server ends this one when its state is saved.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    try:
        app = App(config)
    except (OSError, zmq.ZMQError) as error:
        raise HarliError(f"the finetune service cannot start: {error}", code="start") from error
    try:
        await app.run(stop)
    finally:
        app.close()


class _Formatter(logging.Formatter):
    """Log lines quote data and names of clients: escaped, they cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record), lines=True)


def main() -> None:
    os.umask(run_dir_modes.UMASK)
    hidden_torch.hide()
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(_Formatter("[%(asctime)s] finetune service: %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    text = os.environ.get(SERVICE_ENV)
    if text is None:
        raise SystemExit(f"{SERVICE_ENV} is not set: the finetune service is started by the server")
    try:
        uvloop.run(_main(ServiceConfig.from_json(text)))
    except HarliError as error:
        raise SystemExit(error.message) from error


if __name__ == "__main__":
    main()
