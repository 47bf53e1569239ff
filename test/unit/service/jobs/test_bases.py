"""A job belongs to one base: elsewhere it waits and says so, and its adapter is not offered."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest

from sglang_harli.errors import ConfigError
from sglang_harli.protocol.base_print import BasePrint
from sglang_harli.service.jobs.served_base import UNKNOWN
from support.service.service_fixture import ServiceUnderTest, pairs, until
from support.service.service_peers import limits


def base(number: float, **values: Any) -> BasePrint:
    fields: dict[str, Any] = {
        "model": "org/tiny",
        "path": f"/models/{number:g}",
        "dtype": "bfloat16",
        "math": {"hidden_size": 64, "rms_norm_eps": 1e-6},
        "weights": {"model.norm.weight": (number, 1.0)},
        "digest": f"{number:g}",
    }
    return BasePrint(**(fields | values))


ONE, TWO = base(1), base(2)
NAMED = "its base is org/tiny (/models/1), and this server serves org/tiny (/models/2): their weights differ"


@pytest.fixture(autouse=True)
def serves_one(request: pytest.FixtureRequest) -> None:
    """The shared service's scheduler serves ONE at the beginning of each test."""
    if "rig" in request.fixturenames:
        rig = request.getfixturevalue("rig")
        rig.http.refused.clear()
        serve(rig, ONE)


def serve(rig: ServiceUnderTest, served: BasePrint) -> None:
    """The scheduler comes (back) and serves this."""
    if hasattr(rig, "scheduler"):
        rig.scheduler.restart(served)
    else:
        rig.join_scheduler(base=served)
    until(lambda: rig.client.status().service["scheduler_pid"] == rig.scheduler.pid, "the hello")
    assert rig.client.status().service["base"] == served.shown


def told(rig: ServiceUnderTest) -> Any:
    """The newest state of the service that is no mere sign of life."""
    return next(state for state in reversed(rig.http.states) if state.others is not None)


def half_done(rig: ServiceUnderTest) -> Any:
    """A job that was paused after its second step."""
    rig.scheduler.hold_at = 2
    job = rig.client.submit(pairs(), n_epochs=1, checkpoint_every=0)
    rig.at_step(job, 2)
    rig.client.pause(job.id)
    rig.status(job, "paused")
    rig.scheduler.hold_at = None
    return job


def test_a_job_of_another_base_waits_and_those_behind_it_do_not(rig: ServiceUnderTest) -> None:
    job = half_done(rig)
    serve(rig, TWO)
    assert rig.client.resume(job.id).reason == f"{NAMED}"
    queued = rig.client.submit(pairs(4))
    assert (queued.model, rig.done(queued).base) == ("org/tiny", TWO.shown)
    waits = rig.client.get(job.id)
    assert (waits.status, waits.reason, waits.attempt) == ("queued", NAMED, 1)
    serve(rig, ONE)
    done = rig.done(job)
    assert [start.step for start in rig.scheduler.starts if start.spec.job == job.id][-1] == 2
    assert (done.attempt, done.base) == (2, ONE.shown)
    config, _ = rig.http.published[str(done.fine_tuned_model)]
    assert config["base_model_name_or_path"] == "/models/1"


def test_an_update_of_the_weights_is_another_base_and_an_update_back_is_the_first(
    rig: ServiceUnderTest,
) -> None:
    job = half_done(rig)
    rig.scheduler.update_weights(base(1, path="/models/1-again"))  # the same weights
    until(lambda: rig.client.status().service["base"] == "org/tiny (/models/1-again)", "the hello")
    rig.scheduler.update_weights(TWO)
    until(lambda: rig.client.status().service["base"] == TWO.shown, "the hello")
    rig.client.resume(job.id)
    assert rig.client.get(job.id).reason == NAMED
    rig.done(rig.client.submit(pairs(4)))
    rig.scheduler.update_weights(ONE)
    rig.done(job)


def test_a_start_that_an_update_overtakes_is_not_trained_on_the_new_weights(rig: ServiceUnderTest) -> None:
    job = half_done(rig)
    rig.scheduler.base, rig.scheduler.updates = TWO, 1  # its hello is on the way
    rig.client.resume(job.id)
    until(lambda: rig.client.get(job.id).reason == NAMED, "the reason")
    assert [s.spec.attempt for s in rig.scheduler.starts if s.spec.job == job.id] == [1]
    said = "the served weights were updated"
    until(lambda: any(said in e.message for e in rig.client.events(job.id)), "the event")


def test_adapters_of_another_base_are_named_and_refused_and_come_back_with_it(
    rig: ServiceUnderTest,
) -> None:
    name = str(rig.done(rig.client.submit(pairs(4), suffix="one")).fine_tuned_model)
    until(lambda: name in told(rig).adapters, "the adapter's name")
    rig.scheduler.update_weights(TWO)
    until(lambda: name in (told(rig).others or {}).get(NAMED, []), "the others")
    assert name not in told(rig).adapters
    published = len(rig.http.publications)
    rig.http.want(name)
    until(lambda: rig.http.refused, "the refusal")
    refused = rig.http.refused[-1]
    assert (refused.name, refused.code, refused.text) == (name, "other_base", NAMED)
    assert len(rig.http.publications) == published
    rig.scheduler.update_weights(ONE)
    until(lambda: name in told(rig).adapters, "the adapter's name")
    assert name not in (told(rig).others or {}).get(NAMED, [])
    rig.http.want(name)
    until(lambda: len(rig.http.publications) == published + 1, "the publication")


@pytest.mark.parametrize("restarts", [False, True])
def test_on_weights_that_nobody_knows_no_job_runs_and_no_adapter_is_offered(own: Any, restarts: bool) -> None:
    rig = own(peers=False)
    serve(rig, ONE)
    rig.join_http()
    name = str(rig.done(rig.client.submit(pairs(4), suffix="one")).fine_tuned_model)
    until(lambda: name in told(rig).adapters, "the adapter's name")
    rig.scheduler.update_weights(None)
    until(lambda: rig.client.status().service["base"] is None, "the hello")
    if restarts:
        rig.service.kill()
        rig.service.start()
        new = rig.service.process.pid
        until(lambda: any(state.pid == new for state in rig.http.states), "the new service's state")
    until(lambda: name in (told(rig).others or {}).get(UNKNOWN, []), "the others")
    assert name not in told(rig).adapters
    job = rig.client.submit(pairs(4))
    until(lambda: rig.client.get(job.id).reason == UNKNOWN, "the reason")
    published = len(rig.http.publications)
    rig.http.want(name)
    until(lambda: rig.http.refused, "the refusal")
    assert (rig.http.refused[-1].name, rig.http.refused[-1].text) == (name, UNKNOWN)
    assert len(rig.http.publications) == published
    rig.scheduler.base = TWO  # as it was found to be
    rig.scheduler.hold_runs("")
    assert rig.done(job).base == TWO.shown
    assert name in (told(rig).others or {}).get(NAMED, [])


def test_an_adapter_is_not_published_on_another_base(own: Any) -> None:
    rig = own(peers=False)
    serve(rig, ONE)
    job = rig.client.submit(pairs(4))
    until(lambda: rig.client.get(job.id).sub_state == "publishing", "the end of training")
    serve(rig, TWO)
    rig.join_http()
    other = rig.done(rig.client.submit(pairs(4)))  # publication goes on
    waits = rig.client.get(job.id)
    assert (waits.status, waits.sub_state, waits.reason) == ("running", "publishing", NAMED)
    assert rig.http.publications == [other.fine_tuned_model]
    serve(rig, ONE)
    rig.done(job)


def test_a_job_that_waits_for_its_base_can_be_cancelled(own: Any) -> None:
    rig = own(peers=False)
    serve(rig, ONE)
    trained = rig.client.submit(pairs(4))
    until(lambda: rig.client.get(trained.id).sub_state == "publishing", "the end of training")
    half = half_done(rig)
    serve(rig, TWO)
    rig.client.resume(half.id)
    for job in (trained, half):
        rig.client.cancel(job.id)
        rig.done(job, "cancelled")


# ------------------------------------------------------------------ submit --resume-from
def test_a_job_is_continued_where_its_base_has_another_name_or_dtype(rig: ServiceUnderTest) -> None:
    first = rig.done(rig.client.submit(pairs(4), n_epochs=1))
    weights = {"model.norm.weight": (1.0, 1.0)}
    serve(rig, base(1, model="tiny", path="/elsewhere/tiny", dtype="float32", digest="x", weights=weights))
    again = rig.done(rig.client.submit(resume_from=first.id, n_epochs=2))
    config, _ = rig.http.published[str(again.fine_tuned_model)]
    assert config["base_model_name_or_path"] == "/models/1"


@pytest.mark.parametrize("served", [TWO, base(1, math={"hidden_size": 64, "rms_norm_eps": 1e-5})])
def test_a_job_is_not_continued_on_another_base_of_the_same_name(
    rig: ServiceUnderTest, served: BasePrint
) -> None:
    first = rig.done(rig.client.submit(pairs(4), n_epochs=1))
    serve(rig, served)
    with pytest.raises(ConfigError) as caught:
        rig.client.submit(resume_from=first.id, n_epochs=2)
    assert caught.value.param == "resume_from"
    assert f"its base is {ONE.shown}, and this server serves {served.shown}: their" in caught.value.message


# ------------------------------------------------------------------ jobs without a noted base
def bases(rig: ServiceUnderTest) -> dict[str, str | None]:
    with sqlite3.connect(rig.run_dir / "harli.db") as store:
        bodies = [json.loads(body) for (body,) in store.execute("SELECT body FROM jobs")]
    return {body["id"]: (body.get("base") or {}).get("digest") for body in bodies}


def test_a_job_that_was_accepted_before_the_first_hello_takes_its_base(own: Any) -> None:
    rig = own(peers=False)
    rig.join_http()
    job = rig.client.submit(pairs(4))
    assert bases(rig) == {job.id: None}
    serve(rig, ONE)
    rig.done(job)
    assert bases(rig) == {job.id: "1"}


def test_records_of_version_0_1_take_the_first_base_and_one_line_says_so(own: Any) -> None:
    rig = own(peers=False)
    rig.join_http()
    serve(rig, ONE)
    done = [rig.done(rig.client.submit(pairs(4))) for _ in range(2)]
    half = half_done(rig)
    rig.service.kill()
    with sqlite3.connect(rig.run_dir / "harli.db") as store:
        for job, body in list(store.execute("SELECT id, body FROM jobs")):
            record = json.loads(body)
            del record["base"], record["admitted"]
            store.execute("UPDATE jobs SET body = ? WHERE id = ?", (json.dumps(record), job))
    rig.scheduler.restart(TWO)
    rig.service.start()
    until(lambda: set(bases(rig).values()) == {"2"}, "the base")
    [line] = [text for text in rig.service.log.read_text().splitlines() if "without a noted base" in text]
    assert TWO.shown in line and all(job.id[-8:] in line for job in (*done, half))
    rig.client.resume(half.id)
    rig.done(half)
    assert set(told(rig).adapters) >= {job.fine_tuned_model for job in done}


# ------------------------------------------------------------------ other limits
def test_a_job_that_fitted_its_server_waits_for_one_that_it_fits(rig: ServiceUnderTest) -> None:
    rig.scheduler.hold.clear()
    running, job = (rig.client.submit(pairs(4), lora_r=16) for _ in range(2))
    rig.status(running, "running")
    assert rig.scheduler.limits is not None
    rig.scheduler.limits = limits(max_lora_rank=8)
    serve(rig, ONE)
    rig.scheduler.hold.set()
    reason = until(lambda: r if "fit" in (r := rig.client.get(job.id).reason or "") else "", "why")
    assert reason.startswith("it does not fit this server: lora_r=16 is not accepted")
    rig.scheduler.hold_runs("the served model is being checked")
    until(lambda: rig.client.status().service["hold"], "the hold")
    assert rig.client.get(job.id).reason == reason
    rig.scheduler.hold_runs("")
    rig.done(rig.client.submit(pairs(4), lora_r=8))
    rig.scheduler.limits = limits()
    serve(rig, ONE)
    for waits in (running, job):
        rig.done(waits)


def test_a_job_that_no_hello_had_admitted_fails_where_it_does_not_fit(own: Any) -> None:
    rig = own(peers=False)
    job = rig.client.submit(pairs(4), lora_r=16)
    rig.join_scheduler(base=ONE, max_lora_rank=8)
    failed = rig.done(job, "failed")
    assert failed.error is not None and failed.error.param == "lora_r"


# ------------------------------------------------------------------ a scheduler that takes no run
def test_what_the_scheduler_waits_for_is_the_reason_of_queued_jobs(rig: ServiceUnderTest) -> None:
    half = half_done(rig)
    serve(rig, TWO)
    rig.scheduler.hold_runs("the served model is being checked")
    until(lambda: rig.client.status().service["hold"], "the hold")
    job = rig.client.submit(pairs(4))
    assert rig.client.get(job.id).reason == "the served model is being checked"
    assert rig.client.resume(half.id).reason == NAMED, "what does not pass by itself comes first"
    rig.scheduler.hold_runs("")
    rig.done(job)
    assert rig.client.cancel(half.id).reason != NAMED
