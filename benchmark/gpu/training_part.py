"""Part 2: is training on the device right, free of waits for the device, and fast?

Only the trainer runs, on transformers models with random weights; SGLang is not started. It trains
as a server does: kernels and graphs that compute what torch does are used.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu.page import Page
from gpu.peft_loop import peft_step
from gpu.shapes import RANK, SHAPES, Shape, feed, random_model, served_base, training_run
from sglang_harli.config import HarliOptions
from sglang_harli.peft_trainer.base.frozen_base import FrozenBase
from sglang_harli.peft_trainer.run import TrainingRun
from sglang_harli.protocol.public import Hyperparameters

STEPS = 6
WIDTHS = (512, 384)  # by turns: from the third step on no shape is new
ROWS, WIDTH = 4, 2048  # 8k tokens a micro-batch
SPEED_STEPS, DISCARDED = 5, 2
SLEEP_CYCLES = 20_000_000  # about 10 ms of the device: a quantum's launches queue up behind it
MATMULS = ((8192, 8192, 8192), (8192, 4096, 12_288), (8192, 12_288, 4096))


def run(page: Page, _options: Any) -> None:
    """Measure all of it: what must be right, what must be fast, then what explains it."""
    device = torch.device("cpu" if page.dry else "cuda")
    small = SHAPES["tiny"]
    page.measure("losses", functools.partial(losses, device))
    page.measure("waits", functools.partial(waits, device))
    page.measure("kernels", functools.partial(kernels, device))
    rate = page.measure("matrix rate", functools.partial(matrix_rate, device, page.dry))
    shape = small if page.dry else SHAPES["8b"]
    rows, width = (2, 32) if page.dry else (ROWS, WIDTH)
    page.measure(
        "speed", functools.partial(speed, shape, device, rows, width, rate or {}, page.dry), needs_s=90
    )
    for name, layers in (("0.6b", 4), ("8b", 2)):
        shape = small if page.dry else SHAPES[name]
        work = functools.partial(quanta, shape, device, 2 if page.dry else layers, page.dry)
        page.measure(f"quanta of {name}", work, needs_s=30)


# ---------------------------------------------------------------- right
def losses(device: torch.device) -> dict[str, Any]:
    """Of a tiny fp32 model, on the device and on a CPU, recomputed and kept."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        wanted = _losses_of(torch.device("cpu"), torch.float32, keep=False)
        found = {keep: _losses_of(device, torch.float32, keep=keep) for keep in (False, True)}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    furthest = max(abs(a / b - 1) for got in found.values() for a, b in zip(got, wanted, strict=True))
    sixteen = _losses_of(device, torch.bfloat16, keep=True)
    return {
        "equal": furthest < 1e-4,
        "largest relative difference": furthest,
        "cpu": wanted,
        "recomputed": found[False],
        "kept": found[True],
        "bf16": sixteen,
    }


def _losses_of(device: torch.device, dtype: torch.dtype, *, keep: bool) -> list[float]:
    run = _tiny_run(device, dtype, keep=keep)
    _drive(run)
    _synchronize(device)
    return [round(metrics.loss, 6) for metrics in run.take_metrics()]


def _tiny_run(device: torch.device, dtype: torch.dtype, *, keep: bool, steps: int = 3) -> TrainingRun:
    shape = SHAPES["tiny"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = random_model(shape, torch.device("cpu"), torch.float32)
    base, _ = served_base(model.to(device=device, dtype=dtype))
    run = training_run(base, steps, keep=keep, logits_bytes=1 << 16, rank=8)
    for step in range(1, steps + 1):
        feed(run, step, [24, 17, 9], shape.vocab)
    return run


def waits(device: torch.device) -> dict[str, Any]:
    """Quanta of tiny runs while each wait for the device is an error: launched one by one, and from
    graphs, once those are made."""
    _drive(_tiny_run(device, torch.bfloat16, keep=True))  # what is made at first use may wait
    kinds: list[str] = []
    replays = _tiny_run(device, torch.bfloat16, keep=False)
    _drive(replays, until=2, idle=True)
    for run in (_tiny_run(device, torch.bfloat16, keep=True), replays):
        with _no_waits(device):
            while (shape := run.peek()) is not None:
                kinds.append(shape.kind.value)
                try:
                    run.run(shape.rows)
                except RuntimeError as error:
                    if "called a synchronizing" not in str(error):
                        raise
                    return {"none": False, "first in": shape.kind.value, "what": str(error)}
    found = {"none": True, "quanta": len(kinds), "kinds": sorted(set(kinds))}
    return found | {"from graphs": replays.graphs.replayed if replays.graphs is not None else 0}


@contextlib.contextmanager
def _no_waits(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(device: torch.device) -> dict[str, Any]:
    """The comparisons with torch's own path that a server makes while it warms up."""
    return served_base(random_model(SHAPES["tiny"], device, torch.bfloat16))[1]


# ---------------------------------------------------------------- fast
def matrix_rate(device: torch.device, dry: bool) -> dict[str, Any]:
    """The best rate of a bf16 matrix product that was measured, floating-point operations a
    second."""
    rows = []
    for m, k, n in ((64, 64, 64),) if dry else MATMULS:
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        seconds = _seconds(device, lambda a=a, b=b: a @ b, 2 if dry else 30)
        rows.append({"product": f"{m} x {k} x {n}", "tflops": round(2 * m * k * n / seconds / 1e12, 2)})
    return {"tflops": max(row["tflops"] for row in rows), "rows": rows}


def speed(
    shape: Shape, device: torch.device, rows: int, width: int, rate: dict[str, Any], dry: bool
) -> dict[str, Any]:
    """Tokens per second of whole steps of the whole model: ours with kept activations and
    recomputed, then the plain loop on the same weights."""
    logits = 1 << 16 if dry else HarliOptions().logits_bytes(device.type)
    model = random_model(shape, device, torch.bfloat16)
    base, compared = served_base(model)
    found: dict[str, Any] = {"tokens a micro-batch": rows * width, "layers": shape.layers}
    found["not used"] = {family: why for family, why in compared.items() if why != "as torch"}
    for name, keep in (("kept", True), ("recomputed", False)):
        try:
            found[name] = _ours(base, shape, device, rows, width, keep=keep, logits_bytes=logits)
        except torch.OutOfMemoryError as error:
            found[name] = {"tokens_per_s": None, "why": f"out of memory: {error}"}
        _clear(device)
    hp = Hyperparameters(lora_r=RANK, batch_size=rows)
    step = peft_step(model, hp, rows, width, shape.vocab)
    seconds = _steps(device, step)
    found["peft loop"] = {"tokens_per_s": round(rows * width / statistics.median(seconds), 1)}
    flops = shape.step_flops(rows, width, shape.layers)
    ours = max((found[name]["tokens_per_s"] or 0.0) for name in ("kept", "recomputed"))
    found["tflops"] = round(flops * ours / (rows * width) / 1e12, 2)
    if rate.get("tflops") and not dry:
        found["share_of_matrix_rate"] = found["tflops"] / rate["tflops"]
    if not dry:
        found["of_the_peft_loop"] = ours / found["peft loop"]["tokens_per_s"]
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    del model, base, step
    _clear(device)
    return found


def _ours(
    base: FrozenBase,
    shape: Shape,
    device: torch.device,
    rows: int,
    width: int,
    *,
    keep: bool,
    logits_bytes: int,
) -> dict[str, Any]:
    steps = SPEED_STEPS + DISCARDED
    run = training_run(base, steps, keep=keep, logits_bytes=logits_bytes)
    numbers = iter(range(1, steps + 1))

    def step() -> None:
        feed(run, next(numbers), [width] * rows, shape.vocab)
        _drive(run)

    try:
        seconds = _steps(device, step)
        run.take_metrics()
    finally:
        run.release()
    return {"tokens_per_s": round(rows * width / statistics.median(seconds), 1)}


def _steps(device: torch.device, step: Callable[[], object]) -> list[float]:
    """Seconds of whole steps; the first ones set up kernels and memory."""
    seconds = []
    for number in range(SPEED_STEPS + DISCARDED):
        began = time.perf_counter()
        step()
        _synchronize(device)
        if number >= DISCARDED:
            seconds.append(time.perf_counter() - began)
    return seconds


def quanta(shape: Shape, device: torch.device, layers: int, dry: bool) -> dict[str, Any]:
    """Host (launch) and device milliseconds of each kind of quantum, the first run of a shape and
    later ones; and with graphs, which are made where nothing is served."""
    base, _ = served_base(random_model(shape, device, torch.bfloat16, layers))
    logits = 1 << 16 if dry else HarliOptions().logits_bytes(device.type)
    rows = []
    for keep, graphs in ((False, False), (True, False), (False, True)):
        run = training_run(base, STEPS, keep=keep, logits_bytes=logits)
        for step in range(1, STEPS + 1):
            width = WIDTHS[step % 2] // (16 if dry else 1)
            feed(run, step, [width - cut for cut in ((0, 2, 3, 4) if dry else (0, 40, 90, 130))], shape.vocab)
        times = _quantum_times(run, device, idle=graphs)
        run.release()
        for (kind, first), values in sorted(times.items()):
            host, on_device = zip(*values, strict=True)
            rows.append(
                {"quantum": kind, "kept": keep, "graphs": graphs, "first of its shape": first}
                | {"n": len(values)}
                | {"host_p50_ms": statistics.median(host), "host_max_ms": max(host)}
                | {"device_p50_ms": statistics.median(on_device), "device_max_ms": max(on_device)}
            )
    del base
    _clear(device)
    return {"layers": layers, "rows": rows}


def _quantum_times(
    run: TrainingRun, device: torch.device, *, idle: bool
) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    while (shape := run.peek()) is not None:
        events = _behind_a_pause(device)
        began = time.perf_counter()
        done = run.run(shape.rows, idle=idle)
        host_ms = device_ms = 1e3 * (time.perf_counter() - began)
        if events is not None:
            events[1].record()
            torch.cuda.synchronize()
            device_ms = events[0].elapsed_time(events[1])
        if not done.misleads:  # a graph was made meanwhile, say
            found.setdefault((shape.kind.value, done.first_of_shape), []).append((host_ms, device_ms))
    run.take_metrics()
    return found


def _behind_a_pause(device: torch.device) -> tuple[Any, Any] | None:
    """Two events, the first recorded behind a pause of the device, so that the time between them is
    the device's and not that of launching; None: on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP_CYCLES)
    first.record()
    return first, last


def _seconds(device: torch.device, work: Callable[[], object], rounds: int) -> float:
    """Median seconds of ``work`` by the device's clock."""
    work()
    found = []
    for _ in range(rounds):
        _synchronize(device)
        began = time.perf_counter()
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            work()
            last.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
        else:
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def _drive(run: TrainingRun, *, until: int | None = None, idle: bool = False) -> None:
    """To the end, or until so many steps are applied; ``idle``: graphs may be made."""
    while (until is None or run.applied_step < until) and (shape := run.peek()) is not None:
        run.run(shape.rows, idle=idle)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
