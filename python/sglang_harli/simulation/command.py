"""What ``harli simulate`` runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_harli.errors import ConfigError
from sglang_harli.simulation import compare, engine, report, temporal, trace_files
from sglang_harli.simulation.compare import Row
from sglang_harli.simulation.devices import RATE_MODELS, Noise, SpatialWorld, TemporalWorld

MODES = ("spatial", "temporal")
UNITS = {"spatial": "SMs", "temporal": "tokens/s"}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The command's options; times in milliseconds.  ``trace`` None: the committed ones."""

    trace: str | None = None
    limit: int | None = None
    mode: str = "spatial"
    rate: str = "both"
    tpot_ms: float = 1e3 * compare.TPOT_S
    max_itl_ms: float | None = None
    noise: float = 0.0
    error: float = 0.0
    prefill: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Rows, and how long it took, seconds of simulated time and of ours."""

    mode: str
    rows: list[Row]
    simulated_s: float
    seconds: float

    @property
    def problems(self) -> list[str]:
        return [problem for row in self.rows for problem in row.problems]

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "mode": self.mode,
            "unit": UNITS[self.mode],
            "rows": [row.as_dict() for row in self.rows],
            "simulated_s": round(self.simulated_s, 1),
            "seconds": round(self.seconds, 2),
        }

    def lines(self, *, brief: bool) -> Iterator[str]:
        """For people; ``brief``: one line per trace and rate model."""
        table = report.side_by_side if brief and self.mode == "spatial" else report.one_by_one
        yield from table(self.rows, UNITS[self.mode])
        yield f"{self.simulated_s:.0f} simulated seconds in {self.seconds:.1f} s"


def simulate(wish: Wish) -> Result:
    """Every policy on every trace asked for.

    Raises:
        ConfigError: an option's value is not accepted.
        DataError: the trace file cannot be read or has a bad row.
    """
    _check(wish)
    begin_s = time.monotonic()
    if wish.trace:
        traces = [trace_files.read(wish.trace, limit=wish.limit)]
    else:
        most = temporal.MOST_BATCH if wish.mode == "temporal" else math.inf
        traces = [trace for trace in compare.committed() if trace.mean_batch(compare.TPOT_S) < most + 0.5]
    max_itl_s = None if wish.max_itl_ms is None else wish.max_itl_ms / 1e3
    targets = engine.targets_of(wish.tpot_ms / 1e3, max_itl_s)
    noise = Noise(wish.noise, wish.error, wish.seed)
    rows: list[Row] = []
    for trace in traces:
        if wish.mode == "temporal":
            rows.append(
                temporal.compare(trace, TemporalWorld(noise=noise, decode_only=not wish.prefill), targets)
            )
            continue
        models = RATE_MODELS if wish.rate == "both" else (wish.rate,)
        rows += compare.compare(
            trace, SpatialWorld(noise=noise, decode_only=not wish.prefill), targets, models
        )
    simulated_s = sum(row.simulated_s for row in rows)
    return Result(wish.mode, rows, simulated_s, time.monotonic() - begin_s)


def _check(wish: Wish) -> None:
    if wish.mode not in MODES:
        raise ConfigError(f"--mode {wish.mode!r} is not accepted: give {' or '.join(MODES)}", param="mode")
    if wish.rate not in (*RATE_MODELS, "both"):
        raise ConfigError(
            f"--rate {wish.rate!r} is not accepted: give {', '.join(RATE_MODELS)} or both", param="rate"
        )
    for name in ("tpot_ms", "max_itl_ms"):
        value = getattr(wish, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {value:g} is not accepted: give milliseconds above 0", param=flag)
    if wish.max_itl_ms is not None and wish.max_itl_ms < wish.tpot_ms:
        raise ConfigError(
            f"--max-itl-ms {wish.max_itl_ms:g} is below --tpot-ms {wish.tpot_ms:g}: every token would miss it",
            param="--max-itl-ms",
        )
    if wish.limit is not None and wish.limit < 1:
        raise ConfigError(
            f"--limit {wish.limit} is not accepted: give a number of rows from 1", param="--limit"
        )
