"""`harli` as scripts use it: exit codes, JSON on stdout, problems on stderr, against the real
service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.names import short_id
from sglang_harli.protocol.public import Hyperparameters
from support.models import write_tokenizer
from support.service.service_process import ServiceProcess


def harli(*args: str, endpoint: str | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HARLI_ENDPOINT"}
    if endpoint:
        environment["HARLI_ENDPOINT"] = endpoint
    command = [sys.executable, "-m", "sglang_harli.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, vocab_size=509)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    return str(folder)


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[ServiceProcess]:
    process = ServiceProcess(model)
    try:
        yield process.start()
    finally:
        process.close()


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(8)))
    return str(path)


@pytest.fixture
def bad_data(tmp_path: Path) -> str:
    lines = [json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) for i in range(1, 13)]
    lines[6] = '{"prompt": "q7", "completion"'
    lines[8] = '{"prompt": "q9"}'
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# ------------------------------------------------------------------ help
@pytest.mark.parametrize("args", [["--help"], ["submit", "--help"], ["doctor", "--help"], []])
def test_help_imports_nothing_heavy(args: list[str]):
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['harli', *{args}]\n"
        "heavy = ('torch', 'transformers', 'sglang', 'rich', 'zmq', 'numpy')\n"
        "atexit.register(lambda: print('HEAVY', [m for m in heavy if m in sys.modules]))\n"
        "from sglang_harli.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout


def test_help_names_the_commands_and_exit_codes():
    text = harli("--help").stdout
    for command in (
        *("make-model", "check-data", "submit", "list", "show", "watch", "events"),
        *("pause", "resume", "cancel", "prioritize", "status", "set", "profile", "doctor"),
    ):
        assert f"  {command} " in text
    assert "Exit codes" in text


def test_submit_help_shows_every_hyperparameter_with_its_default():
    text = harli("submit", "--help").stdout
    for name in Hyperparameters.__struct_fields__:
        assert f"  {name} " in text
    assert "default 0.0002; above 0, at most 10" in " ".join(text.split())


# ------------------------------------------------------------------ jobs
def test_a_job_by_endpoint_and_json_before_or_after_the_command(service: ServiceProcess, data: str):
    made = harli(
        "--endpoint", service.endpoint, "submit", "--data", data, "--suffix", "t", "n_epochs=2", "--json"
    )
    assert made.returncode == 0, made.stderr
    job = json.loads(made.stdout)
    assert (job["status"], job["total_steps"], job["step"], job["trained_tokens"]) == ("queued", 4, 0, 0)
    assert job["fine_tuned_model"] is None
    assert job["error"] is None
    shown = harli("--json", "show", short_id(job["id"]), "--endpoint", service.endpoint)
    assert json.loads(shown.stdout)["id"] == job["id"]
    listed = harli("list", "--json", endpoint=service.endpoint)
    assert job["id"] in [row["id"] for row in json.loads(listed.stdout)]
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        done = harli(verb, job["id"], "--json", endpoint=service.endpoint)
        assert json.loads(done.stdout)["status"] == status
    again = harli("resume", job["id"], "--json", endpoint=service.endpoint)
    assert again.returncode == 5
    assert json.loads(again.stdout)["error"]["code"] == "invalid_state"
    assert "cancelled" in again.stderr


def test_priorities_and_going_on_from_a_job(service: ServiceProcess, data: str):
    made = harli(
        "submit", "--data", data, "--priority", "-3", "--suffix", "low", "--json", endpoint=service.endpoint
    )
    job = json.loads(made.stdout)
    assert (job["priority"], job["reason"]) == (-3, "waiting for the scheduler")
    changed = harli("prioritize", "low", "-7", "--json", endpoint=service.endpoint)
    assert json.loads(changed.stdout)["priority"] == -7, changed.stderr
    assert harli("prioritize", "low", "200", endpoint=service.endpoint).returncode == 2
    early = harli("submit", "--resume-from", "low", endpoint=service.endpoint)
    assert early.returncode == 5 and "only a job that is over can be continued" in early.stderr
    assert "waiting for the scheduler" in harli("show", "low", endpoint=service.endpoint).stdout
    harli("cancel", "low", endpoint=service.endpoint)
    late = harli("submit", "--resume-from", "low", "n_epochs=9", endpoint=service.endpoint)
    assert late.returncode == 1 and "has no checkpoint to go on from" in late.stderr
    nothing = harli("submit", "n_epochs=2", endpoint=service.endpoint)
    assert nothing.returncode == 2 and "resume_from" in nothing.stderr
    shown = harli("status", endpoint=service.endpoint).stdout
    assert "space:" in shown and "free: " in shown


def test_what_people_read(service: ServiceProcess, data: str):
    made = harli("submit", "--data", data, "--suffix", "read", endpoint=service.endpoint)
    assert "status:           queued" in made.stdout
    assert "read" in harli("list", endpoint=service.endpoint).stdout
    assert "data_validated: 8 rows" in harli("events", "read", endpoint=service.endpoint).stdout
    assert "serving: not connected" in harli("status", endpoint=service.endpoint).stdout
    status = json.loads(harli("status", "--json", endpoint=service.endpoint).stdout)
    assert status["options"]["tpot_slo_ms"] == 50


def test_bad_lines_are_named_and_no_job_is_made(service: ServiceProcess, bad_data: str):
    before = harli("list", "--json", endpoint=service.endpoint).stdout
    done = harli("submit", "--data", bad_data, endpoint=service.endpoint)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "line 7: not JSON" in done.stderr
    assert "line 9: field 'completion' is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert harli("list", "--json", endpoint=service.endpoint).stdout == before


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["submit", "n_epochs=3"], 2, "--data"),
        (["submit", "--data", "DATA", "n_epoch=3"], 2, "unknown hyperparameter 'n_epoch'"),
        (["submit", "--data", "DATA", "n_epochs=0"], 2, "n_epochs"),
        (["submit", "--data", "DATA", "epochs"], 2, "key=value"),
        (["submit", "--data", "DATA", "max_seq_length=65"], 2, "limit is 64"),
        (["submit", "--data", "/no/file"], 3, "/no/file"),
        (["show", "nobody"], 4, "nobody"),
        (["list", "--status", "done"], 2, "accepted"),
        (["set", "tpot-slo-ms=fast"], 2, "milliseconds"),
        (["set", "run-dir=x"], 2, "tpot-slo-ms"),
        (["profile", "--url", "http://127.0.0.1:1"], 6, "--url"),
        (["profile", "--no-such-flag"], 2, "--no-such-flag"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_exit_codes(service: ServiceProcess, data: str, args: list[str], code: int, says: str):
    done = harli(*[data if a == "DATA" else a for a in args], endpoint=service.endpoint)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_set_answers_with_what_is_in_force(service: ServiceProcess):
    done = harli("set", "tpot-slo-ms=40", "max-itl-ms=none", "--json", endpoint=service.endpoint)
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["outcome"] in ("applied", "deferred")
    stale = harli(
        "set", "tpot-slo-ms=41", "--if-revision", str(answer["revision"] + 9), endpoint=service.endpoint
    )
    assert stale.returncode == 5
    assert "stale" in stale.stdout


def test_watch_and_follow_end_with_the_job(service: ServiceProcess, data: str):
    with FinetuneClient(service.endpoint) as client:
        job = client.submit(data)
        results: dict[str, subprocess.CompletedProcess[str]] = {}

        def run(name: str, *args: str) -> None:
            results[name] = harli(*args, endpoint=service.endpoint)

        threads = [
            threading.Thread(target=run, args=("watch", "watch", job.id)),
            threading.Thread(target=run, args=("json", "watch", job.id, "--json")),
            threading.Thread(target=run, args=("follow", "events", job.id, "--follow", "--json")),
        ]
        for thread in threads:
            thread.start()
        while client.status().service["followers"] < 1:
            time.sleep(0.05)
        client.cancel(job.id)
        for thread in threads:
            thread.join(30)
    assert results["watch"].returncode == results["json"].returncode == 7
    assert "status: cancelled" in results["watch"].stdout
    assert json.loads(results["json"].stdout)["status"] == "cancelled"
    lines = [json.loads(line) for line in results["follow"].stdout.splitlines()]
    assert [line["id"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["type"] == "cancelled"


# ------------------------------------------------------------------ on this machine
def test_check_data_shows_what_is_learned(model: str, tmp_path: Path):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    done = harli("check-data", str(path), "--model", model)
    assert done.returncode == 0, done.stderr
    assert "1 rows" in done.stdout
    assert "[[hello<|im_end|>]]" in done.stdout
    found = json.loads(harli("check-data", str(path), "--model", model, "--json").stdout)
    assert found["ok"]
    assert found["histogram"][0]["rows"] == 1
    assert [part["learned"] for part in found["examples"][0]["parts"]] == [False, True]


def test_check_data_names_bad_lines_and_long_rows(model: str, bad_data: str, tmp_path: Path):
    done = harli("check-data", bad_data, "--model", model)
    assert done.returncode == 3
    assert "line 7: not JSON" in done.stderr
    assert "line 9: field 'completion' is missing" in done.stderr
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "word " * 100}) + "\n")
    assert "the limit is 64" in harli("check-data", str(path), "--model", model).stderr
    cut = harli("check-data", str(path), "--model", model, "--on-overflow", "truncate", "--json")
    assert json.loads(cut.stdout)["truncated"] == 1
    assert harli("check-data", str(path), "--model", "/no/model").returncode == 2


def test_make_model_from_the_command_line(tmp_path: Path):
    done = harli("make-model", str(tmp_path / "m"), "--arch", "qwen3", "--config-only", "--json", timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["arch"] == "qwen3"
    again = harli("make-model", str(tmp_path / "m"), timeout=120)
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr
