"""``state`` checkpoints (to resume a run) and the ``adapter`` folder (to serve it), both atomic.

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

import json
import re
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from sglang_harli.errors import HarliError
from sglang_harli.failpoints import Failpoint, WriteFailpoint, failpoint
from sglang_harli.protocol import shared_memory, trouble
from sglang_harli.protocol.internal import SlotRef
from sglang_harli.service.checkpoint import tensor_files
from sglang_harli.service.checkpoint.tensor_files import Source
from sglang_harli.service.jobs.folder import fsync_folder, fsync_tree
from sglang_harli.service.pacing import Pace

STATE_FILE, RUN_FILE = "state.safetensors", "run.msgpack"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
ADAPTER_META = "harli.json"
ADAPTER_PREFIX = "adapter/"  # of the adapter's tensors among those of a run's state
_STEP = re.compile(r"^step-(\d+)$")


class CheckpointError(HarliError):
    """A checkpoint is missing, torn or not what was written."""

    code = "bad_checkpoint"


# ------------------------------------------------------------------ state
def save_state(
    checkpoints: Path, step: int, slot: SlotRef, run: dict[str, Any], tokens: int, *, rush: bool = False
) -> Path:
    """Write the tensors in ``slot`` as the checkpoint of ``step``; durable on return.  ``rush``:
    without pauses for serving.  Raises OSError: the slot is gone or the disk full."""
    final = checkpoints / f"step-{step}"
    temporary = checkpoints / f"step-{step}.tmp"
    _make_anew(temporary)
    mapped = shared_memory.SharedBuffer.open(slot)
    try:
        failpoint(WriteFailpoint.STATE)
        sources = tensor_files.from_slot(mapped, slot)
        digest = tensor_files.write(temporary / STATE_FILE, sources, Pace(rush=rush))
        del sources
    finally:
        mapped.close()
    _save_meta(temporary, step, run, tokens, digest)
    failpoint(Failpoint.FILE_WRITTEN)
    _replace(temporary, final)
    failpoint(Failpoint.RENAMED)
    return final


def _save_meta(folder: Path, step: int, run: dict[str, Any], tokens: int, state_digest: str) -> None:
    failpoint(WriteFailpoint.META)
    (folder / RUN_FILE).write_bytes(msgspec.msgpack.encode(run))
    meta = {
        "step": step,
        "trained_tokens": tokens,
        "created_at": time.time(),  # stamp: of a checkpoint
        "sha256": {STATE_FILE: state_digest, RUN_FILE: tensor_files.digest(folder / RUN_FILE, Pace())},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint, rising."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(m[1]) for m in (_STEP.match(p.name) for p in checkpoints.iterdir()) if m)


def prune(checkpoints: Path, keep: int = 2, besides: Collection[int] = ()) -> set[int]:
    """Remove all but the newest ``keep`` checkpoints and those ``besides``, older ``.bad`` ones,
    and ``.tmp`` ones; gives the steps that are left.  ``step-0`` stays: a job that carries on
    another one's adapter began there."""
    found = [step for step in steps(checkpoints) if step]
    gone = [step for step in found[:-keep] if step not in besides]
    for step in gone:
        shutil.rmtree(checkpoints / f"step-{step}", ignore_errors=True)
    for path in checkpoints.glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.glob("*.bad"):
        match = _STEP.match(path.stem)
        if match is None or int(match[1]) <= (found[-1] if found else 0):
            shutil.rmtree(path, ignore_errors=True)
    return set(found) - set(gone)


def save_beginning(source: Path, target: Path, seed: int) -> None:
    """The adapter of checkpoint ``source`` as the state of step 0 of a job of ``seed``, moments
    zero.  The caller makes ``target`` durable.  Raises OSError."""
    target.mkdir(parents=True)
    failpoint(WriteFailpoint.STATE)
    with safe_open(source / STATE_FILE, framework="np") as file:

        def load(name: str) -> np.ndarray:
            tensor = file.get_tensor(name)
            return tensor if name.startswith(ADAPTER_PREFIX) else np.zeros_like(tensor)

        names = list(file.keys())
        sources = _sources(file, dict(zip(names, names, strict=True)), load)
        digest = tensor_files.write(target / STATE_FILE, sources, Pace())
    # As the trainer's own state says it of a run that was just made.
    run = {"version": 1, "step": 0, "epoch": 1, "tokens": 0, "seed": seed, "adam_steps": 0}
    _save_meta(target, 0, run, 0, digest)


def load_state(
    checkpoints: Path, step: int, shm: Path
) -> tuple[shared_memory.SharedBuffer, SlotRef, dict[str, Any], int]:
    """The checkpoint of ``step`` in a new slot, the run's plain values and its trained tokens.

    Raises CheckpointError: missing, torn or altered; OSError: shared memory full, or a read failed.
    """
    meta = check_state(checkpoints, step)
    folder, run = checkpoints / f"step-{step}", plain_values(checkpoints, step)
    slot, ref = tensor_files.into_slot(folder / STATE_FILE, shm, Pace())
    return slot, ref, run, int(meta["trained_tokens"])


def plain_values(checkpoints: Path, step: int) -> dict[str, Any]:
    """The run's plain values in a checkpoint; raises OSError, msgspec.MsgspecError."""
    return msgspec.msgpack.decode((checkpoints / f"step-{step}" / RUN_FILE).read_bytes())


def created_at(checkpoints: Path, step: int) -> float | None:
    """When a checkpoint was written, seconds since the epoch; None: it is gone, or not whole."""
    try:
        return float(json.loads((checkpoints / f"step-{step}" / "meta.json").read_bytes())["created_at"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_state(checkpoints: Path, step: int) -> dict[str, Any]:
    """The meta.json of a checkpoint, the checksums in it compared with its files.  Raises
    CheckpointError: they differ; OSError: a read failed."""
    folder = checkpoints / f"step-{step}"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        digests = {name: meta["sha256"][name] for name in (STATE_FILE, RUN_FILE)}
        if meta["step"] != step or not isinstance(meta["trained_tokens"], int):
            raise CheckpointError(f"{folder / 'meta.json'} is not of step {step}")
        _compare(folder, digests)
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is not whole: {error!r}") from error
    return meta


# ------------------------------------------------------------------ adapter
def save_adapter(adapter: Path, checkpoints: Path, step: int, config: dict[str, Any]) -> None:
    """Write the adapter of a checkpoint in PEFT's format; durable on return.  Raises
    CheckpointError: the checkpoint is not whole; OSError: the disk is full."""
    check_state(checkpoints, step)
    temporary = adapter.with_name(f"{adapter.name}.tmp")
    _make_anew(temporary)
    failpoint(WriteFailpoint.ADAPTER)
    with safe_open(checkpoints / f"step-{step}" / STATE_FILE, framework="np") as file:
        found = list(file.keys())
        names = {n: n.removeprefix(ADAPTER_PREFIX) for n in found if n.startswith(ADAPTER_PREFIX)}
        if not names:
            raise CheckpointError(f"checkpoint {checkpoints}/step-{step} holds no adapter")
        sources = _sources(file, names, file.get_tensor)
        tensors_digest = tensor_files.write(temporary / ADAPTER_FILES[0], sources, Pace())
    (temporary / ADAPTER_FILES[1]).write_text(json.dumps(config, indent=2))
    config_digest = tensor_files.digest(temporary / ADAPTER_FILES[1], Pace())
    meta = {"step": step, "sha256": dict(zip(ADAPTER_FILES, (tensors_digest, config_digest), strict=True))}
    (temporary / ADAPTER_META).write_text(json.dumps(meta, indent=2))
    _replace(temporary, adapter)
    failpoint(Failpoint.ADAPTER_EXPORTED)


def load_adapter(adapter: Path, shm: Path) -> tuple[shared_memory.SharedBuffer, SlotRef, dict[str, Any]]:
    """The saved adapter's tensors in a new slot, and its configuration.  Raises CheckpointError:
    the folder is missing or altered; OSError: shared memory is full, or a read failed."""
    try:
        if (adapter / ADAPTER_META).exists():  # else it was saved by harli 0.1.0
            digests = json.loads((adapter / ADAPTER_META).read_bytes())["sha256"]
            _compare(adapter, {name: digests[name] for name in ADAPTER_FILES})
        config = json.loads((adapter / ADAPTER_FILES[1]).read_bytes())
        with safe_open(adapter / ADAPTER_FILES[0], framework="np"):
            pass  # its header is whole: what fails below is shared memory
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        if trouble.passes(error):
            raise
        raise CheckpointError(f"adapter {adapter} cannot be read: {error!r}") from error
    slot, ref = tensor_files.into_slot(adapter / ADAPTER_FILES[0], shm, Pace())
    return slot, ref, config


# ------------------------------------------------------------------ shared by both
def _sources(file: Any, names: dict[str, str], load: Callable[[str], np.ndarray]) -> list[Source]:
    """The tensors ``names`` (stored name: new name) of an open state; all are float32."""
    return [
        Source(new, "float32", tuple(file.get_slice(old).get_shape()), lambda old=old: load(old))
        for old, new in names.items()
    ]


def _make_anew(temporary: Path) -> None:
    """An empty folder; what a crash left in it goes."""
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _compare(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        if tensor_files.digest(folder / name, Pace()) != digest:
            raise CheckpointError(f"{folder / name} was altered after it was written (checksum)")


def _replace(temporary: Path, final: Path) -> None:
    """Make ``temporary`` durable under its final name (an older folder of that name goes)."""
    failpoint(WriteFailpoint.RENAME)
    fsync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_folder(final.parent)
