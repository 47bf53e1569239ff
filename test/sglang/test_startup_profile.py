"""The quick profile at start-up.  SGLang's TokenizerManager is stood in for; what it computes the
real serving side learns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.tokenizer_manager import ServerStatus

from sglang_harli.config import HarliOptions
from sglang_harli.errors import NotReadyError
from sglang_harli.managers.http.start_up.startup_profile import StartupProfile
from sglang_harli.managers.scheduler.policy.serving_state import ServingState
from sglang_harli.managers.scheduler.profile_setup import profile_key
from sglang_harli.managers.scheduler.step_timer import BatchLoad
from sglang_harli.predictor.latency_predictor import LatencyPredictor
from sglang_harli.predictor.profile import sweep
from sglang_harli.predictor.profile.priors import first_guess, from_table
from sglang_harli.predictor.profile.profile_table import ProfileKey, load
from sglang_harli.sglang_versions.current import arguments
from support.model_runner import server_args
from support.service.service_peers import limits

KEY = ProfileKey("m", "cpu", "bfloat16", "0.5.16", "")
LIMITS = {"requests": 4, "row_tokens": 400, "slots": 4096, "vocab": 100, "sampled": 8}


class Rig:
    """A server that takes ``stall_s`` for a load."""

    def __init__(self, run_dir: Path, stall_s: float = 0.0) -> None:
        self.side = ServingState(HarliOptions(run_dir=str(run_dir)))
        self.side.profile_key = KEY
        self.manager = SimpleNamespace(
            server_status=ServerStatus.Starting, generate_request=self.generate, abort_request=self.abort
        )
        self.publisher = SimpleNamespace(was_ready=False, down=None, ask=self.ask)
        self.stall_s, self.aborted, self.loads = stall_s, [], 0
        self.refuses = False

    async def ask(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        assert method == "harli/profile"
        if self.refuses:
            raise NotReadyError("no")
        known = {"profiled": self.side.predictor.profiled, **(self.side.profile() or {})}
        return {"limits": LIMITS, "fields": {}, **known}

    async def generate(self, request: Any, _http: Any) -> AsyncIterator[dict[str, Any]]:
        await asyncio.sleep(self.stall_s)
        self.loads += 1
        prompts, new = request.input_ids, request.sampling_params["max_new_tokens"]
        for step in range(0, new, LIMITS["sampled"]):
            context = sum(len(prompt) + step for prompt in prompts)
            self.side.learn(BatchLoad(True, len(prompts), context, len(prompts), context), 0.01)
        yield {}

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    def run(self, budget_s: float) -> StartupProfile:
        async def whole() -> StartupProfile:
            profile = StartupProfile(self.publisher, self.manager, budget_s)  # type: ignore[arg-type]
            profile.start()
            await asyncio.sleep(0)
            assert profile.done == (not budget_s)
            self.manager.server_status, self.publisher.was_ready = ServerStatus.Up, True
            if profile._task is not None:
                await asyncio.wait_for(profile._task, 60)
            assert profile.done
            await profile.stop()
            return profile

        return asyncio.run(whole())


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    (tmp_path / "runs").mkdir()
    return Rig(tmp_path / "runs")


def test_without_a_budget_nothing_is_done(rig):
    rig.run(0.0)
    assert rig.loads == 0 and not Path(rig.side.options.profile_path).exists()


def test_a_server_without_a_profile_measures_one_and_knows_it_at_once(rig):
    rig.run(60.0)
    found = load(rig.side.options.profile_path, KEY)
    assert found.table is not None and rig.loads == len(sweep.grid(LIMITS)) > 1
    assert sweep.missing(sweep.grid(LIMITS), found.table) == []
    assert rig.side.predictor.known("decode")


def test_one_that_has_a_profile_measures_none(rig):
    rig.run(60.0)
    table = load(rig.side.options.profile_path, KEY).table
    assert table is not None
    again = Rig(Path(rig.side.options.run_dir))
    again.side.predictor = LatencyPredictor(from_table(table, first_guess()))
    again.run(60.0)
    assert again.loads == 0


def test_a_load_that_exceeds_the_budget_is_taken_back(tmp_path):
    rig = Rig(tmp_path, stall_s=3600.0)
    rig.run(0.05)
    assert rig.loads == 0 and len(rig.aborted) == 1
    assert not Path(rig.side.options.profile_path).exists()


def test_what_goes_wrong_does_not_keep_the_server_from_serving(rig):
    rig.refuses = True
    rig.run(60.0)
    assert rig.loads == 0


def test_a_profile_is_of_one_kind_of_decode_graphs(tiny_model):
    args = server_args(tiny_model())
    arguments.resolve(args)
    given = arguments.in_force(args)
    assert "decode_graphs=disabled" in profile_key(limits(), given).flags  # as on every CPU
    given.cuda_graph_config.decode.backend = "full"
    assert "decode_graphs=full" in profile_key(limits(), given).flags
