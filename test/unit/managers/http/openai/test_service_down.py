"""While the finetune service is away, and when it was given up: each operation of the document
answers at once, with a 503 that says when to come again, or with what is wrong with the request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.api_server import ApiServer
from support.schemathesis_run import CHECKS, run, statuses

pytestmark = pytest.mark.long

EXAMPLES = 4  # of each operation; some hundred more come from its document
REFUSED = {400, 401, 403, 404, 405, 413}  # before the service is asked
NOBODY = "0" * 34
OBJECTS = {
    "file_id": [f"file-{NOBODY}"],
    "job_id": [f"ftjob-{NOBODY[:24]}"],
    "upload_id": [f"upload_{NOBODY}"],
    "model": ["tiny-ft-12345678"],
    "parts": {f"upload_{NOBODY}": [f"part_{NOBODY}"]},
    "job": {"model": "org/tiny", "training_file": f"file-{NOBODY}"},
}


@dataclass(frozen=True, kw_only=True)
class State:
    """Why there is no service any more, the code and the Retry-After that say so, and the requests
    that are made."""

    down: str | None
    code: str
    after: str
    phases: str = "coverage,fuzzing"


def ours(request: dict[str, Any]) -> bool:
    """Not other methods of a model's path, which are SGLang's."""
    return request["method"] == "DELETE" or not urlsplit(request["url"]).path.startswith("/v1/models/")


@pytest.fixture(
    params=[
        pytest.param(State(down=None, code="unavailable", after="2"), id="away"),
        pytest.param(
            # What is refused before the service is asked was seen already.
            State(down="it ended 8 times in a row", code="finetune_down", after="60", phases="fuzzing"),
            id="given-up",
        ),
    ]
)
def state(request: pytest.FixtureRequest) -> State:
    return request.param


@pytest.fixture
def server(state: State, tmp_path: Path) -> Iterator[ApiServer]:
    server = ApiServer(f"ipc://{tmp_path}/nobody.sock", down=state.down).start(connected=False)
    yield server
    server.stop()


def test_each_operation_is_a_503_at_once(server: ApiServer, state: State, tmp_path: Path) -> None:
    # Nothing is made or deleted, so nothing is to be found or missed.
    checks = [check for check in CHECKS if check not in ("use_after_free", "ensure_resource_availability")]
    asked = run(server, tmp_path, OBJECTS, phases=state.phases, examples=EXAMPLES, checks=checks)
    for entry in asked:
        request, answer = entry["request"], entry["response"]
        what = f"{request['method']} {request['url'][:200]}: {answer}"
        assert answer["status"] in REFUSED | {503}, what
        if request["method"] == "HEAD" or not ours(request):
            continue
        error = json.loads(answer["content"]["text"])["error"]
        assert set(error) >= {"message", "type", "param", "code"}, what
        if answer["status"] == 503:
            headers = {header["name"].lower(): header["value"] for header in answer["headers"]}
            # Not "timeout": nothing was waited for.
            assert (error["type"], error["code"]) == ("server_error", state.code), what
            assert headers["retry-after"] == state.after, what
            assert headers.get("x-should-retry") == ("false" if state.down else None), what
    for operation, seen in statuses(server, asked).items():
        assert 503 in seen, f"{operation}: {seen}"
    slowest = max(entry["time"] for entry in asked)
    print(f"{len(asked)} requests, the slowest took {slowest:.0f} ms")
