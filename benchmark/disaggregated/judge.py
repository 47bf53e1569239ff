"""What a pair with training on its decode server must show, judged from its cells (pure).

``results``:
    target_ms   per output token
    cells       mode, repetition, disturbed, tpots_ms (of each request; None: it failed or did not end), ttfts_ms,
                failures, tokens_per_s and train_only_tokens_per_s (trained), busy (of serve-only)

A cell that was disturbed is measured again; one that is disturbed then too is left out with its
partner of the other mode.
"""

from __future__ import annotations

from typing import Any

from colocate.judge import Interval, Row, interval, of, on_time, shares
from disaggregated.plan import HARLI, SERVE

KEPT = 0.99  # of serve-only's share within target
Cells = list[dict[str, Any]]
LOAD, SETTING = 1, ""  # as the cells of co-location have them


def kept(results: dict[str, Any]) -> Interval | None:
    """Share of requests within the target, of serve-only's, over pairs of cells with the same
    requests."""
    ours, alone = (of(results["cells"], mode, LOAD) for mode in (HARLI, SERVE))
    target_ms = results["target_ms"]
    pairs = [
        (on_time(ours[n], target_ms), on_time(alone[n], target_ms)) for n in sorted(set(ours) & set(alone))
    ]
    return shares(pairs)


def harvests(results: dict[str, Any]) -> list[float]:
    """Finetune tokens/s beside requests over those of the same server without, by repetition."""
    ours = of(results["cells"], HARLI, LOAD)
    return [c["tokens_per_s"] / c["train_only_tokens_per_s"] for _, c in sorted(ours.items())]


def efficiencies(results: dict[str, Any]) -> list[float]:
    """The harvest over the share of time that serve-only's decode server left idle."""
    ours, alone = (of(results["cells"], mode, LOAD) for mode in (HARLI, SERVE))
    return [
        ours[n]["tokens_per_s"] / ours[n]["train_only_tokens_per_s"] / (1 - alone[n]["busy"])
        for n in sorted(set(ours) & set(alone))
        if alone[n]["busy"] < 1
    ]


def rows(results: dict[str, Any]) -> list[Row]:
    """What is measured against a bound; the harvest has none."""
    return [
        Row("share of requests within target, of the serve-only pair's", kept(results), KEPT),
        Row("harvest: finetune tokens/s, of those without requests", interval(harvests(results)), 0.0),
        Row("harvest efficiency", interval(efficiencies(results)), 0.0),
    ]


def problems(results: dict[str, Any]) -> list[str]:
    """What fails; the benchmark exits with 1 then."""
    found = [
        f"{cell['mode']}, repetition {cell['repetition']}: {len(cell['failures'])} requests failed: {cell['failures'][0]}"
        for cell in results["cells"]
        if cell["failures"]
    ]
    share = kept(results)
    if share is None:
        found.append("no two cells to compare: serve-only kept no target, or every cell was disturbed")
    elif share.value < KEPT:
        found.append(f"requests within target: {share.value:.4f} of the serve-only pair's, at least {KEPT:g}")
    if not any(cell.get("tokens_per_s") for cell in results["cells"]):
        found.append("nothing was trained beside requests")
    return found
