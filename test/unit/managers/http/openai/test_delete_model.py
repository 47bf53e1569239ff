"""Models are deleted by the unmodified openai client, against the routes and the real service."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from sglang_harli import run_paths
from sglang_harli.errors import ConfigError, NotFoundError
from sglang_harli.failpoints import FAULT_POINTS_ENV, FileFailpoint
from sglang_harli.managers.http.openai.access import Access
from support.api_server import ApiServer
from support.service.inner_calls import InnerCalls
from support.service.service_fixture import ServiceUnderTest, pairs, until
from support.tokenizer import make_tokenizer_folder

ROWS = "".join(json.dumps(row) + "\n" for row in pairs(4)).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("service")
    points = folder / "points"
    points.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT_POINTS_ENV, str(points))
        rig: Any = ServiceUnderTest(folder, make_tokenizer_folder(folder / "model"))
        rig.points = points
        yield rig
        rig.close()


@pytest.fixture(scope="module")
def server(service: ServiceUnderTest) -> Iterator[ApiServer]:
    server = ApiServer(run_paths.verbs_endpoint(str(service.run_dir)), access=Access("k", "admin")).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="admin", max_retries=0) as client:
        yield client


@pytest.fixture
def calls(service: ServiceUnderTest) -> Iterator[InnerCalls]:
    calls = InnerCalls(service.run_dir)
    yield calls
    calls.close()


def trained(service: ServiceUnderTest) -> Any:
    return service.done(service.client.submit(pairs(4), n_epochs=1))


def told(service: ServiceUnderTest) -> list[str]:
    """The adapters that the service would have loaded when they are asked for."""
    assert service.http is not None
    states = reversed(service.http.states)
    return next((state.adapters for state in states if state.others is not None), [])


def not_found(client: OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match=name) as caught:
        client.models.delete(name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_model_is_deleted_for_good(client, server, service, calls):
    kept, job = trained(service), trained(service)
    name = job.fine_tuned_model
    alias = f"{name}-step-{job.step}"  # the same state, asked for as a checkpoint
    server.models.names = {name, alias, kept.fine_tuned_model}
    until(lambda: {name, kept.fine_tuned_model} <= set(told(service)), "the names")
    assert client.models.delete(name).to_dict() == {"id": name, "object": "model", "deleted": True}
    assert server.models.unloaded == [(alias, True), (name, True)]
    not_found(client, name)
    not_found(client, alias)
    until(lambda: name not in told(service), "the state without the name")

    found = client.fine_tuning.jobs.retrieve(job.id)
    assert (found.status, found.fine_tuned_model) == ("succeeded", name), "as in OpenAI's API"
    assert found.model_extra["harli"]["deleted_models"] == [name]
    last = list(service.client.events(job.id))[-1]
    assert (last.type, last.data) == ("model_deleted", {"model": name})
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError, match="was deleted") as caught:
        client.fine_tuning.jobs.create(model=name, training_file=file)
    assert caught.value.param == "model"
    with pytest.raises(ConfigError, match="was deleted"):
        service.client.submit(resume_from=job.id, n_epochs=2)

    service.service.kill()
    service.http.states.clear()
    service.service.start()
    until(lambda: kept.fine_tuned_model in told(service), "the names")
    assert name not in told(service)
    service.http.want(name)
    refused = until(lambda: service.http.refused and service.http.refused[-1], "the refusal")
    assert (refused.name, refused.code, refused.text) == (name, "not_found", "it was deleted")


def test_a_kill_when_it_is_stored_deletes_it_too(client, server, service, calls):
    name = trained(service).fine_tuned_model
    (service.points / FileFailpoint.MODEL_DELETED).write_text("stop")
    calls.send("model_delete", {"model": name})
    hit = service.points / f"{FileFailpoint.MODEL_DELETED}.hit"
    until(hit.exists, "the service at the point")
    os.kill(int(hit.read_text()), signal.SIGKILL)
    service.service.process.wait()
    service.service.start()
    service.client.status()
    server.models.names = {name}  # the server has been there all the time
    assert calls.call("model_delete", {"model": name})["again"]
    until(lambda: server.calls.connected, "the service")
    assert client.models.delete(name).deleted, "it is unloaded now"
    not_found(client, name)
    with pytest.raises(NotFoundError):
        calls.call("model_delete", {"model": "tiny-ft-none"})


def test_a_model_that_is_being_published_is_not_deleted_for_a_while_only(client, server, service):
    service.http.passing, service.http.refuse = True, 1  # it is published a moment later
    job = service.client.submit(pairs(4), n_epochs=1)
    until(lambda: service.client.get(job.id).sub_state == "publishing", "the publication")
    name = f"tiny-ft-{job.id[-8:]}"
    server.models.names, server.models.unloaded = {name}, []  # it answers, and the job does not know yet
    with pytest.raises(openai.RateLimitError, match="is being published"):
        client.models.delete(name)
    assert server.models.unloaded == []
    assert service.done(job).fine_tuned_model == name
    service.http.passing = False
    assert client.models.delete(name).deleted and service.client.get(job.id).deleted_models == [name]


@pytest.mark.parametrize("name", ["mine", "org/mine", "org/a b:c/ü"])
def test_an_adapter_of_the_operator_is_unloaded(client, server, name):
    server.models.names, server.models.unloaded = {name}, []
    assert client.models.delete(name).id == name
    assert server.models.unloaded == [(name, False)]
    not_found(client, name)


def test_names_may_be_percent_encoded_and_odd_ones_are_not_found(server):
    server.models.names = {"org/mine", "mine"}
    admin = {"Authorization": "Bearer admin"}
    assert httpx.delete(f"{server.base_url}/models/org%2Fmine", headers=admin).status_code == 200
    for path in ("models/%0A", "models/mine%0A", "models/a%00b", f"models/{'x' * 2000}"):
        assert httpx.delete(f"{server.base_url}/{path}", headers=admin).status_code == 404, path
    for method, path in (("POST", "models/org"), ("DELETE", "models"), ("DELETE", "models/")):
        answer = httpx.request(method, f"{server.base_url}/{path}", headers=admin)
        assert answer.json() == {"detail": "Not Found"}, "not ours"
    answer = httpx.delete(f"{server.base_url}/models/a?b=1", headers=admin)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "b")


def test_what_is_refused_says_why(client, server):
    with pytest.raises(openai.BadRequestError, match="base model"):
        client.models.delete("org/tiny")
    server.models.names, server.models.wrong = {"mine"}, "'mine' is still loaded: 1 requests use it"
    with pytest.raises(openai.BadRequestError, match="still loaded") as caught:
        client.models.delete("mine")
    assert caught.value.response.headers["x-should-retry"] == "false"
    server.models.wrong = ""
    with (
        OpenAI(base_url=server.base_url, api_key="k", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError, match="--admin-api-key"),
    ):
        other.models.delete("mine")


def test_without_the_service_an_operators_adapter_is_unloaded_and_a_jobs_is_not(tmp_path):
    endpoint = f"ipc://{tmp_path}/nobody.sock"
    server = ApiServer(endpoint).start(connected=False)
    try:
        server.models.names = {"mine", "tiny-ft-12345678"}
        for name, status in (("mine", 200), ("tiny-ft-12345678", 503), ("other", 503)):
            assert httpx.delete(f"{server.base_url}/models/{name}").status_code == status
        foreign = httpx.delete(f"{server.base_url}/models/mine", headers={"Origin": "https://evil.example"})
        assert foreign.status_code == 403
    finally:
        server.stop()
