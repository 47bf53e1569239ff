"""`harli profile` against an HTTP server in SGLang's place whose batches are learnt by the real
serving side."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.config import HarliOptions
from sglang_harli.core import PROFILE_ROUTE, QuantumKind
from sglang_harli.errors import ConfigError, HarliError, NotReadyError, UnsupportedError
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.step_timer import BatchLoad
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.profile import sweep as sweeping
from sglang_harli.predictor.profile.measured_points import KEPT_LOADS, MeasuredPoints
from sglang_harli.predictor.profile.priors import first_guess, from_table
from sglang_harli.predictor.profile.profile_table import ProfileKey, load
from sglang_harli.tools import profile

KEY = ProfileKey("m", "cpu", "bfloat16", "0.5.16", "")
LIMITS = {"requests": 8, "row_tokens": 1200, "slots": 4096, "vocab": 100, "sampled": 8}


class Rig:
    """A server whose decode step takes 5 ms, 1 ms a request and 1 us a token of context."""

    def __init__(self, run_dir: Path, *, key: ProfileKey | None = KEY) -> None:
        self.side = ServingState(HarliOptions(run_dir=str(run_dir)))
        self.side.profile_key = key
        self.refuses = False
        self.wants: str | None = None  # the server's API key
        self.key: str | None = None  # the tool's
        self.asked: list[dict[str, Any]] = []
        rig = self

        class Handler(BaseHTTPRequestHandler):
            def refused(self) -> bool:
                return rig.wants is not None and self.headers["Authorization"] != f"Bearer {rig.wants}"

            def do_GET(self) -> None:
                if self.refused():
                    return self._answer({"error": "Unauthorized"}, 401)
                if rig.refuses:
                    return self._answer("loading", 503)
                if rig.side.profile_key is None or self.path != PROFILE_ROUTE:
                    return self._answer({"detail": "Not Found"}, 404)
                self._answer({"limits": LIMITS, "fields": {}, **(rig.side.profile() or {})})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.refused():
                    return self._answer({"error": "Unauthorized"}, 401)
                rig.generate(body)
                self._answer([])

            def _answer(self, value: Any, code: int = 200) -> None:
                data = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def generate(self, body: dict[str, Any]) -> None:
        self.asked.append(body)
        prompts, new = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        for step in range(0, new, LIMITS["sampled"]):
            context = sum(len(prompt) + step for prompt in prompts)
            seconds = 5e-3 + 1e-3 * len(prompts) + 1e-6 * context
            self.side.learn(BatchLoad(True, len(prompts), context, len(prompts), context), seconds)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    (tmp_path / "runs").mkdir()
    made = Rig(tmp_path / "runs")
    yield made
    made.http.shutdown()


def sweep(rig: Rig, *, budget_s: float = 60.0, output: str | None = None) -> dict[str, Any]:
    return profile.sweep(
        profile.ServerPort(rig.url, rig.key), output=output, budget_s=budget_s, progress=iter
    )


def test_a_sweep_measures_every_load_that_fits_and_the_next_start_knows_them(rig, tmp_path):
    made = sweep(rig)
    assert made["missing"] == 0 and made["measured"] == len(rig.asked) == len(sweeping.grid(LIMITS))
    found = load(rig.side.options.profile_path, KEY)
    assert found.table is not None and found.table.points == made["points"]
    predictor = LatencyPredictor(from_table(found.table, first_guess()))
    for batch, context in ((1, 300), (6, 3000)):
        seconds = predictor.decode(batch, context).expected_s
        assert seconds == pytest.approx(5e-3 + 1e-3 * batch + 1e-6 * context, rel=0.03)


def test_loads_stay_within_the_servers_limits():
    loads = sweeping.grid(LIMITS)
    assert {load.batch for load in loads} == {1, 2, 4, 8}
    assert {load.prompt_tokens for load in loads} == {64, 256, 1024}
    assert all(load.batch * (load.prompt_tokens + load.new_tokens) <= 0.9 * LIMITS["slots"] for load in loads)
    prompts = sweeping.bodies(loads[1], 100)["input_ids"]
    assert len(prompts) == loads[1].batch and prompts[0] != prompts[1]
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)


def test_a_sweep_that_ended_early_goes_on_where_it_ended(rig):
    first = sweep(rig, budget_s=0.0)
    assert first["measured"] == 0 and first["missing"] == len(sweeping.grid(LIMITS))
    rig.generate(sweeping.bodies(sweeping.grid(LIMITS)[0], 100))
    rig.asked.clear()
    second = sweep(rig)
    assert second["measured"] == len(rig.asked) == len(sweeping.grid(LIMITS)) - 1
    again = Rig(Path(rig.side.options.run_dir))  # a new server: what it measured is gone, the file is not
    third = sweep(again)
    again.http.shutdown()
    assert third["measured"] == 0 and third["points"] == second["points"]


def test_a_foreign_file_is_replaced(rig):
    sweep(rig)
    other = ProfileKey("another model", "cpu", "bfloat16", "0.5.16", "")
    rig.side.profile_key = other
    made = sweep(rig)
    assert "another model" in made["was"]
    assert load(rig.side.options.profile_path, other).table is not None


def test_where_the_file_goes(rig, tmp_path):
    made = sweep(rig, output=str(tmp_path / "elsewhere" / "p.json"))
    assert Path(made["path"]).is_file() and not Path(rig.side.options.profile_path).exists()
    Path(rig.side.options.run_dir).rmdir()
    with pytest.raises(ConfigError, match="--output"):
        sweep(rig)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        sweep(rig, output=str(tmp_path / "file" / "p.json"))


def test_servers_that_are_none_or_do_not_finetune(tmp_path):
    with pytest.raises(NotReadyError, match="--url"):
        profile.ask(profile.ServerPort("http://127.0.0.1:1"))
    with pytest.raises(ConfigError, match="--url"):
        profile.ask(profile.ServerPort("nonsense"))
    plain = Rig(tmp_path, key=None)
    with pytest.raises(UnsupportedError, match="with finetuning"):
        profile.ask(profile.ServerPort(plain.url))
    plain.http.shutdown()


def test_a_server_that_refuses_is_quoted(rig):
    rig.refuses = True
    with pytest.raises(HarliError, match="answered 503"):
        profile.ask(profile.ServerPort(rig.url))


def test_the_api_key_is_sent_and_a_wrong_one_is_said(rig):
    rig.wants = "secret"
    with pytest.raises(ConfigError, match="wants an API key: give --api-key, or HARLI_API_KEY"):
        sweep(rig)
    rig.key = "another"
    with pytest.raises(ConfigError, match="other than this one"):
        sweep(rig)
    assert not rig.asked
    rig.key = "secret"
    assert sweep(rig)["missing"] == 0


def test_points_are_bounded_and_few_times_are_no_point():
    points = MeasuredPoints()
    points.decode(1, 100, 0.01, 0)
    points.decode(1, 100, 0.01, 0)
    assert points.table(KEY).decode == ()
    for n in range(3 * KEPT_LOADS):
        for seconds in (0.01, 0.02, 0.9):
            points.decode(n + 1, 100, seconds, 0)
            points.quantum(QuantumKind.FORWARD, n + 1, 64, seconds)
    table = points.table(KEY)
    assert len(table.decode) == len(table.quanta) == KEPT_LOADS
    assert {p.seconds for p in table.decode} == {0.02}
    assert max(p.batch for p in table.decode) == 3 * KEPT_LOADS
