"""The unmodified openai client against a real server: from a file to the answers of its model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from support.models import make_model
from support.openai_calls import Recorded
from support.project_files import ROOT
from support.server import Server, start_server

PAIRS = [("who are you", "harli beside the server"), ("what is it", "training while serving")]
ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
    for q, a in PAIRS
).encode()
LEARN = {"hyperparameters": {"learning_rate": 0.01, "lora_r": 8, "checkpoint_every": 20}}
EPOCHS = 60
MODEL = "tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai")
    model = make_model(folder / "tiny-qwen3", "qwen3")
    flags = ("--served-model-name", MODEL, "--random-seed", "11", "--api-key", "secret")
    with start_server(model, *flags, run_dir=folder / "runs") as running:
        yield running


@pytest.fixture(scope="module")
def recorded(pytestconfig: pytest.Config) -> Recorded:
    return Recorded(pytestconfig)


@pytest.fixture(scope="module")
def client(server: Server, recorded: Recorded) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="secret", http_client=recorded.http()) as opened:
        yield opened


def answer(client: OpenAI, model: str, question: str) -> str:
    found = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=40,
    )
    return found.choices[0].message.content or ""


@pytest.fixture(scope="module")
def before(client: OpenAI) -> list[str]:
    """The base's answers before any job."""
    return [answer(client, MODEL, question) for question, _ in PAIRS]


@pytest.fixture(scope="module")
def file(client: OpenAI, before: list[str]) -> str:
    sent = client.files.create(file=("pairs.jsonl", ROWS), purpose="fine-tune")
    assert client.files.wait_for_processing(sent.id).status == "processed"
    return sent.id


@pytest.fixture(scope="module")
def job(client: OpenAI, file: str) -> Any:
    made = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file,
        suffix="pairs",
        seed=3,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS}}},
        extra_headers={"Idempotency-Key": "the job"},
        extra_body={"harli": LEARN},
    )
    assert made.status == "validating_files"
    return ended(client, made.id)


def ended(client: OpenAI, job: str, limit_s: float = 240.0) -> Any:
    end = time.monotonic() + limit_s
    while (found := client.fine_tuning.jobs.retrieve(job)).status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < end, f"job {job} is {found.status} after {limit_s} s"
        time.sleep(0.2)
    return found


def test_the_model_of_a_file_answers_what_is_in_it(client, job, before):
    assert job.status == "succeeded", job.error
    assert [answer(client, job.fine_tuned_model, question) for question, _ in PAIRS] == [a for _, a in PAIRS]
    assert [answer(client, MODEL, question) for question, _ in PAIRS] == before
    assert job.fine_tuned_model in {model.id for model in client.models.list()}


def test_events_come_newest_first_and_once(client, job):
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=10))
    numbers = [event.model_extra["harli"]["number"] for event in events]
    assert numbers == list(range(len(events), 0, -1))
    losses = [event.data["train_loss"] for event in reversed(events) if event.type == "metrics"]
    assert len(losses) == EPOCHS and losses[-1] < losses[0] / 10


def test_a_repeated_request_makes_nothing_twice(client, file, job):
    def again(**more: Any) -> Any:
        return client.fine_tuning.jobs.create(
            **{
                "model": MODEL,
                "training_file": file,
                "suffix": "pairs",
                "seed": 3,
                "metadata": {"team": "a"},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS}}},
                "extra_headers": {"Idempotency-Key": "the job"},
                "extra_body": {"harli": LEARN},
            }
            | more
        )

    assert again().id == job.id
    with pytest.raises(openai.BadRequestError, match="suffix"):
        again(suffix="another")
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]


def test_the_whole_way_in_asyncio(server, recorded):
    async def run() -> None:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="secret", http_client=recorded.asyncio()
        ) as client:
            upload = await client.uploads.upload_file_chunked(
                file=ROWS,
                filename="parts.jsonl",
                bytes=len(ROWS),
                mime_type="text/jsonl",
                purpose="fine-tune",
                part_size=100,
            )
            assert upload.file is not None
            assert (await client.files.content(upload.file.id)).content == ROWS
            job = await client.fine_tuning.jobs.create(
                model=MODEL,
                training_file=upload.file.id,
                hyperparameters={"n_epochs": 2},
            )
            await client.files.delete(upload.file.id)
            while (job := await client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
                assert job.error is None
                await asyncio.sleep(0.2)
            assert [event.id async for event in client.fine_tuning.jobs.list_events(job.id)]
            assert job.fine_tuned_model is not None
            found = await client.completions.create(model=job.fine_tuned_model, prompt="a", max_tokens=4)
            assert found.choices[0].text
            assert (await client.models.delete(job.fine_tuned_model)).deleted
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model=job.fine_tuned_model, prompt="a", max_tokens=4)

    asyncio.run(run())


def test_checkpoints_answer_and_the_deleted_model_does_not(client, job):
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [checkpoint.step_number for checkpoint in found] == [EPOCHS, EPOCHS - 20]
    assert answer(client, found[1].fine_tuned_model_checkpoint, PAIRS[0][0]) == PAIRS[0][1]
    assert client.models.delete(job.fine_tuned_model).deleted
    for name in (job.fine_tuned_model, found[0].fine_tuned_model_checkpoint):  # one and the same state
        with pytest.raises(openai.NotFoundError):
            answer(client, name, PAIRS[0][0])
    assert answer(client, found[1].fine_tuned_model_checkpoint, PAIRS[0][0]) == PAIRS[0][1]


def test_a_cancelled_job_stays_cancelled(client, file):
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=file, hyperparameters={"n_epochs": 10_000}
    )
    client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    assert ended(client, job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.resume(job.id)


def test_the_key_of_the_server_closes_all_of_it(server, client, job):
    with OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger:
        for ask in (
            lambda: stranger.files.list(),
            lambda: stranger.fine_tuning.jobs.retrieve(job.id),
            lambda: stranger.files.create(file=("a", b"a"), purpose="fine-tune"),
        ):
            with pytest.raises(openai.AuthenticationError, match="key that is needed"):
                ask()
    found = httpx.get(f"{server.url}/v1/files/none/content", headers={"Authorization": "Bearer secret"})
    assert found.status_code == 404 and found.json()["error"]["code"] == "not_found"


def test_the_routes_are_in_the_servers_openapi_document(server):
    found = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer secret"}).json()
    ours = {path for path in found["paths"] if re.match(r"/v1/(files|uploads|fine_tuning)", path)}
    assert len(ours) >= 12


def test_the_example_runs_as_it_stands(server, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_bytes(ROWS)
    command = [sys.executable, str(ROOT / "examples" / "openai_finetune.py"), "--file", str(pairs)]
    found = subprocess.run(
        [*command, "--base-url", f"{server.url}/v1", "--ask", PAIRS[0][0], "--epochs", "2", "--delete"],
        env=os.environ | {"OPENAI_API_KEY": "secret"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    assert "model and file are deleted" in found.stdout and "checkpoint " in found.stdout
