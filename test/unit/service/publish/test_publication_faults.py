"""Publication under faults, in the real service: adapters that were damaged, disks and shared
memory that are full, answers that come twice or late."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sglang_harli.failpoints import FAULT_POINTS_ENV, WriteFailpoint
from sglang_harli.protocol import internal
from sglang_harli.protocol.public import Job
from support.service.service_fixture import ServiceUnderTest, pairs, until
from support.service.service_peers import HttpPeer

pytestmark = pytest.mark.long


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "points"
    folder.mkdir()
    monkeypatch.setenv(FAULT_POINTS_ENV, str(folder))
    return folder


def messages(rig: ServiceUnderTest, job: Job, kind: str = "warning") -> list[str]:
    return [e.message for e in rig.client.events(job.id) if e.type == kind]


# ------------------------------------------------------------------ damaged folders
def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors flipped": lambda adapter: flip(adapter / "adapter_model.safetensors"),
    "tensors cut off": lambda adapter: truncate(adapter / "adapter_model.safetensors"),
    "tensors gone": lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
    "config flipped": lambda adapter: flip(adapter / "adapter_config.json"),
    "config gone": lambda adapter: (adapter / "adapter_config.json").unlink(),
    "checksums torn": lambda adapter: truncate(adapter / "harli.json"),
    "folder gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_saved_again_from_the_checkpoint(rig: ServiceUnderTest, damage: str) -> None:
    job = rig.done(rig.client.submit(pairs(4)))
    whole, name = rig.result(job), str(job.fine_tuned_model)
    del rig.http.published[name]
    DAMAGES[damage](rig.folder(job) / "adapter")
    rig.http.want(name)
    until(lambda: name in rig.http.published, "the adapter")
    assert np.array_equal(rig.result(job), whole)
    warnings = [m for m in messages(rig, job) if "saved again from the run's last checkpoint" in m]
    assert len(warnings) == (0 if damage == "folder gone" else 1)
    assert len(messages(rig, job, "adapter_saved")) == 2
    assert rig.client.get(job.id).status == "succeeded"


def test_an_adapter_of_an_earlier_version_has_no_checksums_and_is_served(rig: ServiceUnderTest) -> None:
    job = rig.done(rig.client.submit(pairs(4)))
    name = str(job.fine_tuned_model)
    del rig.http.published[name]
    (rig.folder(job) / "adapter" / "harli.json").unlink()
    rig.http.want(name)
    until(lambda: name in rig.http.published, "the adapter")
    assert messages(rig, job) == []


def test_an_adapter_that_is_lost_is_refused_at_once_and_its_job_stays_succeeded(
    rig: ServiceUnderTest,
) -> None:
    job = rig.done(rig.client.submit(pairs(4)))
    flip(rig.folder(job) / "adapter" / "adapter_model.safetensors")
    for step in (rig.folder(job) / "checkpoints").iterdir():
        truncate(step / "state.safetensors")
    before = len(rig.http.refused)
    for asked in (1, 2):
        rig.http.want(str(job.fine_tuned_model))
        until(lambda asked=asked: len(rig.http.refused) == before + asked, "the refusal")
    refused = rig.http.refused[-1]
    assert (refused.name, refused.code) == (job.fine_tuned_model, "adapter_failed")
    assert "state.safetensors" in refused.text
    assert rig.client.get(job.id).status == "succeeded"
    rig.done(rig.client.submit(pairs(4)))  # publication goes on


def test_an_unknown_adapter_is_refused_at_once(rig: ServiceUnderTest) -> None:
    rig.http.want("tiny-ft-nobody-00000000")
    until(lambda: any(r.name == "tiny-ft-nobody-00000000" for r in rig.http.refused), "the refusal")
    assert rig.http.refused[-1].code == "not_found"


def test_the_folder_is_plain_peft_with_checksums_beside_it(rig: ServiceUnderTest) -> None:
    job = rig.done(rig.client.submit(pairs(4)))
    adapter = rig.folder(job) / "adapter"
    assert {p.name for p in adapter.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "harli.json",
    }
    meta = json.loads((adapter / "harli.json").read_text())
    assert meta["step"] == job.total_steps
    assert set(meta["sha256"]) == {"adapter_model.safetensors", "adapter_config.json"}


# ------------------------------------------------------------------ full disks and full shared memory
def publishing(rig: ServiceUnderTest) -> Job:
    """A job whose training is over and that waits for an HTTP process."""
    job = rig.client.submit(pairs(4))
    return until(lambda: (j := rig.client.get(job.id)).sub_state == "publishing" and j, "the end of training")


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("write", [WriteFailpoint.ADAPTER, WriteFailpoint.RENAME])
def test_an_export_that_the_disk_refuses_is_tried_again(
    own: Any, points: Path, write: WriteFailpoint, number: str
) -> None:
    rig = own(peers=False)
    rig.join_http()
    scheduler = rig.join_scheduler()
    scheduler.hold.clear()
    job = rig.client.submit(pairs(4))
    if write is WriteFailpoint.ADAPTER:
        (points / write).write_text(f"error {number} 2")
        scheduler.hold.set()
    else:  # checkpoints pass the same point: let the last one by
        (points / "adapter-exported").write_text("stop")
        scheduler.hold.set()
        until((points / "adapter-exported.hit").exists, "the first export")
        rig.service.kill()
        shutil.rmtree(rig.folder(job) / "adapter")
        (points / write).write_text(f"error {number} 2")
        rig.service.start()
    rig.done(job)
    assert len([m for m in messages(rig, job) if "trying again in" in m and "a test armed" in m]) == 2


def waits(rig: ServiceUnderTest, job: Job, pause: str) -> Job:
    """A job whose publication has been put off for so long."""
    return until(
        lambda: j if f"trying again in {pause}" in ((j := rig.client.get(job.id)).reason or "") else None,
        "why it waits",
    )


def test_a_disk_that_stays_full_keeps_the_job_and_says_what_to_do(own: Any, points: Path) -> None:
    rig = own()
    (points / WriteFailpoint.ADAPTER).write_text("error ENOSPC 99")
    job = waits(rig, rig.client.submit(pairs(4)), "4 s")
    assert (job.status, job.sub_state) == ("running", "publishing")
    assert "No space left on device" in str(job.reason)
    assert "make room on the disk" in str(job.reason)
    (points / WriteFailpoint.ADAPTER).unlink()
    rig.done(rig.client.submit(pairs(4)))  # which does not wait for the other
    rig.done(job)


def test_full_shared_memory_is_waited_for(own: Any, points: Path) -> None:
    rig = own(peers=False)
    rig.join_scheduler()
    job = publishing(rig)
    (points / WriteFailpoint.SLOT).write_text("error ENOSPC 99")
    rig.join_http()
    reason = str(waits(rig, job, "4 s").reason)
    assert reason.startswith("shared memory has no room for the adapter (")
    assert "make room in /dev/shm" in reason
    (points / WriteFailpoint.SLOT).unlink()
    rig.done(job)
    assert len([m for m in messages(rig, job) if "shared memory has no room" in m]) == 3


def test_a_request_for_an_adapter_that_shared_memory_has_no_room_for_gets_an_answer(
    own: Any, points: Path
) -> None:
    rig = own()
    job = rig.done(rig.client.submit(pairs(4)))
    (points / WriteFailpoint.SLOT).write_text("error ENOSPC 99")
    rig.http.want(str(job.fine_tuned_model))
    until(lambda: rig.http.refused, "the refusal")
    assert (rig.http.refused[-1].code, rig.client.get(job.id).status) == ("shared_memory", "succeeded")
    (points / WriteFailpoint.SLOT).unlink()
    rig.http.want(str(job.fine_tuned_model))
    until(lambda: rig.http.publications.count(str(job.fine_tuned_model)) == 2, "the adapter")


def test_a_refusal_that_may_pass_is_no_end_of_the_job(own: Any) -> None:
    rig = own(peers=False)
    rig.join_scheduler()
    peer = rig.http = HttpPeer(rig.run_dir)
    peer.refuse, peer.passing = 4, True
    peer.start()
    rig._stack.callback(peer.close)
    job = rig.done(rig.client.submit(pairs(4)))
    assert len([m for m in messages(rig, job) if "no room for it; trying again" in m]) == 4


def test_what_nobody_thought_of_ends_neither_the_service_nor_other_publications(own: Any) -> None:
    rig = own(peers=False)
    rig.join_scheduler()
    job = publishing(rig)
    other = rig.client.submit(pairs(4))
    rig.service.kill()
    [step] = (rig.folder(job) / "checkpoints").glob("step-*")
    state = step / "state.safetensors"
    tensors = {name: tensor.astype(np.int8) for name, tensor in load_file(state).items()}
    save_file(tensors, state)  # whole, with the right checksum, and of another kind than is ever written
    meta = json.loads((step / "meta.json").read_text())
    meta["sha256"]["state.safetensors"] = hashlib.sha256(state.read_bytes()).hexdigest()
    (step / "meta.json").write_text(json.dumps(meta))
    shutil.rmtree(rig.folder(job) / "adapter", ignore_errors=True)
    rig.service.start()
    rig.join_http()
    assert str(waits(rig, job, "2 s").reason).startswith("the adapter cannot be published (")
    rig.done(other)
    assert rig.service.alive
    rig.client.cancel(job.id)
    rig.done(job, "cancelled")


# ------------------------------------------------------------------ answers
class Echo(HttpPeer):
    """Answers every question twice, and first the question before it, with a refusal."""

    def _send(self, message: internal.Message) -> None:
        if isinstance(message, internal.AdapterPublished):
            late = internal.AdapterPublished(
                request=message.request - 1, job=message.job, name=message.name, ok=False, text="too late"
            )
            super()._send(late)
            super()._send(message)
        super()._send(message)


def test_late_and_doubled_answers_count_for_nothing(own: Any) -> None:
    rig = own(peers=False)
    rig.join_scheduler()
    peer = Echo(rig.run_dir).start()
    with contextlib.closing(peer):
        for _ in range(3):
            job = rig.done(rig.client.submit(pairs(4)))
            assert messages(rig, job) == []
            assert len(messages(rig, job, "succeeded")) == 1


class Slow(HttpPeer):
    """Keeps its answers to itself until ``answers`` is set."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.answers = threading.Event()

    def _send(self, message: internal.Message) -> None:
        if isinstance(message, internal.AdapterPublished):
            self.answers.wait()
        super()._send(message)


@pytest.mark.parametrize(("refusals", "status"), [(0, "succeeded"), (1, "cancelled")])
def test_a_cancel_while_the_question_is_open_leaves_it_to_the_answer(
    own: Any, refusals: int, status: str
) -> None:
    rig = own(peers=False)
    rig.join_scheduler()
    peer = rig.http = Slow(rig.run_dir).start()
    peer.refuse = refusals
    try:
        job = rig.client.submit(pairs(4))
        until(lambda: peer.publications, "the question")
        assert rig.client.cancel(job.id).status == "running"
        peer.answers.set()
        done = rig.done(job, status)
        assert len(peer.publications) == 1
        assert (done.fine_tuned_model is not None) == (status == "succeeded")
    finally:
        peer.answers.set()
        peer.close()


def test_a_cancel_between_two_tries_is_a_cancel(own: Any, points: Path) -> None:
    rig = own(peers=False)
    rig.join_scheduler()
    job = publishing(rig)
    (points / WriteFailpoint.SLOT).write_text("error ENOSPC 99")
    rig.join_http()
    until(lambda: [m for m in messages(rig, job) if "trying again" in m], "the first try")
    rig.client.cancel(job.id)
    rig.done(job, "cancelled")
    (points / WriteFailpoint.SLOT).unlink()
    rig.done(rig.client.submit(pairs(4)))
    assert len(rig.http.publications) == 1
    assert messages(rig, job, "failed") == []
