"""Checkpoints by the unmodified openai client: what is listed answers, against the real service."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from safetensors.numpy import load_file

from sglang_harli import run_paths
from sglang_harli.errors import NotFoundError
from sglang_harli.failpoints import FAULT_POINTS_ENV, Failpoint, FileFailpoint
from sglang_harli.managers.http.openai.access import Access
from sglang_harli.protocol.public import Job
from support.api_server import ApiServer
from support.service.inner_calls import InnerCalls
from support.service.service_fixture import ServiceUnderTest, pairs, until
from support.tokenizer import make_tokenizer_folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("service")
    points = folder / "points"
    points.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT_POINTS_ENV, str(points))
        model = make_tokenizer_folder(folder / "model")
        rig: Any = ServiceUnderTest(folder, model, keep_checkpoints=3)
        rig.points = points
        yield rig
        rig.close()


@pytest.fixture(scope="module")
def client(service: ServiceUnderTest) -> Iterator[OpenAI]:
    server = ApiServer(run_paths.verbs_endpoint(str(service.run_dir)), access=Access("secret")).start()
    with OpenAI(base_url=server.base_url, api_key="secret", max_retries=0) as client:
        client.server = server  # type: ignore[attr-defined]
        yield client
    server.stop()


def train(service: ServiceUnderTest, upto: int = 8) -> Job:
    """A job of eight steps that has gone so far, with a checkpoint at every second one; three are
    kept."""
    scheduler = service.scheduler
    scheduler.hold_at = 0
    job = service.client.submit(pairs(8), suffix="mine", n_epochs=4, checkpoint_every=2)
    until(lambda: scheduler.can_save(job.id), "a place for checkpoints")
    for step in range(2, upto + 1, 2):
        scheduler.hold_at = step
        saved = service.folder(job) / "checkpoints" / f"step-{step}"
        until(saved.exists, "the checkpoint")
        if step < 8:
            until(lambda: scheduler.can_save(job.id), "a place for the next one")
    return service.done(job) if upto == 8 else service.client.get(job.id)


def listed(client: OpenAI, job: Job, **more: Any) -> list[Any]:
    return list(client.fine_tuning.jobs.checkpoints.list(job.id, **more))


def state(service: ServiceUnderTest, job: Job, step: int) -> np.ndarray:
    """The adapter in a state checkpoint."""
    path = service.folder(job) / "checkpoints" / f"step-{step}" / "state.safetensors"
    [tensor] = [value for name, value in load_file(path).items() if name.startswith("adapter/")]
    return tensor


def brought(service: ServiceUnderTest, name: str) -> np.ndarray:
    """What is published when a request asks for the name."""
    assert service.http is not None
    service.http.published.pop(name, None)
    service.http.want(name)
    _, tensors = until(lambda: service.http.published.get(name), f"the publication of {name}")
    [tensor] = tensors.values()
    return tensor


def refused(service: ServiceUnderTest, name: str) -> tuple[str, str]:
    assert service.http is not None
    service.http.refused.clear()
    service.http.want(name)
    until(lambda: service.http.refused, "the refusal")
    [said] = service.http.refused
    return said.code, said.text


def restarted(service: ServiceUnderTest) -> list[str]:
    """The names that a service tells of after a kill."""
    service.service.kill()
    service.http.states.clear()
    service.service.start()

    def told() -> list[list[str]]:
        return [s.adapters for s in service.http.states if s.others is not None and s.scheduler_seen]

    return until(told, "its state")[-1]


def test_listed_checkpoints_answer_under_their_names(client, service):
    job = service.done(train(service))
    found = listed(client, job)
    assert [c.step_number for c in found] == [8, 6, 4]
    names = [c.fine_tuned_model_checkpoint for c in found]
    model = job.fine_tuned_model
    assert names == [model, f"{model}-step-6", f"{model}-step-4"]
    for one in found:
        assert (one.object, one.fine_tuning_job_id) == ("fine_tuning.job.checkpoint", job.id)
        assert one.id.startswith("ftckpt-") and job.created_at - 1 <= one.created_at
        step = one.step_number
        assert one.metrics.to_dict() == {
            "step": step,
            "train_loss": 4.0 / step,
            "train_mean_token_accuracy": 0.25,
        }
    assert [c.id for c in listed(client, job, limit=1)] == [c.id for c in found], "page by page"
    assert [
        c.id for c in client.fine_tuning.jobs.checkpoints.list(job.id, after=found[0].id, limit=1).data
    ] == [found[1].id]
    for step, name in zip((8, 6, 4), names, strict=True):
        np.testing.assert_array_equal(brought(service, name), state(service, job, step))
    np.testing.assert_array_equal(brought(service, f"{model}-step-8"), state(service, job, 8))
    assert (service.folder(job) / "adapters" / "step-6" / "adapter_config.json").exists()

    told = restarted(service)
    assert set(told) >= {model, f"{model}-step-6", f"{model}-step-4"}, "as an adapter that was evicted"
    np.testing.assert_array_equal(brought(service, names[1]), state(service, job, 6))
    until(lambda: client.server.calls.connected, "the service")


def test_what_is_not_kept_is_refused_with_a_sentence(client, service):
    job = service.done(train(service))
    model = job.fine_tuned_model
    code, text = refused(service, f"{model}-step-2")
    assert code == "not_found" and "has no checkpoint of step 2" in text and "4, 6, 8" in text
    assert refused(service, "tiny-ft-none-12345678-step-2")[0] == "not_found"
    brought(service, f"{model}-step-4")
    shutil.rmtree(service.folder(job) / "checkpoints" / "step-4")
    assert refused(service, f"{model}-step-4")[0] == "not_found"
    assert [c.step_number for c in listed(client, job)] == [8, 6]
    assert f"{model}-step-4" not in restarted(service)
    until(lambda: client.server.calls.connected, "the service")
    with pytest.raises(openai.NotFoundError):
        listed(client, job, after="ftckpt-other-6")
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.checkpoints.list("ftjob-none")
    with pytest.raises(openai.BadRequestError):
        listed(client, job, limit=0)


def test_a_running_jobs_checkpoints_answer_and_a_cancelled_ones_stay(client, service):
    job = train(service, upto=4)
    assert [c.step_number for c in listed(client, job)] == [4, 2]
    first = listed(client, job)[-1].fine_tuned_model_checkpoint
    assert first.endswith("-step-2")
    np.testing.assert_array_equal(brought(service, first), state(service, job, 2))
    exported = service.folder(job) / "adapters" / "step-2"
    assert exported.is_dir() and not (service.folder(job) / "adapters" / "step-2.tmp").exists()
    service.client.cancel(job.id)
    service.done(job, "cancelled")
    found = listed(client, job)
    assert [c.step_number for c in found] == [4, 2]
    for one in found:
        brought_one = brought(service, one.fine_tuned_model_checkpoint)
        np.testing.assert_array_equal(brought_one, state(service, job, one.step_number))
    assert service.client.get(job.id).status == "cancelled"


def test_what_is_pruned_goes_with_its_adapter(client, service):
    job = train(service, upto=6)
    first = listed(client, job)[-1]
    assert first.step_number == 2
    brought(service, first.fine_tuned_model_checkpoint)
    exported = service.folder(job) / "adapters" / "step-2"
    assert exported.is_dir()
    service.scheduler.hold_at = None
    service.done(job)
    until(lambda: not exported.exists(), "the end of what was pruned")
    assert refused(service, first.fine_tuned_model_checkpoint)[0] == "not_found"
    assert first.fine_tuned_model_checkpoint not in restarted(service)
    until(lambda: client.server.calls.connected, "the service")


def test_a_checkpoint_is_deleted_as_a_model(client, service):
    job = service.done(train(service))
    model = job.fine_tuned_model
    brought(service, f"{model}-step-6")
    calls = InnerCalls(service.run_dir)
    try:
        with pytest.raises(NotFoundError):
            calls.call("model_delete", {"model": f"{model}-step-2"})
        for name in (f"{model}-step-6", model):
            gone = calls.call("model_delete", {"model": name})
            assert (gone["model"], gone["again"]) == (name, False)
        for name in (f"{model}-step-6", f"{model}-step-8"):
            assert calls.call("model_delete", {"model": name})["again"], "the last state is the model"
            assert refused(service, name) == ("not_found", "it was deleted")
    finally:
        calls.close()
    assert [c.step_number for c in listed(client, job)] == [4]
    assert not {model, f"{model}-step-6"} & set(restarted(service))
    until(lambda: client.server.calls.connected, "the service")


@pytest.mark.parametrize("point", [Failpoint.ADAPTER_EXPORTED, FileFailpoint.CHECKPOINT_NOTED])
def test_a_kill_while_a_checkpoint_is_made_servable_loses_nothing(client, service, point):
    job = service.done(train(service))
    name = f"{job.fine_tuned_model}-step-6"
    (service.points / point).write_text("stop")
    service.http.want(name)
    hit: Path = service.points / f"{point}.hit"
    until(hit.exists, "the service at the point")
    os.kill(int(hit.read_text()), signal.SIGKILL)
    service.service.process.wait()
    hit.unlink()
    service.http.states.clear()
    service.service.start()
    until(lambda: [s for s in service.http.states if s.scheduler_seen], "its state")
    np.testing.assert_array_equal(brought(service, name), state(service, job, 6))
    until(lambda: client.server.calls.connected, "the service")
    assert [c.step_number for c in listed(client, job)] == [8, 6, 4]
