"""Whatever is killed wherever, no acknowledged job is lost, run twice, published twice or trained differently.

``--points all`` goes through every named point and victim on a bare host and through six of them on a real
server; ``--points step-applied,renamed`` through these points on the bare host; without it a sample runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sglang_harli.fault_points import Point
from support.kill_cases import Case, Outcome
from support.kill_judge import Result, reference, run_case
from support.kill_report import OUTCOMES
from support.kill_world import VICTIMS, BareWorld, RealWorld, World
from support.models import make_model

SNAPSHOT = (
    Point.SNAPSHOT_COPIED,
    Point.FILE_WRITTEN,
    Point.RENAMED,
    Point.STORE_COMMITTED,
    Point.ACKNOWLEDGED,
)
EVERY = [
    *(Case(point, victim) for point in Point for victim in VICTIMS),
    # later in a run, in the middle of a step's micro-batches, and at the checkpoint that ends it
    *(Case(Point.MICRO_BATCH_FED, victim, reach=6) for victim in VICTIMS),
    *(Case(Point.STEP_APPLIED, victim, reach=3) for victim in VICTIMS),
    *(Case(point, victim, final=True) for point in SNAPSHOT for victim in VICTIMS),
]
SAMPLE = [
    Case(Point.JOB_CREATED, "service"),
    Case(Point.STEP_APPLIED, "scheduler", reach=3),
    Case(Point.RENAMED, "all"),
    Case(Point.STORE_COMMITTED, "service", final=True),
    Case(Point.LOADED, "scheduler"),
    Case(Point.REGISTERED, "all"),
]
SERVER = [
    Case(Point.DATA_STORED, "service"),
    Case(Point.STEP_APPLIED, "scheduler", reach=3),
    Case(Point.STORE_COMMITTED, "all"),
    Case(Point.ACKNOWLEDGED, "service"),
    Case(Point.TENSORS_SHARED, "scheduler"),
    Case(Point.REGISTERED, "all"),
]
SERVER_SAMPLE = [Case(Point.FILE_WRITTEN, "service")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bare_case" in metafunc.fixturenames:
        cases = _chosen(metafunc.config.getoption("--points"), SAMPLE, EVERY)
        metafunc.parametrize("bare_case", cases, ids=str)
    if "server_case" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--points")
        cases = SERVER if asked == "all" else SERVER_SAMPLE * (not asked)
        metafunc.parametrize("server_case", cases, ids=str)


def _chosen(asked: str, sample: list[Case], every: list[Case]) -> list[Case]:
    if asked in ("", "all"):
        return every if asked else sample
    points = asked.split(",")
    unknown = sorted(set(points) - set(Point))
    if unknown:
        raise pytest.UsageError(f"--points {','.join(unknown)}: accepted are all, {', '.join(Point)}")
    return [case for case in every if case.point in points]


class Place:
    """A world that is made when it is needed, with the result of an uninterrupted run in it; a case that went
    wrong leaves it, and the next one gets a new world."""

    def __init__(self, make: Callable[[str], World], model: str) -> None:
        self._make, self._model = make, model
        self._world: World | None = None
        self._expected: Result | None = None

    def run(self, case: Case) -> Outcome:
        if self._world is None:
            self._world = self._make(self._model)
            self._world.start()
            self._expected = self._expected or reference(self._world)
        assert self._expected is not None
        outcome = run_case(self._world, case, self._expected)
        if outcome.problems:
            print(self._world.log_tail(200))
            self.close()
        return outcome

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="module")
def bare(model: str) -> Iterator[Place]:
    place = Place(BareWorld, model)
    yield place
    place.close()


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Place]:
    place = Place(RealWorld, model)
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
