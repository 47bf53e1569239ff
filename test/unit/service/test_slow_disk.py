"""A disk that hangs keeps waiting what needs it, and nobody else: the service's loop turns."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sglang_harli.errors import HarliError, ProtocolError
from sglang_harli.failpoints import FAULT_POINTS_ENV, ReadFailpoint
from sglang_harli.protocol.public import UploadArgs
from sglang_harli.service.submit import uploads as uploads_module
from sglang_harli.service.submit.uploads import Uploads
from support.service.service_fixture import ServiceUnderTest, pairs, until

pytestmark = pytest.mark.long

SOON_S = 5.0  # an answer of a service that is not held up, on a busy machine


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "points"
    folder.mkdir()
    monkeypatch.setenv(FAULT_POINTS_ENV, str(folder))
    return folder


@pytest.fixture
def held(points: Path, own) -> Iterator[ServiceUnderTest]:
    """A service whose reads of training data hang until ``go``."""
    rig = own()
    yield rig
    (points / f"{ReadFailpoint.ROWS}.go").touch()


def soon(call, *args, **values):
    since = time.monotonic()
    answer = call(*args, **values)
    assert time.monotonic() - since < SOON_S
    return answer


def test_rows_that_cannot_be_read_now_keep_only_their_run_waiting(held: ServiceUnderTest, points: Path):
    plain = held.done(held.client.submit(pairs(12), n_epochs=2, batch_size=2))
    (points / ReadFailpoint.ROWS).write_text("stop 3")
    job = held.client.submit(pairs(12), n_epochs=2, batch_size=2)
    until((points / f"{ReadFailpoint.ROWS}.hit").exists, "the read that hangs")
    soon(held.client.status)
    soon(held.client.list)
    other = soon(held.client.submit, pairs(4))
    soon(held.client.cancel, other.id)
    beats = len(held.http.states)
    until(lambda: len(held.http.states) > beats + 1, "signs of life")  # what the watchdog counts
    assert held.client.get(job.id).status == "running"
    (points / f"{ReadFailpoint.ROWS}.go").touch()
    np.testing.assert_array_equal(
        held.result(held.done(job)), held.result(plain)
    )  # the same rows in the same order


def test_a_run_is_paused_while_its_rows_cannot_be_read_and_goes_on_later(
    held: ServiceUnderTest, points: Path
):
    (points / ReadFailpoint.ROWS).write_text("stop 3")
    job = held.client.submit(pairs(12), n_epochs=2, batch_size=2)
    until((points / f"{ReadFailpoint.ROWS}.hit").exists, "the read that hangs")
    held.client.pause(job.id)
    held.status(job, "paused")
    (points / f"{ReadFailpoint.ROWS}.go").touch()
    held.client.resume(job.id)
    held.done(job)


# ------------------------------------------------------------------ uploads
def upload_of(content: bytes, sha256: str | None = None) -> UploadArgs:
    digest = sha256 or hashlib.sha256(content).hexdigest()
    return UploadArgs(upload="a" * 32, filename="f", size=len(content), sha256=digest, offset=0)


def test_a_submit_behind_the_last_chunk_waits_until_it_is_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    content = b"x" * 1000
    monkeypatch.setattr(uploads_module, "failpoint", lambda point: time.sleep(0.3))

    async def send(args: UploadArgs) -> Path:
        uploads = Uploads(tmp_path)
        sending = asyncio.create_task(uploads.add(args, [content]))
        await asyncio.sleep(0.05)  # the chunk is with the disk's thread
        try:
            return await uploads.take(args.upload, args.size, args.sha256)
        finally:
            await asyncio.wait([sending])
            sending.exception()

    assert asyncio.run(send(upload_of(content))).read_bytes() == content
    with pytest.raises(HarliError) as caught:  # the answer to a refused chunk names the error
        asyncio.run(send(upload_of(content, "0" * 64)))
    assert caught.value.code in ("upload_unknown", "data_mismatch")


def test_an_upload_is_whole_only_when_its_digest_was_compared(tmp_path: Path):
    content = b"x" * 1000

    async def take_early() -> None:
        uploads = Uploads(tmp_path)
        upload = uploads._begin(upload_of(content, "0" * 64))
        uploads._write(upload, content[:500])
        upload.received = upload.size  # as it stands between the last write and the comparison
        await uploads.take("a" * 32, len(content), "0" * 64)

    with pytest.raises(ProtocolError, match="holds"):
        asyncio.run(take_early())
