"""Result files: the metrics of a job that succeeded, as a CSV file."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from sglang_harli.errors import NotFoundError
from sglang_harli.failpoints import FAULT_POINTS_ENV, FileFailpoint, WriteFailpoint
from sglang_harli.protocol.public import Event, SubmitArgs
from sglang_harli.service.files.results import COLUMNS, add_metrics, write_csv
from support.service.inner_calls import InnerCalls
from support.service.service_fixture import ServiceUnderTest, pairs, until

GOOD = "".join(json.dumps(row) + "\n" for row in pairs(8)).encode()


@pytest.fixture(scope="module")
def rig(tmp_path_factory, model):
    """A service with its peers whose failpoints can be armed in ``rig.points``."""
    folder = tmp_path_factory.mktemp("rig")
    points = folder / "points"
    points.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT_POINTS_ENV, str(points))
        rig = ServiceUnderTest(folder, model)
        rig.points = points
        yield rig
        rig.close()


@pytest.fixture
def calls(rig):
    calls = InnerCalls(rig.run_dir)
    yield calls
    for file in calls.listed().data:
        calls.call("file_delete", {"file": file.id})
    calls.close()


def submit(calls: InnerCalls) -> str:
    return calls.call("submit", SubmitArgs(training_file=calls.file(GOOD).id))["id"]


def succeeded(rig: ServiceUnderTest, job: str):
    return rig.done(rig.client.get(job))


def results(calls: InnerCalls) -> list[str]:
    return [file.id for file in calls.listed(purpose="fine-tune-results").data]


def rows(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(content.decode().splitlines()))


def test_a_job_that_succeeds_has_its_metrics_as_a_file(rig, calls):
    job = succeeded(rig, submit(calls))
    [file] = job.result_files
    assert results(calls) == [file]
    found = calls.call("file_get", {"file": file})
    assert (found["purpose"], found["filename"]) == ("fine-tune-results", "step_metrics.csv")
    content = calls.content(file)
    assert content.splitlines()[0].decode() == ",".join(COLUMNS) and len(content) == found["bytes"]
    assert [row["step"] for row in rows(content)] == [str(step) for step in range(1, 7)]
    assert [float(row["train_loss"]) for row in rows(content)] == [4.0 / step for step in range(1, 7)]
    assert {row["valid_loss"] for row in rows(content)} == {""}

    calls.call("file_delete", {"file": file})
    rig.restart()
    assert rig.client.get(job.id).result_files == [file], "the job names what it has made"
    later = succeeded(rig, submit(calls))
    assert results(calls) == later.result_files, "the deleted one is not made anew"
    with pytest.raises(NotFoundError):
        calls.content(file)
    plain = succeeded(rig, rig.client.submit(pairs(8)).id)
    assert plain.result_files == []


def test_a_kill_when_the_file_is_stored_makes_no_second_one(rig, calls):
    (rig.points / FileFailpoint.RESULT_STORED).write_text("stop")
    job = submit(calls)
    hit = rig.points / f"{FileFailpoint.RESULT_STORED}.hit"
    until(hit.exists, "the service at the point")
    os.kill(int(hit.read_text()), signal.SIGKILL)
    rig.service.process.wait()
    hit.unlink()
    rig.service.start()
    assert succeeded(rig, job).result_files == results(calls)
    assert len(results(calls)) == 1


def test_a_job_without_its_file_gets_it_at_the_next_start(rig, calls):
    job = succeeded(rig, submit(calls))
    [file] = job.result_files
    content = calls.content(file)
    rig.service.kill()
    with sqlite3.connect(rig.run_dir / "harli.db") as db:
        [body] = db.execute("SELECT body FROM jobs WHERE id = ?", [job.id]).fetchone()
        body = json.dumps(json.loads(body) | {"result_files": []})
        db.execute("UPDATE jobs SET body = ? WHERE id = ?", [body, job.id])
        db.execute("DELETE FROM objects WHERE id = ?", [file])
    rig.service.start()
    [again] = until(lambda: rig.client.get(job.id).result_files, "the file")
    assert again != file and results(calls) == [again]
    assert calls.content(again) == content


def test_a_disk_that_refuses_the_file_does_not_keep_the_job_from_its_end(rig, calls):
    file = calls.file(GOOD)
    (rig.points / WriteFailpoint.FILE).write_text("error ENOSPC")
    job = succeeded(rig, calls.call("submit", SubmitArgs(training_file=file.id))["id"])
    if not job.result_files:  # made by the next try, which may have come already
        [made] = until(lambda: rig.client.get(job.id).result_files, "the next try")
        assert results(calls) == [made]


def test_what_was_measured_last_of_a_step_counts(tmp_path: Path):
    steps = [(1, 4.0), (2, 3.0), (3, 2.5), (2, 2.9), (3, 2.4)]  # went back to step 1 in between
    events = [("step_metrics", {"step": s, "loss": loss}) for s, loss in steps]
    evaluation = {"step": 3, "valid_loss": 2.0, "valid_mean_token_accuracy": 0.5}
    events.insert(3, ("eval_metrics", evaluation))  # said once, though the step is done again
    events.append(("step_metrics", {"step": 4, "loss": float("inf"), "train_mean_token_accuracy": 0.25}))
    events.append(("step_metrics", {}))
    with sqlite3.connect("") as table:
        add_metrics(
            table,
            (
                Event(id=n, job="j", created_at=0.0, level="info", type=kind, message="", data=data)
                for n, (kind, data) in enumerate(events)
            ),
        )
        whole = write_csv(table, tmp_path / "file")
    assert (tmp_path / "file").read_text().splitlines() == [
        ",".join(COLUMNS),
        "1,4.0,,,",
        "2,2.9,,,",
        "3,2.4,,2.0,0.5",
        "4,,0.25,,",
    ]
    assert whole.bytes == (tmp_path / "file").stat().st_size
