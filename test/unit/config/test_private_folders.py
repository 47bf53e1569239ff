"""Folders and files that processes of one server share belong to its user alone, and are refused
otherwise."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from sglang_harli import run_paths
from sglang_harli.errors import HarliError
from sglang_harli.protocol import internal, shared_memory
from sglang_harli.protocol.shared_memory import SharedBuffer, SharedBufferError
from sglang_harli.service.checkpoint import checkpoints
from sglang_harli.service.jobs.folder import JobPaths
from sglang_harli.service.run.prepare import restore
from support.service.job_records import record as job_record

OTHER = 54321  # a uid that is not ours
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def shm() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"harli-test-{secrets.token_hex(8)}"
    yield folder
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        os.chown(folder, os.getuid(), -1)
        shared_memory.remove_stale(folder)
    assert not folder.exists()


def filled(folder: Path, text: bytes = b"ours") -> internal.SlotRef:
    slot = SharedBuffer.create(folder, 4096)
    slot.buffer[: len(text)] = text
    slot.close()
    return slot.ref()


# ------------------------------------------------------------------ folders
def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    os.close(run_paths.open_private(tmp_path / "new", make=True))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileNotFoundError):
        run_paths.open_private(tmp_path / "missing")


def test_a_folder_of_ours_that_is_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    os.close(run_paths.open_private(folder))
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_link_or_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(PermissionError, match=f"{name} must be a folder of uid .* a link or a file"):
            run_paths.open_private(tmp_path / name, make=True)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755


@needs_root
def test_another_users_folder_is_refused_with_his_uid(tmp_path: Path) -> None:
    (tmp_path / "his").mkdir(mode=0o777)
    os.chown(tmp_path / "his", OTHER, -1)
    with pytest.raises(
        PermissionError, match=rf"his must be a folder of uid 0, and it belongs to uid {OTHER}"
    ):
        run_paths.open_private(tmp_path / "his", make=True)


# ------------------------------------------------------------------ slots
@needs_root
def test_no_slot_is_made_in_another_users_folder(shm: Path) -> None:
    shm.mkdir(mode=0o777)
    os.chown(shm, OTHER, -1)
    with pytest.raises(SharedBufferError, match=f"belongs to uid {OTHER}: have it removed"):
        SharedBuffer.create(shm, 4096)
    assert list(shm.iterdir()) == []


@needs_root
def test_a_slot_whose_folder_or_file_was_taken_over_is_not_opened(shm: Path) -> None:
    ref = filled(shm)
    os.chown(ref.path, OTHER, -1)
    with pytest.raises(SharedBufferError, match="not a file of uid 0 with mode 0600"):
        SharedBuffer.open(ref)
    os.chown(ref.path, 0, -1)
    os.chown(shm, OTHER, -1)
    with pytest.raises(SharedBufferError, match=f"belongs to uid {OTHER}"):
        SharedBuffer.open(ref)
    os.chown(shm, 0, -1)
    SharedBuffer.open(ref).unlink()


def test_a_link_in_the_place_of_a_slot_leads_nowhere(shm: Path, tmp_path: Path) -> None:
    ref = filled(shm)
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * 4096)
    precious.chmod(0o600)
    Path(ref.path).unlink()
    Path(ref.path).symlink_to(precious)
    with pytest.raises(SharedBufferError):
        SharedBuffer.open(ref)
    Path(ref.path).unlink()
    assert precious.read_bytes() == b"x" * 4096


def test_a_folder_that_is_a_link_is_no_place_for_slots(shm: Path, tmp_path: Path) -> None:
    ref = filled(tmp_path / "real")
    shm.symlink_to(tmp_path / "real")
    with pytest.raises(SharedBufferError, match="a link or a file"):
        SharedBuffer.open(
            internal.SlotRef(path=f"{shm}/{Path(ref.path).name}", nbytes=ref.nbytes, tensors=[])
        )
    with pytest.raises(SharedBufferError, match="a link or a file"):
        SharedBuffer.create(shm, 4096)
    shared_memory.remove_stale(shm)
    assert Path(ref.path).exists() and shm.is_symlink()


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_slot_that_others_may_open_is_refused(shm: Path, mode: int) -> None:
    ref = filled(shm)
    Path(ref.path).chmod(mode)
    with pytest.raises(SharedBufferError, match="with mode 0600"):
        SharedBuffer.open(ref)


def test_a_slot_that_is_too_short_is_refused(shm: Path) -> None:
    ref = filled(shm)
    os.truncate(ref.path, 100)
    with pytest.raises(SharedBufferError, match="shorter than the 4096 bytes"):
        SharedBuffer.open(ref)


def test_the_slots_of_a_server_that_is_gone_go_with_their_folder(shm: Path) -> None:
    filled(shm)
    (shm / "kept").write_text("not a slot")
    shared_memory.remove_stale(shm)
    assert [p.name for p in shm.iterdir()] == ["kept"]
    (shm / "kept").unlink()
    filled(shm)
    shared_memory.remove_stale(shm)
    assert not shm.exists()


@needs_root
def test_a_checkpoint_that_cannot_be_shared_is_not_taken_for_a_damaged_one(shm: Path, tmp_path: Path) -> None:
    paths = JobPaths(tmp_path, job_record().id)
    refs, nbytes = shared_memory.layout([("adapter/x", "float32", (64,), 256)])
    slot = SharedBuffer.create(shm, nbytes)
    slot.view(refs[0])[:] = np.ones(64, dtype=np.float32).tobytes()
    checkpoints.save_state(paths.checkpoints, 2, slot.ref(refs), {"version": 1, "step": 2, "tokens": 20}, 20)
    slot.unlink()
    os.chown(shm, OTHER, -1)
    with pytest.raises(HarliError, match=f"belongs to uid {OTHER}") as caught:
        restore(msgspec.structs.replace(job_record(), checkpoint_step=2, total_steps=9), paths, shm)
    assert caught.value.code == "shared_memory"
    assert checkpoints.steps(paths.checkpoints) == [2]


# ------------------------------------------------------------------ the folder of the sockets
@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for places, short enough for sockets (pytest's own is not always); no variable names
    any."""
    for name in ("TMPDIR", "TEMP", "TMP", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    folder = Path(tempfile.mkdtemp(prefix="places-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("length", [30, 67, 68, 82, 200])
def test_sockets_fit_whatever_the_length_of_tmpdir(
    places: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    top = Path("/dev/shm") / secrets.token_hex(4)
    tmp = Path(f"{top}/{'d' * (length - len(f'{top}/'))}")
    tmp.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(tmp))
    run_dir = str(places / "runs")
    try:
        run_paths.make_ipc_dir(run_dir)
        with (
            zmq.Context() as context,
            context.socket(zmq.DEALER) as bound,
            context.socket(zmq.DEALER) as peer,
        ):
            for endpoint in (run_paths.scheduler_endpoint(run_dir), run_paths.http_endpoint(run_dir)):
                bound.bind(endpoint)
                peer.connect(endpoint)
                peer.send(b"hello")
                assert bound.poll(10_000) and bound.recv() == b"hello"
                peer.disconnect(endpoint)
        short = length <= 107 - len(f"/harli-{os.getuid()}/{'k' * 16}/scheduler.sock")
        assert run_paths.ipc_dir(run_dir).parent.parent == (tmp if short else Path("/tmp"))
    finally:
        shutil.rmtree(run_paths.ipc_dir(run_dir), ignore_errors=True)
        shutil.rmtree(top)


def test_the_length_counts_in_bytes(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = places / ("ü" * 60)
    wide.mkdir()
    monkeypatch.setenv("TMPDIR", str(wide))
    assert run_paths.ipc_dir("runs").parent.parent == Path("/tmp")


def test_a_runtime_directory_comes_before_the_common_folder(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = places / "run"
    runtime.mkdir()
    monkeypatch.setenv("TMPDIR", "/" + "t" * 100)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert run_paths.make_ipc_dir("runs").parent.parent == runtime


@needs_root
def test_a_place_that_another_user_has_taken_is_passed_over(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, free = places / "a", places / "b"
    for place in (taken, free):
        place.mkdir()
    (taken / "harli-0").mkdir()
    os.chown(taken / "harli-0", OTHER, -1)
    monkeypatch.setenv("TMPDIR", str(taken))
    monkeypatch.setenv("TMP", str(free))
    assert run_paths.make_ipc_dir("runs").parent.parent == free


def test_a_place_that_is_missing_is_passed_over(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(places / "missing"))
    assert run_paths.ipc_dir("runs").parent.parent == Path("/tmp")
