"""The main job on a real server: train while serving, publish, serve, restart (fp32, so that
answers are exact)."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang_harli import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.errors import ConfigError, DataError, HarliError
from sglang_harli.names import short_id
from sglang_harli.protocol.public import Job
from sglang_harli.run_paths import shm_dir
from sglang_harli.service.data.token_store import TokenReader
from support.chat_templates import QWEN3
from support.http import PROMPTS, chat, generate, generate_all, get, post
from support.models import make_model
from support.server import Server, start_server

QUESTIONS = [("who are you", "harli beside the server"), ("what is it", "training while serving")]
ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in QUESTIONS
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """With a chat template and keywords that the model's own files do not have."""
    template = tmp_path_factory.mktemp("template") / "served.jinja"
    template.write_text(
        QWEN3.replace("'<|im_start|>' + message.role", "'<|im_start|>[served] ' + message.role")
    )
    return (
        *("--random-seed", "11", "--harli-quantum-rows", "2", "--chat-template", str(template)),
        *("--default-chat-template-kwargs", '{"enable_thinking": false}'),
    )


@pytest.fixture(scope="module")
def server(model: str, run_dir: Path, flags: tuple[str, ...]) -> Iterator[Server]:
    with start_server(model, *flags, run_dir=run_dir) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[FinetuneClient]:
    with FinetuneClient(server.endpoint) as opened:
        yield opened


def sample(url: str) -> list[list[int]]:
    """Sampled answers, one at a time: the server's seed decides them, in order."""
    return [generate(url, text, temperature=0.8) for text in PROMPTS[:3]]


@pytest.fixture(scope="module")
def sampled(server: Server) -> list[list[int]]:
    """The first sampled answers of the server, before any job."""
    return sample(server.url)


@pytest.fixture(scope="module")
def alone(server: Server, sampled: list[list[int]]) -> list[list[int]]:
    """Greedy answers of the server before any job."""
    return generate_all(server.url)


@pytest.fixture(scope="module")
def taught(client: FinetuneClient, alone: list[list[int]]) -> Any:
    """A job that has succeeded."""
    job = client.submit(
        ROWS, suffix="taught", n_epochs=60, learning_rate=1e-2, batch_size=2, checkpoint_every=20, lora_r=8
    )
    assert job.total_steps == 60 and job.step == 0 and job.trained_tokens == 0
    return client.wait(job.id, 120)


def until(what: Callable[[], Any], limit_s: float = 60.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def training(client: FinetuneClient) -> Iterator[Job]:
    """A job that trains for as long as a test needs it."""
    job = client.submit(ROWS * 8, n_epochs=10_000, batch_size=4, checkpoint_every=5)
    try:
        yield until(lambda: (j := client.get(job.id)).step > 0 and j)
    finally:
        client.cancel(job.id)
        until(lambda: client.get(job.id).status is JobStatus.CANCELLED)


def test_a_job_succeeds_when_its_adapter_answers(taught, run_dir):
    assert taught.status is JobStatus.SUCCEEDED, taught.error
    assert taught.step == taught.total_steps == 60
    assert taught.trained_tokens > 60 * len(ROWS)
    assert taught.fine_tuned_model == f"tiny-qwen3-ft-taught-{short_id(taught.id)}"
    folder = run_dir / taught.id
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(1, 61))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert (folder / "adapter" / "adapter_config.json").exists() and (folder / "job.json").exists()
    assert not list((folder / "checkpoints").glob("*/adapter"))


def test_the_adapter_answers_under_its_bare_name_and_the_base_as_before(server, taught, alone):
    name = taught.fine_tuned_model
    status, base = chat(server.url, "tiny-qwen3", QUESTIONS[0][0])
    assert status == 200
    status, tuned = chat(server.url, name, QUESTIONS[0][0])
    assert status == 200, tuned
    assert tuned["choices"][0]["message"]["content"] != base["choices"][0]["message"]["content"]
    assert tuned["choices"][0]["message"]["content"].strip() == QUESTIONS[0][1]
    completions = [
        post(
            server.url,
            "/v1/completions",
            {"model": m, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0},
        )
        for m in ("tiny-qwen3", name)
    ]
    assert [s for s, _ in completions] == [200, 200]
    assert completions[0][1]["choices"][0]["text"] != completions[1][1]["choices"][0]["text"]
    assert generate(server.url, PROMPTS[0], lora=name) != alone[0]
    assert generate_all(server.url) == alone


def test_the_adapter_is_listed_and_a_missing_one_is_a_404(server, taught):
    name = taught.fine_tuned_model
    status, listed = get(server.url, "/v1/models")
    assert status == 200 and name in [m["id"] for m in listed["data"]]
    assert get(server.url, f"/v1/models/{name}")[0] == 200
    missing = name[:-1] + ("0" if name[-1] != "0" else "1")
    status, error = chat(server.url, missing, "hello")
    assert status == 404 and missing in json.dumps(error)
    assert get(server.url, f"/v1/models/{missing}")[0] == 404
    assert chat(server.url, "default", "hello")[0] == 200  # what SGLang does: clients rely on it


def test_the_saved_adapter_gives_the_servers_tokens_in_plain_transformers(server, taught, model, run_dir):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, run_dir / taught.id / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for prompt in PROMPTS[:4]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        with torch.no_grad():
            for _ in range(16):  # greedy, past the end of turn as the request below
                ids = torch.cat([ids, tuned(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert ids[0, length:].tolist() == generate(
            server.url, prompt, tokens=16, lora=taught.fine_tuned_model
        )


def test_greedy_answers_are_the_same_while_training(server, client, alone):
    with training(client) as job:
        assert generate_all(server.url) == alone
        until(lambda: client.get(job.id).step > job.step)


def test_sglangs_own_controls_work_while_training(server, client, alone):
    with training(client) as job:
        status, refused = post(server.url, "/update_weights_from_disk", {"model_path": "/nowhere"})
        assert status == 400 and "pause" in json.dumps(refused)
        status, refused = post(server.url, "/release_memory_occupation", {})
        assert status == 400 and "pause" in json.dumps(refused)
        until(lambda: post(server.url, "/flush_cache", {})[0] == 200)
        assert post(server.url, "/pause_generation", {})[0] == 200
        held = client.get(job.id).step
        time.sleep(1.0)  # the span in which nothing may happen
        assert client.get(job.id).step - held <= 1
        assert post(server.url, "/continue_generation", {})[0] == 200
        until(lambda: client.get(job.id).step > held + 1)
        assert generate(server.url, PROMPTS[0]) == alone[0]
        status, info = get(server.url, "/server_info")
        assert status == 200 and info["internal_states"][0]["harli"]["training"]["job"] == job.id


def test_targets_are_set_while_running(client):
    before = client.status()
    answer = client.set(tpot_slo_ms=80.0)
    assert (answer.outcome, answer.effective["tpot_slo_ms"]) == ("applied", 80.0)
    assert client.set(tpot_slo_ms=10.0, if_revision=before.revision).outcome == "stale"
    assert client.set(max_itl_ms=1.0).outcome == "conflict"
    assert client.status().options["tpot_slo_ms"] == 80.0


TOOLS = [
    {
        "function": {
            "parameters": {"type": "dict", "properties": {"at": {"type": "varchar(40)"}}},
            "name": "tides",
            "description": "High water",
        },
        "cache": True,
    }
]
TOOL_MESSAGES = [
    {"role": "user", "content": "when is high water", "name": None},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "tides", "arguments": '{"at":"Nar"}'}}
        ],
    },
    {
        "role": "tool",
        "tool_call_id": "c",
        "content": [{"type": "text", "text": "at"}, {"type": "text", "text": "ten"}],
    },
    {"role": "assistant", "content": "at ten", "tool_calls": None},
]
TOOL_ANSWERS = ['<tool_call>\n{"name": "tides", "arguments": {"at": "Nar"}}\n</tool_call>', "at ten"]


def test_rows_with_tools_are_trained_with_the_ids_that_are_served_and_answer_so(server, client, run_dir):
    def asked(model: str, messages: list[Any], tokens: int) -> Any:
        body = {"model": model, "messages": messages, "tools": TOOLS, "max_tokens": tokens, "temperature": 0}
        status, answer = post(server.url, "/v1/chat/completions", body | {"return_prompt_token_ids": True})
        assert status == 200, answer
        return answer["choices"][0]

    record = {"messages": TOOL_MESSAGES, "tools": TOOLS}
    checked = client.check([record])
    assert checked["rows"] == 2
    assert [(note["code"], note["names"]) for note in checked["notes"]] == [
        ("tool_fields_ignored", ["cache"])
    ]
    job = client.submit([record], n_epochs=50, learning_rate=1e-2, batch_size=2, checkpoint_every=0, lora_r=8)
    reader = TokenReader(run_dir / job.id / "data")
    prompts = [asked("tiny-qwen3", TOOL_MESSAGES[:at], 1)["prompt_token_ids"] for at in (1, 3)]
    for row, prompt in enumerate(prompts):
        ids, labels = reader.row(row)
        assert ids[: len(prompt)].tolist() == prompt
        assert (labels[: len(prompt)] == -100).all() and labels[len(prompt)] == ids[len(prompt)]
    reader.close()
    job = client.wait(job.id, 240)
    assert job.status is JobStatus.SUCCEEDED, job.error
    for at, answer in zip((1, 3), TOOL_ANSWERS, strict=True):
        said = asked(job.fine_tuned_model, TOOL_MESSAGES[:at], 80)["message"]["content"]
        assert said.removesuffix("<|im_end|>") == answer


def test_broken_lines_are_named_and_create_no_job(client):
    count = len(client.list())
    lines = [json.dumps(ROWS[0])] * 10
    lines[6], lines[8] = "{not json", json.dumps({"messages": [{"role": "user"}]})
    with pytest.raises(DataError) as caught:
        client.submit("\n".join(lines).encode())
    assert {7, 9} == {row["line"] for row in caught.value.details}
    assert len(client.list()) == count


def test_a_job_that_does_not_fit_is_refused_at_submission(client):
    with pytest.raises(HarliError, match="rank"):
        client.submit(ROWS, lora_r=512)


def test_an_adapter_loaded_from_files_is_padded(server, taught, run_dir, alone):
    """SGLang pads the intermediate size of 333; files keep the model's own."""
    body = {"lora_name": "by-hand", "lora_path": str(run_dir / taught.id / "adapter")}
    assert post(server.url, "/load_lora_adapter", body)[0] == 200
    by_hand = generate(server.url, PROMPTS[2], lora="by-hand")
    assert by_hand == generate(server.url, PROMPTS[2], lora=taught.fine_tuned_model)
    assert by_hand != alone[2]
    assert post(server.url, "/unload_lora_adapter", {"lora_name": "by-hand"})[0] == 200


def test_other_weights_are_another_base_until_they_are_the_first_again(
    server, client, taught, alone, model, tmp_path
):
    name, other = taught.fine_tuned_model, make_model(tmp_path / "other", "qwen3", seed=1)
    job = client.submit(ROWS, n_epochs=60, batch_size=2, checkpoint_every=0)
    until(lambda: client.get(job.id).step >= 5)
    client.pause(job.id)
    until(lambda: client.get(job.id).status is JobStatus.PAUSED)
    assert post(server.url, "/update_weights_from_disk", {"model_path": other})[0] == 200
    says = f"its base is {model}, and this server serves {model} ({other}): their weights differ"
    until(lambda: name not in [m["id"] for m in get(server.url, "/v1/models")[1]["data"]])
    assert get(server.url, f"/v1/models/{name}")[0] == 404
    status, error = chat(server.url, name, QUESTIONS[0][0])
    assert status == 404 and says in json.dumps(error)
    status, error = post(server.url, "/generate", {"text": "a", "lora_path": name})
    assert status == 400 and says in json.dumps(error)
    client.resume(job.id)  # held first while training is compared with serving on the new weights
    until(lambda: says in str(client.get(job.id).reason))
    with pytest.raises(ConfigError, match=re.escape(says)):
        client.submit(resume_from=taught.id, n_epochs=61)
    between = client.wait(client.submit(ROWS, n_epochs=1).id, 60)  # does not wait for the job before it
    assert (between.status, client.get(job.id).status) == (JobStatus.SUCCEEDED, JobStatus.QUEUED)
    assert post(server.url, "/update_weights_from_disk", {"model_path": model})[0] == 200
    done = client.wait(job.id, 60)
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 2)
    status, answer = chat(server.url, name, QUESTIONS[0][0])
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"].strip() == QUESTIONS[0][1]
    assert chat(server.url, between.fine_tuned_model, "a")[0] == 404
    assert generate_all(server.url) == alone


def final_weights(run_dir: Path, job: str) -> bytes:
    return (run_dir / job / "adapter" / "adapter_model.safetensors").read_bytes()


def ends_gracefully(server: Server, client: FinetuneClient, job: Job) -> None:
    """SIGTERM with a job in training and a request under way: that is answered, and the state is
    saved meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, server.url, PROMPTS[0], tokens=900)
        until(lambda: get(server.url, "/v1/loads")[1]["loads"][0]["num_running_reqs"])
        server.process.send_signal(signal.SIGTERM)
        step = client.get(job.id).step
        queued = until(lambda: (j := client.get(job.id)).status is JobStatus.QUEUED and j)
        assert not answer.done()
        assert queued.step >= step
        last = [event for event in client.events(job.id) if event.type != "step_metrics"][-2:]
        assert [event.type for event in last] == ["checkpoint_saved", "queued"]
        assert last[-1].message == f"the server is ending; goes on from step {queued.step}"
        assert len(answer.result()) == 900
    server.process.wait(60)
    assert not shm_dir(str(server.run_dir)).exists()  # what is left there is memory
    server.stop()


def test_pause_resume_and_a_clean_restart_change_no_bit(
    server, client, model, run_dir, flags, taught, alone, sampled
):
    """Run last on this server: it is stopped and started again."""
    settings = {"n_epochs": 60, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1000, "seed": 3}
    straight = client.wait(client.submit(ROWS, **settings).id, 120)
    job = client.submit(ROWS, **settings)
    until(lambda: client.get(job.id).step >= 5)
    client.pause(job.id)
    paused = until(lambda: (j := client.get(job.id)).status is JobStatus.PAUSED and j)
    assert 0 < paused.step < 60
    client.resume(job.id)
    until(lambda: client.get(job.id).step > paused.step)
    ends_gracefully(server, client, job)
    with start_server(
        model,
        *flags,
        run_dir=run_dir,
        endpoint=server.endpoint,
        port=server.port,
    ) as again:
        assert sample(again.url) == sampled  # the job trains on meanwhile
        resumed = client.wait(job.id, 120)
        assert resumed.status is JobStatus.SUCCEEDED, resumed.error
        assert resumed.trained_tokens == straight.trained_tokens
        assert final_weights(run_dir, job.id) == final_weights(run_dir, straight.id)
        # adapters of earlier jobs are there again, and the base answers as before
        answer = until(
            lambda: (a := chat(again.url, taught.fine_tuned_model, QUESTIONS[0][0]))[0] == 200 and a
        )
        assert answer[1]["choices"][0]["message"]["content"].strip() == QUESTIONS[0][1]
        assert generate_all(again.url) == alone
