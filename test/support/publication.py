"""What surrounds a publisher in its tests: SGLang's own registry, communicators and lock, a real
socket pair, and a scheduler of dicts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.io_struct import (
    DumperControlReqInput,
    DumperControlReqOutput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.utils import TypeBasedDispatcher

from sglang_harli.managers.http import publisher
from sglang_harli.managers.http.publisher import AdapterPublisher
from sglang_harli.managers.http.tokenizer_handover import TokenizerHandover
from sglang_harli.protocol import internal
from support.plain_arguments import init_control, plain_arguments


def hook_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of plugin's table for publications, put in place as SGLang's registry does."""
    hooks = {name: name for name in ("load_lora_adapter", "unload_lora_adapter")}
    for name, of in {**hooks, "_validate_and_resolve_lora": "refuse_another_base"}.items():
        original, hook = getattr(TokenizerManager, name), getattr(publisher, of)

        async def around(self: Any, *args: Any, _original: Any = original, _hook: Any = hook) -> Any:
            return await _hook(_original, self, *args)

        monkeypatch.setattr(TokenizerManager, name, around)


class Manager(TokenizerManager):
    """SGLang's TokenizerManager, its LoRA and control parts only; ``requests``: what it sends."""

    def __init__(self, **arguments: Any) -> None:
        self.server_args = plain_arguments(**{"enable_lora": True, **arguments})
        self.served_model_name = "base"
        self.model_path = "/models/base"
        self.enable_lora = True
        self._result_dispatcher = TypeBasedDispatcher([])
        self.init_lora()
        init_control(self)
        assert isinstance(self.lora_registry, LoRARegistry)  # SGLang's own
        self.rid_to_state = {}
        self.requests: list[Any] = []
        self.stuck: set[str] = set()  # names of which not one slice is loaded
        self.stuck_ids: set[str] = set()
        self.abandoned: list[str] = []
        self.polls_left = 2
        self.load_error = ""
        self.passing = False
        self.unload_error = ""
        self.response: Any = ...  # instead of the scheduler's answer

    def auto_create_handle_loop(self) -> None:
        pass

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        self.requests.append(obj)
        asyncio.get_running_loop().call_soon(self._result_dispatcher, self._scheduler_answers(obj))

    def _scheduler_answers(self, obj: Any) -> Any:
        if isinstance(obj, LoadLoRAAdapterReqInput | UnloadLoRAAdapterReqInput):
            wrong = self.unload_error if isinstance(obj, UnloadLoRAAdapterReqInput) else ""
            return LoRAUpdateOutput(success=not wrong, error_message=wrong, loaded_adapters={})
        assert isinstance(obj, DumperControlReqInput)
        if obj.method == "harli/load_adapter" and obj.body["lora_name"] in self.stuck:
            self.stuck_ids.add(obj.body["lora_id"])
        if obj.body["lora_id"] in self.stuck_ids:
            if obj.method == "harli/abandon_adapter":
                self.abandoned.append(obj.body["lora_id"])
            return DumperControlReqOutput(success=True, response=[{"state": "loading", "slices": 7}])
        if self.load_error:
            status = {"state": "failed", "error": self.load_error, "passing": self.passing}
        elif obj.method == "harli/load_status" and self.polls_left == 0:
            status = {"state": "loaded"}
        else:
            self.polls_left -= obj.method == "harli/load_status"
            status = {"state": "loading"}
        response = [status] if self.response is ... else self.response
        return DumperControlReqOutput(success=True, response=response)

    def loads(self) -> list[str]:
        """Names of the adapters that the scheduler was asked to load."""
        return [
            r.body["lora_name"] for r in self.requests if getattr(r, "method", "") == "harli/load_adapter"
        ]

    def unloads(self) -> list[str]:
        """Ids of the adapters that the scheduler was asked to unload."""
        return [r.lora_id for r in self.requests if isinstance(r, UnloadLoRAAdapterReqInput)]


class Service:
    """The finetune service's end of the pair."""

    def __init__(self, socket: zmq.asyncio.Socket, manager: Manager, own: AdapterPublisher) -> None:
        self.socket, self.manager, self.publisher = socket, manager, own

    async def receive(self, kind: type[Any]) -> Any:
        async with asyncio.timeout(20):
            while True:
                header, *_ = await self.socket.recv_multipart()
                message = internal.decode(header, "http")
                if isinstance(message, kind):
                    return message

    async def send(self, message: internal.Message) -> None:
        await self.socket.send(internal.encode(message))

    async def publish(self, name: str) -> internal.AdapterPublished:
        await self.send(publish(name))
        return await self.receive(internal.AdapterPublished)


def publish(name: str, request: int = 1) -> internal.PublishAdapter:
    slot = internal.SlotRef(
        path="/dev/shm/slot",
        nbytes=64,
        tensors=[internal.TensorRef("a.lora_A.weight", "float32", (2, 8), 0, 64)],
    )
    return internal.PublishAdapter(
        request=request, job="ftjob-1", name=name, config={"r": 2, "lora_alpha": 4}, slot=slot
    )


@asynccontextmanager
async def connected(
    folder: Path, handover: TokenizerHandover | None = None, **arguments: Any
) -> AsyncIterator[Service]:
    endpoint = f"ipc://{folder}/http.sock"
    manager = Manager(**arguments)
    own = AdapterPublisher(manager, endpoint, handover)
    manager.harli_publisher = own  # type: ignore[attr-defined]
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(endpoint)
    own.start()
    try:
        yield Service(socket, manager, own)
    finally:
        await own.stop()
        socket.close()
        context.term()


def run(test: Callable[..., Any]) -> Callable[[Path], None]:
    def sync(tmp_path: Path) -> None:
        asyncio.run(test(tmp_path))

    sync.__name__ = test.__name__
    return sync


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def state(pid: int, **values: Any) -> internal.ServiceState:
    return internal.ServiceState(pid=pid, **{"endpoint_bound": True, "scheduler_seen": True, **values})
