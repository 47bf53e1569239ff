"""Preparing a run: damaged checkpoints at every file, what they are replaced by, and the events
that say so."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sglang_harli.core import JobStatus
from sglang_harli.protocol import shared_memory, trouble
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.checkpoint.checkpoints import CheckpointError
from sglang_harli.service.jobs import transitions
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.jobs.transitions import JobRecord
from sglang_harli.service.run.prepare import restore
from support.service.job_records import record as job_record

FILES = ("state.safetensors", "run.msgpack", "meta.json")
TOTAL = 6


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit, in the middle of the file (of meta.json: in a checksum)."""
    data = bytearray(path.read_bytes())
    at = data.index(b'"run.msgpack": "') + 20 if path.name == "meta.json" else len(data) // 2
    data[at] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = (truncate, empty, flip, remove)


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    folder = Path("/dev/shm") / f"harli-test-{tmp_path.name}-{id(tmp_path)}"
    yield folder
    shared_memory.remove_stale(folder)
    if folder.exists():
        folder.rmdir()


@pytest.fixture
def paths(tmp_path: Path, shm: Path) -> JobPaths:
    """Checkpoints of steps 2, 4 and 6; each tensor holds its step."""
    paths = JobPaths(tmp_path, job_record().id)
    for step in (2, 4, 6):
        refs, nbytes = shared_memory.layout([("adapter/x", "float32", (64,), 256)])
        slot = shared_memory.SharedBuffer.create(shm, nbytes)
        slot.view(refs[0])[:] = np.full(64, step, dtype=np.float32).tobytes()
        run = {"version": 1, "step": step, "tokens": 10 * step}
        checkpoints.save_state(paths.checkpoints, step, slot.ref(refs), run, 10 * step)
        slot.unlink()
    return paths


def job(step: int, **values: object) -> JobRecord:
    queued = msgspec.structs.replace(
        job_record(), total_steps=TOTAL, checkpoint_step=step, checkpoint_tokens=10 * step, **values
    )
    return transitions.start(queued, 1.0).record


def folder(paths: JobPaths, step: int) -> Path:
    return paths.checkpoints / f"step-{step}"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("step", [4, 6])  # 6: the last one, of which only the publication was left
def test_damage_of_any_file_goes_back_to_the_checkpoint_before(
    paths: JobPaths, shm: Path, name: str, damage: Callable[[Path], None], step: int
) -> None:
    damage(folder(paths, step) / name)
    record = job(step)
    found = restore(record, paths, shm)
    assert (found.step, found.tokens, found.trained) == (step - 2, 10 * (step - 2), False)
    assert found.restore is not None
    slot = shared_memory.SharedBuffer.open(found.restore)
    assert set(np.frombuffer(slot.view(found.restore.tensors[0]), dtype=np.float32)) == {step - 2}
    slot.unlink()
    assert f"step {step}" in found.damage
    assert folder(paths, step).with_suffix(".bad").is_dir() and not folder(paths, step).exists()
    change = transitions.fell_back(record, found.step, found.tokens, found.damage)
    [told] = change.drafts
    assert (told.type, told.level) == ("warning", "warn")
    assert f"goes on from the checkpoint of step {step - 2}" in told.message
    after = change.record
    assert (after.checkpoint_step, after.step, after.trained_tokens) == (step - 2, step - 2, 10 * (step - 2))
    assert (after.metrics_attempt, after.metrics_step) == (record.attempt, step - 2)


def test_a_whole_last_checkpoint_leaves_only_the_publication(paths: JobPaths, shm: Path) -> None:
    found = restore(job(6), paths, shm)
    assert found.trained and found.restore is None and not found.damage


def test_tokens_are_those_that_have_a_checksum(paths: JobPaths, shm: Path) -> None:
    meta = folder(paths, 4) / "meta.json"
    meta.write_text(meta.read_text().replace('"trained_tokens": 40', '"trained_tokens": 41'))
    found = restore(job(4), paths, shm)
    assert found.tokens == 40 and found.restore is not None
    Path(found.restore.path).unlink()


def test_with_no_checkpoint_that_can_be_read_the_run_starts_from_nothing(paths: JobPaths, shm: Path) -> None:
    flip(folder(paths, 4) / "state.safetensors")
    truncate(folder(paths, 2) / "run.msgpack")
    found = restore(job(4), paths, shm)
    assert (found.step, found.restore) == (0, None)
    assert "step 4" in found.damage and "step 2" in found.damage
    [told] = transitions.fell_back(job(4), 0, 0, found.damage).drafts
    assert "goes on from the beginning" in told.message
    kept = sorted(p.name for p in paths.checkpoints.iterdir())
    assert kept == ["step-2.bad", "step-6"]  # one is kept to look at; step 6 was never told to the store


def test_a_missing_checkpoint_is_told(paths: JobPaths, shm: Path) -> None:
    folder(paths, 4).rename(folder(paths, 4).with_suffix(".bad"))  # a crash behind the rename
    found = restore(job(4), paths, shm)
    assert found.step == 2 and "step 4 is missing" in found.damage and found.restore is not None
    Path(found.restore.path).unlink()


def test_an_adapter_carried_from_another_job_is_never_left_out(tmp_path: Path, shm: Path) -> None:
    with pytest.raises(CheckpointError, match=r"begins with cannot be read .*missing"):
        restore(job(0, carried=True), JobPaths(tmp_path, job_record().id), shm)


def test_a_job_whose_last_checkpoint_is_damaged_at_publication_goes_back_to_the_queue() -> None:
    publishing = transitions.trained(job(6)).record
    again = transitions.train_again(publishing, "the checkpoint of step 6 cannot be used")
    assert (again.record.status, again.record.publishing) == (JobStatus.QUEUED, False)
    assert [d.type for d in again.drafts] == ["warning", "queued"]


# ------------------------------------------------------------------ trouble that is no damage
@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_checkpoint_that_cannot_be_opened_now_is_not_put_aside(paths: JobPaths, shm: Path) -> None:
    before = sorted(p.name for p in paths.checkpoints.iterdir())
    with no_descriptors(), pytest.raises(OSError) as caught:
        restore(job(4), paths, shm)
    assert trouble.passes(caught.value)
    assert sorted(p.name for p in paths.checkpoints.iterdir()) == before
    found = restore(job(4), paths, shm)
    assert found.step == 4 and found.restore is not None and not found.damage
    Path(found.restore.path).unlink()


def test_an_adapter_that_cannot_be_opened_now_is_not_taken_for_damaged(paths: JobPaths, shm: Path) -> None:
    checkpoints.save_adapter(paths.adapter, paths.checkpoints, 4, {})
    with no_descriptors(), pytest.raises(OSError) as caught:
        checkpoints.load_adapter(paths.adapter, shm)
    assert trouble.passes(caught.value)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EIO, "the cable"), True),
        (OSError(errno.EMFILE, "too many"), True),
        (OSError(errno.EACCES, "an operator's mistake"), True),
        (OSError("Connection error: the hub is away"), False),  # of a library, whose caller knows better
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (OSError(errno.EFBIG, "too small"), False),
        (MemoryError(), True),
        (ValueError("torn"), False),
    ],
)
def test_what_passes_and_what_does_not(error: Exception, passes: bool) -> None:
    assert trouble.passes(error) is passes
