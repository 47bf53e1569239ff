"""What the service must take over durably, kept by the scheduler until it has (pure)."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_harli.protocol import internal

# Flow control bounds the ring (docs/internals/run-protocol.md): beyond this it would have failed.
RING = 4096
AGAIN_AFTER_S = 3.0  # nothing was acknowledged for so long: what is kept is said again
AGAIN_AT_ONCE = 16

# The rest (progress, pulse, status) is stale a moment later.
KEPT = (
    internal.RunStarted,
    internal.StepDone,
    internal.EvaluationDone,
    internal.SnapshotReady,
    internal.RunStopped,
    internal.RunFailed,
)


class Unacknowledged:
    """A bounded ring of ``size`` messages, oldest first.

    Beyond it a StepDone goes first (metrics of one step), and the message behind it learns not to
    wait for it; never a SnapshotReady or a RunFailed while there is a StepDone.
    """

    def __init__(self, size: int = RING) -> None:
        self._size = size
        self._kept: dict[int, internal.Message] = {}  # by seq, in the order of sending
        self._quiet_since_s = 0.0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, message: internal.Message) -> bool:
        return message.seq in self._kept

    def keep(self, message: internal.Message, now_s: float) -> None:
        if not self._kept:
            self._quiet_since_s = now_s
        if isinstance(message, internal.RunStopped):  # said again: one of them is enough
            for seq, old in self._kept.items():
                if isinstance(old, internal.RunStopped) and _run(old) == _run(message):
                    del self._kept[seq]
                    break
        if len(self._kept) >= self._size:
            self._drop_one()
        self._kept[message.seq] = message

    def acknowledged(self, seqs: Iterable[int], now_s: float) -> None:
        for seq in seqs:
            if self._kept.pop(seq, None) is not None:
                self._quiet_since_s = now_s

    def due(self, now_s: float) -> list[internal.Message]:
        """What to say again now: the oldest ones, where no acknowledgement has come for a while."""
        if not self._kept or now_s - self._quiet_since_s < AGAIN_AFTER_S:
            return []
        self._quiet_since_s = now_s
        return [message for _, message in zip(range(AGAIN_AT_ONCE), self._kept.values(), strict=False)]

    def all(self) -> list[internal.Message]:
        return list(self._kept.values())

    def _drop_one(self) -> None:
        lost = next((m for m in self._kept.values() if isinstance(m, internal.StepDone)), None)
        if lost is None:
            del self._kept[next(iter(self._kept))]
            return
        del self._kept[lost.seq]
        for later in self._kept.values():
            if (
                isinstance(later, KEPT)
                and not isinstance(later, internal.RunStarted)
                and _run(later) == _run(lost)
                and later.after == lost.step
            ):
                later.after = lost.after


def _run(message: object) -> tuple[str, int]:
    return message.job, message.attempt  # type: ignore[attr-defined]
