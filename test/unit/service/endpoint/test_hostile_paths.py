"""No name that comes over the wire becomes the name of a file: nothing is ever written outside the
run directory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sglang_harli.errors import ConfigError, HarliError
from sglang_harli.protocol import public
from support.service.service_fixture import exchange, until

NAMES = [
    "../../escaped",
    "/tmp/escaped-absolute",
    "a\x00escaped",
    "escaped\nname",
    "..",
    ".",
    "~/escaped",
    "escaped/../../escaped",
    "ftjob-" + "0" * 24 + "/../../escaped",
    "e\u202escaped",
    "\\\\server\\escaped",
    "x" * 1024,
]
DATA = b'{"prompt": "a", "completion": "b"}\n'


def everything(folder: Path) -> set[str]:
    return {os.path.join(root, name) for root, dirs, files in os.walk(folder) for name in dirs + files}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, model):
    from support.service.service_fixture import ServiceUnderTest

    folder = tmp_path_factory.mktemp("outside") / "inner"
    folder.mkdir()
    rig = ServiceUnderTest(folder, model, peers=False)
    rig.client.status()
    yield rig, folder.parent
    rig.close()


def submit(rig, **changes) -> dict:
    args = {"filename": "f", "size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
    return exchange(rig, "submit", args | changes, DATA)


def outside(rig, folder: Path) -> set[str]:
    inside = str(rig.run_dir)
    return {path for path in everything(folder) if not path.startswith(inside)} | {
        str(path) for path in Path("/tmp").glob("escaped*")
    }


@pytest.mark.parametrize("name", NAMES)
def test_names_from_the_wire_are_no_paths(hostile, name):
    rig, folder = hostile
    before = outside(rig, folder)
    job = submit(rig, filename=name, idempotency_key=name[:128])  # shown to people, and nothing else
    assert job["data"]["file"] == name
    assert submit(rig, filename=name, idempotency_key=name[:128])["id"] == job["id"]
    with pytest.raises(ConfigError, match="suffix"):
        submit(rig, suffix=name)
    upload = {"upload": name, "size": 3, "sha256": "0" * 64, "offset": 0}
    for verb, args in (
        ("upload", upload),
        ("submit", {"filename": "f", "size": 3, "sha256": "0" * 64, "upload": name}),
        ("get", {"job": name}),
        ("events", {"job": name}),
        ("events", {"job": name, "follow": True}),
        ("pause", {"job": name}),
        ("resume", {"job": name}),
        ("cancel", {"job": name}),
        ("prioritize", {"job": name, "priority": 1}),
        ("submit", {"resume_from": name}),
        ("list", {"after": name}),
    ):
        with pytest.raises(HarliError):
            exchange(rig, verb, args, *([b"abc"] if verb == "upload" else []))
    assert outside(rig, folder) == before
    found = {path.name for path in rig.run_dir.iterdir()}
    jobs = {job.id for job in rig.client.list(limit=1000)}
    assert {name for name in found if name.startswith(("ftjob", ".upload", ".incoming"))} == jobs
    assert not any("escaped" in path for path in everything(rig.run_dir))
    assert rig.service.alive


def test_files_of_a_job_have_fixed_names(hostile):
    rig, _ = hostile
    job = submit(rig, filename="../../evil.jsonl", suffix="a.b-c_d")
    folder = rig.run_dir / job["id"]
    until(lambda: (folder / "events.jsonl").exists(), "the readable copies")
    assert {path.name for path in folder.iterdir()} <= {
        "data",
        "job.json",
        "job.tmp",
        "events.jsonl",
        "metrics.jsonl",
    }
    assert {path.name for path in (folder / "data").iterdir()} == {
        "train.jsonl",
        "ids.npy",
        "targets.npy",
        "rows.npz",
    }


def test_the_run_directory_is_private(tmp_path, model):
    from support.service.service_fixture import FinetuneClient, free_port
    from support.service.service_peers import ServiceProcess

    process = ServiceProcess(tmp_path / "runs", model, free_port())
    process.log = tmp_path / "service.log"
    start = process.start
    # made by the service itself here, not by the test
    process.run_dir = tmp_path
    start()
    try:
        with FinetuneClient(process.endpoint) as client:
            client.status()
        assert (tmp_path / "runs").stat().st_mode & 0o777 == 0o700
    finally:
        process.kill()


def test_a_suffix_that_is_accepted_cannot_leave_a_folder():
    import re

    from sglang_harli.names import SUFFIX_PATTERN, adapter_name

    for name in [*NAMES, "a/b", "-x", ".x", "a b", "x" * 41, "", "a\n"]:
        assert not re.match(SUFFIX_PATTERN, name), name
    assert "/" not in adapter_name("org/../evil\x00name", "s", "ftjob-0123456789abcdef01234567")
    with pytest.raises(HarliError):
        public.convert_args({"filename": "f", "suffix": "a\n"}, public.SubmitArgs)
