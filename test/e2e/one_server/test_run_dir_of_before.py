"""A run directory that version 0.1 (commit bf285ab) left behind opens: its jobs go on, its adapters
answer.  ``conftest.py`` says what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from support.http import chat, get
from support.server import Server

pytestmark = pytest.mark.long

ROUNDING = 1e-3  # another processor rounds another way, and Adam carries that on for fifty steps


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[FinetuneClient]:
    with FinetuneClient(server.endpoint) as opened:
        yield opened


def answers(url: str, name: str, questions: dict[str, str]) -> dict[str, str]:
    found = {}
    for question in questions:
        status, body = chat(url, name, question)
        assert status == 200, body
        found[question] = body["choices"][0]["message"]["content"]
    return found


def test_its_adapter_answers_as_it_did(server: Server, expected: dict[str, Any]):
    done = expected["done"]
    listed = {model["id"] for model in get(server.url, "/v1/models")[1]["data"]}
    assert done["name"] in listed
    assert answers(server.url, done["name"], done["answers"]) == done["answers"]


@pytest.mark.parametrize("which", ["run", "half", "queued"])
def test_its_jobs_go_on_as_they_would_have(
    server: Server, client: FinetuneClient, kept: Path, expected: dict[str, Any], which: str
):
    of_then = expected[which]
    if which == "half":
        assert client.get(of_then["job"]).status == JobStatus.PAUSED
        client.resume(of_then["job"])
    job = client.wait(of_then["job"], 120)
    assert (job.status, job.total_steps, job.step) == (
        JobStatus.SUCCEEDED,
        of_then["steps"],
        of_then["steps"],
    )
    assert job.fine_tuned_model == of_then["name"]
    rows = (kept / "runs" / job.id / "metrics.jsonl").read_text().splitlines()
    by_step = {str(row["step"]): row for row in map(json.loads, rows)}
    assert set(of_then["losses"]) <= set(by_step)
    for step, loss in of_then["losses"].items():
        assert by_step[step]["loss"] == pytest.approx(loss, rel=ROUNDING), step
        assert by_step[step]["learning_rate"] == pytest.approx(of_then["learning_rates"][step], abs=1e-8)
    answers(server.url, of_then["name"], of_then["answers"])
