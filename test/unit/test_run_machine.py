"""The run machine in single situations (the model test walks through all of them)."""

from __future__ import annotations

import pytest
from run_machine_world import FixedPlan, World, new_job

from sglang_harli.core import JobStatus
from sglang_harli.protocol import internal
from sglang_harli.service import jobs
from sglang_harli.service import run_machine as run_machine_module
from sglang_harli.service.run_machine_state import AskHello, Now, Phase, Send


def training() -> World:
    """A job that trains, its adapter announced and its slot given."""
    world = World()
    world.service.apply(jobs.created(new_job(1), "fine"))
    for _ in range(4):
        world.tick(1.0)
        flush(world)
    world.scheduler.work()
    flush(world)
    assert world.service.machine.run is not None
    assert world.service.machine.run.phase is Phase.TRAINING
    return world


def flush(world: World) -> None:
    while (
        world.service.commit()
        or world.service.finish(0)
        or world.deliver(to_service=True, late=False)
        or world.deliver(to_service=False, late=False)
    ):
        pass


def record(world: World) -> jobs.JobRecord:
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


def test_a_full_shared_memory_fails_the_job_and_stops_its_run():
    world = training()
    machine = world.service.machine
    job = record(world)
    world.service.do(machine.slot_refused(job.id, job.attempt, 5, "no space", world.now))
    flush(world)
    failed = record(world)
    assert failed.error is not None and failed.error.code == "shared_memory"
    assert world.scheduler.run is None and machine.run is None


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
    world.service.apply(jobs.ask_pause(record(world)))
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
