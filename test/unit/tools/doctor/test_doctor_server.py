"""`harli doctor` on a server: the real finetune service, HTTP answers, keys, and who may use it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.errors import ConfigError
from sglang_harli.protocol import curve_keys
from sglang_harli.tools.doctor.asked import Answer, Asked, client_keys
from sglang_harli.tools.doctor.checks import access, host, ports, server
from sglang_harli.tools.doctor.finding import Status
from support.models import write_tokenizer
from support.service.service_process import ServiceProcess

SERVICE = {
    "pid": 1,
    "base": "tiny",
    "uptime_s": 1000.0,
    "scheduler_pid": 2,
    "scheduler_answers": True,
    "http_pid": 3,
    "refusal": None,
    "hold": None,
    "store": "ok",
    "unreadable_jobs": {},
    "trouble": None,
}


def judged(waits: str | None = None, serving: Any = None, jobs: Any = None, **service: Any) -> Any:
    status = {"service": SERVICE | service, "serving": serving, "jobs": jobs or {"queued": 0, "running": 0}}
    return server.judge_status(Answer(status=status, waits=waits), "ipc:///s")


# ------------------------------------------------------------------ the finetune service
@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, vocab_size=509)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    process = ServiceProcess(str(folder))
    try:
        yield process.start()
    finally:
        process.close()


def test_a_service_whose_scheduler_is_not_up(service: ServiceProcess):
    asked = Asked(endpoint=service.endpoint)
    finding = server.finetune_service(asked)
    assert finding.status is Status.WARNING
    assert "the scheduler has not said hello" in finding.found and "wait until" in finding.mend
    assert asked.run_dir == service.run_dir, "that of the server which answers"


def test_nothing_answers(tmp_path: Path):
    none = f"ipc://{tmp_path}/none"[:100]
    given = server.finetune_service(Asked(endpoint=none, run_dir=str(tmp_path)))
    assert given.status is Status.WARNING and "nothing listens at" in given.found
    bad = server.finetune_service(Asked(endpoint="http://127.0.0.1:1", run_dir=str(tmp_path)))
    assert bad.status is Status.PROBLEM and "not the HTTP address" in bad.found
    odd = Asked(endpoint="tcp://no..host:30100")  # what can be no host's name
    assert "nothing listens at" in server.finetune_service(odd).found and odd.run_dir.name == "harli-runs"
    assert ports.finetune_endpoint(odd).status is Status.SKIPPED


def test_a_healthy_status():
    assert judged().status is Status.OK
    assert "jobs: 2 succeeded" in judged(jobs={"queued": 0, "running": 0, "succeeded": 2}).found


@pytest.mark.parametrize(
    ("change", "status", "found"),
    [
        (
            {"state": "down", "reason": "it died", "remedy": "restart"},
            "problem",
            "finetuning is down: it died",
        ),
        ({"refusal": "no LoRA"}, "problem", "this server cannot train: no LoRA"),
        ({"scheduler_pid": None}, "problem", "the scheduler has not said hello"),
        ({"http_pid": None, "uptime_s": 3.0}, "warning", "the HTTP process has not said hello"),
        ({"scheduler_answers": False}, "warning", "has not answered within a second"),
        ({"hold": "parity is measured"}, "warning", "no job starts now: parity is measured"),
        ({"store": "the disk is full"}, "problem", "the job store: the disk is full"),
        ({"unreadable_jobs": {"ftjob-1": "torn"}}, "warning", "ftjob-1"),
        ({"trouble": "a frame too many"}, "warning", "a frame too many"),
        ({"serving": {"impossible_targets": ["tpot"]}}, "warning", "serving alone misses a target: tpot"),
        ({"serving": {"parity": {"state": "differs", "why": "by 3"}}}, "problem", "by 3"),
        ({"waits": "waiting for the server's tokenizer", "jobs": {"queued": 1}}, "warning", "tokenizer"),
    ],
)
def test_what_a_status_tells(change: dict[str, Any], status: str, found: str):
    finding = judged(**change)
    assert finding.status == status
    assert found in finding.found and finding.mend


# ------------------------------------------------------------------ HTTP
@pytest.fixture
def http() -> Iterator[Any]:
    """A server whose answers are set by path."""
    answers: dict[str, tuple[int, str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, text = answers.get(self.path, (404, "no"))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", answers
    listening.shutdown()
    listening.server_close()


def test_http_servers(http: Any, tmp_path: Path):
    url, answers = http
    nowhere = f"ipc://{tmp_path}/none"[:100]

    def look() -> tuple[str, str]:
        finding = server.http_server(Asked(http=url, endpoint=nowhere))
        return str(finding.status), finding.found

    assert look()[0] == "problem" and "no SGLang server" in look()[1]
    answers["/health"] = (503, "the server is ending")
    assert look() == ("warning", f"{url}/health answers 503: the server is ending")
    answers["/health"] = (200, "")
    assert look()[0] == "warning" and "an SGLang without harli" in look()[1]
    answers["/harli/profile"] = (200, "{}")
    assert look() == ("ok", f"{url}/health answers 200, with harli")
    answers["/harli/profile"] = (401, "")
    assert look()[0] == "ok"
    for code, status in ((200, "ok"), (401, "problem"), (404, "ok")):
        answers["/v1/models"] = (code, "")
        keyed = server.http_server(Asked(http=url, endpoint=nowhere, api_key="wrong"))
        assert keyed.status == status, "a key that is refused"
    for other in ((200, "<html>"), (500, "{}"), (302, "")):  # a web server that answers any path
        answers["/harli/profile"] = other
        assert look()[0] == "warning" and "not what harli does" in look()[1]
    assert server.judge_ours(url, 0, "timed out").status is Status.WARNING


def test_no_http_server(tmp_path: Path):
    nowhere = f"ipc://{tmp_path}/none"[:100]
    assert server.http_server(Asked(port=1, endpoint=nowhere)).status is Status.SKIPPED
    assert server.http_server(Asked(http="http://127.0.0.1:1", endpoint=nowhere)).status is Status.WARNING
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        Asked(http="tcp://127.0.0.1:30100")
    with pytest.raises(ConfigError, match="1 to 65535"):
        Asked(port=65536)


# ------------------------------------------------------------------ keys and access
@pytest.fixture
def keys(tmp_path: Path) -> Path:
    curve_keys.make_keys(str(tmp_path / "keys"))
    return tmp_path / "keys"


def test_keys_that_match(keys: Path):
    both = access.judge_keys(keys)
    assert both.status is Status.OK and "they match" in both.found
    assert access.judge_keys(keys / "server").status is Status.OK
    assert access.judge_keys(keys / "client").status is Status.OK
    assert access.curve_keys(Asked()).status is Status.SKIPPED
    assert client_keys(str(keys)) == client_keys(str(keys / "client")) == str(keys / "client")
    assert client_keys(None) is None


def test_keys_that_cannot_be_used(keys: Path, tmp_path: Path):
    assert "holds neither" in access.judge_keys(tmp_path).found
    secret = keys / "client" / "client.key_secret"
    secret.chmod(0o644)
    opened = access.judge_keys(keys)
    assert opened.status is Status.PROBLEM and "chmod 600" in opened.found
    secret.chmod(0o600)
    (keys / "server" / "clients" / "client.key").unlink()
    assert "nobody could connect" in access.judge_keys(keys).found


def test_keys_that_do_not_match(keys: Path, tmp_path: Path):
    curve_keys.make_keys(str(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "client" / "server.key", keys / "client" / "server.key")
    finding = access.judge_keys(keys)
    assert finding.status is Status.PROBLEM and "is another server's key" in finding.found
    shutil.rmtree(keys / "client")
    shutil.copytree(tmp_path / "other" / "client", keys / "client")
    assert "does not hold the key of" in access.judge_keys(keys).found


def test_endpoints_that_others_reach():
    assert access.judge_endpoint(Asked(endpoint="tcp://127.0.0.1:30100")).status is Status.OK
    assert access.judge_endpoint(Asked(endpoint="ipc:///s")).status is Status.OK
    bare = access.judge_endpoint(Asked(endpoint="tcp://10.0.0.1:30100"))
    assert bare.status is Status.PROBLEM and "harli make-keys" in bare.mend
    assert access.judge_endpoint(Asked(endpoint="tcp://10.0.0.1:30100", curve_keys="k")).status is Status.OK


def test_http_servers_that_others_reach(http: Any):
    url, answers = http
    answers["/v1/models"] = (200, json.dumps({"data": []}))
    assert access.access(Asked(http=url)).status is Status.OK, "of this host alone"
    opened = access.judge_http(False, ["0.0.0.0"], url)
    assert opened.status is Status.WARNING and "--api-key and --admin-api-key" in opened.mend
    assert access.judge_http(True, ["0.0.0.0"], url).status is Status.OK
    assert access.judge_http(False, [], url).status is Status.OK


# ------------------------------------------------------------------ the machine
@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (host.judge_open_files(1024, 65536), "ok"),
        (host.judge_open_files(256, -1), "ok"),
        (host.judge_open_files(256, 1024), "warning"),
        (host.judge_cores(4), "ok"),
        (host.judge_cores(1), "warning"),
        (host.judge_memory(64 << 30, 32 << 30), "ok"),
        (host.judge_memory(64 << 30, 1 << 30), "warning"),
        (host.judge_clock(2e9, [1.9e9]), "ok"),
        (host.judge_clock(2e9, [2e9 + 3600]), "warning"),
        (host.judge_clock(1000.0, []), "problem"),
    ],
)
def test_what_the_machine_has(finding: Any, status: str):
    assert finding.status == status
    assert bool(finding.mend) == (status != "ok")


def test_available_memory_is_less_than_all():
    assert 0 <= host.available_memory() <= host.host_memory_bytes()
