"""Jobs whose data are files of the service: accepted at once, looked at afterwards."""

from __future__ import annotations

import hashlib
import json

import pytest
from test_file_verbs import killed_at

from sglang_harli.errors import ConfigError, HarliError, ProtocolError, StateError
from sglang_harli.failpoints import FileFailpoint, WriteFailpoint
from sglang_harli.protocol.public import SubmitArgs
from support.service.inner_calls import InnerCalls
from support.service.service_fixture import ServiceUnderTest, pairs, until

GOOD = "".join(json.dumps(row) + "\n" for row in pairs(8)).encode()
BAD = GOOD + b'{"messages": []}\n' * 3 + b"nothing\n"


@pytest.fixture(scope="module")
def rig(tmp_path_factory, model):
    """A service with its peers: jobs run."""
    rig = ServiceUnderTest(tmp_path_factory.mktemp("rig"), model)
    yield rig
    rig.close()


@pytest.fixture
def calls(rig):
    calls = InnerCalls(rig.run_dir)
    yield calls
    calls.close()


def submit(calls: InnerCalls, file: str, **more) -> dict:
    return calls.call("submit", SubmitArgs(training_file=file, **more))


def types(rig: ServiceUnderTest, job: str) -> list[str]:
    return [event.type for event in rig.client.events(job)]


def test_a_job_is_accepted_validated_and_trained_though_its_file_is_deleted(rig, calls):
    file = calls.file(GOOD)
    job = submit(calls, file.id, metadata={"team": "a"}, suffix="mine", idempotency_key="first")
    assert job["status"] == "validating_files" and job["training_file"] == file.id
    assert job["metadata"] == {"team": "a"}
    calls.call("file_delete", {"file": file.id})
    done = rig.client.wait(job["id"], 30, poll_s=0.05)
    assert (done.status, done.error) == ("succeeded", None)
    assert done.data["rows"] == 8 and done.data["sha256"] and done.total_steps == 6
    kinds = types(rig, job["id"])
    assert kinds[:4] == ["job_created", "validating", "data_validated", "queued"]
    again = submit(calls, file.id, metadata={"team": "a"}, suffix="mine", idempotency_key="first")
    assert again["id"] == job["id"]
    with pytest.raises(HarliError, match="metadata") as caught:
        submit(calls, file.id, suffix="mine", idempotency_key="first")
    assert caught.value.code == "idempotency_conflict"
    found = calls.call("list", {"metadata": {"team": "a"}})["jobs"]
    assert [j["id"] for j in found] == [job["id"]]
    assert calls.call("list", {"metadata": {"team": "b"}})["jobs"] == []
    assert job["id"] not in [j["id"] for j in calls.call("list", {"metadata": None})["jobs"]]
    other = calls.file(GOOD)
    begun = submit(calls, other.id, model=done.fine_tuned_model)
    assert begun["resumed_from"] == job["id"]
    rig.done(rig.client.get(begun["id"]))


def test_a_new_course_does_not_take_over_how_the_old_one_was_evaluated(rig, calls):
    file = calls.file(GOOD)
    split = {"validation_split": 0.25, "eval_steps": 1, "early_stopping_patience": 5}
    first = rig.done(rig.client.get(submit(calls, file.id, hyperparameters=split)["id"]))
    keyed = {"model": first.fine_tuned_model, "idempotency_key": "a new course"}
    second = submit(calls, file.id, validation_file=file.id, **keyed)
    assert second["hyperparameters"]["validation_split"] == 0
    assert second["hyperparameters"]["early_stopping_patience"] is None
    assert submit(calls, file.id, validation_file=file.id, **keyed)["id"] == second["id"]
    rig.done(rig.client.get(second["id"]))


def test_a_submit_of_data_that_names_a_model_may_be_repeated(rig, calls):
    first = rig.done(rig.client.get(submit(calls, calls.file(GOOD).id)["id"]))
    args = SubmitArgs(
        filename="f",
        size=len(GOOD),
        sha256=hashlib.sha256(GOOD).hexdigest(),
        model=first.fine_tuned_model,
        idempotency_key="by data",
    )
    second = calls.call("submit", args, GOOD)
    assert second["resumed_from"] == first.id
    assert calls.call("submit", args, GOOD)["id"] == second["id"]
    rig.done(rig.client.get(second["id"]))


def test_a_job_waits_while_the_tokenizer_cannot_be_loaded(inner, service, model):
    aside = model.with_name("aside")
    service.service.kill()
    model.rename(aside)
    try:
        service.service.start()
        job = submit(inner, inner.file(GOOD).id)["id"]
        reason = until(lambda: service.client.get(job).reason, "why it waits")
        assert "tokenizer" in reason and service.client.get(job).status == "validating_files"
    finally:
        aside.rename(model)
    until(lambda: service.client.get(job).status == "queued", "the validation")
    service.client.cancel(job)


def test_a_bad_file_fails_the_job_with_its_lines(rig, calls):
    job = submit(calls, calls.file(BAD, filename="bad.jsonl").id)
    done = rig.client.wait(job["id"], 30, poll_s=0.05)
    assert done.status == "failed" and done.error.code == "invalid_data"
    assert done.error.param == "training_file"
    assert "bad.jsonl: 4 of 12 lines not accepted" in done.error.message
    events = list(rig.client.events(job["id"]))
    assert [e.message.split(":")[0] for e in events if e.type == "data_invalid"] == [
        "lines 9 to 11",
        "line 12",
    ]
    assert events[-1].type == "failed"
    page = calls.call("events_before", {"job": job["id"], "limit": 2})
    assert [e["id"] for e in page["events"]] == [events[-1].id, events[-2].id] and page["has_more"]
    page = calls.call("events_before", {"job": job["id"], "before": 3})
    assert [e["id"] for e in page["events"]] == [2, 1] and not page["has_more"]
    with pytest.raises(StateError, match="before its files were accepted"):
        submit(calls, calls.file(GOOD).id, resume_from=job["id"])


@pytest.mark.parametrize(
    ("more", "error", "param"),
    [
        ({"training_file": "file-0"}, ConfigError, "training_file"),
        ({"training_file": "../../etc/passwd"}, ConfigError, "training_file"),
        ({"model": "gpt-4.1-nano"}, HarliError, "model"),
        ({"hyperparameters": {"n_epochs": 0}}, ConfigError, "n_epochs"),
        ({"hyperparameters": {"lora_r": 1024}}, ConfigError, "lora_r"),
        ({"sha256": "0" * 64}, ProtocolError, "training_file"),
        ({"metadata": {"k" * 65: ""}}, ProtocolError, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, ProtocolError, "metadata"),
    ],
)
def test_what_is_known_at_once_is_refused_at_once(rig, calls, more, error, param):
    before = sorted(p.name for p in rig.run_dir.iterdir())
    file = calls.file(GOOD)
    with pytest.raises(error) as caught:
        calls.call("submit", {"training_file": file.id} | more)
    assert caught.value.param == param
    assert sorted(p.name for p in rig.run_dir.iterdir()) == before


@pytest.fixture
def looked_at(inner, service):
    """A job whose file is being looked at: the thread that does it is held until ``go``."""
    point = service.points / WriteFailpoint.TOKENS
    point.write_text("stop")
    job = submit(inner, inner.file(GOOD).id)["id"]
    until(point.with_suffix(".hit").exists, "the look at the file")
    yield job, point.with_suffix(".go").touch
    point.with_suffix(".go").touch()
    service.client.cancel(job)
    for suffix in (".hit", ".go"):
        point.with_suffix(suffix).unlink()


def test_a_job_that_is_being_validated_can_be_paused_and_resumed(inner, service, looked_at):
    job, go = looked_at
    assert inner.call("pause", {"job": job})["status"] == "paused"
    assert inner.call("pause", {"job": job})["status"] == "paused"
    assert inner.call("resume", {"job": job})["status"] == "validating_files"
    go()
    kinds = until(lambda: "queued" in (kinds := types(service, job)) and kinds, "the validation")
    assert kinds == ["job_created", "validating", "paused", "validating", "data_validated", "queued"]


def test_a_job_that_is_being_validated_is_cancelled_at_once(inner, service, looked_at):
    job, go = looked_at
    assert inner.call("cancel", {"job": job})["status"] == "cancelled"
    assert inner.call("cancel", {"job": job})["status"] == "cancelled"
    go()
    later = submit(inner, inner.file(GOOD).id)["id"]
    until(lambda: service.client.get(later).status == "queued", "the next job's validation")
    assert service.client.get(job).status == "cancelled"
    service.client.cancel(later)


def test_a_kill_at_the_end_of_a_validation_loses_nothing(inner, service):
    file = inner.file(GOOD)
    killed_at(service, inner, FileFailpoint.VALIDATED, "submit", SubmitArgs(training_file=file.id))
    [job] = [job for job in service.client.list() if job.training_file == file.id]
    kinds = until(lambda: "queued" in (kinds := types(service, job.id)) and kinds, "the validation")
    assert kinds == ["job_created", "validating", "data_validated", "queued"]
    service.client.cancel(job.id)
