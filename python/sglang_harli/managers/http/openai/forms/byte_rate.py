"""The rate at which files are received: below what would keep requests for tokens from a core."""

from __future__ import annotations

import asyncio

BYTES_PER_S = 48 << 20  # of all files on their way together
BEHIND_S = 0.005  # the shortest sleep


class ByteRate:
    """Spreads the bytes of all files over time; may be shared by tasks of one event loop."""

    def __init__(self, bytes_per_s: float = BYTES_PER_S) -> None:
        self._s_per_byte = 1.0 / bytes_per_s
        self._next = 0.0  # when the bytes that were taken may have come, by the loop's clock

    async def take(self, count: int) -> None:
        """Returns when ``count`` more bytes may be worked on."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now) + count * self._s_per_byte
        if self._next - now >= BEHIND_S:
            await asyncio.sleep(self._next - now)
