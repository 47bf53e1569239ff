"""The verdict on the pool's live picture: every statement has a run in which it does not hold."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import pool_flow
from pool import flow_picture
from pool.flow_judge import Sample, Span, flows, judge, table
from pool.trace import Ask

TOTAL, STRIPE = 1000, 10


def sample(at_s: float, *, kv: int, train: int, step: int = 0, free: int | None = None) -> Sample:
    free = TOTAL - kv - train if free is None else free
    purposes = {"state": min(train, 100), "micro_batch": max(train - 100, 0), "kept": 0}
    return Sample(at_s, kv, train, free, TOTAL, purposes, reclaims=2, step=step)


def good() -> dict[str, Any]:
    samples = [
        sample(0, kv=50, train=600),
        sample(9, kv=100, train=600, step=2),
        sample(11, kv=700, train=300, step=2),
        sample(12, kv=900, train=100, step=2),
        sample(16, kv=400, train=100, step=2),
        sample(19, kv=300, train=600, step=4),
        sample(21, kv=950, train=0, step=4),
        sample(27, kv=300, train=500, step=5),
    ]
    return {
        "samples": samples,
        "waves": [Span(10, 15), Span(20, 24)],
        "requests": 6,
        "failed": {},
        "job": "running",
        "dropped": 1,
        "stripe_bytes": STRIPE,
    }


def test_a_run_in_which_memory_flows_both_ways_is_clean():
    assert judge(good()) == []
    first, second = flows(good()["samples"], good()["waves"])
    assert (first.to_kv, first.to_train, first.steps) == (500, 500, 2)
    assert (second.to_kv, second.to_train, second.steps) == (600, 500, 1)


def changed(number: int, **values: Any) -> dict[str, Any]:
    results = good()
    results["samples"][number] = replace(results["samples"][number], **values)
    return results


def still() -> dict[str, Any]:
    """Training keeps what it holds, and the KV cache lives with the rest."""
    results = good()
    results["samples"] = [replace(s, kv=200, train=600, free=200) for s in results["samples"]]
    return results


def one_way() -> dict[str, Any]:
    results = good()
    results["samples"] = [
        replace(s, train=0, free=TOTAL - s.kv) if s.at_s > 11 else s for s in results["samples"]
    ]
    return results


def given_but_unused() -> dict[str, Any]:
    """Training gives memory back, but no request ever has it."""
    results = good()
    results["samples"] = [
        replace(s, kv=min(s.kv, 300), free=TOTAL - min(s.kv, 300) - s.train) for s in results["samples"]
    ]
    return results


@pytest.mark.parametrize(
    ("results", "problem"),
    [
        (good() | {"failed": {"1.0": "HTTP 500: no memory"}}, "request 1.0 failed: HTTP 500"),
        (changed(2, free=1), "1 of 8 looks do not sum"),
        (still(), "wave 1: memory did not flow to the KV cache"),
        (given_but_unused(), "wave 2: memory did not flow to the KV cache"),
        (one_way(), "wave 1: memory did not flow back"),
        (changed(7, step=4), "wave 2: the job made no step"),
        (good() | {"job": "failed"}, "the job ended as failed"),
        (good() | {"waves": []}, "no wave was sent"),
        (good() | {"samples": []}, "wave 1: memory did not flow to the KV cache"),
    ],
    ids=["failed", "sum", "still", "unused", "one-way", "no-step", "job", "no-wave", "no-look"],
)
def test_what_does_not_hold_is_named(results: dict[str, Any], problem: str):
    assert any(problem in found for found in judge(results)), judge(results)


def test_the_table_has_a_row_for_each_wave_and_the_verdict():
    text = table(good(), [])
    assert "| 1 | 10 to 15 |" in text
    assert "Verdict: clean." in text
    assert "Verdict: 2 problems." in table(good(), ["a", "b"])
    assert "0 looks" in table(good() | {"samples": [], "waves": []}, [])


def test_a_look_takes_its_figures_from_the_status():
    pool = {
        "kv_bytes": 5,
        "train_bytes": 3,
        "free_bytes": 2,
        "total_bytes": 10,
        "by_owner": {"kv": 7, "state": 1, "micro_batch": 2, "kept": 0},
        "reclaims": 4,
    }
    look = Sample.of(1.5, pool, 7)
    assert (look.kv, look.train, look.free, look.total, look.reclaims, look.step) == (5, 3, 2, 10, 4, 7)
    assert look.purposes == {"state": 1, "micro_batch": 2, "kept": 0}


def test_the_picture_stacks_to_the_total_at_every_look():
    run = good()
    assert all(sum(flow_picture.amounts(s)) == TOTAL for s in run["samples"])
    root = ElementTree.fromstring(flow_picture.svg(run["samples"], run["waves"]))
    polygons = [node for node in root.iter() if node.tag.endswith("polygon")]
    assert len(polygons) == len(flow_picture.BANDS)
    lowest, highest = (
        [float(point.split(",")[1]) for point in polygons[n].attrib["points"].split()] for n in (0, -1)
    )
    assert max(lowest) == flow_picture.HEIGHT - flow_picture.BOTTOM
    assert min(highest) == flow_picture.TOP
    assert ElementTree.fromstring(flow_picture.svg([], [])) is not None


def test_the_prompts_of_a_wave_fit_the_pool_and_share_nothing():
    waves = pool_flow.prompts(1, 2, 4096)
    asks: list[Ask] = [ask for wave in waves for ask in wave.asks]
    assert len({ask.prompt[:8] for ask in asks}) == len(asks)
    assert all(0.9 * pool_flow.POOL_TOKENS < wave.slots <= pool_flow.POOL_TOKENS for wave in waves)
    assert max(ask.slots for ask in asks) < 4096
