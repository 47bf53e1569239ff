"""A small process in place of a server's two: the real trainer, link, adapter loader and publisher
around SGLang's model runner, without HTTP, tokenizer, prefill and decode.

``python -m support.bare_host`` is a template: it imports everything, then forks one host for each
line on its stdin (a JSON object: ``options`` of HarliOptions, ``model``, ``log``,
``registrations``) and answers with the host's pid.  So a host starts in about a second, and each is
a process of its own that can be killed. The template ends with its stdin, the hosts end with the
template.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_harli import run_paths
from sglang_harli.platforms.cpu.engine import CPU_ENGINE_ENV, STAND_IN

os.environ[CPU_ENGINE_ENV] = "1"  # SGLang decides at import which engine it is
sys.path.insert(0, str(STAND_IN))

import torch

torch.set_num_threads(1)  # a pool of threads would not survive the fork

from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry  # noqa: E402
from sglang.srt.managers.tokenizer_manager import TokenizerManager  # noqa: E402
from sglang.srt.models import registry as _models  # noqa: E402, F401  (imports every model: 3 s)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402
from sglang.utils import TypeBasedDispatcher  # noqa: E402

from sglang_harli.config import HarliOptions  # noqa: E402
from sglang_harli.core import StepLoad  # noqa: E402
from sglang_harli.managers.http.publisher import AdapterPublisher  # noqa: E402
from sglang_harli.managers.http.supervision import child_process  # noqa: E402
from sglang_harli.managers.scheduler import control, trainer_setup  # noqa: E402
from sglang_harli.patches import catalog  # noqa: E402
from sglang_harli.plugin import TABLE  # noqa: E402
from support import model_runner  # noqa: E402
from support.plain_arguments import init_control  # noqa: E402

SERVED_NAME = "org/tiny"
POOL_TOKENS = 65_536  # training's memory is lent by the KV pool
WAIT_MS = 5  # for a message, when there is nothing to train


class LoggedRegistry(LoRARegistry):
    """SGLang's registry, which also notes down each registration: ``pid name``, durable, one a
    line."""

    def __init__(self, path: str) -> None:
        super().__init__(None)
        self._path = path

    async def register(self, lora_ref: LoRARef) -> None:
        await super().register(lora_ref)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(fd, f"{os.getpid()} {lora_ref.lora_name}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)


class Manager(TokenizerManager):
    """SGLang's TokenizerManager, its LoRA and control parts only; its requests go to ``requests``,
    from which the loop of the trainer's thread answers them."""

    def __init__(self, args: Any, registrations: str) -> None:
        self.server_args = args
        self.served_model_name = args.served_model_name
        self.enable_lora = True
        self._result_dispatcher = TypeBasedDispatcher([])
        self.init_lora()
        self.lora_registry = LoggedRegistry(registrations)
        init_control(self)
        self.requests: queue.SimpleQueue[tuple[Any, asyncio.AbstractEventLoop]] = queue.SimpleQueue()

    def auto_create_handle_loop(self) -> None:
        pass

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        self.requests.put((obj, asyncio.get_running_loop()))

    def answer_one(self, trainer: Any) -> bool:
        """On the trainer's thread: answer the oldest request; whether there was one."""
        try:
            request, loop = self.requests.get_nowait()
        except queue.Empty:
            return False
        loop.call_soon_threadsafe(self._result_dispatcher, control.answer(trainer, request))
        return True


def host(options: HarliOptions, model: str, registrations: str) -> None:
    """Train and publish until killed."""
    args = model_runner.server_args(
        model, enable_lora=True, served_model_name=SERVED_NAME, max_total_tokens=POOL_TOKENS
    )
    vars(args)["harli_options"] = lambda: options  # as HarliServerArgs answers it
    runner = model_runner.build_runner(args)
    scheduler = SimpleNamespace(
        server_args=args,
        tp_worker=SimpleNamespace(model_runner=runner),
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=None,  # no prompts, no prefixes
    )
    trainer, side = trainer_setup.build_trainer(scheduler, options)
    manager = Manager(args, registrations)
    endpoint = run_paths.http_endpoint(options.absolute_run_dir)
    threading.Thread(target=asyncio.run, args=(_publish(manager, endpoint),), daemon=True).start()
    while True:
        while manager.answer_one(trainer):
            pass
        trainer.poll()
        if trainer.run is not None:
            trainer.tick(idle=True)
        chosen = trainer.slotting.next_idle(StepLoad, side.targets)
        if chosen is None:
            trainer.link.socket.poll(WAIT_MS)
            continue
        trainer.run_quantum(*chosen)


async def _publish(manager: Manager, endpoint: str) -> None:
    AdapterPublisher(manager, endpoint).start()
    await asyncio.Event().wait()


# ------------------------------------------------------------------ the template
def _run_host(asked: dict[str, Any], template: int) -> None:
    """In the forked process."""
    child_process.die_with_parent(template)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(process)d %(message)s")
    run_paths.make_ipc_dir(asked["options"]["run_dir"])
    host(HarliOptions(**{**asked["options"], "parity": "off"}), asked["model"], asked["registrations"])


def main() -> None:
    catalog.register_all(HookRegistry)
    for row in TABLE:
        if "KVCacheConfigurator" in row.target:
            module, name = row.hook.split(":")
            hook = getattr(importlib.import_module(module), name)
            HookRegistry.register(row.target, hook, HookType(row.kind))
    HookRegistry.apply_hooks()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # hosts that were killed leave no zombies
    gc.collect()
    gc.freeze()  # the forks share these pages
    template = os.getpid()
    print(json.dumps({"ready": template}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _run_host(json.loads(line), template)
            except BaseException:
                traceback.print_exc()  # into the log
            finally:
                sys.stderr.flush()
                os._exit(1)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
