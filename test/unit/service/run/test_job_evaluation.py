"""A job with validation data, from its submit to the adapter that is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from sglang_harli.cli import view
from sglang_harli.errors import ConfigError, DataError
from sglang_harli.protocol.public import Hyperparameters, Job
from sglang_harli.service.checkpoint import checkpoints, listing
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.store import JobStore, sqlite_url
from sglang_harli.service.submit import evaluation
from support.service.service_fixture import exchange, pairs, submit_args, until

HP: dict[str, Any] = {"n_epochs": 2, "batch_size": 2, "checkpoint_every": 0, "eval_steps": 2}


@pytest.fixture(autouse=True)
def losses(rig):
    yield
    rig.scheduler.valid_losses = {}


def data(rig, job: Job, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in rig.client.events(job.id) if event.type == kind]


def state_of(rig, job: Job, step: int) -> np.ndarray:
    """The adapter in a checkpoint."""
    tensors = load_file(rig.folder(job) / "checkpoints" / f"step-{step}" / "state.safetensors")
    [name] = [name for name in tensors if name.startswith("adapter/")]
    return tensors[name]


def record(rig, job: Job):
    store = JobStore(sqlite_url(rig.run_dir / "harli.db"))
    try:
        [found] = [record for record in store.jobs() if record.id == job.id]
        return found
    finally:
        store.close()


def test_rows_that_are_held_out_are_evaluated_and_not_trained(rig):
    done = rig.done(rig.client.submit(pairs(10), validation_split=0.2, **HP))
    assert done.data["validation_rows"] == 2 and done.total_steps == done.step == 8
    assert [e["step"] for e in data(rig, done, "eval_metrics")] == [2, 4, 6, 8]
    assert data(rig, done, "eval_metrics")[0] == {
        "step": 2,
        "epoch": 1,
        "valid_loss": 2.0,
        "valid_mean_token_accuracy": 0.5,
        "full_valid_loss": 2.0,
        "full_valid_mean_token_accuracy": 0.5,
        "rows": 2,
        "target_tokens": 2,
        "attempt": 1,
    }
    assert done.evaluation == data(rig, done, "eval_metrics")[-1]
    assert (done.best_step, done.best_valid_loss) == (8, 0.5)
    seen = {rows for job, _, rows in rig.scheduler.evaluated if job == done.id}
    assert len(seen) == 1 and not seen.pop() & rig.scheduler.trained[done.id]
    assert done.trained_tokens < 2 * done.data["tokens"]
    assert data(rig, done, "step_metrics")[0]["train_mean_token_accuracy"] == 0.25


def test_patience_ends_a_job_as_succeeded_and_says_why(rig):
    rig.scheduler.valid_losses = {2: 1.0, 4: 0.99, 6: 1.5}
    patience = {"early_stopping_patience": 2, "early_stopping_min_delta": 0.1}
    done = rig.done(rig.client.submit(pairs(10), validation_split=0.2, **HP, **patience))
    assert (done.step, done.total_steps) == (6, 8)
    assert done.reason == (
        "stopped early at step 6 of 8: valid_loss has not improved in 2 evaluations (the best is 0.9900 at step 4)"
    )
    [stopped] = data(rig, done, "early_stopped")
    assert stopped == {"step": 6, "total_steps": 8, "best_step": 4, "best_valid_loss": 0.99}
    assert np.array_equal(rig.result(done), state_of(rig, done, 6))
    shown = list(view.job_lines(done))
    best = "valid_loss 1.5000, token accuracy 0.5000 at step 6; the best is 0.9900 at step 4"
    assert f"{'evaluation:':<18}{best}" in shown and f"{'validation:':<18}2 rows of the data" in shown
    assert any(line.startswith("status:") and "(stopped early at step 6 of 8" in line for line in shown)
    rig.scheduler.valid_losses = {8: 0.1}
    going_on = rig.done(rig.client.submit(resume_from=done.id, early_stopping_patience=3))
    assert (going_on.step, going_on.best_step) == (8, 8)
    assert [e["step"] for e in data(rig, going_on, "eval_metrics")] == [8]


def test_the_best_checkpoint_is_kept_and_published(rig):
    rig.scheduler.valid_losses = {2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6}
    rig.scheduler.step_s = 0.3  # each step finds the slot free
    hp = HP | {"checkpoint_every": 1, "publish_best": True}
    done = rig.done(rig.client.submit(pairs(10), validation_split=0.2, **hp))
    folder = rig.folder(done) / "checkpoints"

    def kept(steps: list[int]) -> bool:
        return len(steps) == 3 and steps[0] == 4 and steps[2] == 8

    until(lambda: kept(checkpoints.steps(folder)), "the older ones to go")
    assert (done.best_step, done.best_valid_loss) == (4, 0.5)
    assert np.array_equal(rig.result(done), state_of(rig, done, 4))
    assert not np.array_equal(rig.result(done), state_of(rig, done, 8))
    assert data(rig, done, "adapter_saved")[0]["step"] == 4

    until(lambda: kept([c.step for c in record(rig, done).checkpoints]), "the record of it")
    best, _, last = record(rig, done).checkpoints
    assert (best.train_loss, best.valid_loss, best.full_valid_loss) == (1.0, 0.5, 0.5)
    assert (best.train_mean_token_accuracy, best.valid_mean_token_accuracy) == (0.25, 0.5)
    assert (last.train_loss, last.valid_loss) == (0.5, 0.6)
    paths = JobPaths(rig.run_dir, done.id)
    assert listing.with_metrics(record(rig, done), paths) == list(reversed(record(rig, done).checkpoints))
    before = msgspec.structs.replace(record(rig, done), checkpoints=[])  # as a version before left it
    assert [c.step for c in listing.with_metrics(before, paths)][::2] == [8, 4]
    rig.scheduler.valid_losses = {10: 0.9, 12: 0.9}
    more = rig.done(rig.client.submit(resume_from=done.id, n_epochs=3))  # which has it along
    assert more.best_step == 4 and np.array_equal(rig.result(more), state_of(rig, done, 4))
    other = rig.client.submit(pairs(4), resume_from=done.id)  # which begins with the model's adapter
    assert np.array_equal(state_of(rig, other, 0), state_of(rig, done, 4))
    rig.client.cancel(other.id)


def test_a_damaged_best_checkpoint_makes_way_for_the_next(rig):
    rig.scheduler.valid_losses = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.4}
    rig.http.refuse = 3
    rig.scheduler.step_s = 0.3  # each step finds the slot free
    hp = HP | {"publish_best": True, "checkpoint_every": 2}
    old = rig.done(rig.client.submit(pairs(10), validation_split=0.2, **hp), "failed")
    rig.http.refuse = 0
    folder = rig.folder(old) / "checkpoints"
    until(lambda: checkpoints.steps(folder) == [2, 6, 8], "the older ones to go")
    again = rig.client.submit(resume_from=old.id)
    done = rig.done(again)
    assert np.array_equal(rig.result(done), state_of(rig, old, 2))
    (folder / "step-2" / "meta.json").unlink()
    done = rig.done(rig.client.submit(resume_from=old.id))
    assert done.best_step is None  # it was not there to be taken over
    assert np.array_equal(rig.result(done), state_of(rig, old, 8))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_a_validation_file_comes_with_the_submit_and_goes_along(rig, tmp_path):
    file = write(tmp_path / "held.jsonl", pairs(13)[10:])
    done = rig.done(rig.client.submit(pairs(10), validation=file, idempotency_key="v", **HP))
    about = done.data["validation"]
    assert (about["file"], about["rows"], done.data["rows"]) == ("held.jsonl", 3, 10)
    assert about["bytes"] == (tmp_path / "held.jsonl").stat().st_size
    kept = rig.folder(done) / "data" / "validation.jsonl"
    assert kept.read_bytes() == (tmp_path / "held.jsonl").read_bytes()
    assert done.total_steps == 10 and done.evaluation["step"] == 10 and done.evaluation["rows"] == 3
    text = next(e.message for e in rig.client.events(done.id) if e.type == "data_validated")
    assert "evaluated: held.jsonl, 3 rows" in text
    again = rig.client.submit(pairs(10), validation=file, idempotency_key="v", **HP)
    assert again.id == done.id
    for other in (pairs(12)[10:], None):
        with pytest.raises(ConfigError, match="this submit has other validation data"):
            rig.client.submit(pairs(10), validation=other, idempotency_key="v", **HP)
    with pytest.raises(ConfigError, match="keeps its validation data: give data too"):
        rig.client.submit(resume_from=done.id, validation=file)
    more = rig.done(rig.client.submit(resume_from=done.id, n_epochs=3))
    assert [e["step"] for e in data(rig, more, "eval_metrics")] == [12, 14, 15]
    assert not list(rig.run_dir.glob(".up*")) and not list(rig.run_dir.glob(".incoming*"))


def test_bad_lines_of_a_validation_file_name_it(rig, tmp_path):
    file = write(tmp_path / "held.jsonl", [*pairs(1), {"messages": []}])
    with pytest.raises(DataError, match=r"held.jsonl: 1 of 2 lines not accepted: line 2: ") as caught:
        rig.client.submit(pairs(4), validation=file)
    assert caught.value.param == "validation" and caught.value.details[0]["line"] == 2
    with pytest.raises(DataError, match=r"rows.jsonl: it holds no line of data"):
        rig.client.submit(pairs(4), validation=[])
    assert not list(rig.run_dir.glob(".up*")) and not list(rig.run_dir.glob(".incoming*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"validation_size": 5}, "the submit names it in validation_upload"),
        ({"validation_upload": "0" * 32}, "needs validation_size and validation_sha256"),
    ],
)
def test_words_on_a_validation_file_fit_together(rig, changes, says):
    with pytest.raises(ConfigError, match=says):
        exchange(rig, "submit", submit_args(b"{}") | changes, b"{}")


def test_an_upload_that_is_not_there_is_asked_for_again(rig):
    words = {"validation_upload": "0" * 32, "validation_size": 3, "validation_sha256": "0" * 64}
    with pytest.raises(ConfigError) as caught:
        exchange(rig, "submit", submit_args(b"{}") | words, b"{}")
    assert caught.value.code == "upload_unknown"


def test_a_killed_service_neither_loses_nor_doubles_an_evaluation(own):
    rig = own()
    rig.scheduler.step_s = 0.02
    job = rig.client.submit(pairs(10), validation_split=0.2, **(HP | {"eval_steps": 1, "n_epochs": 4}))
    rig.at_step(job, 5)
    rig.restart()
    done = rig.done(job)
    assert [e["step"] for e in data(rig, done, "eval_metrics")] == list(range(1, 17))
    assert [e.id for e in rig.client.events(done.id)] == list(
        range(1, len(list(rig.client.events(job.id))) + 1)
    )


@pytest.mark.parametrize(
    ("hp", "file", "says"),
    [
        ({"early_stopping_patience": 3}, False, "early_stopping_patience=3 is not accepted: nothing is evaluated"),
        ({"eval_steps": 5}, False, "eval_steps=5 is not accepted: nothing is evaluated: give validation data"),
        ({"eval_rows": 5}, False, "eval_rows=5 is not accepted"),
        ({"publish_best": True}, False, "publish_best=true is not accepted: the best checkpoint is not known"),
        ({"validation_split": 0.1}, True, "validation_split=0.1 is not accepted: the job has a validation file"),
        ({"early_stopping_min_delta": 0.1}, True, "it counts with early_stopping_patience"),
        ({"early_stopping_patience": 1, "eval_steps": 0}, True, "needs evaluations before the last step"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(hp, file, says):
    with pytest.raises(ConfigError, match=says):
        evaluation.check(Hyperparameters(**hp), file=file)


def test_what_fits_together_is_accepted():
    for hp, file in (({}, False), ({"eval_steps": 0}, False), ({"publish_best": True}, True)):
        evaluation.check(Hyperparameters(**hp), file=file)
    evaluation.check(Hyperparameters(validation_split=0.5, early_stopping_patience=1), file=False)
