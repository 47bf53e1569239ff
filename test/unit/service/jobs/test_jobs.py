"""The job's state machine: tables, and random walks that must keep its invariants."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harli.core import JobStatus, SubState
from sglang_harli.errors import StateError
from sglang_harli.protocol.public import EVENT_TYPES
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.transitions import DesiredState, JobRecord, Transition
from support.service.job_records import METRICS, record


def running(**values) -> JobRecord:
    return msgspec.structs.replace(transitions.start(record(), 1.0).record, **values)


def types(change: Transition) -> list[str]:
    return [draft.type for draft in change.drafts]


def test_from_queued_to_succeeded():
    job = transitions.start(record(), 5.0).record
    assert (job.status, job.attempt, job.started_at) == (JobStatus.RUNNING, 1, 5.0)
    job = transitions.step_done(job, 1, 10, METRICS).record
    assert (job.step, job.trained_tokens, job.loss, job.tokens_per_s) == (1, 10, 2.0, 20.0)
    assert job.eta_s == 4.5
    job = transitions.checkpoint_saved(job, 10, 100, "final").record
    job = transitions.trained(job).record
    assert (job.status, job.sub_state, job.fine_tuned_model) == (JobStatus.RUNNING, SubState.PUBLISHING, None)
    done = transitions.published(job, 9.0)
    assert types(done) == ["adapter_published", "succeeded"]
    assert (done.record.step, done.record.fine_tuned_model) == (10, "m-ft-01234567")


def test_pause_of_a_queued_job_takes_effect_at_once_and_keeps_its_place():
    paused = transitions.ask_pause(record()).record
    assert paused.status == JobStatus.PAUSED
    again = transitions.ask_resume(paused).record
    assert (again.status, again.number) == (JobStatus.QUEUED, 1)


def test_pause_of_a_running_job_waits_for_the_scheduler():
    asked = transitions.ask_pause(running()).record
    assert (asked.status, asked.desired) == (JobStatus.RUNNING, DesiredState.PAUSE)
    saved = transitions.checkpoint_saved(asked, 4, 40, "pause").record
    stopped = transitions.stopped(saved, 9.0)
    assert types(stopped) == ["paused"]
    assert (stopped.record.status, stopped.record.step, stopped.record.trained_tokens) == (
        JobStatus.PAUSED,
        4,
        40,
    )
    again = transitions.start(transitions.ask_resume(stopped.record).record, 10.0)
    assert (types(again), again.record.attempt, again.record.step) == (["resumed"], 2, 4)


def test_resume_while_pausing_queues_it_again():
    back = transitions.ask_resume(transitions.ask_pause(running()).record).record
    assert back.desired == DesiredState.RUN
    assert transitions.stopped(back, 9.0).record.status == JobStatus.QUEUED


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.PAUSED])
def test_cancel_where_nothing_runs(status):
    cancelled = transitions.ask_cancel(record(status=status), 7.0, in_flight=False).record
    assert (cancelled.status, cancelled.finished_at) == (JobStatus.CANCELLED, 7.0)


def test_cancel_of_a_running_job_wins_over_pause_and_failure():
    asked = transitions.ask_cancel(transitions.ask_pause(running()).record, 7.0, in_flight=False).record
    assert asked.desired == DesiredState.CANCEL
    assert transitions.stopped(asked, 8.0).record.status == JobStatus.CANCELLED
    assert transitions.fail(asked, "out_of_memory", "...", 8.0).record.status == JobStatus.CANCELLED
    with pytest.raises(StateError, match="cancelled"):
        transitions.ask_pause(asked)


def test_cancel_while_publishing():
    job = transitions.trained(running()).record
    assert transitions.ask_cancel(job, 7.0, in_flight=False).record.status == JobStatus.CANCELLED
    asked = transitions.ask_cancel(job, 7.0, in_flight=True).record
    assert (asked.status, asked.desired) == (JobStatus.RUNNING, DesiredState.CANCEL)
    assert transitions.published(asked, 8.0).record.status == JobStatus.SUCCEEDED


def test_failure_says_what_happened():
    failed = transitions.fail(running(), "out_of_memory", "lower batch_size", 8.0, "batch_size")
    assert failed.drafts[0].level == "error"
    assert failed.record.error is not None and failed.record.error.param == "batch_size"


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
def test_finished_jobs_refuse_by_name(status):
    job = record(status=status)
    for ask in (transitions.ask_pause, transitions.ask_resume):
        with pytest.raises(StateError, match=f"is {status}"):
            ask(job)
    if status == JobStatus.CANCELLED:
        assert transitions.ask_cancel(job, 1.0, in_flight=False) == Transition(job)
    else:
        with pytest.raises(StateError):
            transitions.ask_cancel(job, 1.0, in_flight=False)


def test_a_publishing_job_cannot_be_paused():
    with pytest.raises(StateError, match="published"):
        transitions.ask_pause(transitions.trained(running()).record)


ACTIONS = {
    "start": lambda job: transitions.start(job, 2.0),
    "step": lambda job: transitions.step_done(
        job, min(job.step + 1, job.total_steps), job.trained_tokens + 5, METRICS
    ),
    "save": lambda job: transitions.checkpoint_saved(job, job.step, job.trained_tokens, "every"),
    "pause": transitions.ask_pause,
    "resume": transitions.ask_resume,
    "cancel": lambda job: transitions.ask_cancel(job, 3.0, in_flight=False),
    "stopped": lambda job: transitions.stopped(job, 4.0),
    "lost": lambda job: transitions.interrupted(job, "gone", 9.0),
    "fail": lambda job: transitions.fail(job, "nan", "loss is NaN", 4.0),
    "trained": lambda job: transitions.trained(
        transitions.checkpoint_saved(job, job.total_steps, 99, "final").record
    ),
    "published": lambda job: transitions.published(job, 5.0),
}


def possible(job: JobRecord, action: str) -> bool:
    """What the service does only in some states (what users ask may come at any time)."""
    if action in ("pause", "resume", "cancel", "start"):
        return True
    if job.status != JobStatus.RUNNING:
        return False
    return job.publishing == (action in ("published", "fail")) or action == "fail"


@given(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=40))
def test_random_walks_keep_the_invariants(walk):
    job = record()
    for action in walk:
        if not possible(job, action):
            continue
        before = job
        try:
            change = ACTIONS[action](job)
        except StateError:
            assert action in ("pause", "resume", "cancel", "start")
            continue
        job = change.record
        assert all(draft.type in EVENT_TYPES and draft.message for draft in change.drafts)
        assert not before.status.final or job == before
        assert (job.finished_at is not None) == job.status.final
        assert (job.fine_tuned_model is not None) == (job.status == JobStatus.SUCCEEDED)
        assert job.status != JobStatus.SUCCEEDED or job.step == job.total_steps
        assert (job.error is not None) == (job.status == JobStatus.FAILED)
        assert job.status == JobStatus.RUNNING or (job.desired == DesiredState.RUN and not job.publishing)
        assert 0 <= job.checkpoint_step <= job.step <= job.total_steps
        assert job.attempt >= before.attempt
        assert msgspec.json.decode(msgspec.json.encode(job), type=JobRecord) == job
