"""What ours assumes of SGLang beyond names: read from its sources, since a name alone would lie."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from sglang_harli.seams.source import SourceTree

Holds = Callable[[SourceTree], str | None]  # why it does not hold, or None

ARGUMENTS = "sglang.srt.server_args.ServerArgs"
ALLOCATORS = "sglang.srt.mem_cache.allocator"
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


def _without(name: str, otherwise: str) -> Holds:
    """The assumption that SGLang has no such name."""
    return lambda tree: otherwise if tree.find(name) is not None else None


def arguments_are_a_dataclass(tree: SourceTree) -> str | None:
    found = tree.find(ARGUMENTS)
    decorators = getattr(found.node, "decorator_list", []) if found is not None else []
    is_one = any("dataclass" in ast.unparse(decorator) for decorator in decorators)
    return None if is_one else "it is no dataclass: ours cannot add fields as one"


def launch_gives_what_ours_takes(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.entrypoints.engine.Engine._launch_subprocesses")
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


def weight_updates_are_known(tree: SourceTree) -> str | None:
    module = tree.module("sglang.srt.managers.io_struct")
    if module is None:
        return "io_struct is gone"
    pattern = re.compile(r"(Weight|MemoryOccupation)\w*ReqInput$")
    names = {n.name for n in module.body if isinstance(n, ast.ClassDef) and pattern.search(n.name)}
    unknown = sorted(names - WEIGHT_UPDATES - HARMLESS)
    return f"ours does not guard {', '.join(unknown)}" if unknown else None


def keys_and_values_are_apart(tree: SourceTree) -> str | None:
    found = tree.find("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal")
    if found is None or found.node is None:
        return "is gone"
    halves = re.search(r"\(\(2, ", ast.unparse(found.node))  # torch.zeros((2, rows, ...))
    return "they are halves of one" if halves else None


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
ASSUMPTIONS: dict[str, Holds] = {
    "ServerArgs is a dataclass": arguments_are_a_dataclass,
    "ServerArgs() resolves its values": _without(
        f"{ARGUMENTS}.resolve_once", "they are resolved later, by resolve_once"
    ),
    "Engine._launch_subprocesses gives five values": launch_gives_what_ours_takes,
    "the default prefix cache is RadixCache": prefixes_are_in_a_radix_cache,
    "KV slots are freed by free alone": _without(
        f"{ALLOCATORS}.BaseTokenToKVPoolAllocator.free_segment",
        "free_segment frees too: ours does not count it",
    ),
    "the paged allocator's frees are release_pages": _without(
        f"{ALLOCATORS}.PagedTokenToKVPoolAllocator.num_staged_pages", "they are staged_pages now"
    ),
    "requests that change weights are guarded": weight_updates_are_known,
    "K and V of a layer are two allocations": keys_and_values_are_apart,
    "the HTTP server is Python's": _without(
        "sglang.srt.environ.Envs.SGLANG_RUST_SERVER", "SGLANG_RUST_SERVER has none of Python: not refused"
    ),
    "readiness is /health_generate": readiness_is_health_generate,
    "a prefill may follow each decode step": every_decode_round_may_prefill,
}
