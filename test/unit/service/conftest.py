"""One service for the tests that leave it as it was, and services of their own for those that kill
it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.service.service_fixture import ServiceUnderTest, until
from support.tokenizer import make_tokenizer_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory, model):
    """One service for the tests that leave it as it was."""
    rig = ServiceUnderTest(tmp_path_factory.mktemp("shared"), model)
    yield rig
    rig.close()


@pytest.fixture
def rig(shared):
    shared.scheduler.step_s = 0.0
    shared.scheduler.fail_at = shared.scheduler.hold_at = None
    shared.scheduler.hold.set()
    yield shared
    shared.scheduler.hold.set()
    for job in shared.client.list():
        if not job.status.final:
            shared.client.cancel(job.id)
            until(lambda job=job: shared.client.get(job.id).status.final, "the end of the job")


@pytest.fixture
def own(tmp_path, model):
    """``own()``: a service of the test's own."""
    with ExitStack() as stack:

        def make(**options: Any) -> ServiceUnderTest:
            rig = ServiceUnderTest(tmp_path, model, **options)
            stack.callback(rig.close)
            return rig

        yield make
