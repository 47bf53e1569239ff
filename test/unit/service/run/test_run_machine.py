"""The run machine in single situations (the model test walks through all of them)."""

from __future__ import annotations

import msgspec
import pytest

from sglang_harli.core import JobStatus
from sglang_harli.protocol import internal
from sglang_harli.protocol.public import JobError
from sglang_harli.service.jobs import transitions
from sglang_harli.service.run import machine as run_machine_module
from sglang_harli.service.run import state
from sglang_harli.service.run.holds import NotNow
from sglang_harli.service.run.state import AskHello, Now, Phase, Run, SaveSnapshot, Send
from support.run_model.run_simulation import FixedPlan, LossyNetwork, new_job
from support.service.service_peers import limits


def training() -> LossyNetwork:
    """A job that trains, its adapter announced and its slot given."""
    rig = LossyNetwork()
    rig.service.apply(transitions.created(new_job(1), "fine"))
    for _ in range(4):
        rig.tick(1.0)
        flush(rig)
    rig.scheduler.work()
    flush(rig)
    assert rig.service.machine.run is not None
    assert rig.service.machine.run.phase is Phase.TRAINING
    return rig


def flush(rig: LossyNetwork) -> None:
    while (
        rig.service.commit()
        or rig.service.finish(0)
        or rig.deliver(to_service=True, late=False)
        or rig.deliver(to_service=False, late=False)
    ):
        pass


def record(rig: LossyNetwork) -> transitions.JobRecord:
    [record] = rig.service.records.values()
    return record


def test_data_that_cannot_be_read_fails_the_job_and_stops_its_run():
    rig = training()
    machine = rig.service.machine
    cursor = FixedPlan().cursor_after(0)
    rig.service.do(machine.data_failed(cursor, "ids.npy ends too early", rig.now))
    flush(rig)
    failed = record(rig)
    assert failed.status == JobStatus.FAILED and failed.error is not None
    assert failed.error.code == "bad_data_files" and "ids.npy ends too early" in failed.error.message
    assert rig.scheduler.run is None and machine.run is None


def test_a_shared_memory_that_is_too_small_fails_the_job_and_stops_its_run():
    rig = training()
    machine = rig.service.machine
    job = record(rig)
    rig.service.do(machine.slot_refused(job.id, job.attempt, "shared memory has no room", rig.now))
    flush(rig)
    failed = record(rig)
    assert failed.error is not None and failed.error.code == "shared_memory"
    assert rig.scheduler.run is None and machine.run is None


# ------------------------------------------------------------------ jobs that are held
def two_jobs() -> LossyNetwork:
    """Both wait for a scheduler; the first one is about to be prepared."""
    rig = LossyNetwork()
    for number in (1, 2):
        rig.service.apply(
            transitions.created(new_job(number), "fine")
        )  # before the first hello: without a base
    while rig.service.commit():
        pass
    rig.scheduler.hello()
    while not rig.service.work:
        flush_wire(rig)
        rig.service.commit()
    return rig


def test_trouble_while_a_run_is_prepared_puts_its_job_off_and_the_next_one_starts() -> None:
    rig = two_jobs()
    assert rig.service.finish(0, ok=False)
    first, second = rig.service.records.values()
    assert (first.status, first.error) == (JobStatus.QUEUED, None)
    assert second.status == JobStatus.RUNNING
    assert rig.service.queue.reason(first.id) == "trouble; tried again after 1 s"
    assert [d.message for d in rig.service.uncommitted[0][0].drafts] == ["trouble; goes on from step 0"]
    drain(rig)
    assert [r.status for r in rig.store.values()] == [JobStatus.SUCCEEDED] * 2


def test_each_pause_is_longer_up_to_a_bound_and_a_step_forgets_them() -> None:
    rig = LossyNetwork()
    rig.service.apply(transitions.created(new_job(1), "fine"))
    now, pauses = rig.service.machine.state, []
    for _ in range(11):
        while not rig.service.work:
            flush_wire(rig)
            rig.service.commit() or rig.tick(1.0)
        began = rig.s
        rig.service.finish(0, ok=False)
        [hold] = now.holds.values()
        pauses.append(hold.until_s - began)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    drain(rig)
    assert not now.troubles and record(rig).status == JobStatus.SUCCEEDED


def test_what_another_server_can_change_waits_for_it() -> None:
    rig = two_jobs()
    rig.service.finish(0, ok=False, passing=False)
    first = next(iter(rig.service.records.values()))
    drain(rig)
    assert (record_of(rig, first.id).status, len(rig.service.machine.state.holds)) == (
        JobStatus.QUEUED,
        1,
    )
    assert rig.service.queue.reason(first.id) == "trouble"
    rig.kill_scheduler()
    drain(rig)
    assert record_of(rig, first.id).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize("desired", ["pause", "cancel"])
def test_a_job_that_is_put_off_as_it_should_stop_has_stopped(desired: str) -> None:
    rig = two_jobs()
    first = next(iter(rig.service.records.values()))
    asked = (
        transitions.ask_pause(first)
        if desired == "pause"
        else transitions.ask_cancel(first, 1.0, in_flight=False)
    )
    rig.service.apply(asked)
    rig.service.finish(0, ok=False)
    assert record_of(rig, first.id).status == (
        JobStatus.PAUSED if desired == "pause" else JobStatus.CANCELLED
    )
    assert not rig.service.machine.state.holds


def test_a_job_that_is_paused_and_resumed_is_tried_at_once() -> None:
    rig = two_jobs()
    rig.service.finish(0, ok=False)
    first = next(iter(rig.service.records))
    for ask in (transitions.ask_pause, transitions.ask_resume):
        rig.service.apply(ask(record_of(rig, first)))
        rig.service.settle()
    assert not rig.service.machine.state.holds and rig.service.queue.first() == first


def test_no_run_starts_while_the_scheduler_takes_none() -> None:
    rig = two_jobs()
    rig.scheduler.hold_runs("the served model is being checked")
    flush(rig)
    first = next(iter(rig.service.records.values()))
    assert (first.status, rig.scheduler.run) == (JobStatus.QUEUED, None)
    rig.tick(30.0)
    flush(rig)
    assert rig.service.machine.run is None
    rig.scheduler.hold = ""  # its hello is lost: it is asked for
    rig.tick(30.0)
    flush(rig)
    assert record_of(rig, first.id).status == JobStatus.RUNNING


def test_a_hold_leaves_the_run_in_progress_alone() -> None:
    rig = training()
    rig.scheduler.hold_runs("the served model is being checked")
    drain(rig)
    assert record(rig).status == JobStatus.SUCCEEDED


def test_a_run_that_no_longer_has_what_it_needs_is_saved_and_goes_on_later() -> None:
    rig = training()
    for _ in range(2):
        rig.scheduler.work()
    flush(rig)
    job = record(rig)
    rig.service.do(rig.service.machine.put_off(job.id, job.attempt, NotNow("EIO"), rig.now))
    drain(rig)
    assert record(rig).status == JobStatus.SUCCEEDED and record(rig).attempt == 2
    told = {e[3] for e in rig.events if e[1] == "step_metrics"}
    assert told == {1, 2, 3, 4}  # the first step was not done twice
    assert sum(n for e, n in rig.events.items() if e[1] == "step_metrics") == 4


@pytest.mark.parametrize("code", ["out_of_memory", "internal"])
def test_a_run_that_runs_out_of_memory_at_one_step_again_and_again_is_too_large(code: str) -> None:
    rig = training()
    for attempt in range(1, 6):
        while rig.scheduler.run is None and record(rig).status != JobStatus.FAILED:
            rig.tick(10.0)
            flush(rig)
        if record(rig).status == JobStatus.FAILED:
            break
        assert record(rig).attempt == attempt
        rig.scheduler.fail(passing=True, code=code)
        flush(rig)
    if code == "internal":
        drain(rig)
        assert record(rig).status == JobStatus.SUCCEEDED
    else:
        assert (record(rig).attempt, record(rig).error) == (3, JobError("out_of_memory", "EMFILE"))


def drain(rig: LossyNetwork) -> None:
    """All goes well for a while."""
    for _ in range(60):
        for late in (True, False):
            while rig.deliver(to_service=True, late=late) or rig.deliver(to_service=False, late=late):
                pass
        while rig.service.commit() or rig.service.finish(0) or rig.service.publish():
            pass
        for _ in range(3):
            rig.scheduler.work()
        rig.tick(10.0)


def record_of(rig: LossyNetwork, job: str) -> transitions.JobRecord:
    return rig.service.records[job]


def test_training_waits_while_the_store_cannot_be_written(monkeypatch):
    rig = training()
    machine = rig.service.machine
    monkeypatch.setattr(run_machine_module, "MAX_UNSTORED", 1)
    for _ in range(2):  # the first step
        rig.scheduler.work()
    while rig.deliver(to_service=True, late=False):
        pass
    assert machine.state.unstored and machine.next_batch() is None
    flush(rig)
    assert not machine.state.unstored
    assert rig.scheduler.run is not None and rig.scheduler.run.cursor == (4, 0)


@pytest.mark.parametrize("silent_s", [9.0, 11.0])
def test_a_run_of_which_nothing_is_heard_is_asked_after(silent_s):
    rig = training()
    rig.service.do([])
    now = Now(0.0, rig.s + silent_s)
    assert (AskHello() in rig.service.machine.tick(now)) == (silent_s > 10)


def test_a_stop_without_an_answer_is_said_again():
    rig = training()
    rig.service.apply(transitions.ask_pause(record(rig)))
    rig.service.settle()
    rig.to_scheduler.clear()  # it is lost
    again = rig.service.machine.tick(Now(0.0, rig.s + 6))
    assert [e.message for e in again if isinstance(e, Send)] == [
        internal.StopRun(job=record(rig).id, attempt=1, snapshot=True)
    ]


def test_a_scheduler_that_has_lost_the_run_sends_the_job_back_to_its_checkpoint():
    rig = training()
    rig.kill_scheduler()
    for _ in range(3):
        rig.tick(1.0)
        flush(rig)
    assert record(rig).attempt == 2


def test_a_run_whose_memory_requests_need_is_queued_again_and_goes_on_from_its_checkpoint():
    rig = training()
    rig.scheduler.give_up()
    flush(rig)
    for _ in range(3):
        rig.tick(1.0)
        flush(rig)
    assert (record(rig).status, record(rig).attempt) == (JobStatus.RUNNING, 2)
    assert record(rig).error is None and rig.scheduler.run is not None


@pytest.mark.parametrize("desired", [transitions.DesiredState.PAUSE, transitions.DesiredState.CANCEL])
def test_a_run_that_was_to_stop_and_loses_its_memory_has_stopped(desired):
    job = transitions.start(transitions.created(new_job(1), "fine").record, 1.0).record
    asked = (
        transitions.ask_pause(job)
        if desired is transitions.DesiredState.PAUSE
        else transitions.ask_cancel(job, 2.0, in_flight=False)
    )
    over = transitions.interrupted(asked.record, "memory_pressure: requests needed it", 3.0).record
    assert over.status == (
        JobStatus.PAUSED if desired is transitions.DesiredState.PAUSE else JobStatus.CANCELLED
    )


def test_the_scheduler_is_told_what_memory_the_job_needs():
    rig = LossyNetwork()
    job = new_job(1)
    job = msgspec.structs.replace(job, data={"longest_row": 40, "rows": 3})
    rig.service.apply(transitions.created(job, "fine"))
    for _ in range(4):
        rig.tick(1.0)
        flush(rig)
    run = rig.service.machine.run
    assert run is not None and run.start is not None
    assert run.start.spec.memory_bytes == limits().job_memory_bytes(job.hyperparameters, 40, 3) > 0


@pytest.mark.parametrize("kills", [1, 2])
def test_the_last_state_stays_in_shared_memory_until_the_store_knows_its_checkpoint(kills: int):
    rig = training()
    for _ in range(20):
        if rig.scheduler.run is not None and rig.scheduler.run.in_hand is not None:
            if rig.scheduler.run.in_hand.reason == "final":
                break
            flush(rig)
        rig.scheduler.work()
        flush_wire(rig)
    for _ in range(kills):  # written and decided, and killed before that is durable
        write_snapshot(rig)
        assert record(rig).publishing and not rig.store[record(rig).id].publishing
        rig.kill_service()
    for _ in range(8):
        rig.tick(2.0)
        flush(rig)
        rig.service.publish()
    assert record(rig).status == JobStatus.SUCCEEDED
    assert rig.scheduler.run is None and not rig.shm


def flush_wire(rig: LossyNetwork) -> None:
    while rig.deliver(to_service=True, late=False) or rig.deliver(to_service=False, late=False):
        pass


def write_snapshot(rig: LossyNetwork) -> None:
    """Until a snapshot is written; what is decided then is not committed."""
    for _ in range(20):
        flush_wire(rig)
        work = rig.service.work
        found = [i for i, effect in enumerate(work) if isinstance(effect, SaveSnapshot)]
        if found:
            assert rig.service.finish(found[0])
            return
        rig.service.commit() or rig.tick(1.0)
    raise AssertionError("no snapshot was to be written")


# ------------------------------------------------------------------ what is sent ahead
def test_micro_batches_that_are_all_lost_are_sent_again(monkeypatch):
    """As many as may be ahead: none of them is ever reported as taken."""
    monkeypatch.setattr(state, "MOST_AHEAD", 3)
    rig = training()
    held = rig.scheduler.run
    assert held is not None and list(held.queue) == [(1, 0), (1, 1), (2, 0)]
    held.queue.clear()
    held.cursor = (1, 0)  # as if none had come
    for _ in range(8):
        rig.tick(1.0)
        flush(rig)
    assert list(held.queue) == [(1, 0), (1, 1), (2, 0)]


def test_a_service_that_takes_over_a_run_counts_what_the_scheduler_has(monkeypatch):
    monkeypatch.setattr(state, "MOST_AHEAD", 3)
    rig = training()
    rig.kill_service()
    for _ in range(5):
        rig.tick(1.0)
        flush(rig)
    run, held = rig.service.machine.run, rig.scheduler.run
    assert run is not None and held is not None and list(held.queue) == [(1, 0), (1, 1), (2, 0)]
    assert [place for place, _ in run.ahead] == list(held.queue)
    rig.scheduler.work()
    rig.tick(1.0)
    flush(rig)
    assert list(held.queue) == [(1, 1), (2, 0)]  # of unknown size: two of them are enough
    rig.scheduler.work()
    flush(rig)
    assert list(held.queue) == [(2, 0), (2, 1)] and [place for place, _ in run.ahead] == list(held.queue)


def test_a_step_of_any_number_of_micro_batches_is_fed_as_they_are_taken(monkeypatch):
    """Bounded in count, and in bytes but for two: a step of 10,000 micro-batches is never ahead as
    a whole."""
    run = Run("ftjob-1", 1, Phase.TRAINING, 1, plan=LongPlan(), next_cursor=LongPlan().cursor_after(0))
    for nbytes, most in ((1000, 32), (state.BYTES_AHEAD // 4, 4), (1 << 30, 2)):
        for _ in range(200):
            while not run.enough_ahead:
                run.fed(nbytes)
            assert len(run.ahead) == most
            step, index = run.ahead[0][0]
            run.has_taken(step, index + 1)
        run.has_taken(*run.ahead[-1][0])
        run.ahead.clear()
    assert run.next_cursor is not None and run.next_cursor.step == 1 and run.next_cursor.index > 600


class LongPlan(FixedPlan):
    def following(self, cursor):
        return internal.BatchCursor(epoch=cursor.epoch, step=cursor.step, index=cursor.index + 1)
