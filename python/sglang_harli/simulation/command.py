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
from sglang_harli.simulation.devices import RATE_MODELS, Noise, SpatialDevice, TimeSharedDevice

MODES = ("spatial", "temporal")
UNITS = {"spatial": "SMs", "temporal": "tokens/s"}


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
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


def simulate(options: SimulationOptions) -> Result:
    """Every policy on every trace; ConfigError: a bad option; DataError: a bad trace file."""
    _check(options)
    begin_s = time.monotonic()
    if options.trace:
        traces = [trace_files.read(options.trace, limit=options.limit)]
    else:
        most = temporal.MOST_BATCH if options.mode == "temporal" else math.inf
        traces = [trace for trace in compare.committed() if trace.mean_batch(compare.TPOT_S) < most + 0.5]
    max_itl_s = None if options.max_itl_ms is None else options.max_itl_ms / 1e3
    targets = engine.targets_of(options.tpot_ms / 1e3, max_itl_s)
    noise = Noise(options.noise, options.error, options.seed)
    decode_only = not options.prefill
    models = RATE_MODELS if options.rate == "both" else (options.rate,)
    rows: list[Row] = []
    for trace in traces:
        if options.mode == "temporal":
            device = TimeSharedDevice(noise=noise, decode_only=decode_only)
            rows.append(temporal.compare(trace, device, targets))
        else:
            spatial = SpatialDevice(noise=noise, decode_only=decode_only)
            rows += compare.compare(trace, spatial, targets, models)
    simulated_s = sum(row.simulated_s for row in rows)
    return Result(options.mode, rows, simulated_s, time.monotonic() - begin_s)


def _check(options: SimulationOptions) -> None:
    if options.mode not in MODES:
        raise ConfigError(f"--mode {options.mode!r} is not accepted: give {' or '.join(MODES)}", param="mode")
    if options.rate not in (*RATE_MODELS, "both"):
        raise ConfigError(
            f"--rate {options.rate!r} is not accepted: give {', '.join(RATE_MODELS)} or both", param="rate"
        )
    for name in ("tpot_ms", "max_itl_ms"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {value:g} is not accepted: give milliseconds above 0", param=flag)
    if options.max_itl_ms is not None and options.max_itl_ms < options.tpot_ms:
        raise ConfigError(
            f"--max-itl-ms {options.max_itl_ms:g} is below --tpot-ms {options.tpot_ms:g}: every token would miss it",
            param="--max-itl-ms",
        )
    if options.limit is not None and options.limit < 1:
        raise ConfigError(
            f"--limit {options.limit} is not accepted: give a number of rows from 1", param="--limit"
        )
