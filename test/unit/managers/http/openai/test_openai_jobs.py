"""Jobs by the unmodified openai client, against the routes and the real service."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from sglang_harli import run_paths
from sglang_harli.managers.http.openai.access import Access
from support.api_server import ApiServer
from support.project_files import ROOT
from support.service.service_fixture import ServiceUnderTest, pairs, until
from support.tokenizer import make_tokenizer_folder

ROWS = "".join(json.dumps(row) + "\n" for row in pairs(8)).encode()
MODEL = "org/tiny"
PAGE = ROOT / "docs" / "openai.md"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceUnderTest]:
    folder = tmp_path_factory.mktemp("service")
    rig = ServiceUnderTest(folder, make_tokenizer_folder(folder / "model"))
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def server(service: ServiceUnderTest) -> Iterator[ApiServer]:
    server = ApiServer(run_paths.verbs_endpoint(str(service.run_dir)), access=Access("secret")).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def file(client: OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def create(client: OpenAI, file: str, **more: Any) -> Any:
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file, **more)


def ended(client: OpenAI, job: str) -> Any:
    final = ("succeeded", "failed", "cancelled")
    return until(lambda: (j := client.fine_tuning.jobs.retrieve(job)).status in final and j, "the job's end")


def post(server: ApiServer, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.base_url}{path}", json=body, headers={"Authorization": "Bearer secret"} | headers
    )


# ------------------------------------------------------------------ the whole way
def test_a_job_from_its_file_to_its_model(client, file):
    job = create(
        client,
        file,
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": "auto",
                    "batch_size": 8,
                    "learning_rate_multiplier": 0.5,
                }
            },
        },
        extra_body={"harli": {"hyperparameters": {"lora_r": 4}, "priority": 3}},
    )
    assert (job.object, job.status, job.training_file, job.model) == (
        "fine_tuning.job",
        "validating_files",
        file,
        MODEL,
    )
    done = ended(client, job.id)
    assert done.status == "succeeded" and done.error is None
    assert done.fine_tuned_model and done.fine_tuned_model.startswith("tiny-ft-mine-")
    assert (done.seed, done.metadata, done.integrations) == (7, {"team": "a"}, [])
    used = done.method.supervised.hyperparameters
    assert (used.n_epochs, used.batch_size, used.learning_rate_multiplier) == (3, 8, 0.5)
    assert done.hyperparameters.batch_size == 8
    extra = done.model_extra["harli"]
    assert extra["hyperparameters"]["learning_rate"] == 1e-4 and extra["hyperparameters"]["lora_r"] == 4
    assert (extra["priority"], extra["step"], extra["total_steps"]) == (3, 3, 3)
    assert done.finished_at >= done.created_at and done.trained_tokens > 0

    [result] = done.result_files
    assert result in [f.id for f in client.files.list(purpose="fine-tune-results")]
    header, *steps = client.files.content(result).text.splitlines()
    assert header.startswith("step,train_loss,train_accuracy,valid_loss,") and len(steps) == 3

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))
    numbers = [event.model_extra["harli"]["number"] for event in events]
    assert numbers == list(range(len(events), 0, -1)), "newest first, none left out, none twice"
    kinds = {event.model_extra["harli"]["type"]: event.type for event in events}
    assert kinds["step_metrics"] == "metrics" and kinds["succeeded"] == "message"
    (first,) = [e for e in events if e.type == "metrics" and e.data["step"] == 1]
    assert first.data["train_loss"] > 0 and first.created_at >= job.created_at
    again = list(client.fine_tuning.jobs.list_events(job.id))
    assert [event.id for event in again] == [event.id for event in events]

    begun = client.fine_tuning.jobs.create(model=done.fine_tuned_model, training_file=file)
    assert begun.model_extra["harli"]["resumed_from"] == job.id
    assert ended(client, begun.id).status == "succeeded"


def test_the_same_in_asyncio(server, file):
    async def run() -> None:
        async with AsyncOpenAI(base_url=server.base_url, api_key="secret", max_retries=0) as client:
            job = await client.fine_tuning.jobs.create(
                model=MODEL, training_file=file, hyperparameters={"n_epochs": 1}
            )
            while (job := await client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
                assert job.error is None
                await asyncio.sleep(0.05)
            assert [e.type async for e in client.fine_tuning.jobs.list_events(job.id)]

    asyncio.run(run())


def test_pages_of_jobs_and_a_filter_of_metadata(client, file):
    wanted = [create(client, file, metadata={"group": "g", "n": str(n)}).id for n in range(3)]
    other = create(client, file, metadata={"group": "h"}).id
    found = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"group": "g"})]
    assert found == wanted[::-1]
    all_jobs = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert all_jobs[:4] == [other, *wanted[::-1]]
    for job in (*wanted, other):
        ended(client, job)


def test_a_bad_file_is_a_failed_job_with_its_lines(client):
    bad = client.files.create(file=("bad.jsonl", ROWS + b"{}\n"), purpose="fine-tune")
    job = ended(client, create(client, bad.id).id)
    assert job.status == "failed" and job.error.code == "invalid_data" and job.error.param == "training_file"
    messages = [e.message for e in client.fine_tuning.jobs.list_events(job.id) if e.level == "error"]
    assert any(message.startswith("line 9: ") for message in messages)


def test_pause_resume_and_cancel(client, service, file):
    service.scheduler.step_s = 0.2
    try:
        job = create(client, file, hyperparameters={"n_epochs": 50})
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", "the run")
        client.fine_tuning.jobs.pause(job.id)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused", "the pause")
        client.fine_tuning.jobs.resume(job.id)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", "the run")
        client.fine_tuning.jobs.cancel(job.id)
        assert ended(client, job.id).status == "cancelled"
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled", "asked again"
        for change in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
            with pytest.raises(openai.BadRequestError, match="is cancelled") as caught:
                change(job.id)
            assert caught.value.response.headers["x-should-retry"] == "false"
    finally:
        service.scheduler.step_s = 0.0


def test_a_job_has_the_targets_in_force_until_it_ends(client, service, file):
    job = create(client, file)
    client.fine_tuning.jobs.pause(job.id)
    before = client.fine_tuning.jobs.retrieve(job.id).model_extra["harli"]["slo"]
    assert before["tpot_slo_ms"] > 0
    assert service.client.set(max_itl_ms=before["tpot_slo_ms"] + 7).outcome == "applied"
    try:
        after = client.fine_tuning.jobs.retrieve(job.id).model_extra["harli"]["slo"]
        assert after == before | {"max_itl_ms": before["tpot_slo_ms"] + 7}
    finally:
        service.client.set(max_itl_ms=before["max_itl_ms"])
    assert client.fine_tuning.jobs.cancel(job.id).model_extra["harli"]["slo"] is None


def test_a_key_makes_one_job(client, file):
    def keyed(**more: Any) -> Any:
        return create(client, file, extra_headers={"Idempotency-Key": "a job"}, **more)

    first = keyed(metadata={"a": "1"})
    assert keyed(metadata={"a": "1"}).id == first.id
    with pytest.raises(openai.BadRequestError, match="metadata") as caught:
        keyed(metadata={"a": "2"})
    assert caught.value.code == "idempotency_conflict"
    ended(client, first.id)


def test_numbers_come_back_as_they_were_sent(client, file):
    for multiplier in (2.7, 5.1, 0.3):
        job = create(client, file, hyperparameters={"learning_rate_multiplier": multiplier, "n_epochs": 1})
        assert job.hyperparameters.learning_rate_multiplier == multiplier
        client.fine_tuning.jobs.cancel(job.id)


def test_jobs_without_metadata_can_be_asked_for(client):
    found = client.get("/fine_tuning/jobs?metadata=null", cast_to=httpx.Response).json()["data"]
    assert found and all(job["metadata"] == {} for job in found)
    with pytest.raises(openai.BadRequestError, match="one of the two"):
        client.get("/fine_tuning/jobs?metadata=null&metadata[a]=b", cast_to=httpx.Response)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "gpt-4.1-nano"}, "model", "model_not_found"),
        ({"training_file": "file-none"}, "training_file", "invalid_value"),
        ({"training_file": None}, "training_file", None),
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "unsupported"),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "unsupported"),
        ({"suffix": "no spaces, please"}, "suffix", "invalid_value"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "unknown_parameter"),
        ({"harli": {"hyperparameters": {"lora_r": 0}}}, "lora_r", "invalid_value"),
        ({"harli": {"hyperparameters": {"nothing": 1}}}, "nothing", "invalid_value"),
        ({"harli": {"other": 1}}, "harli.other", "unknown_parameter"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        (
            {
                "hyperparameters": {"batch_size": 2},
                "harli": {"hyperparameters": {"gradient_accumulation_steps": 2}},
            },
            "harli.hyperparameters.gradient_accumulation_steps",
            None,
        ),
        ({"nothing": 1}, "nothing", "unknown_parameter"),
        ({"harli": {"resume_from": "x" * 1_000_000}}, "harli.resume_from", "invalid_value"),
        ({"metadata": {"x" * 500_000: "", "a": [1] * 200_000}}, "metadata", "invalid_value"),
        ({"metadata": {"a": "nul\0"}}, "a", "bad_request"),
    ],
)
def test_what_is_refused_names_the_field(server, file, change, param, code):
    body = {"model": MODEL, "training_file": file} | change
    found = post(
        server, "/fine_tuning/jobs", {name: value for name, value in body.items() if value is not None}
    )
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == param and code in (None, error["code"])
    assert found.headers["x-should-retry"] == "false"


def test_what_is_not_served_says_so(client):
    with pytest.raises(openai.NotFoundError, match="permissions"):
        client.fine_tuning.checkpoints.permissions.create("org/tiny:a:b", project_ids=["p"])
    with pytest.raises(openai.NotFoundError, match="graders"):
        client.fine_tuning.alpha.graders.run(grader={"type": "string_check"}, model_sample="a")  # type: ignore[arg-type]
    for ask in (client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError, match="ftjob-none"):
            ask("ftjob-none")
    with pytest.raises(openai.NotFoundError, match="ftjob-none"):
        list(client.fine_tuning.jobs.list_events("ftjob-none"))
    with pytest.raises(openai.NotFoundError):
        list(client.fine_tuning.jobs.list(after="ftjob-none"))


# ------------------------------------------------------------------ evaluation
def test_a_validation_file_is_evaluated(client, file):
    job = create(
        client,
        file,
        validation_file=file,
        extra_body={"harli": {"hyperparameters": {"eval_steps": 2}}},
    )
    done = ended(client, job.id)
    assert (done.status, done.validation_file) == ("succeeded", file)
    metrics = [e for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
    evaluated = [e.data for e in metrics if e.model_extra["harli"]["type"] == "eval_metrics"]
    assert {found["step"] for found in evaluated} == {2, 4, 6}
    assert all(found["valid_loss"] >= 0 for found in evaluated)
    assert done.model_extra["harli"]["evaluation"]["step"] == 6


def test_a_bad_validation_file_is_named(client, file):
    bad = client.files.create(file=("bad.jsonl", ROWS + b"{}\n"), purpose="fine-tune")
    job = ended(client, create(client, file, validation_file=bad.id).id)
    assert job.status == "failed" and job.error.param == "validation_file"
    assert "bad.jsonl" in job.error.message
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert any(text.startswith("validation file, line 9: ") for text in said), said


# ------------------------------------------------------------------ the page
def test_the_examples_of_the_page_run(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(ROWS)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    client = '"http://127.0.0.1:30000/v1", api_key="none"'
    first = examples[0].replace(client, f'"{server.base_url}", api_key="secret"')
    assert "secret" in first
    # The routes here have no models beside them: those are SGLang's.
    first = first.replace("client.models.list().data[0].id", f'"{MODEL}"')
    names: dict[str, Any] = {"__name__": "page"}
    exec(first + examples[1], names)  # the page's own code
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "validating_files" and shown[-1].startswith("succeeded tiny-ft-support-")
    assert shown[1].startswith("message the job is done")
