"""The seam: everything that is replaced in SGLang, in one table, and when.

SGLang calls ``activate()`` (entry point ``sglang.srt.plugins``) before it parses arguments and
again in each scheduler process.  Our arguments always replace SGLang's; the rest follows when the
switch is on.  Leans on SGLang: ``plugins.hook_registry`` and the table's targets.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from sglang_harli.config import FLAG_PREFIX, SWITCH_ENV, SWITCH_PREFILL, SWITCH_SERVE
from sglang_harli.sglang_versions import supported

logger = logging.getLogger(__name__)

DISTRIBUTION = "sglang-harli"

PLUGIN_NAME = "harli"  # the entry point's name, as SGLANG_PLUGINS spells it


@dataclass(frozen=True, slots=True)
class Replacement:
    """One row of the table.

    Attributes:
        target: what is replaced in SGLang, a dotted path.
        hook: ours, as ``module:name``, imported when it is installed.
        why: why a replacement is needed.
        kind: a HookType: replace, before, after or around.
        main: for the main process (HTTP and tokenizer), else for the scheduler processes.
        always: with --harli-finetune off too; pair: so on a prefill server.
    """

    target: str
    hook: str
    why: str
    kind: str = "around"
    main: bool = True
    always: bool = False
    pair: bool = False

    @property
    def applies(self) -> bool:
        """Whether it is in force, once the switch is on."""
        return self.always or finetuning() or (self.pair and on_prefill_server())


SERVER_ARGS = Replacement(
    "sglang.srt.server_args.ServerArgs",
    "sglang_harli.server_args:HarliServerArgs",
    "our options are flags like SGLang's own, and travel to each of its processes",
    kind="replace",
)

# Only with the switch on and, but for rows that say ``always``, --harli-finetune on.  The patches
# (sglang_harli.patches.catalog) need the switch alone: LoRA, or a CPU, needs them without
# finetuning too.
TABLE = (
    Replacement(
        "sglang.srt.managers.scheduler.Scheduler",
        "sglang_harli.managers.scheduler.scheduler:HarliScheduler",
        "training quanta run between batches, on the scheduler's thread",
        kind="replace",
        main=False,
    ),
    *(
        Replacement(
            f"sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.{method}",
            f"sglang_harli.managers.scheduler.memory.pool_setup:{hook}",
            why,
            main=False,
        )
        for method, hook, why in (
            (
                "_profile_available_bytes",
                "leave_room",
                "on a GPU the KV pool takes all that is free: what training needs outside it stays out",
            ),
            ("_build_mha_kv_pool", "build_kv_pool", "the KV cache's memory can be lent to training"),
            (
                "_build_token_to_kv_pool_allocator",
                "build_allocator",
                "slots whose memory is lent are free on call: an allocation takes them back",
            ),
        )
    ),
    *(
        Replacement(
            f"sglang.srt.disaggregation.decode.{method}",
            f"sglang_harli.managers.scheduler.memory.transfers:{hook}",
            why,
            main=False,
        )
        for method, hook, why in (
            (
                "DecodePreallocQueue._pre_alloc",
                "pre_alloc",
                "a prefill server writes on no stream: what training gave back is cleared before it hears of the slots",
            ),
            (
                "DecodeTransferQueue.pop_transferred",
                "pop_transferred",
                "behind a transfer that was given up, free slots may still be written to",
            ),
        )
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.release_memory_occupation",
        "sglang_harli.managers.http.training_guards:refuse_while_training",
        "the scheduler's answer to a release has no room for a refusal",
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.flush_cache",
        "sglang_harli.managers.http.training_guards:flush_while_idle",
        "SGLang refuses it while a request runs, also one of ours",
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.pause_generation",
        "sglang_harli.managers.http.training_guards:pause_training_too",
        "its default mode holds requests back in the HTTP process alone; training pauses too",
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler",
        "sglang_harli.managers.http.training_guards:stop_training_to_end",
        "the scheduler hears of the end only when all requests are done: training stops for them at once",
        kind="after",
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_manager.kill_process_tree",
        "sglang_harli.managers.http.supervision.supervisor:stop_with_tree",
        "it kills the service and this process at once: what is written is finished first, shared memory given back",
        kind="before",
    ),
    Replacement(
        "sglang.srt.entrypoints.http_server.launch_server",
        "sglang_harli.managers.http.start_up.handshake:http_server_starts",
        "the offline Engine launches the same processes, and has none that could publish an adapter",
        kind="before",
    ),
    Replacement(
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        "sglang_harli.managers.http.start_up.handshake:launch",
        "the finetune service is up before the model is; the schedulers' hello proves this table",
    ),
    Replacement(
        "sglang.srt.entrypoints.engine.Engine.shutdown",
        "sglang_harli.managers.http.supervision.supervisor:stop",
        "it kills the service as one of its children, which would be restarted",
        kind="before",
    ),
    Replacement(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "sglang_harli.managers.http.routes:before_setup_and_run",
        "publication of adapters, the health gate, /v1/models/{id}, files and fine-tuning live in the HTTP process",
        kind="before",
        always=True,
    ),
    Replacement(
        "sglang.srt.utils.auth.add_api_key_middleware",
        "sglang_harli.managers.http.openai.install:add_api_key_middleware",
        "files and fine-tuning take the admin key too, are closed with it alone, and refuse in OpenAI's form",
        always=True,
    ),
    *(
        Replacement(
            f"sglang.srt.entrypoints.{handler}",
            f"sglang_harli.managers.http.model_names:{hook}",
            "a bare adapter name as model is the adapter; a missing one is a 404, never the base's answer",
            kind=kind,
            pair=True,
        )
        for handler, hook, kind in (
            (
                "openai.serving_base.OpenAIServingBase._parse_model_parameter",
                "parse_model_parameter",
                "around",
            ),
            (
                "openai.serving_base.OpenAIServingBase.create_error_response",
                "create_error_response",
                "around",
            ),
            (
                "openai.serving_responses.OpenAIServingResponses.create_responses",
                "create_responses",
                "around",
            ),
            ("anthropic.serving.AnthropicServing.handle_messages", "handle_messages", "around"),
        )
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter",
        "sglang_harli.managers.http.publisher:load_lora_adapter",
        "an adapter of ours that SGLang evicted has no path to be loaded from again",
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.unload_lora_adapter",
        "sglang_harli.managers.http.publisher:unload_lora_adapter",
        "an adapter that the operator unloads is not brought back at its next request",
    ),
    Replacement(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_and_resolve_lora",
        "sglang_harli.managers.http.publisher:refuse_another_base",
        "an adapter of another base is loaded until its unload has had its turn, and answers no more; of a pair both "
        "servers refuse a request",
        pair=True,
    ),
)


def activate() -> None:
    """SGLang's entry point: cheap, idempotent, without a touch of CUDA.  SystemExit: harli was
    asked for, and this SGLang is not a supported one."""
    if not supported_version(asked=is_on() or _flag_given()):
        return
    # These import what this version of SGLang has.
    from sglang_harli.managers.http.start_up.lora_paths import check_lora_paths
    from sglang_harli.managers.http.start_up.refusals import refuse_flags, refuse_model
    from sglang_harli.server_args import HarliServerArgs, Seam

    HarliServerArgs.seam = Seam(refuse_flags, refuse_model, check_lora_paths, install)
    _register([SERVER_ARGS])
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:  # it holds the class as an attribute, which the registry does not rebind
        engine.Engine.server_args_class = HarliServerArgs
    if is_on() and multiprocessing.parent_process() is not None:
        # A child of the process whose arguments turned the switch on: install() does the rest.
        _register_patches()
        if finetuning():
            _register([row for row in TABLE if not row.main])


def install() -> None:
    """Install the main process's rows once its arguments have turned the switch on.  SystemExit: a
    row could not be applied (SGLang itself only logs it)."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    rows = [row for row in TABLE if row.main and row.applies]
    _register_patches()
    _register(rows)
    HookRegistry.apply_hooks()  # skips what is applied already
    lost = [row.target for row in rows if row.target not in HookRegistry._patched]
    if lost:
        raise SystemExit(
            f"sglang-harli: SGLang did not let {', '.join(lost)} be replaced: see the traceback above"
        )


def is_on() -> bool:
    """Whether the switch is on; children inherit it."""
    return bool(os.environ.get(SWITCH_ENV))


def finetuning() -> bool:
    """Whether the whole table applies, not only what a server without finetuning needs."""
    return is_on() and os.environ[SWITCH_ENV] not in (SWITCH_SERVE, SWITCH_PREFILL)


def on_prefill_server() -> bool:
    """Whether this is a prefill server of a pair, which serves adapters and does not train."""
    return os.environ.get(SWITCH_ENV) == SWITCH_PREFILL


def supported_version(*, asked: bool) -> bool:
    """Whether this is an SGLang that the table was written for.  ``asked``: by an option, the
    launcher or a parent process; then another version is a SystemExit."""
    os.environ.pop(supported.VERSION_ENV, None)  # it is for processes that cannot look
    if supported.is_supported():
        return True
    names = " and ".join(supported.SUPPORTED)
    sentence = f"harli supports sglang {names}, and this is {supported.installed()}"
    if asked:
        raise SystemExit(
            f"{sentence}: pip install sglang=={supported.NEWEST}, or start SGLang itself (sglang serve) "
            f"without any {FLAG_PREFIX} option"
        )
    if "version" not in _done:
        _done.add("version")
        logger.warning("%s: it stays out of the way", sentence)
    return False


def _flag_given() -> bool:
    return any(argument.startswith(FLAG_PREFIX) for argument in sys.argv[1:])


_done: set[str] = set()  # what this process has registered or said


def _register(rows: Iterable[Replacement]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    for row in rows:
        if row.target in _done:
            continue
        _done.add(row.target)
        module, name = row.hook.split(":")
        hook = getattr(importlib.import_module(module), name)
        HookRegistry.register(
            row.target, hook, HookType(row.kind), source=HookSource(PLUGIN_NAME, DISTRIBUTION)
        )


def _register_patches() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_harli.patches import catalog  # which reads the version: not before the gate

    if "patches" not in _done:
        _done.add("patches")
        catalog.register_all(HookRegistry)
