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
    if "world" in request.fixturenames:
        world = request.getfixturevalue("world")
        world.http.refused.clear()
        serve(world, ONE)


def serve(world: ServiceUnderTest, served: BasePrint) -> None:
    """The scheduler comes (back) and serves this."""
    if hasattr(world, "scheduler"):
        world.scheduler.restart(served)
    else:
        world.join_scheduler(base=served)
    until(lambda: world.client.status().service["scheduler_pid"] == world.scheduler.pid, "the hello")
    assert world.client.status().service["base"] == served.shown


def told(world: ServiceUnderTest) -> Any:
    """The newest state of the service that is no mere sign of life."""
    return next(state for state in reversed(world.http.states) if state.others is not None)


def half_done(world: ServiceUnderTest) -> Any:
    """A job that was paused after its second step."""
    world.scheduler.hold_at = 2
    job = world.client.submit(pairs(), n_epochs=1, checkpoint_every=0)
    world.at_step(job, 2)
    world.client.pause(job.id)
    world.status(job, "paused")
    world.scheduler.hold_at = None
    return job


def test_a_job_of_another_base_waits_and_those_behind_it_do_not(world: ServiceUnderTest) -> None:
    job = half_done(world)
    serve(world, TWO)
    assert world.client.resume(job.id).reason == f"{NAMED}"
    queued = world.client.submit(pairs(4))
    assert (queued.model, world.done(queued).base) == ("org/tiny", TWO.shown)
    waits = world.client.get(job.id)
    assert (waits.status, waits.reason, waits.attempt) == ("queued", NAMED, 1)
    serve(world, ONE)
    done = world.done(job)
    assert [start.step for start in world.scheduler.starts if start.spec.job == job.id][-1] == 2
    assert (done.attempt, done.base) == (2, ONE.shown)
    config, _ = world.http.published[str(done.fine_tuned_model)]
    assert config["base_model_name_or_path"] == "/models/1"


def test_an_update_of_the_weights_is_another_base_and_an_update_back_is_the_first(
    world: ServiceUnderTest,
) -> None:
    job = half_done(world)
    world.scheduler.update_weights(base(1, path="/models/1-again"))  # the same weights
    until(lambda: world.client.status().service["base"] == "org/tiny (/models/1-again)", "the hello")
    world.scheduler.update_weights(TWO)
    until(lambda: world.client.status().service["base"] == TWO.shown, "the hello")
    world.client.resume(job.id)
    assert world.client.get(job.id).reason == NAMED
    world.done(world.client.submit(pairs(4)))
    world.scheduler.update_weights(ONE)
    world.done(job)


def test_a_start_that_an_update_overtakes_is_not_trained_on_the_new_weights(world: ServiceUnderTest) -> None:
    job = half_done(world)
    world.scheduler.base, world.scheduler.updates = TWO, 1  # its hello is on the way
    world.client.resume(job.id)
    until(lambda: world.client.get(job.id).reason == NAMED, "the reason")
    assert [s.spec.attempt for s in world.scheduler.starts if s.spec.job == job.id] == [1]
    said = "the served weights were updated"
    until(lambda: any(said in e.message for e in world.client.events(job.id)), "the event")


def test_adapters_of_another_base_are_named_and_refused_and_come_back_with_it(
    world: ServiceUnderTest,
) -> None:
    name = str(world.done(world.client.submit(pairs(4), suffix="one")).fine_tuned_model)
    until(lambda: name in told(world).adapters, "the adapter's name")
    world.scheduler.update_weights(TWO)
    until(lambda: name in (told(world).others or {}).get(NAMED, []), "the others")
    assert name not in told(world).adapters
    published = len(world.http.publications)
    world.http.want(name)
    until(lambda: world.http.refused, "the refusal")
    refused = world.http.refused[-1]
    assert (refused.name, refused.code, refused.text) == (name, "other_base", NAMED)
    assert len(world.http.publications) == published
    world.scheduler.update_weights(ONE)
    until(lambda: name in told(world).adapters, "the adapter's name")
    assert name not in (told(world).others or {}).get(NAMED, [])
    world.http.want(name)
    until(lambda: len(world.http.publications) == published + 1, "the publication")


@pytest.mark.parametrize("restarts", [False, True])
def test_on_weights_that_nobody_knows_no_job_runs_and_no_adapter_is_offered(own: Any, restarts: bool) -> None:
    world = own(peers=False)
    serve(world, ONE)
    world.join_http()
    name = str(world.done(world.client.submit(pairs(4), suffix="one")).fine_tuned_model)
    until(lambda: name in told(world).adapters, "the adapter's name")
    world.scheduler.update_weights(None)
    until(lambda: world.client.status().service["base"] is None, "the hello")
    if restarts:
        world.service.kill()
        world.service.start()
        new = world.service.process.pid
        until(lambda: any(state.pid == new for state in world.http.states), "the new service's state")
    until(lambda: name in (told(world).others or {}).get(UNKNOWN, []), "the others")
    assert name not in told(world).adapters
    job = world.client.submit(pairs(4))
    until(lambda: world.client.get(job.id).reason == UNKNOWN, "the reason")
    published = len(world.http.publications)
    world.http.want(name)
    until(lambda: world.http.refused, "the refusal")
    assert (world.http.refused[-1].name, world.http.refused[-1].text) == (name, UNKNOWN)
    assert len(world.http.publications) == published
    world.scheduler.base = TWO  # as it was found to be
    world.scheduler.hold_runs("")
    assert world.done(job).base == TWO.shown
    assert name in (told(world).others or {}).get(NAMED, [])


def test_an_adapter_is_not_published_on_another_base(own: Any) -> None:
    world = own(peers=False)
    serve(world, ONE)
    job = world.client.submit(pairs(4))
    until(lambda: world.client.get(job.id).sub_state == "publishing", "the end of training")
    serve(world, TWO)
    world.join_http()
    other = world.done(world.client.submit(pairs(4)))  # publication goes on
    waits = world.client.get(job.id)
    assert (waits.status, waits.sub_state, waits.reason) == ("running", "publishing", NAMED)
    assert world.http.publications == [other.fine_tuned_model]
    serve(world, ONE)
    world.done(job)


def test_a_job_that_waits_for_its_base_can_be_cancelled(own: Any) -> None:
    world = own(peers=False)
    serve(world, ONE)
    trained = world.client.submit(pairs(4))
    until(lambda: world.client.get(trained.id).sub_state == "publishing", "the end of training")
    half = half_done(world)
    serve(world, TWO)
    world.client.resume(half.id)
    for job in (trained, half):
        world.client.cancel(job.id)
        world.done(job, "cancelled")


# ------------------------------------------------------------------ submit --resume-from
def test_a_job_is_continued_where_its_base_has_another_name_or_dtype(world: ServiceUnderTest) -> None:
    first = world.done(world.client.submit(pairs(4), n_epochs=1))
    weights = {"model.norm.weight": (1.0, 1.0)}
    serve(world, base(1, model="tiny", path="/elsewhere/tiny", dtype="float32", digest="x", weights=weights))
    again = world.done(world.client.submit(resume_from=first.id, n_epochs=2))
    config, _ = world.http.published[str(again.fine_tuned_model)]
    assert config["base_model_name_or_path"] == "/models/1"


@pytest.mark.parametrize("served", [TWO, base(1, math={"hidden_size": 64, "rms_norm_eps": 1e-5})])
def test_a_job_is_not_continued_on_another_base_of_the_same_name(
    world: ServiceUnderTest, served: BasePrint
) -> None:
    first = world.done(world.client.submit(pairs(4), n_epochs=1))
    serve(world, served)
    with pytest.raises(ConfigError) as caught:
        world.client.submit(resume_from=first.id, n_epochs=2)
    assert caught.value.param == "resume_from"
    assert f"its base is {ONE.shown}, and this server serves {served.shown}: their" in caught.value.message


# ------------------------------------------------------------------ jobs without a noted base
def bases(world: ServiceUnderTest) -> dict[str, str | None]:
    with sqlite3.connect(world.run_dir / "harli.db") as store:
        bodies = [json.loads(body) for (body,) in store.execute("SELECT body FROM jobs")]
    return {body["id"]: (body.get("base") or {}).get("digest") for body in bodies}


def test_a_job_that_was_accepted_before_the_first_hello_takes_its_base(own: Any) -> None:
    world = own(peers=False)
    world.join_http()
    job = world.client.submit(pairs(4))
    assert bases(world) == {job.id: None}
    serve(world, ONE)
    world.done(job)
    assert bases(world) == {job.id: "1"}


def test_records_of_version_0_1_take_the_first_base_and_one_line_says_so(own: Any) -> None:
    world = own(peers=False)
    world.join_http()
    serve(world, ONE)
    done = [world.done(world.client.submit(pairs(4))) for _ in range(2)]
    half = half_done(world)
    world.service.kill()
    with sqlite3.connect(world.run_dir / "harli.db") as store:
        for job, body in list(store.execute("SELECT id, body FROM jobs")):
            record = json.loads(body)
            del record["base"], record["admitted"]
            store.execute("UPDATE jobs SET body = ? WHERE id = ?", (json.dumps(record), job))
    world.scheduler.restart(TWO)
    world.service.start()
    until(lambda: set(bases(world).values()) == {"2"}, "the base")
    [line] = [text for text in world.service.log.read_text().splitlines() if "without a noted base" in text]
    assert TWO.shown in line and all(job.id[-8:] in line for job in (*done, half))
    world.client.resume(half.id)
    world.done(half)
    assert set(told(world).adapters) >= {job.fine_tuned_model for job in done}


# ------------------------------------------------------------------ other limits
def test_a_job_that_fitted_its_server_waits_for_one_that_it_fits(world: ServiceUnderTest) -> None:
    world.scheduler.hold.clear()
    running, job = (world.client.submit(pairs(4), lora_r=16) for _ in range(2))
    world.status(running, "running")
    assert world.scheduler.limits is not None
    world.scheduler.limits = limits(max_lora_rank=8)
    serve(world, ONE)
    world.scheduler.hold.set()
    reason = until(lambda: r if "fit" in (r := world.client.get(job.id).reason or "") else "", "why")
    assert reason.startswith("it does not fit this server: lora_r=16 is not accepted")
    world.scheduler.hold_runs("the served model is being checked")
    until(lambda: world.client.status().service["hold"], "the hold")
    assert world.client.get(job.id).reason == reason
    world.scheduler.hold_runs("")
    world.done(world.client.submit(pairs(4), lora_r=8))
    world.scheduler.limits = limits()
    serve(world, ONE)
    for waits in (running, job):
        world.done(waits)


def test_a_job_that_no_hello_had_admitted_fails_where_it_does_not_fit(own: Any) -> None:
    world = own(peers=False)
    job = world.client.submit(pairs(4), lora_r=16)
    world.join_scheduler(base=ONE, max_lora_rank=8)
    failed = world.done(job, "failed")
    assert failed.error is not None and failed.error.param == "lora_r"


# ------------------------------------------------------------------ a scheduler that takes no run
def test_what_the_scheduler_waits_for_is_the_reason_of_queued_jobs(world: ServiceUnderTest) -> None:
    half = half_done(world)
    serve(world, TWO)
    world.scheduler.hold_runs("the served model is being checked")
    until(lambda: world.client.status().service["hold"], "the hold")
    job = world.client.submit(pairs(4))
    assert world.client.get(job.id).reason == "the served model is being checked"
    assert world.client.resume(half.id).reason == NAMED, "what does not pass by itself comes first"
    world.scheduler.hold_runs("")
    world.done(job)
    assert world.client.cancel(half.id).reason != NAMED
