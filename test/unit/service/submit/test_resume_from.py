"""``resume_from``: a job that is over goes on as a new one, or lends its adapter to other data."""

from __future__ import annotations

import shutil

import msgspec
import numpy as np
import pytest

from sglang_harli.errors import ConfigError, HarliError, NotFoundError, StateError
from sglang_harli.service.checkpoint import checkpoints
from support.service.service_fixture import pairs, until

HP = {"n_epochs": 3, "seed": 7, "checkpoint_every": 4, "gradient_accumulation_steps": 2}  # 9 steps


@pytest.fixture(scope="module")
def whole(shared):
    """The result of the uninterrupted run."""
    return shared.result(shared.done(shared.client.submit(pairs(), **HP)))


def _saved(rig, job) -> int:
    return sum(event.type == "checkpoint_saved" for event in rig.client.events(job.id))


def failed_at(rig, step: int, **changes):
    """A job that failed at ``step``, every checkpoint before that written and told."""
    hp = HP | changes
    peer = rig.scheduler
    peer.fail_at, peer.hold_at = step, 0
    job = rig.client.submit(pairs(), **hp)
    until(lambda: peer.spec is not None and peer.spec.job == job.id and peer._slot_free, "the slot")
    for number, last in enumerate(range(hp["checkpoint_every"], step, hp["checkpoint_every"]), start=1):
        peer.hold_at = last
        until(lambda number=number: _saved(rig, job) == number and peer._slot_free, "the checkpoint")
    peer.hold_at = None
    job = rig.done(job, "failed")
    peer.fail_at = None
    return job


def test_a_failed_job_goes_on_and_ends_as_an_uninterrupted_one(rig, whole):
    old = failed_at(rig, 7)
    job = rig.client.submit(resume_from=old.id, suffix="again")
    assert (job.resumed_from, job.step, job.total_steps) == (old.id, 4, 9)
    assert job.hyperparameters == old.hyperparameters and job.data == old.data
    shutil.rmtree(rig.folder(old))  # either may be deleted
    done = rig.done(job)
    assert np.array_equal(rig.result(done), whole)
    assert done.trained_tokens == 3 * done.data["tokens"]
    events = list(rig.client.events(job.id))
    assert events[0].message.endswith(f"goes on from step 4 of job {old.id}")
    assert [e.data["step"] for e in events if e.type == "step_metrics"] == [5, 6, 7, 8, 9]
    assert rig.client.get(old.id).status == "failed"


def test_a_cancelled_job_can_go_on(rig, whole):
    rig.scheduler.step_s = 0.03
    old = rig.client.submit(pairs(), **HP)
    until(lambda: any(e.type == "checkpoint_saved" for e in rig.client.events(old.id)), "a checkpoint")
    rig.client.cancel(old.id)
    rig.scheduler.step_s = 0.0
    done = rig.done(rig.client.submit(resume_from=old.id))
    assert np.array_equal(rig.result(done), whole)


def test_a_finished_job_with_more_epochs_goes_on_with_the_next(rig, whole):
    first = rig.done(rig.client.submit(pairs(), **(HP | {"n_epochs": 2})))
    with pytest.raises(ConfigError, match=r"all of its 6 steps: raise n_epochs \(now 2\), or give --data"):
        rig.client.submit(resume_from=first.id)
    with pytest.raises(ConfigError, match=r"n_epochs=1 makes 3 steps.*has already done 6"):
        rig.client.submit(resume_from=first.id, n_epochs=1)
    job = rig.client.submit(resume_from=first.id, n_epochs=3, learning_rate=1e-4, priority=3)
    assert (job.step, job.total_steps, job.hyperparameters.learning_rate, job.priority) == (6, 9, 1e-4, 3)
    done = rig.done(job)
    assert np.array_equal(rig.result(done), whole)  # the arithmetic knows no learning rate
    epochs = {e.data["epoch"] for e in rig.client.events(job.id) if e.type == "step_metrics"}
    assert epochs == {3}


def test_what_may_not_change_is_listed(rig):
    old = failed_at(rig, 7)
    with pytest.raises(
        ConfigError, match=r"batch_size=4, seed=7, and cannot go on with batch_size=2, seed=8"
    ) as e:
        rig.client.submit(resume_from=old.id, batch_size=2, seed=8, n_epochs=4)
    assert "n_epochs, learning_rate" in e.value.message and e.value.param == "batch_size"
    with pytest.raises(ConfigError, match=r"lora_r=16.*lora_r=8: an adapter keeps its shape"):
        rig.client.submit(pairs(4), resume_from=old.id, lora_r=8)


def test_who_cannot_be_continued(rig):
    with pytest.raises(NotFoundError):
        rig.client.submit(resume_from="ftjob-x")
    rig.scheduler.hold.clear()
    queued = rig.client.submit(pairs(4))
    with pytest.raises(StateError, match="only a job that is over can be continued"):
        rig.client.submit(resume_from=queued.id)
    rig.client.cancel(queued.id)
    with pytest.raises(HarliError, match="it ended at step 0, before its first one") as caught:
        rig.client.submit(resume_from=queued.id)
    assert caught.value.code == "bad_checkpoint"
    before = len(rig.client.list(limit=1000))
    assert not [p for p in rig.run_dir.iterdir() if p.name.startswith(".incoming")]
    assert len(rig.client.list(limit=1000)) == before


def test_a_damaged_checkpoint_is_passed_over_and_told(rig, whole):
    old = failed_at(rig, 9, checkpoint_every=2)
    folder = rig.folder(old) / "checkpoints"
    before, last = checkpoints.steps(folder)
    newest = folder / f"step-{last}" / "run.msgpack"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    job = rig.client.submit(resume_from=old.id)
    assert (last, job.step) == (8, before)
    assert any("was altered" in e.message for e in rig.client.events(job.id) if e.type == "warning")
    assert np.array_equal(rig.result(rig.done(job)), whole)
    (folder / f"step-{before}" / "meta.json").unlink()
    with pytest.raises(HarliError, match=rf"no checkpoint to go on from.*step-8.*step-{before}"):
        rig.client.submit(resume_from=old.id)


def test_data_that_are_gone_are_named(rig):
    old = failed_at(rig, 7)
    (rig.folder(old) / "data" / "ids.npy").unlink()
    with pytest.raises(
        HarliError, match=r"the data of job .* cannot be read.*ids.npy.*give --data"
    ) as caught:
        rig.client.submit(resume_from=old.id)
    assert caught.value.code == "bad_data_files"


def test_a_job_that_failed_in_publication_is_published_without_training(rig):
    rig.http.refuse = 3
    old = rig.done(rig.client.submit(pairs(4)), "failed")
    assert old.error.code == "publication_failed"
    rig.http.refuse = 0
    fed = len(rig.scheduler.fed)
    done = rig.done(rig.client.submit(resume_from=old.id))
    assert done.step == done.total_steps == old.total_steps
    assert len(rig.scheduler.fed) == fed
    assert done.fine_tuned_model in rig.http.published


def test_other_data_begin_a_new_course_with_the_adapter(rig):
    old = rig.done(rig.client.submit(pairs(), **HP))
    job = rig.client.submit(pairs(8), resume_from=old.id, seed=3, n_epochs=1)
    assert (job.step, job.hyperparameters.seed, job.data["rows"]) == (0, 3, 8)
    folder = rig.folder(job) / "checkpoints"
    done = rig.done(job)
    start = rig.scheduler.starts[-1]
    assert start.step == 0 and start.restore is not None
    assert start.meta == {"version": 1, "step": 0, "epoch": 1, "tokens": 0, "seed": 3, "adam_steps": 0}
    assert done.trained_tokens == done.data["tokens"]
    assert rig.client.get(job.id).resumed_from == old.id
    assert checkpoints.steps(folder)[0] == 0  # where it began stays
    other = rig.done(rig.client.submit(pairs(8), seed=3, n_epochs=1, gradient_accumulation_steps=2))
    assert not np.array_equal(rig.result(done), rig.result(other))
    events = [e.message for e in rig.client.events(job.id)]
    assert events[0].endswith(f"goes on with the adapter of job {old.id}")


def test_the_first_checkpoint_of_a_new_course_holds_the_adapter_and_no_moments(rig):
    old = rig.done(rig.client.submit(pairs(4)))
    rig.scheduler.hold.clear()
    job = rig.client.submit(pairs(8), resume_from=old.id)
    from safetensors.numpy import load_file

    began = load_file(rig.folder(job) / "checkpoints" / "step-0" / "state.safetensors")
    ended = load_file(rig.folder(old) / "checkpoints" / f"step-{old.step}" / "state.safetensors")
    assert began.keys() == ended.keys()
    for name, tensor in began.items():
        assert np.array_equal(tensor, ended[name]) if name.startswith("adapter/") else not tensor.any()
    assert checkpoints.check_state(rig.folder(job) / "checkpoints", 0)["trained_tokens"] == 0


def test_the_same_key_continues_once(rig):
    old = failed_at(rig, 7)
    first = rig.client.submit(resume_from=old.id, idempotency_key="go on")
    assert rig.client.submit(resume_from=old.id, idempotency_key="go on").id == first.id
    with pytest.raises(ConfigError, match="idempotency_key"):
        rig.client.submit(pairs(4), idempotency_key="go on")


def test_so_many_checkpoints_stay_also_after_the_end(own):
    rig = own(keep_checkpoints=3)
    job = rig.client.submit(pairs(), n_epochs=2, checkpoint_every=1)
    done = rig.done(job)
    kept = checkpoints.steps(rig.folder(job) / "checkpoints")
    until(lambda: len(checkpoints.steps(rig.folder(job) / "checkpoints")) <= 3, "the pruning")
    assert kept[-1] == done.total_steps
    assert msgspec.json.decode((rig.folder(job) / "job.json").read_bytes())["status"] == "succeeded"
