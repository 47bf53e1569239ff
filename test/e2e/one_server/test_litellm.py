"""LiteLLM, unmodified and in an environment of its own, before a server: its SDK and its proxy."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from support.litellm_environment import (
    LITELLM,
    MASTER_KEY,
    NotInstalledError,
    make_environment,
    proxy,
    run_environment,
)
from support.project_files import ROOT
from support.server import Server
from support.service.service_fixture import pairs

pytestmark = pytest.mark.long

SCRIPT = ROOT / "test" / "support" / "litellm_client.py"
MODEL = "tiny"
ROWS = "".join(json.dumps(row) + "\n" for row in pairs(8))
TOKENS = 32  # of the kept answers


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with LiteLLM."""
    try:
        return make_environment(tmp_path_factory.mktemp("litellm") / "venv")
    except NotInstalledError as error:
        pytest.skip(f"{LITELLM} could not be installed: {error}")


# ------------------------------------------------------------------ the SDK
@pytest.fixture(scope="module")
def said(
    litellm: Path,
    server: Server,
    admin_key: str,
    expected: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the script printed."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(ROWS)
    done = expected["done"]
    command = [str(litellm), "-I", str(SCRIPT), f"{server.url}/v1", admin_key, str(path), MODEL]
    command += [done["name"], next(iter(done["answers"]))]
    ran = subprocess.run(command, env=run_environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_files_and_jobs_by_the_sdk(said: dict[str, Any]) -> None:
    first = said["blocking"]
    assert (first["file"]["filename"], first["file"]["bytes"]) == ("rows.jsonl", len(ROWS))
    assert first["files"] == [first["file"]["id"]] and first["content"] == ROWS and first["deleted"]
    created = first["created"]
    assert (created["status"], created["seed"], created["model"]) == ("validating_files", 7, MODEL)
    assert created["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert created["training_file"] == first["file"]["id"]
    assert first["retrieved"]["harli"]["suffix"] == "lite"
    for part in (first, said["asyncio"]):
        job = part["created"]["id"]
        assert part["retrieved"]["id"] == part["cancelled"]["id"] == job and part["listed"] == [job]
        assert part["cancelled"]["status"] == "cancelled" and part["cancelled"]["finished_at"]
    assert said["asyncio"]["created"]["hyperparameters"]["n_epochs"] == 3

    refused = said["refused"]
    assert refused["status"] == 400 and "there is no file 'file-none'" in refused["text"], refused


def test_the_result_of_a_job_answers_the_sdk(said: dict[str, Any], expected: dict[str, Any]) -> None:
    answer = next(iter(expected["done"]["answers"].values()))
    assert said["chat"] == {"blocking": answer, "asyncio": answer, "stream": answer}


# ------------------------------------------------------------------ the proxy
@pytest.fixture(scope="module")
def proxy_url(
    litellm: Path, server: Server, admin_key: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The proxy, with the config that docs/openai.md has."""
    [config] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "openai.md").read_text(), re.DOTALL)
    config = config.replace("http://127.0.0.1:30000", server.url)
    with proxy(litellm, config.replace("SERVER_KEY", admin_key), tmp_path_factory.mktemp("proxy")) as url:
        yield url


def client(proxy_url: str, path: str) -> OpenAI:
    return OpenAI(base_url=f"{proxy_url}{path}", api_key=MASTER_KEY, max_retries=0)


def test_the_result_of_a_job_answers_through_the_proxy(proxy_url: str, expected: dict[str, Any]) -> None:
    done = expected["done"]
    with client(proxy_url, "/v1") as by_proxy:
        for question, answer in done["answers"].items():
            asked: dict[str, Any] = {
                "model": done["name"],
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": TOKENS,
            }
            whole = by_proxy.chat.completions.create(**asked)
            assert whole.choices[0].message.content == answer
        pieces = by_proxy.chat.completions.create(**asked, stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == answer


def test_files_through_the_proxy(proxy_url: str) -> None:
    with client(proxy_url, "/v1") as by_proxy:
        file = by_proxy.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
        assert (file.filename, file.bytes, file.status) == ("rows.jsonl", len(ROWS), "processed")
        assert file.id in [one.id for one in by_proxy.files.list()]
        assert by_proxy.files.retrieve(file.id).id == file.id
        assert by_proxy.files.content(file.id).content == ROWS.encode()
        assert by_proxy.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            by_proxy.files.retrieve(file.id)


def test_the_proxys_own_fine_tuning_routes_want_a_licence(proxy_url: str) -> None:
    with client(proxy_url, "/v1") as by_proxy:
        for ask in (
            lambda: by_proxy.fine_tuning.jobs.list(extra_query={"custom_llm_provider": "openai"}),
            lambda: by_proxy.fine_tuning.jobs.create(
                model=MODEL, training_file="file-a", extra_body={"custom_llm_provider": "openai"}
            ),
        ):
            with pytest.raises(openai.InternalServerError):
                ask()
        with pytest.raises(openai.NotFoundError):
            by_proxy.uploads.create(filename="a", purpose="fine-tune", bytes=9, mime_type="text/jsonl")


def test_all_of_the_api_through_a_path_that_the_proxy_passes_on(proxy_url: str) -> None:
    with client(proxy_url, "/finetune") as passed_on:
        file = passed_on.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
        made = [
            passed_on.fine_tuning.jobs.create(
                model=MODEL,
                training_file=file.id,
                method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
                metadata={"by": "proxy"},  # the proxy takes it for its own
                extra_headers={"Idempotency-Key": "by the proxy"},
                extra_body={"harli": {"hyperparameters": {"lora_r": 4}}},
            )
            for _ in range(2)
        ]
        job = made[0].id
        assert made[1].id == job and not made[0].metadata
        assert made[0].to_dict()["harli"]["hyperparameters"]["lora_r"] == 4  # type: ignore[index]
        assert [one.id for one in passed_on.fine_tuning.jobs.list(limit=1).data] == [job]
        assert passed_on.fine_tuning.jobs.list(metadata={"by": "proxy"}).data == []
        assert passed_on.fine_tuning.jobs.cancel(job).status == "cancelled"
        assert list(passed_on.fine_tuning.jobs.list_events(job))
        upload = passed_on.uploads.upload_file_chunked(
            file=ROWS.encode(),
            filename="parts.jsonl",
            bytes=len(ROWS),
            mime_type="text/jsonl",
            purpose="fine-tune",
            part_size=200,
        )
        assert upload.file is not None
        for one in (file.id, upload.file.id):
            assert passed_on.files.delete(one).deleted
        with pytest.raises(openai.BadRequestError, match="there is no file 'file-none'") as caught:
            passed_on.fine_tuning.jobs.create(model=MODEL, training_file="file-none")
        assert caught.value.param == "training_file"
        assert caught.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            passed_on.models.delete("none")


def test_the_proxy_passes_nothing_on_without_its_key(proxy_url: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for path in ("/finetune/files", "/v1/files"):
            answer = httpx.get(f"{proxy_url}{path}", headers=headers, timeout=60)
            assert answer.status_code >= 400, answer.text
