"""What the co-location benchmark must show, judged from its cells (pure).

``results``:
    targets   {load: {label: milliseconds per output token}}; labels are ``1.5x`` or ``20 ms``
    loads     per cent busy, 0 for no requests; ``baseline``: {"load", "target"} where the baselines are compared
    device    ``cpu`` or ``cuda``
    cells     rows of ``colocate_modes.Rig.measure``:
        mode, setting, load, repetition, disturbed (None, or why it is left out)
        tpots_ms, ttfts_ms   of each request, in the same order in each mode; None: late whatever the target
        tokens               asked for by each request
        tokens_per_s         trained; train_only_tokens_per_s: by the same server in turns, of "default limits"
        busy                 share of the time in which serve-only had something to compute
        prediction           of decode steps, as ``harli status`` shows it
        limits_ms            {"idle", "busy"}: bounds of a quantum in force

A ratio is taken within a repetition, between cells of the same load and the same requests.
Intervals are 95%: Student's t over repetitions (of logarithms), for shares of requests a bootstrap
over repetitions and the requests of each, in pairs.  A row fails exactly when its whole interval is
on the wrong side of its bound; it holds when the whole interval is on the right side; otherwise it
is open.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SERVE, TRAIN, PLAIN_LOOP = "serve-only", "train-only", "plain loop"
UNCOORDINATED, NICE, SLICES, HARLI = "two processes", "nice 19", "fixed slices", "harli"
PAUSED = "paused job"  # what our server costs without training; nothing is judged by it
MODES = (SERVE, TRAIN, PLAIN_LOOP, UNCOORDINATED, NICE, SLICES, PAUSED, HARLI)
SEPARATE = (UNCOORDINATED, NICE)
BURST, SHIFT, IDLE = "burst", "core taken", 0
DEFAULT = "default limits"
ALL, FEW = "", "the baselines' requests"  # settings of serve-only
APART = ", "  # between a target's label and what else a setting of ours says
ONE_BATCH = "4 rows"

KEPT = 0.99  # of serve-only's share within target
HOPELESS = (
    0.9  # a setting of separate processes that keeps less in the first repetition is not measured again
)
EFFICIENCY = {"4x": 0.9, "2x": 0.8, "1.5x": 0.75}
EFFICIENCY_UP_TO = 60  # per cent busy
IDLE_HARVEST = 0.97
OVER_ONE_BATCH, OVER_BEST = 1.15, 1.0
MAPE, COVERAGE = 0.10, 0.98
HOLDS, FAILS, OPEN, MISSING = "holds", "FAILS", "open", "no data"

# Two-sided 95% points of Student's t by degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
RESAMPLES = 2000
TOGETHER_MS = 10.0  # first tokens that one prefill gives out come within this time

Cells = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% interval; ``n``: how many values it is made of."""

    value: float
    lower: float
    upper: float
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """Something that must hold: at least (or at most) ``bound``."""

    text: str
    found: Interval | None
    bound: float
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.found is None:
            return MISSING
        good, bad = self.found.lower >= self.bound, self.found.upper < self.bound
        if not self.at_least:
            good, bad = self.found.upper <= self.bound, self.found.lower > self.bound
        return FAILS if bad else HOLDS if good else OPEN


# ------------------------------------------------------------------ statistics
def interval(values: Sequence[float], *, logs: bool = True) -> Interval | None:
    """Mean (of logarithms: geometric) and interval over repetitions; None without values, unbounded
    from one."""
    if not values:
        return None
    logs = logs and min(values) > 0
    points = [math.log(v) for v in values] if logs else list(values)
    mean, half = statistics.fmean(points), math.inf
    if len(points) > 1:
        half = T_95[min(len(points) - 2, len(T_95) - 1)] * statistics.stdev(points) / math.sqrt(len(points))
    if not logs:
        return Interval(mean, mean - half, mean + half, len(points))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(points))


def on_time(cell: dict[str, Any], target_ms: float) -> list[int]:
    """1 for each request within its target, 0 for each late one."""
    return [int(t is not None and t <= target_ms) for t in cell["tpots_ms"]]


def shares(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Interval | None:
    """Ratio of the share on time in the first to that in the second, over pairs of repetitions.

    Drawn with replacement: repetitions, since all requests of a cell share the machine's speed in
    that minute, and requests within each, the same ones on both sides.
    """
    pairs = [pair for pair in pairs if pair[0] and len(pair[0]) == len(pair[1])]
    over, under = sum(sum(p[0]) for p in pairs), sum(sum(p[1]) for p in pairs)
    if not under:
        return None
    rng = np.random.default_rng(0)
    times = rng.multinomial(
        len(pairs), [1 / len(pairs)] * len(pairs), size=RESAMPLES
    )  # each repetition is drawn
    drawn_over, drawn_under = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for pair, count in zip(pairs, times.T, strict=True):
        # a draw of requests is a draw of how many are on time on both sides, on one, on none
        kinds = Counter(zip(*pair, strict=True))
        names, chances = list(kinds), [size / len(pair[0]) for size in kinds.values()]
        drawn = rng.multinomial(len(pair[0]) * count, chances)
        drawn_over += drawn @ [a for a, _ in names]
        drawn_under += drawn @ [b for _, b in names]
    ratios = drawn_over[drawn_under > 0] / drawn_under[drawn_under > 0]
    lower, upper = np.quantile(ratios, [0.025, 0.975], method="nearest")
    return Interval(over / under, float(lower), float(upper), sum(len(pair[0]) for pair in pairs))


# ------------------------------------------------------------------ cells
def of(cells: Cells, mode: str, load: int | str, setting: str | None = None) -> dict[int, dict[str, Any]]:
    """Undisturbed cells by repetition."""
    return {
        cell["repetition"]: cell
        for cell in cells
        if cell["mode"] == mode
        and cell["load"] == load
        and cell["disturbed"] is None
        and setting in (None, cell["setting"])
    }


def settings_of(cells: Cells, mode: str) -> list[str]:
    """In the order of their first cell."""
    return list(dict.fromkeys(cell["setting"] for cell in cells if cell["mode"] == mode))


def ratios(
    over: dict[int, dict[str, Any]],
    under: dict[int, dict[str, Any]],
    value: Callable[[dict[str, Any]], float] = lambda cell: cell["tokens_per_s"],
) -> dict[int, float]:
    """Of one value, by repetition, where both have been measured and the second is not 0."""
    both = sorted(set(over) & set(under))
    return {n: value(over[n]) / value(under[n]) for n in both if value(under[n]) > 0}


def harvests(cells: Cells, load: int | str, setting: str) -> dict[int, float]:
    """Of our server beside requests: finetune tokens/s over train-only's, by repetition.

    Train-only's rate is that of right before and after the cell: a machine's speed changes within
    minutes.
    """
    ours = of(cells, HARLI, load, setting)
    return {n: c["tokens_per_s"] / c["train_only_tokens_per_s"] for n, c in sorted(ours.items())}


def efficiencies(cells: Cells, load: int, setting: str) -> list[float]:
    """Harvest ratio over the share of time that serve-only left idle, by repetition."""
    harvest, alone = harvests(cells, load, setting), of(cells, SERVE, load, ALL)
    return [harvest[n] / (1 - alone[n]["busy"]) for n in harvest if n in alone and alone[n]["busy"] < 1]


def kept(cells: Cells, mode: str, setting: str, load: int | str, target_ms: float) -> Interval | None:
    """Share within target against serve-only's."""
    pairs = []
    for n, cell in sorted(of(cells, mode, load, setting).items()):
        for alone_setting in settings_of(cells, SERVE):  # the one that had the same requests
            alone = of(cells, SERVE, load, alone_setting).get(n)
            if alone is not None and alone["tokens"] == cell["tokens"]:
                pairs.append((on_time(cell, target_ms), on_time(alone, target_ms)))
                break
    return shares(pairs)


def best_rows(cells: Cells) -> str | None:
    """The number of rows at which the plain loop is fastest, by its median."""
    speeds = {
        setting: statistics.median(c["tokens_per_s"] for c in of(cells, PLAIN_LOOP, IDLE, setting).values())
        for setting in settings_of(cells, PLAIN_LOOP)
        if of(cells, PLAIN_LOOP, IDLE, setting)
    }
    return max(speeds, key=lambda name: speeds[name]) if speeds else None


# ------------------------------------------------------------------ what must hold
def judge(results: dict[str, Any]) -> list[Row]:
    """Every row that these cells can say something about; one that fails makes the benchmark
    fail."""
    return [
        *_attainment(results),
        *_harvest(results),
        *_separate(results),
        *_burst(results),
        *_predictor(results),
    ]


def _attainment(results: dict[str, Any]) -> Iterator[Row]:
    for load, targets in results["targets"].items():
        for label, target_ms in targets.items():
            found = kept(results["cells"], HARLI, label, int(load), target_ms)
            yield Row(f"share within target, {load}% busy, {label}, of serve-only's", found, KEPT)


def _harvest(results: dict[str, Any]) -> Iterator[Row]:
    cells = results["cells"]
    for load, targets in results["targets"].items():
        for label in targets:
            if label in EFFICIENCY and int(load) <= EFFICIENCY_UP_TO:
                found = interval(efficiencies(cells, int(load), label))
                yield Row(f"harvest efficiency, {load}% busy, {label}", found, EFFICIENCY[label])
    train = of(cells, TRAIN, IDLE)
    default = of(cells, HARLI, IDLE, DEFAULT).values()
    idle = [cell["tokens_per_s"] / cell["train_only_tokens_per_s"] for cell in default]
    yield Row("idle with default limits, of train-only in turns with it", interval(idle), IDLE_HARVEST)
    if not settings_of(cells, PLAIN_LOOP):
        return
    one = ratios(train, of(cells, PLAIN_LOOP, IDLE, ONE_BATCH))
    yield Row("train-only, of the plain loop in one batch", interval(list(one.values())), OVER_ONE_BATCH)
    rows = best_rows(cells)
    best = ratios(train, of(cells, PLAIN_LOOP, IDLE, rows)) if rows else {}
    text = f"train-only, of the plain loop at its best ({rows})"
    yield Row(text, interval(list(best.values())), OVER_BEST)


def with_few(cells: Cells, load: int | str, label: str) -> dict[int, dict[str, Any]]:
    """Our cells with the requests that the baselines have: few requests may come faster or slower
    than the rate says."""
    return of(cells, HARLI, load, label + APART + FEW) or of(cells, HARLI, load, label)


def label_of(setting: str) -> str:
    """The target's label in a setting of ours."""
    return setting.partition(APART)[0]


def _separate(results: dict[str, Any]) -> Iterator[Row]:
    cells, at = results["cells"], results["baseline"]
    if at is None:
        return
    load, label = at["load"], at["target"]
    target_ms = results["targets"][str(load)][label]
    ours = with_few(cells, load, label)
    memory: list[float] = []
    for mode in SEPARATE:
        for setting in settings_of(cells, mode):
            theirs = of(cells, mode, load, setting)
            memory += ratios(ours, theirs, lambda cell: cell["pss_bytes"]).values()
            share = kept(cells, mode, setting, load, target_ms)
            if share is not None and share.value >= KEPT:
                # where the setting trained nothing, whatever we trained is more
                faster = [
                    ours[n]["tokens_per_s"] / max(theirs[n]["tokens_per_s"], 1e-9)
                    for n in ours
                    if n in theirs
                ]
                text = f"finetune tokens/s, {load}% busy, {label}, of {mode}, {setting}"
                yield Row(text, interval(faster), 1.0)
    if any(settings_of(cells, mode) for mode in SEPARATE):
        text = "memory of all processes (PSS), of two separate ones with a copy of the weights each"
        yield Row(text, interval(memory), 1.0, at_least=False)


def burst_excess(ours: dict[str, Any], alone: dict[str, Any], target_ms: float) -> tuple[float, float]:
    """How much of what a burst may cost was used, 1 being all: (first tokens, last tokens), from
    when they were sent.

    The k-th first token may come one quantum of idle time later than serve-only's k-th; of those
    that one prefill gives out together the last one counts, since who comes during a quantum is
    computed with whom it holds up.  A request's last token may come as long after its first as its
    target says, and one quantum; where that is later, one quantum of idle time after serve-only's.
    (Not TPOT by TPOT: whom the first prefill takes, and then waits for the others', is chance.)
    """
    idle_ms, busy_ms = ours["limits_ms"]["idle"], ours["limits_ms"]["busy"]
    firsts = [sorted(math.inf if t is None else t for t in cell["ttfts_ms"]) for cell in (ours, alone)]
    behind = [bisect.bisect_right(firsts[0], a + TOGETHER_MS) - 1 for a in firsts[0]]
    first = max(a / (firsts[1][last] + idle_ms) for a, last in zip(firsts[0], behind, strict=True))
    last = 0.0
    for begun, end, end_alone, tokens in zip(
        ours["ttfts_ms"], _ends_ms(ours), _ends_ms(alone), ours["tokens"], strict=True
    ):
        if end is None:
            return first, math.inf
        allowed = begun + target_ms * (tokens - 1) + busy_ms
        last = max(last, end / max(allowed, (end_alone or 0.0) + idle_ms))
    return first, last


def _ends_ms(cell: dict[str, Any]) -> Iterator[float | None]:
    """When each request's last token came; None: it failed or did not end in time."""
    for first, tpot, tokens in zip(cell["ttfts_ms"], cell["tpots_ms"], cell["tokens"], strict=True):
        yield None if first is None or tpot is None else first + tpot * (tokens - 1)


def _burst(results: dict[str, Any]) -> Iterator[Row]:
    cells, at = results["cells"], results["baseline"]
    if not any(cell["load"] == BURST for cell in cells) or at is None:
        return
    target_ms = results["targets"][str(at["load"])][at["target"]]
    ours, alone = of(cells, HARLI, BURST), of(cells, SERVE, BURST)
    found = [burst_excess(ours[n], alone[n], target_ms) for n in sorted(set(ours) & set(alone))]
    for place, text in enumerate(
        (
            "first token, of serve-only's and one quantum",
            "last token, of its target (or serve-only's) and one quantum",
        )
    ):
        values = [min(pair[place], 1e6) for pair in found]
        yield Row(f"burst from idle: the latest {text}", interval(values), 1.0, at_least=False)


def _predictor(results: dict[str, Any]) -> Iterator[Row]:
    by_repetition: dict[int, Cells] = {}
    for cell in results["cells"]:
        if (
            cell["mode"] == HARLI
            and cell["disturbed"] is None
            and cell.get("prediction")
            and isinstance(cell["load"], int)
            and cell["load"] > 0
        ):
            by_repetition.setdefault(cell["repetition"], []).append(cell["prediction"])
    for name, text, bound, at_least in (
        ("mape", "mean error of predicted decode steps", MAPE, False),
        ("coverage", "decode steps within their upper bound", COVERAGE, True),
    ):
        means = [statistics.fmean(p[name] for p in found) for found in by_repetition.values()]
        yield Row(text, interval(means, logs=False), bound, at_least)
    shifts = [c["shift"] for c in results["cells"] if c["load"] == SHIFT and c.get("shift")]
    if shifts:
        found = [s["after"]["coverage"] for s in shifts if s["steps"] >= 400]
        text = "within their upper bound from 200 steps after another process took half a core"
        yield Row(text, interval(found, logs=False), COVERAGE)
