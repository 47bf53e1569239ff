"""What the package leans on in SGLang: found in its sources; listed if it is read by attribute."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sglang_harli import plugin
from sglang_harli.patches import catalog
from sglang_harli.seams.source import Function, is_super
from sglang_harli.sglang_versions import supported

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Lean:
    """One thing of SGLang that ours needs.

    Attributes:
        name: a dotted path in SGLang.
        what: ``import``, ``hook``, ``override`` or ``member``.
        ours: where we need it, a path in the package.
        kind: of a hook: a HookType.
        hook: of a hook or an override: ours, as ``module:qualified.name``.
        given: how many of the hook's first arguments are given already (``functools.partial``).
    """

    name: str
    what: str
    ours: str
    kind: str = ""
    hook: str = ""
    given: int = 0


# Read by attribute, in the modules named (which say so too).
MEMBERS: dict[tuple[str, str], str] = {
    ("sglang.srt.managers.scheduler.Scheduler", "managers/scheduler/scheduler.py"): (
        "waiting_queue ipc_channels weight_updater server_args"
    ),
    ("sglang.srt.managers.scheduler.Scheduler", "managers/scheduler/serving_view.py"): (
        "running_batch max_prefill_tokens chunked_prefill_size chunked_req get_num_allocatable_reqs"
    ),
    ("sglang.srt.managers.scheduler.Scheduler", "managers/scheduler/transfer_view.py"): (
        "disagg_decode_prealloc_queue disagg_decode_transfer_queue"
    ),
    ("sglang.srt.disaggregation.decode.DecodePreallocQueue", "managers/scheduler/transfer_view.py"): (
        "queue retracted_queue num_reserved_decode_tokens"
    ),
    ("sglang.srt.disaggregation.decode.DecodePreallocQueue", "managers/scheduler/memory/transfers.py"): (
        "token_to_kv_pool_allocator"
    ),
    ("sglang.srt.disaggregation.decode.DecodeTransferQueue", "managers/scheduler/memory/transfers.py"): (
        "queue scheduler"
    ),
    ("sglang.srt.managers.scheduler.Scheduler", "managers/scheduler/co_serving.py"): (
        "device idle_sleeper _engine_paused max_running_requests max_req_len max_total_num_tokens"
    ),
    ("sglang.srt.managers.scheduler.Scheduler", "managers/scheduler/step_timer.py"): (
        "enable_overlap forward_stream"
    ),
    ("sglang.srt.managers.scheduler.Scheduler", "managers/scheduler/trainer_setup.py"): (
        "token_to_kv_pool_allocator tree_cache tp_worker"
    ),
    ("sglang.srt.managers.schedule_batch.Req", "managers/scheduler/policy/waiting_prompts.py"): (
        "origin_input_ids output_ids time_stats sampling_params finished lora_id"
    ),
    ("sglang.srt.managers.schedule_batch.ScheduleBatch", "managers/scheduler/step_timer.py"): (
        "reqs forward_mode batch_is_full is_empty"
    ),
    ("sglang.srt.mem_cache.allocator.BaseTokenToKVPoolAllocator", "mem_cache/kv/slot_allocator.py"): (
        "free_pages need_sort available_size free clear"
    ),
    ("sglang.srt.server_args.ServerArgs", "server_args.py"): (
        "device disable_overlap_schedule "
        "enable_lora lora_paths lora_backend max_loaded_loras max_lora_rank lora_target_modules "
        "max_total_tokens page_size kv_cache_dtype dtype served_model_name tokenizer_path model_path "
        "enable_metrics"
    ),
    ("sglang.srt.managers.tokenizer_manager.TokenizerManager", "managers/http/publisher.py"): (
        "lora_registry lora_update_lock lora_ref_cache server_args server_status"
    ),
}


_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_UNIFIED = "sglang.srt.mem_cache.unified_radix_cache"
# The same of one version's own files.
OF_VERSION: dict[str, dict[tuple[str, str], str]] = {
    "pinned": {
        ("sglang.srt.managers.schedule_batch.Req", "sglang_versions/pinned/requests.py"): (
            "prefix_indices extend_range"
        ),
        ("sglang.srt.server_args.ServerArgs", "sglang_versions/pinned/arguments.py"): (
            "__post_init__ get_model_config _handle_gpu_memory_settings"
        ),
        ("sglang.srt.server_args.ServerArgs", "sglang_versions/pinned/refusals.py"): "torchao_config",
        ("sglang.srt.mem_cache.allocator.BaseTokenToKVPoolAllocator", "sglang_versions/pinned/slots.py"): (
            "release_pages backup_state restore_state is_not_in_free_group free_group"
        ),
        ("sglang.srt.mem_cache.radix_cache.RadixCache", "sglang_versions/pinned/prefix_tree.py"): (
            "evictable_leaves _delete_leaf _record_remove_event token_to_kv_pool_allocator"
        ),
        (_UPDATER, "sglang_versions/pinned/weight_updates.py"): "is_fully_idle",
    },
    "newest": {
        ("sglang.srt.managers.schedule_batch.Req", "sglang_versions/newest/requests.py"): (
            "prefix_len extend_end"
        ),
        ("sglang.srt.server_args.ServerArgs", "sglang_versions/newest/arguments.py"): (
            "__post_init__ resolve_once __reduce__ _input_frozen _resolution_finished"
        ),
        ("sglang.srt.mem_cache.allocator.BaseTokenToKVPoolAllocator", "sglang_versions/newest/slots.py"): (
            "release_pages free_group free_segment"
        ),
        ("sglang.srt.mem_cache.allocator.PagedTokenToKVPoolAllocator", "sglang_versions/newest/slots.py"): (
            "num_staged_pages _release_page_ids free_page_ids"
        ),
        (f"{_UNIFIED}.UnifiedRadixCache", "sglang_versions/newest/prefix_tree.py"): (
            "tree_core tree_components cache_controller linker disable _evict_device_leaf "
            "token_to_kv_pool_allocator update_eviction_metrics evictable_size protected_size"
        ),
        (
            _UPDATER,
            "sglang_versions/newest/weight_updates.py",
        ): "_session is_fully_idle scheduler _assert_weight_cache_inactive",
        ("sglang.srt.managers.scheduler.Scheduler", "sglang_versions/newest/decode_rounds.py"): (
            "prefill_decode_interval _prefill_decode_interval_remaining"
        ),
        (
            "sglang.srt.managers.tokenizer_manager.TokenizerManager",
            "sglang_versions/newest/lora_unloads.py",
        ): ("pending_lora_unloads"),
    },
}


@functools.cache
def leans(folder: str) -> list[Lean]:
    """All of them with the files of one version (``sglang_versions.supported.FOLDERS``); names that
    several modules import stand once."""
    if folder != supported.folder():  # tables are made when they are imported: in another process
        version = next(v for v, name in supported.FOLDERS.items() if name == folder)
        environment = {**os.environ, supported.VERSION_ENV: version}
        command = [sys.executable, "-W", "ignore", "-m", __name__]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return msgspec.json.decode(done.stdout, type=list[Lean])
    found = {lean.name: lean for lean in _imports(folder)}
    return [*found.values(), *_hooks(folder), *_overrides(folder), *_members(folder)]


def _imports(folder: str) -> Iterator[Lean]:
    for path, tree in _sources(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
                yield from (Lean(f"{node.module}.{alias.name}", "import", path) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (
                    Lean(alias.name, "import", path)
                    for alias in node.names
                    if alias.name.split(".")[0] == "sglang"
                )


def _hooks(folder: str) -> Iterator[Lean]:
    for row in (plugin.SERVER_ARGS, *plugin.TABLE):
        yield Lean(row.target, "hook", "plugin.py", row.kind, row.hook)
    for name, hooks in catalog.ALL.items():
        for target, hook, kind in hooks:
            ours, given = getattr(hook, "func", hook), len(getattr(hook, "args", ()))
            path = f"{ours.__module__}:{ours.__qualname__}"
            yield Lean(target, "hook", f"patches: {name}", kind, path, given)


def _overrides(folder: str) -> Iterator[Lean]:
    """Methods that call SGLang's of the same name by ``super()``."""
    for path, tree in _sources(folder):
        bases = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang"
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                named = (bases.get(base.id) for base in node.bases if isinstance(base, ast.Name))
                for base in filter(None, named):
                    for method in _supers(node):
                        hook = f"{_module(path)}:{node.name}.{method}"
                        yield Lean(f"{base}.{method}", "override", path, hook=hook)


def _supers(node: ast.ClassDef) -> Iterator[str]:
    for method in node.body:
        if isinstance(method, Function) and any(is_super(call, method.name) for call in ast.walk(method)):
            yield method.name


def _members(folder: str) -> Iterator[Lean]:
    for (owner, ours), names in (*MEMBERS.items(), *OF_VERSION[folder].items()):
        yield from (Lean(f"{owner}.{name}", "member", ours) for name in names.split())


def _sources(folder: str) -> Iterator[tuple[str, ast.Module]]:
    others = [PACKAGE / "sglang_versions" / name for name in supported.FOLDERS.values() if name != folder]
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent not in others:
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_bytes())


def _module(path: str) -> str:
    return "sglang_harli." + path.removesuffix(".py").replace("/", ".")


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(leans(supported.folder())))
