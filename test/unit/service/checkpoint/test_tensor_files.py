"""Tensor files are what safetensors reads and writes; they are worked on in pieces, with rests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sglang_harli.protocol import shared_memory
from sglang_harli.run_paths import shm_dir
from sglang_harli.service import pacing
from sglang_harli.service.checkpoint import tensor_files
from sglang_harli.service.checkpoint.tensor_files import Source
from sglang_harli.service.pacing import Pace


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    folder = shm_dir(str(tmp_path))
    yield folder
    shared_memory.remove_stale(folder)
    if folder.exists():
        folder.rmdir()


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "large": rng.standard_normal((700, 1000), dtype=np.float32),  # of several pieces
        "adapter/half": rng.standard_normal((3, 5)).astype(np.float16),
        "count": np.arange(7, dtype=np.int64),
        "scalar": np.array(2.5, dtype=np.float32),
    }


def sources(values: dict[str, np.ndarray]) -> list[Source]:
    return [Source(n, t.dtype.name, t.shape, lambda t=t: t) for n, t in values.items()]


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor)


def test_what_is_written_is_what_the_library_reads(tmp_path: Path):
    path = tmp_path / "t.safetensors"
    digest = tensor_files.write(path, sources(tensors()), Pace())
    assert_equal(load_file(path), tensors())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == tensor_files.digest(path, Pace())


def test_the_pace_does_not_change_the_bytes(tmp_path: Path):
    for name, pace in (("polite", Pace()), ("rushed", Pace(rush=True))):
        tensor_files.write(tmp_path / name, sources(tensors()), pace)
    assert (tmp_path / "polite").read_bytes() == (tmp_path / "rushed").read_bytes()


def test_a_file_goes_into_a_slot_and_back(tmp_path: Path, shm: Path):
    save_file(tensors(), tmp_path / "t.safetensors")
    slot, ref = tensor_files.into_slot(tmp_path / "t.safetensors", shm, Pace())
    try:
        tensor_files.write(tmp_path / "again.safetensors", tensor_files.from_slot(slot, ref), Pace())
        assert_equal(load_file(tmp_path / "again.safetensors"), tensors())
    finally:
        slot.unlink()


def test_a_tensor_that_is_not_of_its_shape_is_refused(tmp_path: Path):
    short = Source("a", "float32", (4,), lambda: np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="a has 12 bytes, its shape"):
        tensor_files.write(tmp_path / "t", [short], Pace())


def test_no_slot_stays_where_its_tensors_cannot_be_read(tmp_path: Path, shm: Path, monkeypatch):
    save_file(tensors(), tmp_path / "t.safetensors")

    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Pace, "rest", full)
    with pytest.raises(OSError, match="no room"):
        tensor_files.into_slot(tmp_path / "t.safetensors", shm, Pace())
    assert not list(shm.glob("slot-*"))


def test_rests_follow_work_and_a_rush_takes_none(monkeypatch):
    slept: list[float] = []
    clock = iter([0.0, 0.0002, 0.005, 0.005])
    monkeypatch.setattr(pacing.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(pacing.time, "sleep", slept.append)
    pace = Pace()
    pace.rest()  # too little work yet
    pace.rest()
    assert slept == [pytest.approx(0.005 * pacing.REST)]
    clock = iter([0.0, 1.0])
    Pace(rush=True).rest()
    assert len(slept) == 1
