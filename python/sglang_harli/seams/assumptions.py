"""What ours assumes of SGLang beyond names: read from its sources, since a name alone would lie."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from sglang_harli.seams.source import SourceTree

ENGINE = "sglang.srt.entrypoints.engine"
LAUNCHED = 5  # values of Engine._launch_subprocesses that ours takes apart
# Requests that change the weights, or whether they are there: ours refuses the first four while a
# job trains, and follows the last two.
WEIGHT_UPDATES = {
    "UpdateWeightFromDiskReqInput",
    "UpdateWeightsFromDistributedReqInput",
    "UpdateWeightsFromTensorReqInput",
    "UpdateWeightsFromIPCReqInput",
    "ReleaseMemoryOccupationReqInput",
    "ResumeMemoryOccupationReqInput",
}
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


def arguments_are_a_dataclass(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.server_args.ServerArgs")
    decorators = getattr(found.node, "decorator_list", []) if found is not None else []
    is_one = any("dataclass" in ast.unparse(decorator) for decorator in decorators)
    return None if is_one else "it is no dataclass: ours cannot add fields as one"


def construction_resolves_arguments(tree: SourceTree) -> str | None:
    late = tree.find("sglang.srt.server_args.ServerArgs.resolve_once")
    return "they are resolved later, by resolve_once" if late is not None else None


def launch_gives_what_ours_takes(tree: SourceTree) -> str | None:
    found = tree.find(f"{ENGINE}.Engine._launch_subprocesses")
    if found is None or found.node is None:
        return "is gone"
    counts = {
        len(node.value.elts)
        for node in ast.walk(found.node)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
    }
    return None if counts == {LAUNCHED} else f"it returns {sorted(counts)} values, ours takes {LAUNCHED}"


def prefixes_are_in_a_radix_cache(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.mem_cache.registry.default_radix_cache_factory")
    if found is None or found.node is None:
        return "the factory is gone"
    returned = [ast.unparse(n.value) for n in ast.walk(found.node) if isinstance(n, ast.Return) and n.value]
    if any(text.startswith("RadixCache(") for text in returned):
        return None
    return "the default is another tree: ours evicts no prefix for training"


def slots_are_freed_in_one_way(tree: SourceTree) -> str | None:
    owner = "sglang.srt.mem_cache.allocator.BaseTokenToKVPoolAllocator"
    more = [name for name in ("free_segment", "free_page_ids") if tree.find(f"{owner}.{name}") is not None]
    return f"{' and '.join(more)} free slots too: ours does not count them" if more else None


def paged_frees_are_release_pages(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.mem_cache.allocator.PagedTokenToKVPoolAllocator.num_staged_pages")
    return "they are staged_pages now" if found is not None else None


def weight_updates_are_known(tree: SourceTree) -> str | None:
    module = tree.module("sglang.srt.managers.io_struct")
    if module is None:
        return "io_struct is gone"
    pattern = re.compile(r"(Weight|MemoryOccupation)\w*ReqInput$")
    names = {n.name for n in module.body if isinstance(n, ast.ClassDef) and pattern.search(n.name)}
    unknown = sorted(names - WEIGHT_UPDATES - HARMLESS)
    return f"ours does not guard {', '.join(unknown)}" if unknown else None


def requests_know_their_cached_prefix(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.managers.schedule_batch.Req.prefix_indices")
    return None if found is not None else "it is prefix_len now"


def keys_and_values_are_apart(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal")
    if found is None or found.node is None:
        return "is gone"
    halves = re.search(r"\(\(2, ", ast.unparse(found.node))  # torch.zeros((2, rows, ...))
    return "they are halves of one" if halves else None


def http_is_pythons(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.environ.Envs.SGLANG_RUST_SERVER")
    return "SGLANG_RUST_SERVER has no Python HTTP process: not refused" if found is not None else None


def readiness_is_health_generate(tree: SourceTree) -> str | None:
    module = tree.module("sglang.srt.entrypoints.http_server")
    ready = module is not None and any(
        isinstance(node, ast.Constant) and node.value == "/ready" for node in ast.walk(module)
    )
    return "GET /ready is not gated" if ready else None


def every_decode_round_may_prefill(tree: SourceTree) -> str | None:
    fields = tree.folder / "sglang" / "srt"
    for path in (fields / "server_args.py", *sorted((fields / "arg_groups").rglob("*.py"))):
        if path.is_file() and re.search(r"^\s*prefill_decode_interval\s*:", path.read_text(), re.MULTILINE):
            return "prefill_decode_interval is not known to the ledger"
    return None


# In words, and how it is read.
ASSUMPTIONS: dict[str, Callable[[SourceTree], str | None]] = {
    "ServerArgs is a dataclass": arguments_are_a_dataclass,
    "ServerArgs() resolves its values": construction_resolves_arguments,
    "Engine._launch_subprocesses gives five values": launch_gives_what_ours_takes,
    "the default prefix cache is RadixCache": prefixes_are_in_a_radix_cache,
    "KV slots are freed by free alone": slots_are_freed_in_one_way,
    "the paged allocator's frees are release_pages": paged_frees_are_release_pages,
    "requests that change weights are guarded": weight_updates_are_known,
    "a request's cached prefix is prefix_indices": requests_know_their_cached_prefix,
    "K and V of a layer are two allocations": keys_and_values_are_apart,
    "the HTTP server is Python's": http_is_pythons,
    "readiness is /health_generate": readiness_is_health_generate,
    "a prefill may follow each decode step": every_decode_round_may_prefill,
}
