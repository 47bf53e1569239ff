"""Servers for benchmarks: ours and plain SGLang with the same limits; hold one still, talk to it,
end it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "test"))

from sglang_harli.platforms.cpu import engine
from support.server import Server, start_server

# Arguments that decide what a server can hold and how it computes; None and False are SGLang's
# defaults.
LIMITS = (
    *("device", "dtype", "attention_backend", "sampling_backend", "mem_fraction_static", "max_total_tokens"),
    *("max_running_requests", "chunked_prefill_size", "context_length", "page_size", "disable_radix_cache"),
    *("disable_overlap_schedule", "disable_cuda_graph"),
)
LORA_LIMITS = ("enable_lora", "max_lora_rank", "lora_target_modules", "max_loras_per_batch", "lora_backend")

# A plugin for plain SGLang: on a CPU it cannot start with LoRA flags unless pin_memory is kept out
# of its LoRA layers.  The baseline gets that one patch and nothing else of ours.
BASELINE_PLUGIN = """
def activate():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang_harli.patches.lora import pin_memory
    for target, hook, kind in pin_memory.HOOKS:
        HookRegistry.register(target, hook, HookType(kind))
"""


def ours(model: Path, *flags: str) -> Server:
    """Our launcher with its own defaults on the CPU engine."""
    return start_server(model, *flags)


def plain(model: Path, flags: list[str]) -> Server:
    """Plain SGLang on the CPU engine, no plugin at all."""
    return start_server(model, *flags, launcher="plain")


def plain_with_lora(model: Path, flags: list[str], folder: Path) -> Server:
    """Plain SGLang with LoRA flags: no plugin but the patch without which they do not start on a
    CPU.

    Args:
        folder: takes the baseline's plugin.
    """
    metadata = folder / "harli_bench_baseline-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (folder / "harli_bench_baseline.py").write_text(BASELINE_PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harli-bench-baseline\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nbaseline = harli_bench_baseline:activate\n"
    )
    path = os.pathsep.join([str(engine.STAND_IN), str(folder)])
    return start_server(
        model, *flags, launcher="plain", env={"SGLANG_PLUGINS": "baseline", "PYTHONPATH": path}
    )


@contextlib.contextmanager
def ended(*servers: Server) -> Iterator[None]:
    """End these servers at the end, at once: nothing of a benchmark's server is worth a graceful
    end."""
    try:
        yield
    finally:
        for server in servers:
            server.kill()


def hold(server: Server) -> None:
    """Stop every process of it: an idle SGLang scheduler spins on a core."""
    for process in server.family():
        process.suspend()


@contextlib.contextmanager
def running(server: Server) -> Iterator[None]:
    """Let a held server go for the length of a block."""
    for process in server.family():
        process.resume()
    try:
        yield
    finally:
        hold(server)


def get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(server.url + path, timeout=60) as reply:
        return json.load(reply)


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    """POST JSON; the answer is JSON, or text where it is none."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        answer = reply.read()
    return json.loads(answer) if answer.startswith((b"{", b"[")) else answer.decode()


def limits_of(server: Server) -> dict[str, Any]:
    """What a running server resolved its limits to (``LIMITS`` and ``LORA_LIMITS``)."""
    info = get(server, "/server_info")
    return {name: info.get(name) for name in (*LIMITS, *LORA_LIMITS, "max_total_num_tokens")}


def flags_for(limits: dict[str, Any], *, lora: bool) -> list[str]:
    """SGLang flags that give a plain server the same limits."""
    flags: list[str] = []
    for name in (*LIMITS, *(LORA_LIMITS if lora else ())):
        value = limits.get(name)
        if value is None or value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags += [str(v) for v in (sorted(value) if isinstance(value, list | tuple | set) else [value])]
    return flags
