"""The real finetune service killed, restarted and hindered: nothing acknowledged is lost, runs end
the same."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from support.service.service_fixture import pairs, until

pytestmark = pytest.mark.long


# ------------------------------------------------------------------ crashes
def test_a_killed_service_adopts_the_run_in_progress(own):
    rig = own()
    whole = rig.result(rig.done(rig.client.submit(pairs(), n_epochs=4, seed=3)))
    rig.scheduler.step_s = 0.1
    job = rig.client.submit(pairs(), n_epochs=4, seed=3, checkpoint_every=4)
    rig.at_step(job, 6)
    rig.restart()
    done = rig.done(job)
    assert done.attempt == 1
    assert np.array_equal(rig.result(done), whole)
    fed = [f for f in rig.scheduler.fed if f[0] == job.id]
    assert len(fed) == len(set(fed)) == done.total_steps
    steps = [e.data["step"] for e in rig.client.events(job.id) if e.type == "step_metrics"]
    assert steps == list(range(1, 21))
    assert any("goes on at step" in e.message for e in rig.client.events(job.id))


def test_what_was_asked_in_between_is_told_to_the_run_in_progress(own):
    rig = own()
    rig.scheduler.step_s = 0.05
    job = rig.client.submit(pairs(), n_epochs=20)
    rig.at_step(job, 4)
    rig.restart()
    paused = rig.client.pause(job.id)  # before the scheduler has said hello
    until(lambda: rig.scheduler.spec is None, "the end of the run")
    assert paused.status in ("paused", "running")
    assert rig.status(job, "paused").step >= 4


def test_a_restarted_server_goes_on_from_the_last_checkpoint(own):
    rig = own()
    whole = rig.result(rig.done(rig.client.submit(pairs(), n_epochs=4, seed=3)))
    rig.scheduler.step_s = 0.05
    job = rig.client.submit(pairs(), n_epochs=4, seed=3, checkpoint_every=4)
    until((rig.folder(job) / "checkpoints" / "step-4").is_dir, "a checkpoint")
    rig.at_step(job, 6)
    rig.service.kill()
    rig.scheduler.restart()
    rig.service.start()
    done = rig.done(job)
    assert done.attempt == 2
    assert [s.step for s in rig.scheduler.starts if s.spec.job == job.id] == [0, 4]
    assert np.array_equal(rig.result(done), whole)
    assert done.trained_tokens == 4 * done.data["tokens"]


def test_a_half_done_publication_is_finished_and_adapters_are_known_again(own):
    rig = own(peers=False)
    rig.join_scheduler()
    job = rig.client.submit(pairs(4))
    until(lambda: rig.client.get(job.id).sub_state == "publishing", "the end of training")
    assert rig.client.get(job.id).status == "running"
    rig.restart()
    rig.join_http()
    done = rig.done(job)
    assert done.step == done.total_steps
    rig.restart()
    state = until(
        lambda: s if (s := rig.http.states[-1]).pid == rig.service.process.pid else None, "the state"
    )
    assert state.adapters == [done.fine_tuned_model]
    assert state.endpoint_bound
    until(lambda: rig.http.states[-1].scheduler_seen, "the scheduler's hello")


def test_a_checkpoint_that_was_altered_is_passed_over(own):
    rig = own()
    rig.scheduler.step_s = 0.05
    job = rig.client.submit(pairs(), n_epochs=4, checkpoint_every=2)
    rig.at_step(job, 7)
    paused = rig.client.pause(job.id)
    newest = rig.folder(job) / "checkpoints" / f"step-{paused.step}" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    rig.client.resume(job.id)
    done = rig.done(job)
    assert any("cannot be used" in e.message for e in rig.client.events(job.id))
    assert done.step == done.total_steps


def test_a_damaged_last_checkpoint_is_trained_again_and_published(own):
    rig = own(peers=False)
    rig.join_scheduler()
    job = rig.client.submit(pairs(), n_epochs=1, checkpoint_every=2)
    # Its event comes from the store: from then on the checkpoint counts, and the scheduler's state
    # is not read again.
    until(
        lambda: [
            e for e in rig.client.events(job.id) if e.type == "checkpoint_saved" and e.data["step"] == 5
        ],
        "the last checkpoint",
    )
    rig.service.kill()
    newest = rig.folder(job) / "checkpoints" / "step-5"
    (newest / "run.msgpack").write_bytes(b"")
    # Usually step 4's is there; where one fell due as its slot was still being written, it was left
    # out.
    earlier = [int(found.name.removeprefix("step-")) for found in newest.parent.glob("step-[0-4]")]
    before = f"the checkpoint of step {max(earlier)}" if earlier else "the beginning"
    shutil.rmtree(rig.folder(job) / "adapter", ignore_errors=True)  # it may have been saved from it before
    rig.service.start()
    rig.join_http()
    done = rig.done(job)
    assert done.attempt == 2 and (newest / "run.msgpack").stat().st_size > 0
    told = [e.message for e in rig.client.events(job.id) if e.level == "warn"]
    assert any("trained again" in text for text in told)
    assert any(f"goes on from {before}" in text for text in told)
    whole = rig.result(rig.done(rig.client.submit(pairs(), n_epochs=1)))
    assert np.array_equal(rig.result(done), whole)


@pytest.mark.parametrize("name", ["ids.npy", "targets.npy"])
def test_data_that_is_cut_off_fails_its_job_and_the_next_one_goes_on(own, name):
    rig = own()
    rig.scheduler.step_s = 0.05
    job = rig.client.submit(pairs(), n_epochs=20)
    rig.at_step(job, 3)
    path = rig.folder(job) / "data" / name
    os.truncate(path, path.stat().st_size // 4)
    failed = rig.done(job, "failed")
    assert failed.error.code == "bad_data_files" and name in failed.error.message
    until(lambda: rig.scheduler.spec is None, "the end of the run")
    rig.scheduler.step_s = 0.0
    rig.done(rig.client.submit(pairs(4)))


def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again(rig):
    rig.scheduler.hold.clear()
    job = rig.client.submit(pairs(4), n_epochs=1)
    blocker = rig.folder(job) / "checkpoints"
    blocker.write_text("in the way")
    rig.scheduler.hold.set()
    warned = until(lambda: [e for e in rig.client.events(job.id) if e.type == "warning"], "the warning")
    assert "checkpoint of step 1 cannot be written" in warned[0].message
    assert rig.client.get(job.id).status == "running"
    blocker.unlink()
    rig.done(job)


def test_a_graceful_end(own):
    rig = own()
    rig.done(rig.client.submit(pairs(4)))
    assert rig.service.terminate() == 0
    assert "Traceback" not in rig.service.log.read_text()
