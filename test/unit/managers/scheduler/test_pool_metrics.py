"""The figures on training's memory: in Prometheus's form, and where the KV pool cannot lend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from sglang_harli.cli import view
from sglang_harli.core import MemoryPurpose
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure
from support.pool_parts import small_geometry

METRICS = """
import os, tempfile
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
from sglang_harli.core import MemoryPurpose
from sglang_harli.managers.scheduler.memory.memory_pressure import MemoryPressure
from sglang_harli.cli import view
from sglang_harli.managers.scheduler.metrics import PoolMetrics
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
import torch
from support.pool_parts import give_back_in_order, small_pool
pool, slots, _ = small_pool()
pressure = MemoryPressure(pool, torch.device("cpu"))
give_back_in_order(pool)
metrics = PoolMetrics(pressure)
metrics.update(1.0)
pool.lease(MemoryPurpose.STATE, "a", 2)
metrics.update(2.0)
taken = slots.alloc(slots.available_size())
pressure.dropped_micro_batches = 3
metrics.update(2.5)
metrics.update(3.0)
metrics.update(4.0)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_metrics_in_prometheus_form():
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{METRICS}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = {line for line in done.stdout.splitlines() if not line.startswith("#")}
    wanted = {
        'harli_pool_bytes{owner="free"} 0.0',
        'harli_pool_bytes{owner="state"} 0.0',
        'harli_pool_watermark_bytes{mark="low"} 0.0',
        "harli_pool_reclaims_total 1.0",
        "harli_pool_reclaim_seconds_count 1.0",
        "harli_dropped_micro_batches_total 3.0",
    }
    assert wanted <= lines, done.stderr or done.stdout
    (kv,) = [line for line in lines if line.startswith('harli_pool_bytes{owner="kv"}')]
    assert float(kv.split()[-1]) == small_geometry().total_bytes


def test_training_s_own_memory_is_fixed():
    pressure = MemoryPressure(None, torch.device("cpu"), fixed_bytes=1 << 20, reserve_bytes=5)
    assert "cannot lend" in (pressure.limit_conflict(1 << 20) or "")
    space = pressure.memory.obtain(MemoryPurpose.STATE, [((1000,), torch.float32)])
    assert (
        space is not None
        and pressure.memory.obtain(MemoryPurpose.STATE, [((1 << 19,), torch.float32)]) is None
    )
    status = pressure.status()
    assert (
        status["kv_bytes"] + status["train_bytes"] + status["free_bytes"] == status["total_bytes"] == 1 << 20
    )
    assert sum(status["by_owner"].values()) == status["total_bytes"]
    assert (status["backing"], status["train_bytes"], status["reserve_bytes"]) == ("fixed", space.nbytes, 5)
    pressure.tick()
    pressure.make_room(100)
    pressure.relieve(1)


def test_people_read_whose_memory_it_is_in_two_lines():
    pressure = MemoryPressure(None, torch.device("cpu"), fixed_bytes=3 << 20)
    assert list(view.pool_lines(None)) == []
    status = pressure.status() | {
        "backing": "host",
        "kv_bytes": 1 << 20,
        "train_bytes": 1536 << 10,
        "free_bytes": 512 << 10,
        "by_owner": {"kv": 1536 << 10, "kept": 0, "micro_batch": 1 << 20, "state": 512 << 10},
        "reclaims": 2,
        "reclaim_ms": {"p50": 0.25, "max": 1.5, "last": 0.25},
        "max_train_bytes": None,
    }
    first, second = view.pool_lines(status)
    assert first == (
        "pool (host): 3.0 MiB = requests and prefixes 1.0 MiB + training 1.5 MiB (micro_batch 1.0 MiB, "
        "state 512.0 KiB) + free 512.0 KiB"
    )
    assert "reclaims 2 (median 0.25 ms, longest 1.5 ms)" in second and "at most all to training" in second
