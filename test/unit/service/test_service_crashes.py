"""The real finetune service killed, restarted and hindered: nothing acknowledged is lost, runs end the same."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from support.service.service_fixture import pairs, until

pytestmark = pytest.mark.long


# ------------------------------------------------------------------ crashes
def test_a_killed_service_adopts_the_run_in_progress(own):
    world = own()
    whole = world.result(world.done(world.client.submit(pairs(), n_epochs=4, seed=3)))
    world.scheduler.step_s = 0.1
    job = world.client.submit(pairs(), n_epochs=4, seed=3, checkpoint_every=4)
    world.at_step(job, 6)
    world.restart()
    done = world.done(job)
    assert done.attempt == 1
    assert np.array_equal(world.result(done), whole)
    fed = [f for f in world.scheduler.fed if f[0] == job.id]
    assert len(fed) == len(set(fed)) == done.total_steps
    steps = [e.data["step"] for e in world.client.events(job.id) if e.type == "step_metrics"]
    assert steps == list(range(1, 21))
    assert any("goes on at step" in e.message for e in world.client.events(job.id))


def test_what_was_asked_in_between_is_told_to_the_run_in_progress(own):
    world = own()
    world.scheduler.step_s = 0.05
    job = world.client.submit(pairs(), n_epochs=20)
    world.at_step(job, 4)
    world.restart()
    paused = world.client.pause(job.id)  # before the scheduler has said hello
    until(lambda: world.scheduler.spec is None, "the end of the run")
    assert paused.status in ("paused", "running")
    assert world.status(job, "paused").step >= 4


def test_a_restarted_server_goes_on_from_the_last_checkpoint(own):
    world = own()
    whole = world.result(world.done(world.client.submit(pairs(), n_epochs=4, seed=3)))
    world.scheduler.step_s = 0.05
    job = world.client.submit(pairs(), n_epochs=4, seed=3, checkpoint_every=4)
    until((world.folder(job) / "checkpoints" / "step-4").is_dir, "a checkpoint")
    world.at_step(job, 6)
    world.service.kill()
    world.scheduler.restart()
    world.service.start()
    done = world.done(job)
    assert done.attempt == 2
    assert [s.step for s in world.scheduler.starts if s.spec.job == job.id] == [0, 4]
    assert np.array_equal(world.result(done), whole)
    assert done.trained_tokens == 4 * done.data["tokens"]


def test_a_half_done_publication_is_finished_and_adapters_are_known_again(own):
    world = own(peers=False)
    world.join_scheduler()
    job = world.client.submit(pairs(4))
    until(lambda: world.client.get(job.id).sub_state == "publishing", "the end of training")
    assert world.client.get(job.id).status == "running"
    world.restart()
    world.join_http()
    done = world.done(job)
    assert done.step == done.total_steps
    world.restart()
    state = until(
        lambda: s if (s := world.http.states[-1]).pid == world.service.process.pid else None, "the state"
    )
    assert state.adapters == [done.fine_tuned_model]
    assert state.endpoint_bound
    until(lambda: world.http.states[-1].scheduler_seen, "the scheduler's hello")


def test_a_checkpoint_that_was_altered_is_passed_over(own):
    world = own()
    world.scheduler.step_s = 0.05
    job = world.client.submit(pairs(), n_epochs=4, checkpoint_every=2)
    world.at_step(job, 7)
    paused = world.client.pause(job.id)
    newest = world.folder(job) / "checkpoints" / f"step-{paused.step}" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    world.client.resume(job.id)
    done = world.done(job)
    assert any("cannot be used" in e.message for e in world.client.events(job.id))
    assert done.step == done.total_steps


def test_a_damaged_last_checkpoint_is_trained_again_and_published(own):
    world = own(peers=False)
    world.join_scheduler()
    job = world.client.submit(pairs(), n_epochs=1, checkpoint_every=2)
    # Its event comes from the store: from then on the checkpoint counts, and the scheduler's state is not read again.
    until(
        lambda: [
            e for e in world.client.events(job.id) if e.type == "checkpoint_saved" and e.data["step"] == 5
        ],
        "the last checkpoint",
    )
    world.service.kill()
    newest = world.folder(job) / "checkpoints" / "step-5"
    (newest / "run.msgpack").write_bytes(b"")
    # Usually step 4's is there; where one fell due as its slot was still being written, it was left out.
    earlier = [int(found.name.removeprefix("step-")) for found in newest.parent.glob("step-[0-4]")]
    before = f"the checkpoint of step {max(earlier)}" if earlier else "the beginning"
    shutil.rmtree(world.folder(job) / "adapter", ignore_errors=True)  # it may have been saved from it before
    world.service.start()
    world.join_http()
    done = world.done(job)
    assert done.attempt == 2 and (newest / "run.msgpack").stat().st_size > 0
    told = [e.message for e in world.client.events(job.id) if e.level == "warn"]
    assert any("trained again" in text for text in told)
    assert any(f"goes on from {before}" in text for text in told)
    whole = world.result(world.done(world.client.submit(pairs(), n_epochs=1)))
    assert np.array_equal(world.result(done), whole)


@pytest.mark.parametrize("name", ["ids.npy", "targets.npy"])
def test_data_that_is_cut_off_fails_its_job_and_the_next_one_goes_on(own, name):
    world = own()
    world.scheduler.step_s = 0.05
    job = world.client.submit(pairs(), n_epochs=20)
    world.at_step(job, 3)
    path = world.folder(job) / "data" / name
    os.truncate(path, path.stat().st_size // 4)
    failed = world.done(job, "failed")
    assert failed.error.code == "bad_data_files" and name in failed.error.message
    until(lambda: world.scheduler.spec is None, "the end of the run")
    world.scheduler.step_s = 0.0
    world.done(world.client.submit(pairs(4)))


def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again(world):
    world.scheduler.hold.clear()
    job = world.client.submit(pairs(4), n_epochs=1)
    blocker = world.folder(job) / "checkpoints"
    blocker.write_text("in the way")
    world.scheduler.hold.set()
    warned = until(lambda: [e for e in world.client.events(job.id) if e.type == "warning"], "the warning")
    assert "checkpoint of step 1 cannot be written" in warned[0].message
    assert world.client.get(job.id).status == "running"
    blocker.unlink()
    world.done(job)


def test_a_graceful_end(own):
    world = own()
    world.done(world.client.submit(pairs(4)))
    assert world.service.terminate() == 0
    assert "Traceback" not in world.service.log.read_text()
