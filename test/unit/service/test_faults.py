"""Every write of the service refused, a locked store, files that vanish: an error that says so or a
recovery, and what was acknowledged is never lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harli import run_paths
from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.errors import HarliError, NotReadyError
from sglang_harli.failpoints import FAULT_POINTS_ENV, ReadFailpoint, WriteFailpoint
from support.service.service_fixture import ServiceUnderTest, pairs, until

pytestmark = pytest.mark.long

FOR_GOOD = 1_000_000


class Faults:
    """The folder of armed points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arm(self, write: WriteFailpoint | ReadFailpoint, kind: str = "ENOSPC", times: int = FOR_GOOD) -> None:
        temporary = self.folder / ".armed"
        temporary.write_text(f"error {kind} {times}")
        os.replace(temporary, self.folder / write)

    def armed(self, write: WriteFailpoint) -> bool:
        return (self.folder / write).exists()

    def clear(self) -> None:
        for write in (*WriteFailpoint, *ReadFailpoint):
            (self.folder / write).unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def points(tmp_path_factory) -> Iterator[Faults]:
    """In force for every service that this file starts."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT_POINTS_ENV, str(folder))
        yield Faults(folder)


@pytest.fixture(scope="module")
def shared(points, tmp_path_factory, model) -> Iterator[ServiceUnderTest]:
    rig = ServiceUnderTest(tmp_path_factory.mktemp("shared"), model)
    yield rig
    rig.close()


@pytest.fixture
def faults(points) -> Iterator[Faults]:
    """Asked for behind the rig, so that nothing is armed when that is tidied up."""
    yield points
    points.clear()


def events_of(rig: ServiceUnderTest, job, kind: str) -> list[str]:
    return [e.message for e in rig.client.events(job.id) if e.type == kind]


class Background:
    """A call in a thread of its own; ``result`` waits for it."""

    def __init__(self, call) -> None:
        self._found: list = []
        self._thread = threading.Thread(target=lambda: self._found.append(call()))
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self):
        self._thread.join(60)
        [found] = self._found
        return found


# ------------------------------------------------------------------ submit
@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("write", [WriteFailpoint.DATA, WriteFailpoint.TOKENS, WriteFailpoint.SETTLE])
def test_data_that_cannot_be_stored_are_a_refusal_that_leaves_nothing(rig, faults, write, kind):
    before = sorted(p.name for p in rig.run_dir.iterdir())
    faults.arm(write, kind, 2)
    for _ in range(2):
        with pytest.raises(HarliError, match=r"the data cannot be stored in .*: make room") as caught:
            rig.client.submit(pairs(4))
        assert caught.value.code == "storage" and str(rig.run_dir) in caught.value.message
    assert sorted(p.name for p in rig.run_dir.iterdir()) == before
    rig.done(rig.client.submit(pairs(4)))


# ------------------------------------------------------------------ the store
@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS"])
def test_a_store_that_cannot_be_written_holds_acknowledgements_back(own, faults, kind):
    rig = own(peers=False)  # nobody else writes
    queued = rig.client.submit(pairs(4))
    faults.arm(WriteFailpoint.STORE, kind)
    submit = Background(lambda: rig.client.submit(pairs(5), idempotency_key=f"held {kind}"))
    until(lambda: rig.client.list(limit=1)[0].id != queued.id, "the job in memory")
    change = Background(lambda: rig.client.prioritize(queued.id, 4))
    shown = until(lambda: s if (s := rig.client.status().service["store"]) != "ok" else None, "what is wrong")
    assert shown.startswith("the job store cannot be written:")
    with pytest.raises(NotReadyError, match="the job store cannot be written"):
        rig.client.submit(pairs(6))
    assert list(rig.client.events(queued.id))  # reading goes on
    assert not submit.done and not change.done
    faults.clear()
    assert submit.result().status == "queued" and change.result().priority == 4
    assert rig.client.status().service["store"] == "ok"


def test_a_job_that_was_not_acknowledged_is_made_once_by_the_retry(own, faults):
    rig = own(peers=False)
    assert rig.client.list() == []
    faults.arm(WriteFailpoint.STORE)
    submit = Background(lambda: rig.client.submit(pairs(4), idempotency_key="cut off"))
    until(lambda: rig.client.status().service["store"] != "ok", "what is wrong")
    with FinetuneClient(
        rig.service.endpoint
    ) as other:  # its job is known, and not on the disk: no answer yet
        again = Background(lambda: other.submit(pairs(4), idempotency_key="cut off"))
        assert not submit.done and not again.done
        rig.service.kill()
        faults.clear()
        rig.service.start()
        assert submit.result().id == again.result().id
    assert len(rig.client.list()) == 1


def test_the_run_goes_on_while_the_store_is_away_for_a_moment(rig, faults):
    rig.scheduler.step_s = 0.02
    job = rig.client.submit(pairs(), n_epochs=3, checkpoint_every=4)
    rig.at_step(job, 2)
    faults.arm(WriteFailpoint.STORE, times=2)
    done = rig.done(job)
    events = list(rig.client.events(job.id))
    assert [e.id for e in events] == list(range(1, len(events) + 1))
    steps = [e.data["step"] for e in events if e.type == "step_metrics"]
    assert steps == list(range(1, done.total_steps + 1))


def test_a_store_locked_by_another_process_is_waited_for(rig):
    rig.scheduler.hold.clear()
    job = rig.client.submit(pairs(4))
    other = sqlite3.connect(rig.run_dir / "harli.db", isolation_level=None)
    other.execute("PRAGMA busy_timeout=5000")
    other.execute("BEGIN EXCLUSIVE")
    try:
        change = Background(lambda: rig.client.prioritize(job.id, 7))
        waited = until(
            lambda: s if (s := rig.client.status().service["store"]) != "ok" else None, "what is wrong"
        )
        assert waited == "the job store cannot be written: database is locked"
        assert rig.client.get(job.id).id == job.id
        assert not change.done
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert change.result().priority == 7
    with sqlite3.connect(rig.run_dir / "harli.db") as reader:
        [[body]] = reader.execute("SELECT body FROM jobs WHERE id = ?", (job.id,))
    assert json.loads(body)["priority"] == 7


def test_a_store_that_another_process_keeps_is_a_clear_end_and_the_next_start_works(own):
    rig = own(peers=False)
    rig.service.kill()
    other = sqlite3.connect(rig.run_dir / "harli.db", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    try:
        rig.service.start()
        assert rig.service.process.wait(60) == 1
        assert "cannot be opened: " in rig.service.log.read_text()
        assert "database is locked" in rig.service.log.read_text().splitlines()[-1]
    finally:
        other.close()
    rig.service.start()
    assert rig.client.status().service["store"] == "ok"


# ------------------------------------------------------------------ readable copies
@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS"])
def test_copies_that_fell_behind_are_completed(rig, faults, kind):
    faults.arm(WriteFailpoint.MIRROR, kind)
    done = rig.done(rig.client.submit(pairs(4)))
    folder = rig.folder(done)
    until(lambda: "cannot be written now" in rig.service.log.read_text(), "the warning")
    faults.clear()

    def agrees() -> bool:
        try:
            told = [json.loads(line)["id"] for line in (folder / "events.jsonl").read_text().splitlines()]
            shown = json.loads((folder / "job.json").read_text())
        except FileNotFoundError:
            return False
        return told == [e.id for e in rig.client.events(done.id)] and shown["status"] == "succeeded"

    until(agrees, "the whole copies")


def test_copies_are_completed_at_the_next_start(own):
    rig = own()
    done = rig.done(rig.client.submit(pairs(4)))
    folder = rig.folder(done)
    until(lambda: '"succeeded"' in (folder / "job.json").read_text(), "job.json")
    whole = (folder / "events.jsonl").read_bytes()
    rig.service.kill()
    (folder / "events.jsonl").write_bytes(whole[:-40])
    (folder / "metrics.jsonl").write_text("not ours\n")
    (folder / "job.json").unlink()
    rig.service.start()
    until(lambda: (folder / "job.json").exists(), "job.json")  # the last of the copies
    assert (folder / "events.jsonl").read_bytes() == whole
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


# ------------------------------------------------------------------ checkpoints, adapter, shared memory
@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("write", [WriteFailpoint.STATE, WriteFailpoint.META, WriteFailpoint.RENAME])
def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again(rig, faults, write, kind):
    rig.scheduler.hold_at = 0
    job = rig.client.submit(pairs(), n_epochs=1, checkpoint_every=2)
    until(lambda: rig.scheduler.spec is not None and rig.scheduler._slot_free, "the slot")
    faults.arm(write, kind, 2)
    rig.scheduler.hold_at = 2  # in passing
    until(lambda: events_of(rig, job, "checkpoint_saved"), "the checkpoint")
    warned = events_of(rig, job, "warning")
    assert len(warned) == 2 and all("checkpoint of step 2 cannot be written" in text for text in warned)
    faults.arm(write, kind, 1)
    rig.scheduler.hold_at = 3
    rig.at_step(job, 3)
    paused = Background(lambda: rig.client.pause(job.id))
    rig.status(job, "paused")
    paused.result()
    assert rig.client.get(job.id).step == 3
    rig.scheduler.hold_at = None
    faults.arm(write, kind, 1)
    rig.client.resume(job.id)
    rig.done(job)  # the last one, or the adapter's folder


def test_a_disk_that_stays_full_keeps_the_last_state_until_there_is_room(rig, faults):
    faults.arm(WriteFailpoint.STATE)
    job = rig.client.submit(pairs(), n_epochs=1, checkpoint_every=0)
    waits = until(
        lambda: j if "trying again in 4 s" in ((j := rig.client.get(job.id)).reason or "") else None, "why"
    )
    assert (waits.status, waits.sub_state, waits.step) == ("running", "checkpointing", waits.total_steps)
    assert waits.reason.startswith(f"the checkpoint of step {waits.total_steps} cannot be written (")
    assert [text[-4:] for text in events_of(rig, job, "warning")] == [" 1 s", " 2 s", " 4 s"]
    faults.clear()
    assert rig.done(job).attempt == 1


def test_a_job_cancelled_while_the_disk_is_full_does_not_keep_the_queue_waiting(rig, faults):
    faults.arm(WriteFailpoint.STATE)
    job = rig.client.submit(pairs(), n_epochs=1, checkpoint_every=0)
    until(lambda: "trying again in 4 s" in (rig.client.get(job.id).reason or ""), "a long pause")
    rig.client.cancel(job.id)
    rig.status(job, "cancelled")
    faults.clear()  # a try after the pause would be written, and none is made
    rig.done(rig.client.submit(pairs(4)))
    assert events_of(rig, job, "warning")[-1].endswith("given up")


def test_a_last_state_whose_slot_is_gone_is_trained_again(rig, faults):
    faults.arm(WriteFailpoint.STATE)
    job = rig.client.submit(pairs(), n_epochs=1, checkpoint_every=0)
    until(lambda: events_of(rig, job, "warning"), "the first try")
    for slot in run_paths.shm_dir(str(rig.run_dir)).glob("slot-*"):
        slot.unlink()
    faults.clear()
    assert rig.done(job).attempt == 2
    assert any("given up" in text for text in events_of(rig, job, "warning"))


def test_an_adapter_that_cannot_be_written_is_tried_again(rig, faults):
    faults.arm(WriteFailpoint.ADAPTER, times=1)
    rig.done(rig.client.submit(pairs(4)))
    assert not faults.armed(WriteFailpoint.ADAPTER)


@pytest.mark.parametrize("kind", ["ENOSPC", "EMFILE"])
def test_shared_memory_that_is_full_is_waited_for(rig, faults, kind):
    faults.arm(WriteFailpoint.SLOT, kind)
    jobs = [rig.client.submit(pairs(4)) for _ in range(3)]

    def reasons() -> list[str]:
        return [rig.client.get(job.id).reason or "" for job in jobs]

    until(lambda: all("; tried again after" in reason for reason in reasons()), "the reasons")
    says = "shared memory has no room" if kind == "ENOSPC" else "shared memory cannot be used"
    assert all(reason.startswith(f"{says} for the 4096 bytes of a checkpoint") for reason in reasons())
    assert {rig.client.get(job.id).status for job in jobs} <= {"queued", "running"}
    faults.clear()
    for job in jobs:
        rig.done(job)


def test_what_all_of_shared_memory_cannot_hold_is_an_error_of_the_job(rig):
    rig.scheduler.state_bytes = 1 << 50  # more than any machine has
    failed = rig.done(rig.client.submit(pairs(4)), "failed")
    assert failed.error.code == "shared_memory" and str(1 << 50) in failed.error.message
    assert "shared memory is too small" in failed.error.message
    rig.scheduler.state_bytes = 4096
    rig.done(rig.client.submit(pairs(4)))


# ------------------------------------------------------------------ what a run needs and cannot have for a while
@pytest.mark.parametrize("kind", ["EMFILE", "EIO"])
def test_a_queue_of_jobs_outlasts_a_time_in_which_nothing_can_be_read(rig, faults, kind):
    faults.arm(ReadFailpoint.DATA, kind)
    jobs = [rig.client.submit(pairs(4)) for _ in range(6)]

    def waits(job) -> bool:
        found = rig.client.get(job.id)
        return found.status == "queued" and "; tried again after" in str(found.reason)

    for job in jobs:
        until(lambda job=job: waits(job), "why it waits")
    assert {job.status for job in rig.client.list(limit=6)} <= {"queued", "running"}
    faults.clear()
    for job in jobs:
        rig.done(job)


def test_a_time_without_file_descriptors_ends_nothing(own):
    rig = own()
    rig.scheduler.hold.clear()
    jobs = [rig.client.submit(pairs(4)) for _ in range(2)]
    until(lambda: rig.scheduler.spec is not None and rig.scheduler._slot_free, "the slot")
    pid = rig.service.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))  # nothing can be opened any more
    rig.scheduler.hold.set()
    log = rig.service.log
    # A slot, the store, a checkpoint: in whatever order they want a descriptor.
    until(lambda: log.read_text().count("Too many open files") >= 2, "the warnings")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    for job in jobs:
        rig.done(job)
    assert rig.service.alive and rig.service.process.pid == pid


def test_rows_that_cannot_be_read_for_a_while_put_the_job_off_and_no_step_is_lost(rig, faults):
    rig.scheduler.hold_at = 3
    job = rig.client.submit(pairs(), n_epochs=4, checkpoint_every=0)
    rig.at_step(job, 3)
    faults.arm(ReadFailpoint.ROWS, "EIO", 2)
    rig.scheduler.hold_at = None
    done = rig.done(job)
    assert done.attempt == 3
    steps = [e.data["step"] for e in rig.client.events(job.id) if e.type == "step_metrics"]
    assert steps == list(range(1, done.total_steps + 1))
    assert len([e for e in rig.client.events(job.id) if "data cannot be read now" in e.message]) == 2


def test_a_tokenizer_that_cannot_be_loaded_is_waited_for(own, tmp_path, model):
    folder = shutil.copytree(model, tmp_path / "model")
    rig = ServiceUnderTest(tmp_path / "rig", folder, peers=False)
    try:
        jobs = [rig.client.submit(pairs(4)) for _ in range(2)]
        rig.service.kill()
        folder.rename(tmp_path / "away")
        rig.service.start()
        rig.join_scheduler()
        rig.join_http()
        for job in jobs:
            reason = until(
                lambda job=job: r if "tried again" in (r := rig.client.get(job.id).reason or "") else "",
                "why",
            )
            assert reason.startswith(f"the tokenizer of {folder} cannot be loaded")
        (tmp_path / "away").rename(folder)
        for job in jobs:
            rig.done(job)
    finally:
        rig.close()


# ------------------------------------------------------------------ the kernel itself
def test_a_limit_of_the_kernel_on_file_sizes(own):
    rig = own()
    kept = rig.done(rig.client.submit(pairs(4)))
    pid = rig.service.process.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    with pytest.raises(HarliError) as caught:
        rig.client.submit(pairs(400))
    assert caught.value.code in ("storage", "not_ready")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    rig.done(rig.client.submit(pairs(4)))
    assert rig.client.get(kept.id).status == "succeeded"
    assert rig.service.alive and rig.service.process.pid == pid


# ------------------------------------------------------------------ data that vanish
@pytest.mark.parametrize("name", ["ids.npy", "targets.npy", "rows.npz"])
def test_a_data_file_that_vanished_before_the_run(rig, name):
    rig.scheduler.hold.clear()
    first, second = rig.client.submit(pairs(4)), rig.client.submit(pairs(4))
    rig.status(first, "running")
    (rig.folder(second) / "data" / name).unlink()
    rig.scheduler.hold.set()
    failed = rig.done(second, "failed")
    assert failed.error.code == "bad_data_files" and name in failed.error.message
    rig.done(first)


def test_a_data_file_cut_off_during_the_run(rig):
    rig.scheduler.hold_at = 0
    job = rig.client.submit(pairs(), n_epochs=4)
    until(lambda: rig.scheduler.spec is not None and rig.scheduler.spec.job == job.id, "the run")
    os.truncate(rig.folder(job) / "data" / "ids.npy", 200)
    rig.scheduler.hold_at = None
    failed = rig.done(job, "failed")
    assert failed.error.code == "bad_data_files" and "ids.npy" in failed.error.message
    rig.done(rig.client.submit(pairs(4)))
