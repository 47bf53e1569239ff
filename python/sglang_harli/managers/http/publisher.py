"""HTTP process: makes a finished adapter servable under its name, and an evicted one again.

SGLang's LoRA registry lives in this process.  Two tasks in the server's event loop: one reads the
finetune service's messages, the other publishes, one adapter at a time.  The scheduler loads the
tensors from shared memory in slices between batches; the name is registered when all are there, so
no request meets half an adapter.  SGLang's ``lora_update_lock`` is held while the loading begins
and while the name is registered, not in between.  Steps may be repeated: a served name answers ok.

Leans on SGLang's TokenizerManager (lora_update_lock, lora_registry, lora_ref_cache,
update_lora_adapter_communicator, server_args), LoRARef, LoadLoRAAdapterReqOutput and mirrors the
bookkeeping of TokenizerControlMixin.load_lora_adapter_from_tensors. Evictions are
patches/08-lora-unload's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from sglang_harli.errors import HarliError, NotReadyError, StateError, UnsupportedError
from sglang_harli.failpoints import Failpoint, failpoint
from sglang_harli.managers.http.model_names import MissingModelError
from sglang_harli.managers.http.prefill import refused_requests
from sglang_harli.managers.http.prefill.prefill_servers import PrefillServers
from sglang_harli.managers.http.scheduler_call import call
from sglang_harli.managers.http.tokenizer_handover import TokenizerHandover
from sglang_harli.names import checkpoint_of, looks_like_adapter
from sglang_harli.patches.lora.request_counts import uses_of
from sglang_harli.patches.lora.unload import refuse_when_all_are_pinned, unload_when_idle, updates_of
from sglang_harli.protocol import internal
from sglang_harli.protocol.trouble import passes
from sglang_harli.sglang_versions.current import arguments

logger = logging.getLogger(__name__)

DELETED = "it was deleted"
DROPPED = "unloaded by the operator: not served until the server restarts"
TENSOR_PATH = "__tensor__"  # SGLang's path of an adapter that came as tensors
HELLO_EVERY_S = 1.0
MOST_NOT_THERE = 1000  # names of checkpoints that are remembered as missing
POLL_FIRST_S, POLL_LONGEST_S = 0.01, 0.2
QUIET_S = 60.0  # without one slice of any adapter: the loading is given up
# How long a request waits for an evicted adapter to come back.
BRING_BACK_S = 120.0  # a service that is held still and replaced takes half a minute; twice in a row one
ASK_AGAIN_S = 10.0  # a question may be lost
HAND_OVER_PAUSE_S = 60.0  # at most, between two attempts to hand over the tokenizer


class AdapterPublisher:
    """The HTTP process's end of the ipc pair to the finetune service.

    Args:
        tokenizer_manager: SGLang's; all calls run in its event loop.
        endpoint: run_paths.http_endpoint(run_dir).
        handover: of this server's tokenizer; None where it has none.
        pair: the prefill servers of a decode server; None: it computes prompts itself.

    Attributes:
        was_ready: the service's socket has been open and the scheduler's hello had reached it.
        state: the latest ServiceState; received: how many messages the service has sent.
        others: adapters of another base, which are not served, and the sentence that says so.
        down: why there is no service any more; None while there is one, or will be again.
    """

    def __init__(
        self,
        tokenizer_manager: Any,
        endpoint: str,
        handover: TokenizerHandover | None = None,
        pair: PrefillServers | None = None,
    ) -> None:
        self._manager, self.pair = tokenizer_manager, pair
        self._handover = handover
        self._handing_over: asyncio.Task[None] | None = None
        self._hand_over_pause_s = 0.0
        self._endpoint = endpoint
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._queue: asyncio.Queue[internal.PublishAdapter] = asyncio.Queue()
        self._newest: dict[str, internal.PublishAdapter] = {}  # by adapter, of those that wait or are in work
        self._waiting: dict[str, asyncio.Future[str]] = {}  # evicted adapter -> what is wrong, "" when back
        self._coming: set[asyncio.Task[str]] = set()
        self._dropped: set[str] = set()  # unloaded by the operator, or deleted
        self._not_there: dict[str, str] = {}  # checkpoint -> why the service has none
        self._seq = 0
        self.state: internal.ServiceState | None = None
        self.others: dict[str, str] = {}
        self.was_ready = False
        self.received = 0
        self.down: str | None = None

    # ---------------------------------------------------------------- life
    @property
    def listening(self) -> bool:
        """Whether messages of the service are received."""
        return self._socket is not None and self._task is not None and not self._task.done()

    def start(self) -> None:
        """Connect and begin; inside the server's running event loop."""
        self._task = asyncio.create_task(self._run(), name="harli-publisher")
        self._task.add_done_callback(_log_failure)

    async def stop(self) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._context is not None:
            self._context.destroy()
        self._task = self._socket = self._context = None

    async def _open(self) -> zmq.asyncio.Socket:
        """Connect; a failure (no descriptor is left) is logged, and tried again each second."""
        said = ""
        while True:
            socket = None
            try:
                if self._context is None:
                    self._context = zmq.asyncio.Context()
                socket = self._context.socket(zmq.DEALER)
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a service that is away
                socket.setsockopt(zmq.RECONNECT_IVL, 100)
                socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
                socket.connect(self._endpoint)
                return socket
            except zmq.ZMQError as error:
                if socket is not None:
                    socket.close()
                if said != str(error):
                    said = str(error)
                    logger.error(
                        "harli: no link to the finetune service (%s): serving goes on without it", error
                    )
            await asyncio.sleep(HELLO_EVERY_S)

    async def _run(self) -> None:
        self._socket = socket = await self._open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._greet())
            tasks.create_task(self._receive(socket))
            tasks.create_task(self._publish_queued())
            if self.pair is not None:
                tasks.create_task(self._show_pair(self.pair))

    async def _greet(self) -> None:
        while self.state is None:
            await self._say_hello()
            await asyncio.sleep(HELLO_EVERY_S)

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            header, *_ = await socket.recv_multipart()
            self.received += 1
            try:
                message = internal.decode(header, "to_http")
            except msgspec.MsgspecError as error:
                logger.error("harli: dropped a message of the finetune service: %s", error)
                continue
            if isinstance(message, internal.ServiceState):
                await self._take_state(message)
            elif isinstance(message, internal.AdapterRefused):
                logger.error("harli: adapter %s cannot be brought back: %s", message.name, message.text)
                self._refused(message)
            else:
                self._newest[message.name] = message
                self._queue.put_nowait(message)

    def _refused(self, message: internal.AdapterRefused) -> None:
        if message.code == "not_found" and checkpoint_of(message.name) is not None:
            if message.name not in self._manager.lora_registry.get_all_adapters():
                self._manager.lora_ref_cache.pop(message.name, None)
            if len(self._not_there) >= MOST_NOT_THERE:
                self._not_there.clear()
            self._not_there[message.name] = message.text
        self._settle(message.name, message.text)

    async def _publish_queued(self) -> None:
        while True:
            wanted = await self._queue.get()
            # The slot of a repeated question, or of a service that is gone, may be gone too.
            if self._newest.get(wanted.name) is wanted:
                await self._publish(wanted)
                if self._newest.get(wanted.name) is wanted:
                    del self._newest[wanted.name]

    # ---------------------------------------------------------------- the service
    async def _send(self, message: internal.Message) -> None:
        self._seq += 1
        message.seq = self._seq
        if self._socket is None:  # not open yet
            return
        try:
            await self._socket.send(internal.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:  # away (Again); it asks again, or is greeted, when it is back
            logger.debug("harli: %s not sent to the finetune service: %s", type(message).__name__, error)

    async def _say_hello(self) -> None:
        fingerprint = self._handover.fingerprint if self._handover is not None else ""
        name = self._manager.served_model_name
        await self._send(internal.HttpHello(pid=os.getpid(), served_model_name=name, tokenizer=fingerprint))

    async def _hand_over_again(self, handover: TokenizerHandover) -> None:
        """The service could not read the file; with growing pauses while that goes on."""
        await asyncio.sleep(self._hand_over_pause_s)
        self._hand_over_pause_s = min(max(2 * self._hand_over_pause_s, 1.0), HAND_OVER_PAUSE_S)
        lost = self.state is not None and self.state.tokenizer_lost  # not said before the last one was read
        if lost and await asyncio.to_thread(handover.write):
            await self._say_hello()

    async def _take_state(self, state: internal.ServiceState) -> None:
        before, self.state = self.state, state
        if state.endpoint_bound and state.scheduler_seen and not self.was_ready:
            self.was_ready = True
            logger.info("harli: the finetune service (pid %d) is ready", state.pid)
        self._note_others(state.others)
        self._remember(state.adapters)
        if state.greeted_by != os.getpid():  # ours was lost, or has gone to the service before
            await self._say_hello()
        if not state.tokenizer_lost:
            self._hand_over_pause_s = 0.0
        writes = self._handing_over is not None and not self._handing_over.done()
        if state.tokenizer_lost and self._handover is not None and not writes:
            self._handing_over = asyncio.create_task(self._hand_over_again(self._handover))
        if before is not None and before.pid == state.pid:
            return
        for name in list(self._waiting):
            await self._send(internal.AdapterWanted(name=name))

    def _remember(self, names: list[str]) -> None:
        """Adapters of earlier runs of the server: loaded on demand, like evicted ones."""
        if not names:
            return
        from sglang.srt.lora.lora_registry import LoRARef

        for name in names:
            if name not in self._dropped and name not in self._manager.lora_ref_cache:
                self._manager.lora_ref_cache[name] = LoRARef(lora_name=name, lora_path=TENSOR_PATH)

    def _note_others(self, others: dict[str, list[str]] | None) -> None:
        """Adapters of another base: after an update of the weights some may be loaded."""
        if others is None:
            return
        self.others = {name: text for text, names in others.items() for name in names}
        # A request for one then comes to ``bring_back``, which says why not.
        self._remember(list(self.others))
        loaded = self._manager.lora_registry.get_all_adapters()
        for name in self.others:
            self._leave_pair(name)
        for name in [name for name in loaded if name in self.others]:
            logger.info("harli: adapter %s is unloaded: %s", name, self.others[name])
            updates_of(self._manager).start(self._unload_other(name))

    async def _unload_other(self, name: str) -> None:
        result = await unload_when_idle(self._manager, name)
        if not result.success:  # tried again at the next word of the service
            logger.error("harli: adapter %s could not be unloaded: %s", name, result.error_message)

    async def _show_pair(self, pair: PrefillServers) -> None:
        """The service shows the prefill servers in its status."""
        shown: tuple[Any, Any] | None = None
        while True:
            now = (pair.status(), self.state.pid if self.state is not None else None)
            if now != shown and now[1] is not None:
                shown = now
                await self._send(internal.PrefillState(servers=now[0]))
            await asyncio.sleep(HELLO_EVERY_S)

    # ---------------------------------------------------------------- publication
    async def _publish(self, wanted: internal.PublishAdapter) -> None:
        answer = internal.AdapterPublished(request=wanted.request, job=wanted.job, name=wanted.name, ok=True)
        try:
            loaded = self._manager.lora_registry.get_all_adapters()
            if wanted.name not in loaded:
                await self.finish_unload(wanted.name)
            if wanted.name not in self._dropped and wanted.name not in loaded:
                await self._load(wanted)
            if wanted.name in self._dropped:
                answer.text = DROPPED
        except Exception as error:  # boundary: one publication is answered with an error; the next one comes
            answer.ok, answer.text, answer.passing = False, str(error), passes(error)
            answer.code = error.code if isinstance(error, HarliError) else "internal"
            if isinstance(error, HarliError):
                logger.error("harli: adapter %s is not served: %s", wanted.name, error)
            else:
                answer.text = f"{type(error).__name__}: {error}"
                logger.exception("harli: adapter %s is not served", wanted.name)
        await self._answer(answer)
        updates_of(self._manager).start(self._evict(wanted.name))

    async def _evict(self, published: str) -> None:
        """What is beyond --max-loaded-loras goes, but not what has just come."""
        with uses_of(self._manager).looking_up([published]):
            await updates_of(self._manager).evict()

    async def _answer(self, answer: internal.AdapterPublished) -> None:
        self._settle(answer.name, "" if answer.ok else answer.text)
        await self._send(answer)

    def _settle(self, name: str, wrong: str) -> None:
        """End the wait of requests for an adapter: it is back (``""``), or what is wrong."""
        waiting = self._waiting.get(name)
        if waiting is not None and not waiting.done():
            waiting.set_result(wrong)

    def go_down(self, why: str) -> None:
        """There will be no service any more: requests that wait for an adapter get an error."""
        self.down = why
        for name in list(self._waiting):
            self._settle(name, self._no_service())

    def _no_service(self) -> str:
        return f"it is not loaded, and {self.down}: restart the server to have it back"

    async def _load(self, wanted: internal.PublishAdapter) -> None:
        """Have the scheduler load the adapter, then register its name, if not unloaded by then.

        Raises:
            UnsupportedError: LoRA is off, full of pinned adapters, or does not fit the adapter.
            NotReadyError: not now: the scheduler makes no progress with it, or lacks memory.
            StateError: the scheduler does not answer as expected.
        """
        from sglang.srt.lora.lora_registry import LoRARef

        # A fresh id each time: SGLang's prefix cache is keyed by it.
        ref = LoRARef(lora_name=wanted.name, lora_path=TENSOR_PATH)
        since = time.monotonic()
        if self.pair is not None and wanted.name not in self._dropped:
            await self.pair.ensure(wanted.name, wanted.folder)
        body = {
            "lora_id": ref.lora_id,
            "lora_name": wanted.name,
            "config": wanted.config,
            "slot": msgspec.to_builtins(wanted.slot),
            "urgent": wanted.name in self._waiting,
        }
        async with self._manager.lora_update_lock:
            self._check_room(wanted.name)
            status = await self.ask("harli/load_adapter", body)
        status = await self._loaded(wanted.name, ref.lora_id, status)
        if status.get("state") != "loaded":
            kind = NotReadyError if status.get("passing") else UnsupportedError
            raise kind(status.get("error") or f"unexpected answer {status}", code="load_failed")
        failpoint(Failpoint.LOADED)
        async with self._manager.lora_update_lock:
            if wanted.name in self._dropped:  # meanwhile
                updates_of(self._manager).unfinished[wanted.name] = ref.lora_id
                await self._put_away(wanted.name)
                return
            await self._manager.lora_registry.register(ref)
            self._manager.lora_ref_cache[wanted.name] = ref
        failpoint(Failpoint.REGISTERED)
        logger.info("harli: adapter %s is served (loaded in %.2f s)", wanted.name, time.monotonic() - since)

    async def finish_unload(self, name: str) -> bool:
        """Have the scheduler unload what an earlier unload left there; False: there was none.
        StateError: it fails again, and the name is not loaded until it has been done."""
        async with self._manager.lora_update_lock:
            updates = updates_of(self._manager)
            if name not in updates.unfinished or name in updates.leaving:  # requests may use it
                return False
            await self._put_away(name)
            return True

    async def _put_away(self, name: str) -> None:
        """Have the scheduler unload what has no name; under ``lora_update_lock``."""
        result = await updates_of(self._manager).finish(name)
        if not result.success:
            raise StateError(f"it could not be put away: {result.error_message}", code="load_failed")
        logger.info("harli: adapter %s is put away: it was unloaded while it was being loaded", name)

    async def _loaded(self, name: str, lora_id: str, status: dict[str, Any]) -> dict[str, Any]:
        """The scheduler's last answer on a loading; NotReadyError: no slice for a minute."""
        wait_s, done, since_s = POLL_FIRST_S, status.get("slices"), time.monotonic()
        while status.get("state") == "loading":
            if status.get("slices") != done:
                done, since_s = status.get("slices"), time.monotonic()
            elif time.monotonic() - since_s > QUIET_S:
                status = await self.ask("harli/abandon_adapter", {"lora_id": lora_id})
                if status.get("state") == "loaded":  # just now
                    return status
                text = f"not one slice of it could be loaded beside the requests in {QUIET_S:g} s"
                raise NotReadyError(text)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.5, POLL_LONGEST_S)
            asked = {"lora_id": lora_id, "urgent": name in self._waiting}
            status = await self.ask("harli/load_status", asked)
        return status

    def _check_room(self, name: str) -> None:
        if not arguments.in_force(self._manager.server_args).enable_lora:
            raise UnsupportedError(
                "LoRA serving is off: start the server with --enable-lora", code="lora_disabled"
            )
        if name in updates_of(self._manager).leaving:
            raise NotReadyError("the operator is unloading it")
        try:
            refuse_when_all_are_pinned(self._manager)
        except ValueError as error:
            raise UnsupportedError(str(error), code="no_room") from error

    async def ask(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        """One remote call to the scheduler; runs to its end also where the caller is cancelled.
        StateError: the scheduler reports an error, or does not answer as expected."""
        answers = await call(self._manager, method, body)
        if len(answers) == 1 and not answers[0].success:
            raise StateError(f"{method}: {answers[0].error}", code="load_failed")
        if len(answers) != 1 or not answers[0].response or not isinstance(answers[0].response[0], dict):
            raise StateError(f"{method}: unexpected answer {answers!r:.500}", code="load_failed")
        return answers[0].response[0]

    # ---------------------------------------------------------------- evicted adapters
    async def bring_back(self, name: str, timeout_s: float = BRING_BACK_S) -> str:
        """Have the service publish an evicted adapter again; returns what failed, or ``""``."""
        if name in self.others:
            return self.others[name]
        if self.down is not None:
            return self._no_service()
        if name in updates_of(self._manager).leaving:
            return f"LoRA adapter {name!r} is being unloaded"
        future = self._waiting.get(name)
        if future is None:
            future = self._waiting[name] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: self._waiting.pop(name, None))
            await self._send(internal.AdapterWanted(name=name))
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            done, _ = await asyncio.wait([future], timeout=min(left_s, ASK_AGAIN_S))
            if done:
                return future.result()
            await self._send(internal.AdapterWanted(name=name))
        text = f"the finetune service did not bring it back within {timeout_s:g} s: try again"
        if not future.done():
            future.set_result(text)  # the next request asks anew
        return text

    def load_meanwhile(self, name: str) -> None:
        """An adapter of ours that is not loaded here comes back, and to the prefill servers."""
        if name in self.dormant() and name not in self._waiting:
            task = asyncio.create_task(self.bring_back(name))
            self._coming.add(task)
            task.add_done_callback(self._coming.discard)

    @contextlib.contextmanager
    def asking_for(self, names: Iterable[str]) -> Iterator[None]:
        """Around a request's look-up of its adapters: those of checkpoints are brought here when
        they are first asked for.  Raises MissingModelError: the service has no such checkpoint."""
        from sglang.srt.lora.lora_registry import LoRARef

        cache, loaded = self._manager.lora_ref_cache, self._manager.lora_registry.get_all_adapters
        unknown = [n for n in names if checkpoint_of(n) and n not in cache and n not in loaded()]
        for name in unknown:
            if name in self._dropped:
                raise MissingModelError(name, DROPPED)
            self._not_there.pop(name, None)
            cache[name] = LoRARef(lora_name=name, lora_path=TENSOR_PATH)
        try:
            yield
        except ValueError as error:
            for name in unknown:
                if name not in loaded():
                    cache.pop(name, None)
            for name in names:
                if name in self._not_there and name not in loaded():
                    raise MissingModelError(name, self._not_there[name]) from error
            raise

    def _leave_pair(self, name: str) -> None:
        if self.pair is not None:
            self.pair.forget(name)

    def drop(self, name: str) -> None:
        """The operator unloaded it: the name answers no more, until the server restarts."""
        ref = self._manager.lora_ref_cache.get(name)
        if ref is not None and ref.lora_path == TENSOR_PATH:
            del self._manager.lora_ref_cache[name]
            self._dropped.add(name)
            self._leave_pair(name)
            self._settle(name, DROPPED)

    def delete(self, name: str) -> None:
        """A job's model is deleted: it is not loaded any more, and what is being loaded is put
        away."""
        self._manager.lora_ref_cache.pop(name, None)
        self._dropped.add(name)
        self._leave_pair(name)
        self._settle(name, DELETED)

    def dormant(self) -> list[str]:
        """Names of our adapters that answer when asked for but are not loaded now."""
        gone = self._manager.lora_registry.get_all_adapters().keys() | updates_of(self._manager).leaving
        return [
            name
            for name, ref in self._manager.lora_ref_cache.items()
            if name not in gone and ref.lora_path == TENSOR_PATH and looks_like_adapter(name)
            if name not in self.others
        ]


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical(
            "harli: publication has stopped: finished adapters are not served until the server restarts",
            exc_info=task.exception(),
        )


# ------------------------------------------------------------------ in SGLang's tokenizer manager
async def load_lora_adapter(
    original: Callable[..., Awaitable[Any]], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``TokenizerControlMixin.load_lora_adapter``: evicted ones of ours have no path."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqOutput

    publisher: AdapterPublisher | None = getattr(manager, "harli_publisher", None)
    if publisher is None or obj.lora_path != TENSOR_PATH or not looks_like_adapter(obj.lora_name):
        return await original(manager, obj, *args, **kwargs)
    wrong = await publisher.bring_back(obj.lora_name)
    return LoadLoRAAdapterReqOutput(success=not wrong, error_message=wrong)


async def unload_lora_adapter(
    original: Callable[..., Awaitable[Any]], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``TokenizerControlMixin.unload_lora_adapter`` (the operator's, not an eviction): an
    adapter of ours answers no more, also one that is not loaded now."""
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqOutput

    publisher: AdapterPublisher | None = getattr(manager, "harli_publisher", None)
    async with manager.lora_update_lock:  # not while it is being registered
        if publisher is not None and obj.lora_name in publisher.dormant():
            publisher.drop(obj.lora_name)
            return UnloadLoRAAdapterReqOutput(success=True)
    if publisher is not None and obj.lora_name not in manager.lora_registry.get_all_adapters():
        try:
            if await publisher.finish_unload(obj.lora_name):
                return UnloadLoRAAdapterReqOutput(success=True)
        except HarliError as error:
            return UnloadLoRAAdapterReqOutput(success=False, error_message=str(error))
    result = await original(manager, obj, *args, **kwargs)
    if result.success and publisher is not None and looks_like_adapter(obj.lora_name):
        publisher.drop(obj.lora_name)
    return result


async def refuse_another_base(original: Callable[..., Awaitable[None]], manager: Any, obj: Any) -> None:
    """Around ``TokenizerManager._validate_and_resolve_lora``: a ValueError (SGLang answers 400) for
    an adapter of another base's weights, also while it is still loaded; a checkpoint is looked for
    where it is asked for."""
    publisher: AdapterPublisher | None = getattr(manager, "harli_publisher", None)
    with refused_requests.noted(manager, obj):
        _check_base(manager, obj)
        check_pair(manager, _names(obj), stream=bool(getattr(obj, "stream", False)))
        with contextlib.nullcontext() if publisher is None else publisher.asking_for(_names(obj)):
            await original(manager, obj)
        _check_base(manager, obj)  # the weights may have been updated while an adapter was brought back


def _check_base(manager: Any, obj: Any) -> None:
    publisher: AdapterPublisher | None = getattr(manager, "harli_publisher", None)
    others = {} if publisher is None else publisher.others
    for name in _names(obj):
        if name in others:
            raise ValueError(f"LoRA adapter {name!r} is not served here: {others[name]}")


def check_pair(manager: Any, names: Iterable[str], *, stream: bool = False) -> None:
    """On a decode server: HTTPException 503 (of a stream, which has begun, ValueError) for an
    adapter that a prefill server does not have now; the request would wait for KV that is never
    sent.  One of ours is loaded there meanwhile."""
    from fastapi import HTTPException

    publisher: AdapterPublisher | None = getattr(manager, "harli_publisher", None)
    if publisher is None or publisher.pair is None:
        return
    for name in names:
        if why := publisher.pair.why_not(name):
            publisher.load_meanwhile(name)
            text = f"LoRA adapter {name!r} is not served now: {why}"
            raise ValueError(text) if stream else HTTPException(503, detail=text)


def _names(obj: Any) -> list[str]:
    """The adapters that a request names."""
    paths = obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path]
    return [name for name in paths if isinstance(name, str)]
