"""The inner endpoint of a service, and services that a test may stop at a durable step."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from sglang_harli.failpoints import FAULT_POINTS_ENV
from support.service.inner_calls import InnerCalls
from support.service.service_fixture import ServiceUnderTest
from support.tokenizer import make_tokenizer_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(tmp_path_factory, model):
    """A service whose failpoints can be armed in ``service.points``."""
    folder = tmp_path_factory.mktemp("service")
    points = folder / "points"
    points.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT_POINTS_ENV, str(points))
        rig = ServiceUnderTest(
            folder, model, peers=False, max_file_size="3MiB", max_part_size="1MiB", max_files_size="8MiB"
        )
        rig.points = points
        yield rig
        rig.close()


@pytest.fixture
def inner(service):
    """The inner endpoint; files and uploads of a test are removed behind it."""
    with ExitStack() as stack:
        calls = InnerCalls(service.run_dir)
        stack.callback(calls.close)
        yield calls
        for file in calls.listed().data:
            calls.call("file_delete", {"file": file.id})
