"""`harli check-data` with the server's flags, and by the running server itself."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.errors import ConfigError, DataError
from support.chat_templates import FAMILIES, make_family
from support.service.service_process import ServiceProcess

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def harli(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "HARLI_ENDPOINT"} | environment
    command = [sys.executable, "-m", "sglang_harli.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=kept)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("base"), "qwen3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [CHAT, {"messages": [{"role": "developer", "content": "Be short."}, *CHAT["messages"]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[ServiceProcess]:
    process = ServiceProcess(str(model))
    try:
        yield process.start()
    finally:
        process.close()


def prompt_of(found: dict[str, Any]) -> str:
    return found["examples"][0]["parts"][0]["text"]


def test_the_servers_flags_make_the_rows(model: Path, data: str, tmp_path: Path):
    def check(*flags: str) -> dict[str, Any]:
        done = harli("check-data", data, "--model", str(model), *flags, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    plain = check()
    assert plain["notes"][0]["code"] == "role_not_rendered" and plain["notes"][0]["names"] == ["developer"]
    assert "does not render messages of role developer" in plain["summary"]
    assert plain["max_seq_length"] == 1024
    assert not prompt_of(plain).endswith("</think>\n\n")
    closed = check("--default-chat-template-kwargs", '{"enable_thinking": false}')
    assert prompt_of(closed).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    file = tmp_path / "other.jinja"
    file.write_text(FAMILIES["plain"].template.replace("<|im_start|>", "<|im_start|>[other] "))
    other = check("--chat-template", str(file), "--context-length", "300")
    assert prompt_of(other).startswith("<|im_start|>[other] user") and other["max_seq_length"] == 300


def test_flags_that_are_wrong_are_named(model: Path, data: str):
    def error(*flags: str) -> str:
        done = harli("check-data", data, *flags)
        assert done.returncode in (2, 3), done.stderr
        return done.stderr

    base = ("--model", str(model))
    assert "--chat-template no.jinja cannot be read" in error(*base, "--chat-template", "no.jinja")
    assert "--chat-template no.json cannot be read" in error(*base, "--chat-template", "no.json")
    assert "SGLang's own template 'chatml'" in error(*base, "--chat-template", "chatml")
    assert "give a JSON object" in error(*base, "--default-chat-template-kwargs", "[1]")
    assert "give --model too" in error("--chat-template", "x.jinja", "--revision", "v1")
    assert "no such folder" in error("--model", "~/no/such/model")


def test_a_hub_id_and_a_home_have_the_limit_of_the_model(model: Path, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "word " * 3000}) + "\n")
    hub = tmp_path / "hub"
    snapshot = hub / "models--acme--toy" / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot)
    (hub / "models--acme--toy" / "refs").mkdir()
    (hub / "models--acme--toy" / "refs" / "main").write_text("a" * 40)
    shutil.copytree(model, tmp_path / "models" / "toy")
    environment = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    for name in ("acme/toy", "~/models/toy"):
        done = harli("check-data", str(path), "--model", name, **environment)
        assert done.returncode == 3 and "the limit is 1024" in done.stderr, done.stderr


def test_a_revision_of_a_hub_id_is_read_as_its_folder_is(data: str, tmp_path: Path):
    hub = tmp_path / "hub" / "models--acme--toy"
    snapshot = hub / "snapshots" / ("b" * 40)  # no other revision is on this machine
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": "<|im_start|>"}
    make_family(snapshot, "plain", **settings)
    (hub / "refs").mkdir()
    (hub / "refs" / "v2").write_text("b" * 40)
    environment = {"HF_HUB_CACHE": str(hub.parent), "HF_HUB_OFFLINE": "1"}
    folder = harli("check-data", data, "--model", str(snapshot), "--json")
    named = harli("check-data", data, "--model", "acme/toy", "--revision", "v2", "--json", **environment)
    assert named.returncode == 0, named.stderr
    assert json.loads(named.stdout) == json.loads(folder.stdout)
    other = harli("check-data", data, "--model", "acme/toy", "--revision", "v1", **environment)
    assert other.returncode == 2 and "acme/toy" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"text_config": null}'])
def test_a_config_that_is_odd_is_no_traceback(data: str, tmp_path: Path, content: str):
    folder = make_family(tmp_path / "odd", "plain")
    (folder / "config.json").write_text(content)
    done = harli("check-data", data, "--model", str(folder))
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)


def test_the_running_server_checks_a_file_and_makes_no_job(
    service: ServiceProcess, data: str, tmp_path: Path
):
    done = harli("check-data", data, "--json", HARLI_ENDPOINT=service.endpoint)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["rows"], found["file"]) == (True, 2, "chat.jsonl")
    assert [part["learned"] for part in found["examples"][0]["parts"]] == [False, True]
    assert found["notes"][0]["names"] == ["developer"]
    shown = harli("--endpoint", service.endpoint, "check-data", data)
    assert "2 rows" in shown.stdout and "[[" in shown.stdout
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(CHAT) + "\n{}\n")
    refused = harli("check-data", str(bad), "--json", HARLI_ENDPOINT=service.endpoint)
    assert refused.returncode == 3 and "line 2: field 'messages'" in refused.stderr
    assert json.loads(refused.stdout)["bad_lines"][0]["line"] == 2
    with FinetuneClient(service.endpoint) as client:
        assert client.list() == []
        long = [{"prompt": "q", "completion": "word " * 400_000}] * 2  # more than a frame: it is uploaded
        found = client.check(long, max_seq_length=50, on_overflow="truncate")
        assert (found["rows"], found["truncated"], found["longest_row"]) == (2, 2, 50)
        with pytest.raises(ConfigError, match="max_seq_length=5000 is not accepted"):
            client.check([CHAT], max_seq_length=5000)
        with pytest.raises(DataError):
            client.check("/no/such/file")
    assert not list(service.run_dir.glob(".incoming-*")) and not list(service.run_dir.glob("ftjob-*"))


def test_the_report_of_a_table_says_what_it_is_and_where_it_is_at_fault(model: Path, tmp_path: Path):
    path = tmp_path / "alpaca.jsonl"  # whatever its name
    path.write_bytes(gzip.compress(b"instruction,input,output\nSay it,in German,Gut\nSay,,\n"))
    done = harli("check-data", str(path), "--model", str(model), "--json")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert [found[name] for name in ("format", "file_format", "unit")] == ["alpaca", "csv", "row"]
    assert found["file_text"] == "CSV, packed with gzip"
    assert (found["rows"], found["bad_rows"], found["fault"], found["truncated"]) == (1, 1, None, 0)
    assert found["bad_lines"] == [
        {
            "row": 2,
            "line": 3,
            "field": "output",
            "reason": "field 'output' is empty: there is nothing to learn",
        }
    ]
    [example] = found["examples"]
    assert example["row"] == 1 and "Say it\nin German" in example["parts"][0]["text"]
    assert sum(bucket["rows"] for bucket in found["histogram"]) == 1 and 0 < found["loss_share"] < 1
    shown = harli("check-data", str(path), "--model", str(model))
    assert "rows of the format alpaca in CSV, packed with gzip; 1 rows not accepted" in shown.stdout
    assert "row 1: " in shown.stdout and "[[" in shown.stdout
    assert "row 2 (line 3): field 'output' is empty" in shown.stderr


def test_what_is_about_the_whole_file_is_said_once(model: Path, tmp_path: Path):
    path = tmp_path / "dpo.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 3000)
    done = harli("check-data", str(path), "--model", str(model), "--json")
    found = json.loads(done.stdout)
    assert found["fault"].startswith("this looks like preference data (DPO)") and found["format"] is None
    assert (found["bad_rows"], len(found["bad_lines"]), done.returncode) == (3000, 1000, 3)
    assert done.stderr.count("preference data") == 1
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    done = harli("check-data", str(path), "--model", str(model))
    assert "this is a zip archive" in done.stderr and "Traceback" not in done.stderr


def test_parquet_and_folders_at_the_running_server(service: ServiceProcess, model: Path, tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([CHAT] * 3), folder / "train-00000-of-00001.parquet")
    environment = {"HARLI_ENDPOINT": service.endpoint}
    sent = json.loads(harli("check-data", str(folder), "--json", **environment).stdout)
    here = json.loads(harli("check-data", str(folder), "--model", str(model), "--json").stdout)
    assert (sent["rows"], sent["file"], sent["file_format"]) == (3, "set.jsonl", "jsonl")
    assert sent["tokens"] == here["tokens"] and here["file"] == str(folder)
    with FinetuneClient(service.endpoint) as client:
        job = client.submit(folder / "train-00000-of-00001.parquet")
        assert (job.data["format"], job.data["file_text"], job.data["rows"]) == ("messages", "Parquet", 3)
        [validated] = [e for e in client.events(job.id) if e.type == "data_validated"]
        assert "format: messages in Parquet" in validated.message
        client.cancel(job.id)
