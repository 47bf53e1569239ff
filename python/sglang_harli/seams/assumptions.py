"""What ours assumes of SGLang beyond names: read from its sources, since a name alone would lie."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

from sglang_harli import sglang_versions
from sglang_harli.seams.request_fields import KNOWN
from sglang_harli.seams.source import SourceTree

Holds = Callable[[SourceTree], str | None]  # why it does not hold, or None

ARGUMENTS = "sglang.srt.server_args.ServerArgs"
ALLOCATORS = "sglang.srt.mem_cache.allocator"
ENVIRONMENT = "sglang.srt.environ.Envs"
# Requests that change whether the weights are there: ours follows them.
OCCUPATIONS = {"ReleaseMemoryOccupationReqInput", "ResumeMemoryOccupationReqInput"}
# Requests with weights in their name that change none of the served ones.
HARMLESS = {
    "InitWeightsSendGroupForRemoteInstanceReqInput",
    "SendWeightsToRemoteInstanceReqInput",
    "InitWeightsUpdateGroupReqInput",
    "DestroyWeightsUpdateGroupReqInput",
    "UpdateWeightVersionReqInput",
    "GetWeightsByNameReqInput",
    "CheckWeightsReqInput",
}


def _without(name: str, otherwise: str) -> Holds:
    """The assumption that SGLang has no such name."""
    return lambda tree: otherwise if tree.find(name) is not None else None


def _with(name: str, otherwise: str) -> Holds:
    """The assumption that SGLang has this name, where that says more than the name."""
    return lambda tree: None if tree.find(name) is not None else otherwise


def arguments_are_a_dataclass(tree: SourceTree) -> str | None:
    found = tree.find(ARGUMENTS)
    decorators = getattr(found.node, "decorator_list", []) if found is not None else []
    is_one = any("dataclass" in ast.unparse(decorator) for decorator in decorators)
    return None if is_one else "it is no dataclass: ours cannot add fields as one"


def arguments_are_a_struct(tree: SourceTree) -> str | None:
    module = tree.module("sglang.srt.server_args")
    made = [ast.unparse(node) for node in module.body if isinstance(node, ast.Assign)] if module else []
    is_one = any(text.startswith("ServerArgs = msgspec.defstruct(") for text in made)
    return None if is_one else "it is no Struct made by msgspec.defstruct: ours cannot add fields so"


def memory_settings_are_a_hook(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.arg_groups.resolution_hooks._OVERRIDABLE_HOOKS")
    named = (
        found is not None
        and found.node is not None
        and '"handle_gpu_memory_settings"' in (ast.unparse(found.node).replace("'", '"'))
    )
    return None if named else "handle_gpu_memory_settings cannot be wrapped: ours sets no KV pool size"


def launch_gives(count: int) -> Holds:
    def holds(tree: SourceTree) -> str | None:
        found = tree.find("sglang.srt.entrypoints.engine.Engine._launch_subprocesses")
        if found is None or found.node is None:
            return "is gone"
        counts = {
            len(node.value.elts)
            for node in ast.walk(found.node)
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
        }
        return None if counts == {count} else f"it returns {sorted(counts)} values, ours takes {count}"

    return holds


def prefixes_are_in(made: str) -> Holds:
    def holds(tree: SourceTree) -> str | None:
        found = tree.find("sglang.srt.mem_cache.registry.default_radix_cache_factory")
        if found is None or found.node is None:
            return "the factory is gone"
        returned = [
            ast.unparse(n.value) for n in ast.walk(found.node) if isinstance(n, ast.Return) and n.value
        ]
        if any(text.startswith(f"{made}(") for text in returned):
            return None
        return "the default is another tree: ours evicts no prefix for training"

    return holds


def weight_updates_are_guarded(folder: str) -> Holds:
    """``ANSWERS`` of that folder's ``weight_updates`` has every request that changes weights."""

    def holds(tree: SourceTree) -> str | None:
        source = Path(sglang_versions.__path__[0], folder, "weight_updates.py").read_text()
        guarded = {
            ast.unparse(key).removeprefix("io_struct.")
            for node in ast.parse(source).body
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ANSWERS"
            if isinstance(node.value, ast.Dict)
            for key in node.value.keys
            if key is not None
        }
        module = tree.module("sglang.srt.managers.io_struct")
        if module is None:
            return "io_struct is gone"
        pattern = re.compile(r"(Weight|MemoryOccupation)\w*ReqInput$")
        names = {n.name for n in module.body if isinstance(n, ast.ClassDef) and pattern.search(n.name)}
        unknown = sorted(names - guarded - OCCUPATIONS - HARMLESS)
        return f"ours does not guard {', '.join(unknown)}" if unknown else None

    return holds


def request_fields_are_known(folder: str) -> Holds:
    def holds(tree: SourceTree) -> str | None:
        fields: set[str] = set()
        for name in ("GenerateReqInput", "EmbeddingReqInput"):
            found = tree.find(f"sglang.srt.managers.io_struct.{name}")
            if found is None or not isinstance(found.node, ast.ClassDef):
                return f"{name} is gone"
            fields |= {ast.unparse(n.target) for n in found.node.body if isinstance(n, ast.AnnAssign)}
        unknown = sorted(fields - KNOWN[folder])
        return f"any client may send {', '.join(unknown)}: guard or note it" if unknown else None

    return holds


def frees_are(known: set[str]) -> Holds:
    """By which methods of the slot allocators KV slots become free."""

    def holds(tree: SourceTree) -> str | None:
        found = tree.find(f"{ALLOCATORS}.BaseTokenToKVPoolAllocator")
        if found is None or not isinstance(found.node, ast.ClassDef):
            return "is gone"
        methods = {n.name for n in found.node.body if isinstance(n, ast.FunctionDef)}
        unknown = sorted(name for name in methods - known if name.startswith("free"))
        return f"{', '.join(unknown)} free too: ours does not count them" if unknown else None

    return holds


def keys_and_values_are(one: bool) -> Holds:
    """Of a layer: halves of one allocation, or two."""

    def holds(tree: SourceTree) -> str | None:
        found = tree.find("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal")
        if found is None or found.node is None:
            return "is gone"
        halves = re.search(r"\(\(2, ", ast.unparse(found.node))  # torch.zeros((2, rows, ...))
        if bool(halves) == one:
            return None
        return "they are halves of one" if halves else "they are two allocations"

    return holds


def readiness_is(*known: str) -> Holds:
    """The routes that say whether the server is ready, which ours keeps closed until it is."""

    def holds(tree: SourceTree) -> str | None:
        module = tree.module("sglang.srt.entrypoints.http_server")
        if module is None:
            return "the HTTP server is gone"
        routes = {
            node.value
            for node in ast.walk(module)
            if isinstance(node, ast.Constant) and node.value in ("/ready", "/health_generate")
        }
        unknown = sorted(routes.symmetric_difference(known))
        return f"{', '.join(unknown)}: not gated, or not there" if unknown else None

    return holds


def has_prefill_interval(tree: SourceTree) -> bool:
    fields = tree.folder / "sglang" / "srt"
    paths = (fields / "server_args.py", *sorted((fields / "arg_groups").rglob("*.py")))
    pattern = re.compile(r"^\s*prefill_decode_interval\s*:", re.MULTILINE)
    return any(pattern.search(path.read_text()) for path in paths if path.is_file())


def every_decode_round_may_prefill(tree: SourceTree) -> str | None:
    return "prefill_decode_interval is not known to the ledger" if has_prefill_interval(tree) else None


def prefills_keep_an_interval(tree: SourceTree) -> str | None:
    return None if has_prefill_interval(tree) else "there is no prefill_decode_interval"


# By the version's own files (sglang_versions): in words, and how it is read.
ASSUMPTIONS: dict[str, dict[str, Holds]] = {
    "pinned": {
        "ServerArgs is a dataclass": arguments_are_a_dataclass,
        "ServerArgs() resolves its values": _without(
            f"{ARGUMENTS}.resolve_once", "they are resolved later, by resolve_once"
        ),
        "Engine._launch_subprocesses gives five values": launch_gives(5),
        "the default prefix cache is RadixCache": prefixes_are_in("RadixCache"),
        "KV slots are freed by free alone": frees_are({"free", "free_group_begin", "free_group_end"}),
        "the paged allocator's frees are release_pages": _without(
            f"{ALLOCATORS}.PagedTokenToKVPoolAllocator.num_staged_pages", "they are staged_pages now"
        ),
        "requests that change weights are guarded": weight_updates_are_guarded("pinned"),
        "fields that a client may send are known": request_fields_are_known("pinned"),
        "K and V of a layer are two allocations": keys_and_values_are(one=False),
        "the HTTP server is Python's": _without(
            f"{ENVIRONMENT}.SGLANG_RUST_SERVER", "SGLANG_RUST_SERVER has none of Python: not refused"
        ),
        "readiness is /health_generate": readiness_is("/health_generate"),
        "a prefill may follow each decode step": every_decode_round_may_prefill,
    },
    "newest": {
        "ServerArgs is a Struct": arguments_are_a_struct,
        "ServerArgs are resolved by resolve_once": _with(
            f"{ARGUMENTS}.resolve_once", "they are resolved otherwise"
        ),
        "the memory settings can be wrapped": memory_settings_are_a_hook,
        "Engine._launch_subprocesses gives six values": launch_gives(6),
        "the default prefix cache is UnifiedRadixCache": prefixes_are_in("create_unified_radix_cache"),
        "KV slots are freed by the methods that ours counts": frees_are(
            # The others end in free and free_segment.
            {"free", "free_segment", "free_page_ids", "free_group_begin", "free_group_end"}
            | {"free_full", "free_segments", "free_full_segment", "free_full_segments"}
        ),
        "the paged allocator's frees are staged_pages": _with(
            f"{ALLOCATORS}.PagedTokenToKVPoolAllocator.num_staged_pages", "they are staged no more"
        ),
        "requests that change weights are guarded": weight_updates_are_guarded("newest"),
        "fields that a client may send are known": request_fields_are_known("newest"),
        "K and V of a layer are halves of one allocation": keys_and_values_are(one=True),
        "SGLANG_RUST_SERVER names the HTTP server that is refused": _with(
            f"{ENVIRONMENT}.SGLANG_RUST_SERVER", "another name may turn it on"
        ),
        "readiness is /ready and /health_generate": readiness_is("/ready", "/health_generate"),
        "prefill_decode_interval keeps prefills apart": prefills_keep_an_interval,
    },
}
