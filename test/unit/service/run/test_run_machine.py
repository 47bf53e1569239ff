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
    world = LossyNetwork()
    world.service.apply(transitions.created(new_job(1), "fine"))
    for _ in range(4):
        world.tick(1.0)
        flush(world)
    world.scheduler.work()
    flush(world)
    assert world.service.machine.run is not None
    assert world.service.machine.run.phase is Phase.TRAINING
    return world


def flush(world: LossyNetwork) -> None:
    while (
        world.service.commit()
        or world.service.finish(0)
        or world.deliver(to_service=True, late=False)
        or world.deliver(to_service=False, late=False)
    ):
        pass


def record(world: LossyNetwork) -> transitions.JobRecord:
    [record] = world.service.records.values()
    return record


def test_data_that_cannot_be_read_fails_the_job_and_stops_its_run():
    world = training()
    machine = world.service.machine
    cursor = FixedPlan().cursor_after(0)
    world.service.do(machine.data_failed(cursor, "ids.npy ends too early", world.now))
    flush(world)
    failed = record(world)
    assert failed.status == JobStatus.FAILED and failed.error is not None
    assert failed.error.code == "bad_data_files" and "ids.npy ends too early" in failed.error.message
    assert world.scheduler.run is None and machine.run is None


def test_a_shared_memory_that_is_too_small_fails_the_job_and_stops_its_run():
    world = training()
    machine = world.service.machine
    job = record(world)
    world.service.do(machine.slot_refused(job.id, job.attempt, "shared memory has no room", world.now))
    flush(world)
    failed = record(world)
    assert failed.error is not None and failed.error.code == "shared_memory"
    assert world.scheduler.run is None and machine.run is None


# ------------------------------------------------------------------ jobs that are held
def two_jobs() -> LossyNetwork:
    """Both wait for a scheduler; the first one is about to be prepared."""
    world = LossyNetwork()
    for number in (1, 2):
        world.service.apply(
            transitions.created(new_job(number), "fine")
        )  # before the first hello: without a base
    while world.service.commit():
        pass
    world.scheduler.hello()
    while not world.service.work:
        flush_wire(world)
        world.service.commit()
    return world


def test_trouble_while_a_run_is_prepared_puts_its_job_off_and_the_next_one_starts() -> None:
    world = two_jobs()
    assert world.service.finish(0, ok=False)
    first, second = world.service.records.values()
    assert (first.status, first.error) == (JobStatus.QUEUED, None)
    assert second.status == JobStatus.RUNNING
    assert world.service.queue.reason(first.id) == "trouble; tried again after 1 s"
    assert [d.message for d in world.service.uncommitted[0][0].drafts] == ["trouble; goes on from step 0"]
    drain(world)
    assert [r.status for r in world.store.values()] == [JobStatus.SUCCEEDED] * 2


def test_each_pause_is_longer_up_to_a_bound_and_a_step_forgets_them() -> None:
    world = LossyNetwork()
    world.service.apply(transitions.created(new_job(1), "fine"))
    now, pauses = world.service.machine.state, []
    for _ in range(11):
        while not world.service.work:
            flush_wire(world)
            world.service.commit() or world.tick(1.0)
        began = world.s
        world.service.finish(0, ok=False)
        [hold] = now.holds.values()
        pauses.append(hold.until_s - began)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    drain(world)
    assert not now.troubles and record(world).status == JobStatus.SUCCEEDED


def test_what_another_server_can_change_waits_for_it() -> None:
    world = two_jobs()
    world.service.finish(0, ok=False, passing=False)
    first = next(iter(world.service.records.values()))
    drain(world)
    assert (record_of(world, first.id).status, len(world.service.machine.state.holds)) == (
        JobStatus.QUEUED,
        1,
    )
    assert world.service.queue.reason(first.id) == "trouble"
    world.kill_scheduler()
    drain(world)
    assert record_of(world, first.id).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize("desired", ["pause", "cancel"])
def test_a_job_that_is_put_off_as_it_should_stop_has_stopped(desired: str) -> None:
    world = two_jobs()
    first = next(iter(world.service.records.values()))
    asked = (
        transitions.ask_pause(first)
        if desired == "pause"
        else transitions.ask_cancel(first, 1.0, in_flight=False)
    )
    world.service.apply(asked)
    world.service.finish(0, ok=False)
    assert record_of(world, first.id).status == (
        JobStatus.PAUSED if desired == "pause" else JobStatus.CANCELLED
    )
    assert not world.service.machine.state.holds


def test_a_job_that_is_paused_and_resumed_is_tried_at_once() -> None:
    world = two_jobs()
    world.service.finish(0, ok=False)
    first = next(iter(world.service.records))
    for ask in (transitions.ask_pause, transitions.ask_resume):
        world.service.apply(ask(record_of(world, first)))
        world.service.settle()
    assert not world.service.machine.state.holds and world.service.queue.first() == first


def test_no_run_starts_while_the_scheduler_takes_none() -> None:
    world = two_jobs()
    world.scheduler.hold_runs("the served model is being checked")
    flush(world)
    first = next(iter(world.service.records.values()))
    assert (first.status, world.scheduler.run) == (JobStatus.QUEUED, None)
    world.tick(30.0)
    flush(world)
    assert world.service.machine.run is None
    world.scheduler.hold = ""  # its hello is lost: it is asked for
    world.tick(30.0)
    flush(world)
    assert record_of(world, first.id).status == JobStatus.RUNNING


def test_a_hold_leaves_the_run_in_progress_alone() -> None:
    world = training()
    world.scheduler.hold_runs("the served model is being checked")
    drain(world)
    assert record(world).status == JobStatus.SUCCEEDED


def test_a_run_that_no_longer_has_what_it_needs_is_saved_and_goes_on_later() -> None:
    world = training()
    for _ in range(2):
        world.scheduler.work()
    flush(world)
    job = record(world)
    world.service.do(world.service.machine.put_off(job.id, job.attempt, NotNow("EIO"), world.now))
    drain(world)
    assert record(world).status == JobStatus.SUCCEEDED and record(world).attempt == 2
    told = {e[3] for e in world.events if e[1] == "step_metrics"}
    assert told == {1, 2, 3, 4}  # the first step was not done twice
    assert sum(n for e, n in world.events.items() if e[1] == "step_metrics") == 4


@pytest.mark.parametrize("code", ["out_of_memory", "internal"])
def test_a_run_that_runs_out_of_memory_at_one_step_again_and_again_is_too_large(code: str) -> None:
    world = training()
    for attempt in range(1, 6):
        while world.scheduler.run is None and record(world).status != JobStatus.FAILED:
            world.tick(10.0)
            flush(world)
        if record(world).status == JobStatus.FAILED:
            break
        assert record(world).attempt == attempt
        world.scheduler.fail(passing=True, code=code)
        flush(world)
    if code == "internal":
        drain(world)
        assert record(world).status == JobStatus.SUCCEEDED
    else:
        assert (record(world).attempt, record(world).error) == (3, JobError("out_of_memory", "EMFILE"))


def drain(world: LossyNetwork) -> None:
    """All goes well for a while."""
    for _ in range(60):
        for late in (True, False):
            while world.deliver(to_service=True, late=late) or world.deliver(to_service=False, late=late):
                pass
        while world.service.commit() or world.service.finish(0) or world.service.publish():
            pass
        for _ in range(3):
            world.scheduler.work()
        world.tick(10.0)


def record_of(world: LossyNetwork, job: str) -> transitions.JobRecord:
    return world.service.records[job]


def test_training_waits_while_the_store_cannot_be_written(monkeypatch):
    world = training()
    machine = world.service.machine
    monkeypatch.setattr(run_machine_module, "MAX_UNSTORED", 1)
    for _ in range(2):  # the first step
        world.scheduler.work()
    while world.deliver(to_service=True, late=False):
        pass
    assert machine.state.unstored and machine.next_batch() is None
    flush(world)
    assert not machine.state.unstored
    assert world.scheduler.run is not None and world.scheduler.run.cursor == (4, 0)


@pytest.mark.parametrize("silent_s", [9.0, 11.0])
def test_a_run_of_which_nothing_is_heard_is_asked_after(silent_s):
    world = training()
    world.service.do([])
    now = Now(0.0, world.s + silent_s)
    assert (AskHello() in world.service.machine.tick(now)) == (silent_s > 10)


def test_a_stop_without_an_answer_is_said_again():
    world = training()
    world.service.apply(transitions.ask_pause(record(world)))
    world.service.settle()
    world.to_scheduler.clear()  # it is lost
    again = world.service.machine.tick(Now(0.0, world.s + 6))
    assert [e.message for e in again if isinstance(e, Send)] == [
        internal.StopRun(job=record(world).id, attempt=1, snapshot=True)
    ]


def test_a_scheduler_that_has_lost_the_run_sends_the_job_back_to_its_checkpoint():
    world = training()
    world.kill_scheduler()
    for _ in range(3):
        world.tick(1.0)
        flush(world)
    assert record(world).attempt == 2


def test_a_run_whose_memory_requests_need_is_queued_again_and_goes_on_from_its_checkpoint():
    world = training()
    world.scheduler.give_up()
    flush(world)
    for _ in range(3):
        world.tick(1.0)
        flush(world)
    assert (record(world).status, record(world).attempt) == (JobStatus.RUNNING, 2)
    assert record(world).error is None and world.scheduler.run is not None


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
    world = LossyNetwork()
    job = new_job(1)
    job = msgspec.structs.replace(job, data={"longest_row": 40, "rows": 3})
    world.service.apply(transitions.created(job, "fine"))
    for _ in range(4):
        world.tick(1.0)
        flush(world)
    run = world.service.machine.run
    assert run is not None and run.start is not None
    assert run.start.spec.memory_bytes == limits().job_memory_bytes(job.hyperparameters, 40, 3) > 0


@pytest.mark.parametrize("kills", [1, 2])
def test_the_last_state_stays_in_shared_memory_until_the_store_knows_its_checkpoint(kills: int):
    world = training()
    for _ in range(20):
        if world.scheduler.run is not None and world.scheduler.run.in_hand is not None:
            if world.scheduler.run.in_hand.reason == "final":
                break
            flush(world)
        world.scheduler.work()
        flush_wire(world)
    for _ in range(kills):  # written and decided, and killed before that is durable
        write_snapshot(world)
        assert record(world).publishing and not world.store[record(world).id].publishing
        world.kill_service()
    for _ in range(8):
        world.tick(2.0)
        flush(world)
        world.service.publish()
    assert record(world).status == JobStatus.SUCCEEDED
    assert world.scheduler.run is None and not world.shm


def flush_wire(world: LossyNetwork) -> None:
    while world.deliver(to_service=True, late=False) or world.deliver(to_service=False, late=False):
        pass


def write_snapshot(world: LossyNetwork) -> None:
    """Until a snapshot is written; what is decided then is not committed."""
    for _ in range(20):
        flush_wire(world)
        work = world.service.work
        found = [i for i, effect in enumerate(work) if isinstance(effect, SaveSnapshot)]
        if found:
            assert world.service.finish(found[0])
            return
        world.service.commit() or world.tick(1.0)
    raise AssertionError("no snapshot was to be written")


# ------------------------------------------------------------------ what is sent ahead
def test_micro_batches_that_are_all_lost_are_sent_again(monkeypatch):
    """As many as may be ahead: none of them is ever reported as taken."""
    monkeypatch.setattr(state, "MOST_AHEAD", 3)
    world = training()
    held = world.scheduler.run
    assert held is not None and list(held.queue) == [(1, 0), (1, 1), (2, 0)]
    held.queue.clear()
    held.cursor = (1, 0)  # as if none had come
    for _ in range(8):
        world.tick(1.0)
        flush(world)
    assert list(held.queue) == [(1, 0), (1, 1), (2, 0)]


def test_a_service_that_takes_over_a_run_counts_what_the_scheduler_has(monkeypatch):
    monkeypatch.setattr(state, "MOST_AHEAD", 3)
    world = training()
    world.kill_service()
    for _ in range(5):
        world.tick(1.0)
        flush(world)
    run, held = world.service.machine.run, world.scheduler.run
    assert run is not None and held is not None and list(held.queue) == [(1, 0), (1, 1), (2, 0)]
    assert [place for place, _ in run.ahead] == list(held.queue)
    world.scheduler.work()
    world.tick(1.0)
    flush(world)
    assert list(held.queue) == [(1, 1), (2, 0)]  # of unknown size: two of them are enough
    world.scheduler.work()
    flush(world)
    assert list(held.queue) == [(2, 0), (2, 1)] and [place for place, _ in run.ahead] == list(held.queue)


def test_a_step_of_any_number_of_micro_batches_is_fed_as_they_are_taken(monkeypatch):
    """Bounded in count, and in bytes but for two: a step of 10,000 micro-batches is never ahead as a whole."""
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
