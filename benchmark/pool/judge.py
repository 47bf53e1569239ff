"""What the unified pool must show against a static split, and the table of it (pure).

``results``:
    capacity  {"saved" or "kept": {"whole", "least", "unified", each split: rows of the largest
              micro-batch}}
    launches  one per launch: {mode: row}; a row is ``bench_pool_trace.summary`` with
              peak_tokens    most slots that requests held at once, the longest request that fits included
              cached_again   tokens of that request that a second one found in the prefix cache
              tokens_per_s   trained while the trace was served; None without training
              pool           the server's pool as ``harli status`` shows it; None without one
              sums           whether its parts gave the total at every look
              grown_bytes    most resident memory of the scheduler above that at its start
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RESERVE_BYTES = 256 * 2**20  # --harli-train-reserve: what training may use beside the pool
PLAIN, UNIFIED = "plain SGLang", "unified"
SPLITS = {"static 50/50": 0.5, "static 80/20": 0.8}  # the KV cache's share
MODES = (PLAIN, *SPLITS, UNIFIED)


@dataclass(frozen=True, slots=True)
class Statement:
    """Something that must hold, whether it does, and the numbers."""

    text: str
    holds: bool
    found: str


def judge(results: dict[str, Any]) -> list[Statement]:
    """Every statement; one that is false makes the benchmark fail."""
    statements = list(_micro_batches(results["capacity"]))
    for number, launch in enumerate(results["launches"], 1):
        mark = f" (launch {number})" if len(results["launches"]) > 1 else ""
        statements += [Statement(s.text + mark, s.holds, s.found) for s in _launch(launch)]
    return statements


def _micro_batches(capacity: dict[str, dict[str, int]]) -> Iterator[Statement]:
    saved, kept = capacity["saved"], capacity["kept"]
    yield Statement(
        "training alone fits the micro-batch that the whole budget allows",
        saved[UNIFIED] == saved["whole"] > 0,
        f"{saved[UNIFIED]} rows, the budget allows {saved['whole']}",
    )
    yield Statement(
        "with kept activations too, up to the rounding of each lease to stripes",
        kept["least"] <= kept[UNIFIED] and kept[UNIFIED] > 0,
        f"{kept[UNIFIED]} rows, the budget allows {kept['least']} to {kept['whole']}",
    )
    for split in SPLITS:
        yield Statement(
            f"{split} does not fit that micro-batch",
            saved[split] < saved[UNIFIED] and kept[split] < kept[UNIFIED],
            f"{saved[split]} against {saved[UNIFIED]} rows, kept {kept[split]} against {kept[UNIFIED]}",
        )


def _launch(launch: dict[str, dict[str, Any]]) -> Iterator[Statement]:
    plain, unified = launch[PLAIN], launch[UNIFIED]
    yield Statement(
        "serving alone reaches as many cached tokens as SGLang alone",
        unified["peak_tokens"] == plain["peak_tokens"] > 0
        and unified["cached_again"] == plain["cached_again"] > 0,
        f"peak {unified['peak_tokens']} against {plain['peak_tokens']}, found in the cache again "
        f"{unified['cached_again']} against {plain['cached_again']}",
    )
    for split in SPLITS:
        yield Statement(
            f"{split} does not reach them",
            launch[split]["peak_tokens"] < plain["peak_tokens"],
            f"{launch[split]['peak_tokens']} against {plain['peak_tokens']}",
        )
    yield Statement(
        "SGLang alone serves the whole trace",
        plain["requests"] > 0 and not plain["failed"],
        "; ".join(plain["failed"].values()) or f"{plain['requests']} requests",
    )
    worse = sorted(set(unified["failed"]) - set(plain["failed"]))
    yield Statement(
        "no request is rejected that SGLang alone serves",
        not worse and unified["requests"] == plain["requests"],
        ", ".join(f"{name}: {unified['failed'][name]}" for name in worse)
        or f"{unified['requests']} requests",
    )
    more = sorted(n for n, count in unified["retracted"].items() if count > plain["retracted"].get(n, 0))
    yield Statement(
        "no request is retracted that SGLang alone does not retract",
        not more,
        ", ".join(more) or f"{sum(unified['retracted'].values())} retractions",
    )
    yield from _reclaim(plain, unified)


def _reclaim(plain: dict[str, Any], unified: dict[str, Any]) -> Iterator[Statement]:
    pool = unified["pool"] or {}
    reclaims, median = pool.get("reclaims") or 0, (pool.get("reclaim_ms") or {}).get("p50")
    step = plain["decode_ms"]
    yield Statement(
        "memory is taken back in less than a decode step, at the median",
        reclaims > 0 and median is not None and step is not None and median < step,
        f"{reclaims} times, median {_ms(median)}, a decode step of SGLang alone {_ms(step)}",
    )
    yield Statement(
        "the pool's parts give its total at every look", bool(unified["sums"]), "kv, train and free bytes"
    )
    grown, alone = unified["grown_bytes"], plain["grown_bytes"]
    yield Statement(
        "resident memory stays within that of SGLang alone and the reserve",
        grown <= alone + RESERVE_BYTES,
        f"grown by {_mib(grown)}, SGLang alone by {_mib(alone)}, reserve {_mib(RESERVE_BYTES)}",
    )
    yield Statement(
        "training goes on beside the trace",
        (unified["tokens_per_s"] or 0) > 0,
        f"{unified['tokens_per_s']} tokens/s",
    )


# ------------------------------------------------------------------ what is printed
def table(results: dict[str, Any], statements: list[Statement]) -> str:
    capacity, launches = results["capacity"], results["launches"]
    rows: list[tuple[str, dict[str, str]]] = [
        ("peak tokens cached", _over(launches, lambda row: row["peak_tokens"], max)),
        ("largest micro-batch, saved inputs, rows", _rows(capacity["saved"])),
        ("largest micro-batch, kept activations, rows", _rows(capacity["kept"])),
        ("prefix hit rate", _over(launches, lambda row: row["hit_rate"], statistics.median, "{:.1%}")),
        ("preemptions", _over(launches, lambda row: sum(row["retracted"].values()), sum)),
        (
            "finetune tokens/s",
            _over(launches, lambda row: row["tokens_per_s"], statistics.median, "{:.0f}"),
        ),
        ("failed requests", _over(launches, lambda row: len(row["failed"]), sum)),
        ("decode step, ms (median gap)", _over(launches, lambda row: row["decode_ms"], statistics.median)),
        ("first token, ms (median)", _over(launches, lambda row: row["ttft_ms"], statistics.median)),
        ("scheduler's memory above its start, MiB", _over(launches, _grown, max, "{:.0f}")),
        ("times memory was taken back", _over(launches, _pool("reclaims"), sum)),
        ("taking it back, ms (median)", _over(launches, _pool("reclaim_ms", "p50"), statistics.median)),
        ("taking it back, ms (longest)", _over(launches, _pool("reclaim_ms", "max"), max)),
    ]
    lines = ["| | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(cells.get(mode, "-") for mode in MODES) + " |" for name, cells in rows
    ]
    lines += ["", "| must hold | | found |", "|---|---|---|"]
    lines += [f"| {s.text} | {'yes' if s.holds else 'NO'} | {s.found} |" for s in statements]
    return "\n".join(lines)


def _rows(found: dict[str, int]) -> dict[str, str]:
    return {mode: str(found[mode]) for mode in MODES if mode in found}


def _over(launches: list[dict[str, Any]], value: Any, merge: Any, form: str = "{:g}") -> dict[str, str]:
    cells = {}
    for mode in MODES:
        values = [v for launch in launches if mode in launch and (v := value(launch[mode])) is not None]
        if values:
            cells[mode] = form.format(merge(values))
    return cells


def _pool(*keys: str) -> Any:
    def look(row: dict[str, Any]) -> Any:
        value: Any = row["pool"]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return look


def _grown(row: dict[str, Any]) -> float:
    return row["grown_bytes"] / 2**20


def _mib(value: int) -> str:
    return f"{value / 2**20:.0f} MiB"


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} ms"
