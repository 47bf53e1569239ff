"""SGLang's real TokenizerManager without a server: its requests end in a scheduler that a test
drives by hand.

``Sides(model).drive(scenario)`` runs a coroutine with one; ``waiting`` are the requests that the
scheduler has, and ``token``, ``finish`` and ``drop`` are what it says of them.  LoRA updates are
answered at once from ``adapters``, by SGLang's rules.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchStrOutput,
    BatchTokenizedGenerateReqInput,
    DumperControlReqInput,
    GenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    TokenizedGenerateReqInput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import PortArgs

from support.model_runner import publish, server_args

LOGPROBS = [
    "input_token_logprobs_val",
    "input_token_logprobs_idx",
    "output_token_logprobs_val",
    "output_token_logprobs_idx",
    "input_top_logprobs_val",
    "input_top_logprobs_idx",
    "output_top_logprobs_val",
    "output_top_logprobs_idx",
    "input_token_ids_logprobs_val",
    "input_token_ids_logprobs_idx",
    "output_token_ids_logprobs_val",
    "output_token_ids_logprobs_idx",
]


class Sides:
    """One event loop, and a ``Side`` for each set of options, that tests share."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._runner = asyncio.Runner()
        self._made: dict[str, Side] = {}
        self._all: list[Side] = []

    def drive(self, scenario: Callable[[Side], Coroutine[Any, Any, None]], **options: Any) -> None:
        """Run a scenario on a side that has the adapters one and two; afterwards nothing is in use
        or known."""
        self._runner.run(self._run(scenario, options))

    async def _run(
        self, scenario: Callable[[Side], Coroutine[Any, Any, None]], options: dict[str, Any]
    ) -> None:
        key = repr(sorted(options.items()))
        if key not in self._made:
            self._made[key] = Side(self._model, **options)
            self._all.append(self._made[key])
        side = self._made.pop(key)  # of a scenario that fails no other one is to hear
        publish(side.server_args, role="tokenizer")
        side.sent.clear()
        for name in set(side.adapters) - {"one", "two"}:
            assert (await side.unload(name)).success
        await side.load(*({"one", "two"} - set(side.adapters)))
        async with asyncio.timeout(60):
            await scenario(side)
        await settled()
        assert not side.waiting and not side.rid_to_state
        assert {name: side.uses(name) for name in side.adapters} == dict.fromkeys(side.adapters, 0)
        self._made[key] = side

    def close(self) -> None:
        self._runner.run(self._close_sockets())
        self._runner.close()

    async def _close_sockets(self) -> None:
        """A context that is collected together with a socket of its own waits for it for ever."""
        for side in self._all:
            side.recv_from_detokenizer.context.destroy(linger=0)


async def settled() -> None:
    """Calls whose reader is gone are closed by the event loop, a turn or two later."""
    for _ in range(20):
        await asyncio.sleep(0)


class Socket:
    """The socket to the scheduler: gives each message to a function."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take

    def send_pyobj(self, obj: Any, flags: int = 0, protocol: int = 0) -> None:
        self._take(obj)


class Side(TokenizerManager):
    """Attributes:
    waiting: requests that the scheduler has, by id, in the order in which they came.
    sent: every message to the scheduler.
    adapters: name -> id of what the scheduler has loaded.
    refusing: what it answers the next LoRA updates with; "" where it does them.
    other_rank: what a second rank answers them with; None: there is none.
    slow: LoRA updates are answered when ``answer_updates`` is called, not at once.
    """

    def __init__(self, model: str, **options: Any) -> None:
        args = server_args(
            model, enable_lora=True, skip_tokenizer_init=False, max_total_tokens=2048, **options
        )
        publish(args, role="tokenizer")
        super().__init__(args, PortArgs.init_new(args))
        self.send_to_scheduler.close()
        self.send_to_scheduler = Socket(self._to_scheduler)  # type: ignore[assignment]
        self.waiting: dict[str, TokenizedGenerateReqInput] = {}
        self.sent: list[Any] = []
        self.adapters: dict[str, str] = {}
        self.refusing = ""
        self.other_rank: str | None = None
        self.slow = False
        self._updates: list[Any] = []

    def auto_create_handle_loop(self) -> None:
        pass  # nothing is read from the sockets

    # ---- what comes to the scheduler
    def _to_scheduler(self, obj: Any) -> None:
        if isinstance(obj, BatchTokenizedGenerateReqInput):
            for one in obj.batch:
                self._to_scheduler(one)
            return
        self.sent.append(obj)
        self.update_lora_adapter_communicator._fan_out = 1 if self.other_rank is None else 2
        loop = asyncio.get_running_loop()
        if isinstance(obj, TokenizedGenerateReqInput):
            assert obj.lora_id is None or obj.lora_id in self.adapters.values(), (
                "an adapter that is not loaded"
            )
            self.waiting[obj.rid] = obj
        elif isinstance(obj, AbortReq):
            for rid in [rid for rid in self.waiting if rid.startswith(obj.rid)]:
                loop.call_soon(self.drop, rid)
        elif isinstance(obj, DumperControlReqInput):
            raise AssertionError(f"nothing answers {obj.method}")
        elif isinstance(
            obj, LoadLoRAAdapterReqInput | LoadLoRAAdapterFromTensorsReqInput | UnloadLoRAAdapterReqInput
        ):
            self._updates.append(obj)
            if not self.slow:
                loop.call_soon(self.answer_updates)

    def answer_updates(self) -> None:
        asked, self._updates = self._updates, []
        for obj in asked:
            self._result_dispatcher(self._update(obj))
            if self.other_rank is not None:
                error = self.other_rank
                self._result_dispatcher(LoRAUpdateOutput(success=not error, error_message=error))

    def _update(self, obj: Any) -> LoRAUpdateOutput:
        error = self.refusing
        if not error and isinstance(obj, UnloadLoRAAdapterReqInput):
            used = [r.rid for r in self.waiting.values() if r.lora_id == obj.lora_id]
            assert not used, f"{obj.lora_name} is unloaded under {used}"
            assert self.adapters.pop(obj.lora_name) == obj.lora_id
        elif not error and obj.lora_name in self.adapters:
            error = f"Failed to load LoRA adapter {obj.lora_name} because it is already loaded"
        elif not error:
            self.adapters[obj.lora_name] = obj.lora_id
        return LoRAUpdateOutput(success=not error, error_message=error, loaded_adapters=dict(self.adapters))

    # ---- what the scheduler says
    async def token(self, *rids: str) -> None:
        await self._say(rids, None)

    async def finish(self, *rids: str) -> None:
        for rid in rids:
            del self.waiting[rid]
        await self._say(rids, {"type": "length", "length": 1})

    async def refuse(self, rid: str, status: int) -> None:
        """An output that ends a request with an HTTP status, such as a queue that is full."""
        del self.waiting[rid]
        await self._say([rid], {"type": "abort", "message": "no", "status_code": status})

    def drop(self, rid: str) -> None:
        """It was aborted while it waited."""
        if self.waiting.pop(rid, None) is not None:
            type(self)._handle_abort_req(self, AbortReq(rid=rid))

    async def _say(self, rids: Any, reason: Any) -> None:
        count = len(rids)
        said: dict[str, Any] = {
            "rids": list(rids),
            "finished_reasons": [reason] * count,
            "output_strs": ["x"] * count,
            "output_ids": [array("q", [5])] * count,
            "prompt_tokens": [1] * count,
            "completion_tokens": [1] * count,
            "reasoning_tokens": [0] * count,
            "cached_tokens": [0] * count,
            "retraction_counts": [0] * count,
        }
        needed = [field.name for field in msgspec.structs.fields(BatchStrOutput) if field.required]
        unsaid: dict[str, Any] = {
            name: [] if name in LOGPROBS else None for name in needed if name not in said
        }
        output = BatchStrOutput(**said, **unsaid)
        await self._handle_batch_output(output)

    # ---- what a test asks
    def ask(self, **request: Any) -> asyncio.Task[Any]:
        """One call, as SGLang's /generate makes it; its task gives the answer."""

        async def call() -> Any:
            return await self.generate_request(GenerateReqInput(**request), None).__anext__()

        return asyncio.create_task(call())

    def uses(self, name: str) -> int:
        """SGLang's own counter of an adapter that is loaded."""
        return self.lora_registry._counters[self.adapters[name]].value()

    async def load(self, *names: str) -> None:
        for name in names:
            result = await self.load_lora_adapter(
                LoadLoRAAdapterReqInput(lora_name=name, lora_path=f"/adapters/{name}")
            )
            assert result.success, result.error_message

    async def unload(self, name: str) -> Any:
        return await self.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    async def came(self, count: int) -> list[str]:
        """Wait until the scheduler has so many requests."""
        await self.until(lambda: len(self.waiting) == count)
        return list(self.waiting)
