"""Whatever is killed wherever, no acknowledged job is lost, run twice, published twice or trained
differently.

``--points all`` goes through every named point and victim on a bare host and through six of them on
a real server; ``--points step-applied,renamed`` through these points on the bare host; without it a
sample runs.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.failpoints import Failpoint
from sglang_harli.protocol.public import Event
from support.kills.kill_cases import Case, Outcome
from support.kills.kill_judge import HYPERPARAMETERS, JOB_S, ROWS, Result, reference, run_case, weights
from support.kills.kill_report import OUTCOMES
from support.kills.kill_targets import VICTIMS, BareRig, RealRig, Rig, until
from support.models import make_model

pytestmark = pytest.mark.long

SNAPSHOT = (
    Failpoint.SNAPSHOT_COPIED,
    Failpoint.FILE_WRITTEN,
    Failpoint.RENAMED,
    Failpoint.STORE_COMMITTED,
    Failpoint.ACKNOWLEDGED,
)
EVERY = [
    *(Case(point, victim) for point in Failpoint for victim in VICTIMS),
    # later in a run, in the middle of a step's micro-batches, and at the checkpoint that ends it
    *(Case(Failpoint.MICRO_BATCH_FED, victim, reach=6) for victim in VICTIMS),
    *(Case(Failpoint.STEP_APPLIED, victim, reach=3) for victim in VICTIMS),
    *(Case(Failpoint.EVALUATED, victim, reach=2) for victim in VICTIMS),
    *(Case(Failpoint.EVALUATED, victim, final=True) for victim in VICTIMS),
    *(Case(point, victim, final=True) for point in SNAPSHOT for victim in VICTIMS),
]
SAMPLE = [
    Case(Failpoint.JOB_CREATED, "service"),
    Case(Failpoint.STEP_APPLIED, "scheduler", reach=3),
    Case(Failpoint.EVALUATED, "all", reach=2),
    Case(Failpoint.RENAMED, "all"),
    Case(Failpoint.STORE_COMMITTED, "service", final=True),
    Case(Failpoint.LOADED, "scheduler"),
    Case(Failpoint.REGISTERED, "all"),
]
SERVER = [
    Case(Failpoint.DATA_STORED, "service"),
    Case(Failpoint.STEP_APPLIED, "scheduler", reach=3),
    Case(Failpoint.STORE_COMMITTED, "all"),
    Case(Failpoint.ACKNOWLEDGED, "service"),
    Case(Failpoint.TENSORS_SHARED, "scheduler"),
    Case(Failpoint.REGISTERED, "all"),
]
SERVER_SAMPLE = [Case(Failpoint.FILE_WRITTEN, "service")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bare_case" in metafunc.fixturenames:
        cases = _chosen(_asked(metafunc.config), SAMPLE, EVERY)
        metafunc.parametrize("bare_case", cases, ids=str)
    if "server_case" in metafunc.fixturenames:
        asked = _asked(metafunc.config)
        cases = SERVER if asked == "all" else SERVER_SAMPLE * (not asked)
        metafunc.parametrize("server_case", cases, ids=str)


def _asked(config: pytest.Config) -> str:
    return str(config.getoption("--points"))


def _chosen(asked: str, sample: list[Case], every: list[Case]) -> list[Case]:
    if asked in ("", "all"):
        return every if asked else sample
    points = asked.split(",")
    unknown = sorted(set(points) - set(Failpoint))
    if unknown:
        raise pytest.UsageError(f"--points {','.join(unknown)}: accepted are all, {', '.join(Failpoint)}")
    return [case for case in every if case.point in points]


class Place:
    """A rig that is made when it is needed, with the result of an uninterrupted run in it; a case
    that went wrong leaves it, and the next one gets a new rig."""

    def __init__(self, make: Callable[[str], Rig], model: str) -> None:
        self._make, self._model = make, model
        self._rig: Rig | None = None
        self._expected: Result | None = None

    def rig(self) -> Rig:
        if self._rig is None:
            self._rig = self._make(self._model)
            self._rig.start()
        return self._rig

    def run(self, case: Case) -> Outcome:
        rig = self.rig()
        self._expected = self._expected or reference(rig)
        outcome = run_case(rig, case, self._expected)
        if outcome.problems:
            print(rig.log_tail(200))
            self.close()
        return outcome

    def close(self) -> None:
        if self._rig is not None:
            self._rig.close()
            self._rig = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="module")
def bare(model: str) -> Iterator[Place]:
    place = Place(BareRig, model)
    yield place
    place.close()


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Place]:
    place = Place(RealRig, model)
    yield place
    place.close()


def _try(place: Place, case: Case, config: pytest.Config) -> None:
    outcome = place.run(case)
    config.stash.setdefault(OUTCOMES, []).append(outcome)
    assert not outcome.problems


def test_on_a_bare_host(bare: Place, bare_case: Any, pytestconfig: pytest.Config) -> None:
    _try(bare, bare_case, pytestconfig)


def test_on_a_real_server(server: Place, server_case: Any, pytestconfig: pytest.Config) -> None:
    _try(server, server_case, pytestconfig)


def test_watch_sees_a_job_through_the_death_of_everything(
    server: Place, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if _asked(pytestconfig) not in ("", "all"):
        pytest.skip("--points names points of the bare host")
    rig = server.rig()
    settings: dict[str, Any] = HYPERPARAMETERS | {"n_epochs": 20, "checkpoint_every": 10}
    rig.faults.arm(Failpoint.STEP_APPLIED, 30)
    with FinetuneClient(rig.endpoint) as client:
        job = client.submit(ROWS, **settings)
        rig.faults.hit(Failpoint.STEP_APPLIED)  # it trains no further until everything is dead
        until(lambda: _saved(list(client.events(job.id))), "a checkpoint", 30)
        output = tmp_path / "watch"
        with _watching(rig.endpoint, job.id, output) as watch:
            until(lambda: output.stat().st_size, "the first line of harli watch", 60)
            rig.kill("all")
            rig.start()
            assert watch.wait(JOB_S) == 0, output.read_text()
        done = client.get(job.id)
        assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 2), done.error
        assert f"served as: {done.fine_tuned_model}" in output.read_text()
        events = list(client.events(job.id))
        [resumed] = [event for event in events if event.type == "resumed"]
        saved = _saved(events[: resumed.id])[-1]
        assert resumed.message == f"attempt 2 starts from the checkpoint of step {saved}"
        straight = client.wait(client.submit(ROWS, **settings).id, JOB_S)
        assert weights(rig, job.id) == weights(rig, straight.id)


def _saved(events: list[Event]) -> list[int]:
    """The steps of which there is a checkpoint, in order."""
    return [event.data["step"] for event in events if event.type == "checkpoint_saved"]


@contextlib.contextmanager
def _watching(endpoint: str, job: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "sglang_harli.cli", "watch", job, "--endpoint", endpoint]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
