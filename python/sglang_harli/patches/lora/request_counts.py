"""Runtime half of ``patches/07-lora-request-counts``: each use of an adapter counts once.

Leans on: ``srt.managers.tokenizer_manager.TokenizerManager`` (``init_lora``, ``generate_request``,
``_init_req_state``, ``_resolve_lora_path``, ``_dispatch_to_scheduler``, ``_handle_batch_output``,
``_handle_abort_req``, and on 0.5.23 ``_release_req_states_on_failure``; ``rid_to_state``,
``lora_registry``), ``srt.lora.lora_registry.LoRARegistry`` (``acquire``, ``release``,
``_registry``, ``_counters``, ``_registry_lock``) and the requests of ``srt.managers.io_struct``.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from sglang_harli.sglang_versions import supported
from sglang_harli.sglang_versions.current import lora_requests

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_REGISTRY = "sglang.srt.lora.lora_registry.LoRARegistry"
HEALTH_CHECK = "HEALTH_CHECK"  # SGLang answers requests whose id begins so with any sign of life


class AdapterUses:
    """Which requests of one tokenizer manager use which adapter; all on its event loop.

    Attributes:
        looked_up: names that some call is about to look up, with how many calls.
        heard_s: adapter id -> ``time.monotonic()`` of its requests' last token or end.
        idle: called when the last use of an adapter has ended.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._sent: dict[str, list[Any]] = {}  # request id -> the requests of that id that the scheduler has
        self._adapters: dict[str, list[str]] = {}  # of these: request id -> adapter ids
        self.looked_up: Counter[str] = Counter()
        self.heard_s: dict[str, float] = {}
        self.idle: Callable[[], None] | None = None

    # ---------------------------------------------------------------- an adapter's counter
    def count(self, lora_id: str) -> int:
        counter = self._manager.lora_registry._counters.get(lora_id)
        return counter.value() if counter is not None else 0

    def requests(self, lora_id: str) -> int:
        """How many requests of the adapter the scheduler has."""
        return sum(ids.count(lora_id) for ids in self._adapters.values())

    def in_use(self, name: str, lora_id: str) -> bool:
        return self.count(lora_id) > 0 or self.looked_up[name] > 0

    def hold(self, lora_id: str) -> None:
        counter = self._manager.lora_registry._counters.get(lora_id)
        if counter is not None:
            counter._count += 1

    def let_go(self, lora_id: str) -> None:
        counter = self._manager.lora_registry._counters.get(lora_id)
        if counter is None:
            return
        counter._count -= 1
        if counter._count == 0:
            self.heard_s.pop(lora_id, None)
            if self.idle is not None:
                self.idle()

    @contextlib.contextmanager
    def looking_up(self, names: Iterable[str]) -> Iterator[None]:
        """Somebody is about to use the adapters of these names, whatever ids they have by then."""
        counted = list(names)
        self.looked_up.update(counted)
        try:
            yield
        finally:
            self.looked_up.subtract(counted)
            for name in counted:
                if self.looked_up[name] <= 0:
                    del self.looked_up[name]

    # ---------------------------------------------------------------- what the scheduler has
    def sent(self, rid: str, lora_id: str | None, request: Any) -> None:
        if not rid.startswith(HEALTH_CHECK):  # of these the scheduler may say nothing
            self._sent.setdefault(rid, []).append(request)
        if lora_id is not None:
            self._adapters.setdefault(rid, []).append(lora_id)
            self.hold(lora_id)

    def is_sent(self, request: Any) -> bool:
        return any(one is request for one in self._sent.get(request.rid, ()))

    def has(self, rid: str) -> bool:
        return rid in self._sent

    def sent_ids(self) -> set[str]:
        return set(self._sent)

    def heard(self, rids: list[str], reasons: list[Any]) -> None:
        """Output has come for these requests; those with a reason have ended."""
        if self._adapters:
            now_s = time.monotonic()
            for rid in rids:
                for lora_id in self._adapters.get(rid, ()):
                    self.heard_s[lora_id] = now_s
        for rid, reason in zip(rids, reasons, strict=False):
            if reason is not None:
                self.ended(rid)

    def ended(self, rid: str) -> None:
        """The scheduler has said that a request ended; one that is not known here is no error."""
        _take_first(self._sent, rid)
        lora_id = _take_first(self._adapters, rid)
        if lora_id is not None:
            self.let_go(lora_id)


def _take_first(lists: dict[str, list[Any]], key: str) -> Any:
    found = lists.get(key)
    if not found:
        return None
    first = found.pop(0)
    if not found:
        del lists[key]
    return first


def uses_of(manager: Any) -> AdapterUses:
    """The uses of a ``TokenizerManager``."""
    found = manager.__dict__.get("lora_uses")
    if found is None:
        found = manager.lora_uses = AdapterUses(manager)
    return found


# ------------------------------------------------------------------ one call of generate_request
async def _generate_request(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    answers: Any = original(manager, obj, *args, **kwargs)
    try:
        async for answer in answers:
            yield answer
    except Exception:
        if not lora_requests.ABORTS_SENT:
            _end_sent(manager, obj)
        raise
    finally:
        _let_go_of_call(manager, obj)
        _forget_unsent(manager, obj)
        await answers.aclose()  # last: it may wait for a lock


def _parts(obj: Any) -> Iterator[Any]:
    """A request, or the requests of a batch: those that SGLang makes a state of."""
    parts = obj.__dict__.get("_sub_obj_cache")
    return iter((obj,) if parts is None else parts.values())


def _end_sent(manager: Any, obj: Any) -> None:
    """The call fails: nobody reads the results of what was sent."""
    from sglang.srt.managers.io_struct import AbortReq

    uses = uses_of(manager)
    sent = {part.rid for part in _parts(obj) if isinstance(part.rid, str) and uses.is_sent(part)}
    for rid in sorted(sent - _begin_as_others(uses, sent)):
        manager._dispatch_to_scheduler(AbortReq(rid=rid))


def _release_states(original: Callable[..., None], manager: Any, states: dict[str, Any]) -> None:
    """Around SGLang's own cleanup of a call that fails, which aborts what it has sent."""
    kept = _begin_as_others(uses_of(manager), set(states))
    original(
        manager, {rid: state for rid, state in states.items() if not state.dispatched or rid not in kept}
    )


def _begin_as_others(uses: AdapterUses, rids: set[str]) -> set[str]:
    """Of a call's ids, those that an abort cannot name: SGLang aborts every request whose id begins
    with the one given, also another call's.  Such a request runs on."""
    others = uses.sent_ids() - rids
    return {rid for rid in rids if any(other.startswith(rid) for other in others)}


def _forget_unsent(manager: Any, obj: Any) -> None:
    """The scheduler never ends what it never got; if the reader left SGLang keeps its state."""
    for part in _parts(obj):
        state = manager.rid_to_state.get(part.rid) if isinstance(part.rid, str) else None
        if state is not None and state.obj is part and not uses_of(manager).is_sent(part):
            del manager.rid_to_state[part.rid]


def _before_req_state(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang finds an id in use after it has noted, for good, those before it in the batch, and
    never one of an ended call that the scheduler still has."""
    uses = uses_of(manager)
    for rid in [obj.rid] if isinstance(obj.rid, str) else obj.rid:
        if not rid:  # the scheduler aborts all requests whose id begins with that of an abort
            raise ValueError("rid is empty: give an id of at least one character, or none")
        if rid in manager.rid_to_state or uses.has(rid):
            raise ValueError(f"Duplicate request ID detected: {rid}")
        if rid.startswith(HEALTH_CHECK) and obj.lora_path:
            raise ValueError(f"rid is {rid!r}: ids that begin with {HEALTH_CHECK} are the server's own")


# ------------------------------------------------------------------ the look-up
async def _resolve_lora_path(original: Callable[..., Awaitable[None]], manager: Any, obj: Any) -> None:
    uses = uses_of(manager)
    names = {obj.lora_path} if isinstance(obj.lora_path, str) else set(obj.lora_path) - {None}
    with uses.looking_up(names):
        await original(manager, obj)
        found = [obj.lora_id] if isinstance(obj.lora_id, str) else obj.lora_id
        _hold_for_call(uses, obj, [lora_id for lora_id in found if lora_id is not None])


def _hold_for_call(uses: AdapterUses, obj: Any, lora_ids: list[str]) -> None:
    """Hold adapters until all requests of a call have been sent, or the call ends."""
    answers = getattr(obj, "parallel_sample_num", 1)
    each = 1 if answers == 1 else 1 + answers  # the prefix that several answers share is a request too
    unsent = getattr(obj, "batch_size", 1) * each
    # Of a plain class: SGLang's dumps pickle requests, and are read where there is no sglang_harli.
    call = SimpleNamespace(lora_ids=lora_ids, unsent=unsent)
    for part in {id(one): one for one in (obj, *_parts(obj))}.values():
        part._lora_call = call  # which SGLang's copies of it keep
    for lora_id in lora_ids:
        uses.hold(lora_id)


def _let_go_of_call(manager: Any, obj: Any) -> None:
    call = obj.__dict__.get("_lora_call")
    if call is not None:
        held, call.lora_ids = call.lora_ids, []
        for lora_id in held:
            uses_of(manager).let_go(lora_id)


async def _acquire(original: Callable[..., Any], registry: Any, lora_name: Any) -> Any:
    """The ids of adapters by name, which become the most recently used; ``AdapterUses`` counts."""
    names = [lora_name] if isinstance(lora_name, str) else lora_name
    async with registry._registry_lock.writer_lock:
        lora_ids = [_look_up(registry, name) for name in names]
    return lora_ids[0] if isinstance(lora_name, str) else lora_ids


def _look_up(registry: Any, name: str | None) -> str | None:
    if name is None:
        return None
    ref = registry._registry.get(name)
    if ref is None:
        raise ValueError(
            f"The following requested LoRA adapters are not loaded: {name}\n"
            f"Loaded adapters: {list(registry._registry)}."
        )
    registry._registry.move_to_end(name)
    return ref.lora_id


async def _release(original: Callable[..., Any], registry: Any, lora_id: Any) -> None:
    """What SGLang calls at some of a request's ends; ``AdapterUses`` hears of each exactly once."""


# ------------------------------------------------------------------ what goes to the scheduler, and what comes back
def _after_dispatch(result: None, manager: Any, obj: Any) -> None:
    from sglang.srt.managers import io_struct

    if isinstance(obj, io_struct.BatchTokenizedGenerateReqInput | io_struct.BatchTokenizedEmbeddingReqInput):
        requests: list[Any] = list(obj.batch)
    elif isinstance(obj, io_struct.TokenizedGenerateReqInput | io_struct.TokenizedEmbeddingReqInput):
        requests = [obj]
    else:
        return
    for request in requests:
        state = manager.rid_to_state.get(request.rid)
        part = state.obj if state is not None else None
        uses_of(manager).sent(request.rid, request.lora_id, part)
        call = part.__dict__.get("_lora_call") if part is not None else None
        if call is not None:
            call.unsent -= 1
            if call.unsent == 0:
                _let_go_of_call(manager, part)


def _before_batch_output(manager: Any, recv_obj: Any) -> None:
    uses_of(manager).heard(recv_obj.rids, recv_obj.finished_reasons)


def _before_abort(manager: Any, recv_obj: Any) -> None:
    uses_of(manager).ended(recv_obj.rid)


HOOKS = (
    *supported.only("newest", ((f"{_MANAGER}._release_req_states_on_failure", _release_states, "around"),)),
    (f"{_MANAGER}.generate_request", _generate_request, "around"),
    (f"{_MANAGER}._init_req_state", _before_req_state, "before"),
    (f"{_MANAGER}._resolve_lora_path", _resolve_lora_path, "around"),
    (f"{_MANAGER}._dispatch_to_scheduler", _after_dispatch, "after"),
    (f"{_MANAGER}._handle_batch_output", _before_batch_output, "before"),
    (f"{_MANAGER}._handle_abort_req", _before_abort, "before"),
    (f"{_REGISTRY}.acquire", _acquire, "around"),
    (f"{_REGISTRY}.release", _release, "around"),
)
