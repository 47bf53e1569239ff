"""``state`` checkpoints (to resume a run) and the ``adapter`` folder (to serve it): two things, both atomic.

::

    checkpoints/step-120/state.safetensors   every tensor of the run, as the scheduler named it
                         run.msgpack         schedule, random generators, cursor: plain values
                         meta.json           step, tokens, sha256 of both files
    adapter/adapter_model.safetensors        PEFT's format, fp32
            adapter_config.json
            harli.json                   step, sha256 of both files

A folder is written under a temporary name, fsynced and renamed; so one that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sglang_harli.errors import HarliError
from sglang_harli.fault_points import Point, Write, reach
from sglang_harli.protocol import shared_memory
from sglang_harli.protocol.internal import SlotRef
from sglang_harli.service.job_files import fsync_folder, fsync_tree

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
ADAPTER_META = "harli.json"
ADAPTER_PREFIX = "adapter/"  # of the adapter's tensors among those of a run's state
_STEP = re.compile(r"^step-(\d+)$")


class CheckpointError(HarliError):
    """A checkpoint is missing, torn or not what was written."""

    code = "bad_checkpoint"


# ------------------------------------------------------------------ state
def save_state(checkpoints: Path, step: int, slot: SlotRef, run: dict[str, Any], tokens: int) -> Path:
    """Write the tensors in ``slot`` as the checkpoint of ``step``; durable on return.

    Raises:
        OSError: the slot is gone, or the disk is full.
    """
    final = checkpoints / f"step-{step}"
    temporary = checkpoints / f"step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    mapped = shared_memory.Slot.open(slot)
    try:
        arrays = {
            t.name: np.frombuffer(mapped.view(t), dtype=np.dtype(t.dtype)).reshape(t.shape)
            for t in slot.tensors
        }
        reach(Write.STATE)
        _save_tensors(arrays, temporary / "state.safetensors")
        del arrays
    finally:
        mapped.close()
    _save_meta(temporary, step, run, tokens)
    reach(Point.FILE_WRITTEN)
    _replace(temporary, final)
    reach(Point.RENAMED)
    return final


def _save_meta(folder: Path, step: int, run: dict[str, Any], tokens: int) -> None:
    reach(Write.META)
    (folder / "run.msgpack").write_bytes(msgspec.msgpack.encode(run))
    meta = {
        "step": step,
        "trained_tokens": tokens,
        "created_at": time.time(),
        "sha256": {name: _sha256(folder / name) for name in ("state.safetensors", "run.msgpack")},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint, rising."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(m[1]) for m in (_STEP.match(p.name) for p in checkpoints.iterdir()) if m)


def prune(checkpoints: Path, keep: int = 2) -> None:
    """Remove all but the newest ``keep`` checkpoints, and older ones that were put aside as damaged.

    ``step-0`` stays: it is where a job began that carries on another one's adapter.  What a crash left
    half-written goes too.
    """
    found = [step for step in steps(checkpoints) if step]
    for step in found[:-keep]:
        shutil.rmtree(checkpoints / f"step-{step}", ignore_errors=True)
    for path in checkpoints.glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.glob("*.bad"):
        match = _STEP.match(path.stem)
        if match is None or int(match[1]) <= (found[-1] if found else 0):
            shutil.rmtree(path, ignore_errors=True)


def save_beginning(source: Path, target: Path, seed: int) -> None:
    """The adapter of checkpoint ``source`` as a state at which no step was taken: moments zero, for a job
    of this ``seed``.  The caller makes ``target`` durable.

    Raises:
        OSError: the disk is full.
    """
    target.mkdir(parents=True)
    tensors = load_file(source / "state.safetensors")
    state = {
        name: tensor if name.startswith(ADAPTER_PREFIX) else np.zeros_like(tensor)
        for name, tensor in tensors.items()
    }
    reach(Write.STATE)
    _save_tensors(state, target / "state.safetensors")
    # As the trainer's own state says it of a run that was just made.
    run = {"version": 1, "step": 0, "epoch": 1, "tokens": 0, "seed": seed, "adam_steps": 0}
    _save_meta(target, 0, run, 0)


def load_state(
    checkpoints: Path, step: int, shm: Path
) -> tuple[shared_memory.Slot, SlotRef, dict[str, Any], int]:
    """The checkpoint of ``step`` in a new slot, the run's plain values and its trained tokens.

    Raises:
        CheckpointError: it is missing, torn or altered.
        OSError: shared memory is full.
    """
    meta = check_state(checkpoints, step)
    folder = checkpoints / f"step-{step}"
    run = msgspec.msgpack.decode((folder / "run.msgpack").read_bytes())
    slot, ref = _into_slot(load_file(folder / "state.safetensors"), shm)
    return slot, ref, run, int(meta["trained_tokens"])


def check_state(checkpoints: Path, step: int) -> dict[str, Any]:
    """The meta.json of a checkpoint whose files have the checksums in it; CheckpointError otherwise."""
    folder = checkpoints / f"step-{step}"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        for name, digest in meta["sha256"].items():
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name} was altered after it was written (checksum)")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder} is not whole: {error!r}") from error
    return meta


# ------------------------------------------------------------------ adapter
def save_adapter(adapter: Path, checkpoints: Path, step: int, config: dict[str, Any]) -> None:
    """Write the adapter of a checkpoint in PEFT's format; durable on return.

    Raises:
        CheckpointError: the checkpoint is not whole.
        OSError: the disk is full.
    """
    check_state(checkpoints, step)
    tensors = load_file(checkpoints / f"step-{step}" / "state.safetensors")
    chosen = {
        name.removeprefix(ADAPTER_PREFIX): np.asarray(tensor, dtype=np.float32)
        for name, tensor in tensors.items()
        if name.startswith(ADAPTER_PREFIX)
    }
    if not chosen:
        raise CheckpointError(f"checkpoint {checkpoints}/step-{step} holds no adapter")
    temporary = adapter.with_name("adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    reach(Write.ADAPTER)
    _save_tensors(chosen, temporary / "adapter_model.safetensors")
    (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2))
    meta = {"step": step, "sha256": {name: _sha256(temporary / name) for name in ADAPTER_FILES}}
    (temporary / ADAPTER_META).write_text(json.dumps(meta, indent=2))
    _replace(temporary, adapter)
    reach(Point.ADAPTER_EXPORTED)


def load_adapter(adapter: Path, shm: Path) -> tuple[shared_memory.Slot, SlotRef, dict[str, Any]]:
    """The saved adapter's tensors in a new slot, and its configuration.

    Raises:
        CheckpointError: the folder is missing or is not what was written.
        OSError: shared memory is full.
    """
    try:
        if (adapter / ADAPTER_META).exists():  # else it was saved by harli 0.1.0
            for name, digest in json.loads((adapter / ADAPTER_META).read_bytes())["sha256"].items():
                if _sha256(adapter / name) != digest:
                    raise CheckpointError(f"{adapter / name} was altered after it was written (checksum)")
        config = json.loads((adapter / ADAPTER_FILES[1]).read_bytes())
        tensors = load_file(adapter / ADAPTER_FILES[0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"adapter {adapter} cannot be read: {error!r}") from error
    slot, ref = _into_slot(tensors, shm)
    return slot, ref, config


# ------------------------------------------------------------------ shared by both
def _into_slot(tensors: dict[str, np.ndarray], shm: Path) -> tuple[shared_memory.Slot, SlotRef]:
    refs, nbytes = shared_memory.layout(
        (name, t.dtype.name, t.shape, t.nbytes) for name, t in tensors.items()
    )
    slot = shared_memory.Slot.create(shm, nbytes)
    for ref in refs:
        place = np.frombuffer(slot.view(ref), dtype=np.dtype(ref.dtype)).reshape(ref.shape)
        place[...] = tensors[ref.name]
    return slot, slot.ref(refs)


def _save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the operating system's errors
        raise OSError(f"{path} cannot be written: {error}") from error


def _replace(temporary: Path, final: Path) -> None:
    """Make ``temporary`` durable under its final name (an older folder of that name goes)."""
    reach(Write.RENAME)
    fsync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_folder(final.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
