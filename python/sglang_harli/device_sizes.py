"""Sizes that follow from the kind of device, each with its reason.  Standard library only.

A CPU does a few GFLOP/s a core and copies at memory speed, so its pieces are small. On a CUDA
device a piece of work costs its launches (some microseconds each on the host) before it costs the
device anything, so pieces are as large as a latency target allows.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class DeviceSizes:
    """Of one kind of device.

    Attributes:
        logits_bytes: default of ``--harli-logits-mem``. The head reads its weights twice a chunk of
            target tokens, so a chunk must hold enough of them: with 150,000 tokens of vocabulary
            64 MiB are 110, which a CPU takes some milliseconds for; 512 MiB are 880.
        reserve_bytes: default of ``--harli-train-reserve``, a layer's working set.
        optimizer_elements: weights that a slice of the optimizer updates. On two CPU cores
            2 million are about 10 ms of memory traffic; on a device 32 million read and write
            about 0.9 GB, some tenths of a millisecond, for as many launches as 2 million would.
        snapshot_bytes: one slice of a copy of the state. The host moves it at memory speed, within
            a quantum, whatever the device is.
        snapshot_buffers: slices on their way from the device at once: one is copied while the host
            moves the other.
        head_block: target tokens in which the head is cut; products of a device have tiles of 128.
        token_block: tokens in which a long row is cut. A device's attention has tiles of 128, and a
            block of a layer costs the same launches whatever its length.
    """

    logits_bytes: int
    reserve_bytes: int
    optimizer_elements: int
    snapshot_bytes: int
    snapshot_buffers: int
    head_block: int
    token_block: int


SIZES = {
    "cpu": DeviceSizes(
        logits_bytes=64 * MIB,
        reserve_bytes=256 * MIB,
        optimizer_elements=2_000_000,
        snapshot_bytes=4 * MIB,
        snapshot_buffers=1,
        head_block=16,
        token_block=64,
    ),
    "cuda": DeviceSizes(
        logits_bytes=512 * MIB,
        reserve_bytes=1024 * MIB,
        optimizer_elements=32_000_000,
        snapshot_bytes=4 * MIB,
        snapshot_buffers=4,
        head_block=128,
        token_block=256,
    ),
}


def sizes_of(device: str) -> DeviceSizes:
    """Those of a kind of device, such as ``"cuda"``; another accelerator is sized as CUDA."""
    return SIZES["cpu" if device == "cpu" else "cuda"]
