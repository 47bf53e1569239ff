"""The check for the day a GPU is there: its verdicts, its pages, its first parts without one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support.project_files import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))

import gpu_check
from common.load import Seen
from gpu import judge, page, platform_part, pool_moves, shapes, tables, training_part
from gpu.device import bench
from gpu.merge import merge, verdict
from gpu.replay import Targets, figures, requests_for
from gpu.server_part import _without
from gpu.shapes import SHAPES
from sglang_harli.config import SWITCHED
from sglang_harli.mem_cache.backing.static import StaticBacking

WINDOW = {"within_target": 1.0}
CO_SERVING = {
    "serve_only": WINDOW,
    "together": WINDOW,
    "finetune_tokens_per_s": 1.0,
    "reclaim_of_step": 0.2,
}
GOOD: dict[int, dict[str, Any]] = {
    1: {"moves": {"rows": [{"contents_right": True}]}, "graph": {"right": True}},
    2: {
        "losses": {"equal": True},
        "waits": {"none": True},
        "speed": {"share_of_matrix_rate": 0.45, "of_the_peft_loop": 1.1},
    },
    3: {
        "decode": {"ratio": 1.02},
        "greedy": {"during": True, "after": True},
        "adapter": {"answers": True},
        "co_serving": CO_SERVING,
        "backing static": {"greedy_equal": True, "co_serving": CO_SERVING},
    },
    4: {"rate 8": CO_SERVING, "rate 24": CO_SERVING, "predictor": {"error": 0.049}},
}
# Part, path to a figure, a value that breaks a statement.
BROKEN = [
    (1, ("moves", "rows"), [{"contents_right": True}, {"contents_right": False}]),
    (1, ("graph", "right"), False),
    (2, ("losses", "equal"), False),
    (2, ("waits", "none"), False),
    (2, ("speed", "share_of_matrix_rate"), 0.449),
    (2, ("speed", "of_the_peft_loop"), 1.09),
    (3, ("decode", "ratio"), 1.021),
    (3, ("greedy", "during"), False),
    (3, ("greedy", "after"), False),
    (3, ("adapter", "answers"), False),
    (3, ("co_serving", "together"), {"within_target": 0.98}),
    (3, ("co_serving", "finetune_tokens_per_s"), 0.0),
    (3, ("co_serving", "reclaim_of_step"), 1.1),
    (3, ("backing static", "greedy_equal"), False),
    (4, ("rate 24", "together"), {"within_target": 0.98}),
    (4, ("predictor", "error"), 0.051),
    (4, ("predictor", "error"), float("nan")),
]


def changed(sections: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    return sections | {first: changed(sections[first], tuple(rest), value) if rest else value}


# ---------------------------------------------------------------- verdicts
@pytest.mark.parametrize("part", GOOD)
def test_what_holds_holds(part: int):
    rows = judge.rows_of(part, GOOD[part])
    assert rows and all(row.holds for row in rows)


@pytest.mark.parametrize(("part", "path", "value"), BROKEN)
def test_each_statement_can_fail(part: int, path: tuple[str, ...], value: Any):
    rows = judge.rows_of(part, changed(GOOD[part], path, value))
    assert sum(row.holds is False for row in rows) == 1


@pytest.mark.parametrize("part", GOOD)
def test_what_was_not_measured_neither_holds_nor_fails(part: int):
    rows = judge.rows_of(part, {})
    assert rows and all(row.holds is None and row.value is None for row in rows)


# ---------------------------------------------------------------- pages
def page_of(folder: Path, part: int = 2, *, dry: bool = False, seconds: float = 60.0) -> page.Page:
    return page.Page(part, dry, folder, "dry" if dry else "h200", time.monotonic() + seconds)


def read(found: page.Page) -> tuple[dict[str, Any], str]:
    return json.loads(found.path.with_suffix(".json").read_text())["results"], found.path.read_text()


def test_a_section_that_fails_is_named_and_the_others_are_measured(tmp_path: Path):
    found = page_of(tmp_path)

    def fails() -> None:
        raise ValueError("the kernel is\nnot there")

    assert found.measure("speed", fails) is None
    assert found.measure("losses", lambda: {"equal": True}) == {"equal": True}
    results, text = read(found)
    assert results["missing"] == {"speed": "ValueError: the kernel is\nnot there"}
    assert "- speed: ValueError: the kernel is not there" in text and "| equal | yes |" in text
    assert "| losses are those of the CPU | yes | 1 | holds |" in text
    assert "not measured" in text and found.exit_code() == page.FAILS


def test_when_the_time_is_over_the_page_says_what_is_missing(tmp_path: Path):
    found = page_of(tmp_path, seconds=10)
    assert found.measure("speed", lambda: 1, needs_s=30) is None
    assert found.measure("losses", lambda: {"equal": True}) is not None
    assert "out of time: 10 s were left, 30 are needed" in read(found)[1]
    assert found.exit_code() == page.MISSING
    found.ends_s = 0.0
    assert found.measure("waits", lambda: 1) is None and "waits" in found.missing


def test_a_section_that_hangs_is_given_up_and_the_page_is_there(tmp_path: Path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from gpu import page\n"
        "page.GRACE_S = 0.2\n"
        "found = page.Page(2, False, Path(sys.argv[2]), 'h200', time.monotonic() + 0.2).watched()\n"
        "found.at_end(lambda: print('ended'))\n"
        "found.measure('losses', lambda: {'equal': True})\n"
        "found.measure('speed', lambda: time.sleep(60))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmark"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == page.MISSING and "ended" in done.stdout, done.stderr
    results, _ = read(page_of(tmp_path))
    assert results["sections"] == {"losses": {"equal": True}}
    assert results["missing"] == {"speed": "out of time: it was still running"}


def test_a_part_that_is_ended_leaves_its_page(tmp_path: Path):
    code = (
        "import os, signal, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from gpu import page\n"
        "found = page.Page(2, False, Path(sys.argv[2]), 'h200', time.monotonic() + 60).watched()\n"
        "found.measure('losses', lambda: {'equal': True})\n"
        "found.measure('speed', lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "benchmark"), str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == page.MISSING
    results, text = read(page_of(tmp_path))
    assert results["sections"] == {"losses": {"equal": True}}
    assert "- speed: ended by SIGTERM: it was still running" in text


def test_a_dry_page_says_so_and_judges_nothing(tmp_path: Path):
    found = page_of(tmp_path, dry=True)
    found.measure("losses", lambda: {"equal": False})
    results, text = read(found)
    assert text.startswith("# DRY RUN: ") and results["rows"] == []
    assert "fails" not in text and found.exit_code() == page.HOLDS


def test_pages_are_joined_and_the_newest_of_a_part_counts(tmp_path: Path):
    for part, sections in GOOD.items():
        found = page_of(tmp_path, part)
        found.settings["attention"] = "triton"
        found.sections = sections
        found.write()
    joined, code = merge(tmp_path, "h200")
    assert code == page.HOLDS and "## 4. A server of 8B" in joined.read_text()
    assert "attention triton" in joined.read_text()
    (tmp_path / page_of(tmp_path, 3).path.with_suffix(".json").name).unlink()
    joined, code = merge(tmp_path, "h200")
    assert code == page.MISSING and "**Not run.**" in joined.read_text()


def test_the_joined_verdict_is_that_of_the_worst_part():
    good = {part: {"dry": False, "missing": {}, "rows": [{"holds": True}]} for part in GOOD}
    assert verdict(good) == page.HOLDS
    assert verdict({1: good[1]}) == page.MISSING
    late = good | {2: {"dry": False, "missing": {"x": "out of time: 1 s"}, "rows": []}}
    assert verdict(late) == page.MISSING
    assert verdict(late | {3: {"dry": False, "missing": {"x": "OSError: no"}, "rows": []}}) == page.FAILS
    assert verdict(good | {3: {"dry": False, "missing": {}, "rows": [{"holds": False}]}}) == page.FAILS


def test_sections_are_tables_without_long_lists():
    text = tables.sections_text(
        {"one": {"a": 1.23456, "b": {"c": True, "raw": [1, 2]}, "rows": [{"x": 1}, {"x": None, "y": "p|q"}]}}
    )
    assert "| a | 1.235 |" in text and "| b, c | yes |" in text and "raw" not in text
    assert "| x | y |" in text and "| - | p\\|q |" in text


# ---------------------------------------------------------------- figures
def test_requests_that_did_not_end_are_late():
    seen = [Seen(0.1, 0.02, 5, 1.0), Seen(0.1, 0.04, 5, 1.0), None]
    found = figures(seen, Targets(0.03, ttft_s=0.05), 2.0)
    assert found["within_target"] == pytest.approx(1 / 3) and found["first_in_time"] == 0.0
    assert found["late or failed"] == 1
    assert figures([None], Targets(0.03), 1.0)["within_target"] == 0.0


def test_a_trace_is_brought_to_a_rate_and_cut_to_the_context(tmp_path: Path):
    file = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{n:02d}.5,{5000 if n else 10},{201}" for n in range(60)]
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    name, slow = requests_for(file, mean_batch=3.0, tpot_s=0.03, seconds=1e3, most_tokens=4000)
    _, fast = requests_for(file, mean_batch=12.0, tpot_s=0.03, seconds=1e3, most_tokens=4000)
    assert name.startswith("trace.csv") and max(r.prompt_tokens + r.output_tokens for r in slow) <= 4000
    assert slow[-1].arrival_s == pytest.approx(60 * 200 * 0.03 / 3.0)
    assert fast[1].arrival_s == pytest.approx(slow[1].arrival_s / 4)
    name, made = requests_for(None, mean_batch=8.0, tpot_s=0.03, seconds=20.0, most_tokens=4000)
    assert "synthetic" in name and made and all(r.arrival_s < 20 for r in made)


def test_a_step_counts_the_products_of_an_8b_model():
    shape = SHAPES["8b"]
    per_token = shape.step_flops(4, 2048, shape.layers) / 8192
    weights = 7.57e9  # linears and head of such a model
    assert 4 * weights < per_token < 4.5 * weights


def test_flags_are_left_out_with_their_values():
    flags = ["--device", "cuda", "--lora-target-modules", "q", "k", "--disable-x", "--dtype", "bfloat16"]
    assert _without(flags, {"--lora-target-modules", "--dtype"}) == ["--device", "cuda", "--disable-x"]


# ---------------------------------------------------------------- without a GPU
OPTIONS = argparse.Namespace()


def test_part_1_runs_dry_by_the_driver_s_double(tmp_path: Path):
    found = page_of(tmp_path, 1, dry=True)
    platform_part.run(found, OPTIONS)
    assert not found.missing and found.exit_code() == page.HOLDS
    assert list(found.sections)[-1] == "green contexts"  # they may leave the device in disorder
    assert all(row.holds for row in judge.rows_of(1, found.sections))
    calls = {row["call"] for row in found.sections["calls"]["rows"]}
    assert {"create", "map", "set_access", "unmap", "fill", "record", "wait", "done"} <= calls
    assert {row["backing"] for row in found.sections["moves"]["rows"]} == {"aliased", "remapped", "static"}


def test_part_1_sees_a_backing_that_does_not_clear_what_comes_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StaticBacking, "take_back", lambda self, stripes, extents: self._lent.clear())
    with bench(dry=True) as device:
        rows = {row["backing"]: row["contents_right"] for row in pool_moves.moves(device, True)["rows"]}
        assert not platform_part.graph(device, True)["right"]
    assert rows == {"aliased": True, "remapped": True, "static": False}


def test_part_2_runs_dry_on_the_cpu(tmp_path: Path):
    found = page_of(tmp_path, 2, dry=True, seconds=600)
    training_part.run(found, OPTIONS)
    assert not found.missing and found.exit_code() == page.HOLDS
    assert found.sections["losses"]["equal"] and found.sections["waits"]["none"]
    kinds = {row["quantum"] for row in found.sections["quanta of 8b"]["rows"]}
    assert {"copy", "embed", "forward", "head", "backward", "optimizer"} <= kinds
    assert "share_of_matrix_rate" not in found.sections["speed"]  # nothing is judged by a CPU's
    assert found.sections["kernels"] == dict.fromkeys(SWITCHED, "not compared here")


def test_part_2_trains_with_what_a_server_would_use(monkeypatch: pytest.MonkeyPatch):
    def check(family: str) -> Any:
        def compared(base: Any) -> str | None:
            assert family in base.kernels.open
            (base.kernels.refuse if family == "lora" else base.kernels.allow)(family)
            return "the lora kernels differ" if family == "lora" else None

        return compared

    monkeypatch.setattr(shapes, "CHECKS", tuple(check(family) for family in SWITCHED))
    model = shapes.random_model(SHAPES["tiny"], torch.device("cpu"), torch.float32)
    base, found = shapes.served_base(model)
    assert found == dict.fromkeys(SWITCHED, "as torch") | {"lora": "the lora kernels differ"}
    run = shapes.training_run(base, 1, keep=False, logits_bytes=1 << 16)
    assert run.base.kernels.used == set(SWITCHED) - {"lora"}
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    fused = [program.qkv._frozen for program in run._pieces.layers]
    assert all(
        len(products) == 1 and len(products[0][0]) == 2 * len(weight)
        for weight, products in zip(weights, fused, strict=True)
    )


def test_a_part_or_the_join_is_to_be_given():
    for words in ([], ["--part", "1", "--merge"], ["--part", "5"]):
        with pytest.raises(SystemExit):
            gpu_check.parse(words)
    assert sum(gpu_check.LIMITS_S.values()) <= 24 * 60 and max(gpu_check.LIMITS_S.values()) < 8 * 60


def test_the_script_runs_by_itself_and_needs_a_gpu_or_dry(tmp_path: Path):
    script = [
        sys.executable,
        str(ROOT / "benchmark" / "gpu_check.py"),
        "--part",
        "1",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run([*script, "--dry"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("gpu-check-1_dry_*.md")
    assert written.read_text().startswith("# DRY RUN")
