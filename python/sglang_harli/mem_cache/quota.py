"""How much of the pool training may hold, and when it may grow (docs/internals/memory.md). Pure.

Four things keep memory from going to and fro:

- watermarks: training grows only while ``high`` stripes stay free, and gives back ahead of need
  only below ``low``; both follow the KV cache's largest growth over a second, which fades;
- the dip: by how much the KV cache uses less than lately. A load that comes in waves gets its
  memory back at the next one: training leaves it alone until the dip has faded;
- a cool-down after each time that the KV cache took memory back: one second, doubled up to thirty
  when it happens again soon, forgotten after a quiet minute;
- a cap, settable at run time.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from sglang_harli.mem_cache.geometry import PoolGeometry

GROWTH_WINDOW_S = 1.0
HALF_LIFE_S = 5.0  # of what is remembered of growth and of earlier use
COOL_DOWN_S = 1.0
LONGEST_COOL_DOWN_S = 30.0
QUIET_S = 60.0
UNUSED_S = 60.0  # a prefix unused for so long makes way for what a run cannot do without

_BUCKET_S = 0.1  # the growth window is kept as the least use in each tenth of a second
_BUCKETS = round(GROWTH_WINDOW_S / _BUCKET_S)
_LARGEST_LOW = 8  # low is at most an eighth of what can be lent, high a quarter: the rest is for reclaims


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Stripes' worth of slots that stay physically free for the KV cache."""

    low: int  # below it training gives back ahead of need
    high: int  # training grows only above it: after a growth as large as the last, low is still free


class Quota:
    """Decides how many stripes training may take and should give.

    Args:
        max_train_bytes: cap on what is lent; None: all that is lendable. May be set at any time:
            what is lent above it stays until it is given back.
        prefix_keep: share of the slots, 0 to 1, that cached prefixes in use keep as training grows.
    """

    def __init__(
        self, geometry: PoolGeometry, *, max_train_bytes: int | None, prefix_keep: float = 0.5
    ) -> None:
        self.geometry = geometry
        self.max_train_bytes = max_train_bytes
        self.prefix_keep = prefix_keep
        self._least: deque[tuple[int, int]] = deque()  # (tenth of a second, least slots used in it)
        self._growth = 0.0  # slots in a second
        self._dip = 0.0  # slots
        self._used: int | None = None  # slots, and when that was
        self._used_at_s = 0.0
        self._cool_down_s = COOL_DOWN_S
        self._cool_until_s = -math.inf
        self._reclaimed_s = -math.inf

    @property
    def max_stripes(self) -> int:
        """The cap in whole stripes."""
        lendable = len(self.geometry.lendable)
        if self.max_train_bytes is None:
            return lendable
        return min(lendable, self.max_train_bytes // self.geometry.stripe_bytes)

    def observe(self, *, now_s: float, used_slots: int) -> None:
        """Note how many slots the KV cache uses now (requests and cached prefixes)."""
        bucket = math.floor(now_s / _BUCKET_S)
        least = self._least
        if least and least[-1][0] == bucket:
            if used_slots < least[-1][1]:
                least[-1] = (bucket, used_slots)
        else:
            least.append((bucket, used_slots))
            while least[0][0] < bucket - _BUCKETS:
                least.popleft()
        growth = used_slots - min(used for _, used in least)
        faded = 0.5 ** ((now_s - self._used_at_s) / HALF_LIFE_S)
        self._growth = max(float(growth), self._growth * faded)
        fell = 0 if self._used is None else self._used - used_slots
        self._dip = max(self._dip * faded + fell, 0.0)
        self._used, self._used_at_s = used_slots, now_s

    def evicted(self, slots: int) -> None:
        """Cached prefixes were evicted for training: that use has fallen is no dip."""
        if self._used is not None:
            self._used -= slots

    @property
    def watermarks(self) -> Watermarks:
        """As of the last observation; 0 when the KV cache has not grown lately."""
        low = min(self._stripes(self._growth), len(self.geometry.lendable) // _LARGEST_LOW)
        return Watermarks(low, 2 * low)

    def _stripes(self, slots: float) -> int:
        return math.floor(slots / self.geometry.stripe_slots + 0.5)

    def cooling(self, now_s: float) -> bool:
        """Whether training may take nothing because the KV cache took memory back a moment ago."""
        return now_s < self._cool_until_s

    def may_take(self, *, now_s: float, free_stripes: int, train_stripes: int) -> int:
        """More stripes that training may lease now; ``free_stripes``: lendable, wholly free."""
        if self.cooling(now_s):
            return 0
        room = free_stripes - self.watermarks.high - self._stripes(self._dip)
        return max(min(room, self.max_stripes - train_stripes), 0)

    def must_give(self, *, free_stripes: int, train_stripes: int) -> int:
        """Stripes to give back ahead of need: none above ``low``, else up to ``high``.

        So the next small growth does not ask again. ``free_stripes``: free slots in stripes, which
        need not be wholly free.
        """
        marks = self.watermarks
        if free_stripes >= marks.low:
            return 0
        return min(marks.high - free_stripes, train_stripes)

    def reclaimed(self, now_s: float) -> None:
        """The KV cache took memory back: training waits before it grows again. What comes during a
        cool-down is the same event: it restarts the cool-down without doubling it."""
        if not self.cooling(now_s):
            soon = now_s - self._reclaimed_s < QUIET_S
            self._cool_down_s = min(self._cool_down_s * 2, LONGEST_COOL_DOWN_S) if soon else COOL_DOWN_S
        self._reclaimed_s = now_s
        self._cool_until_s = now_s + self._cool_down_s

    def hold_off(self, until_s: float) -> None:
        """Training takes nothing more until then, as in a cool-down."""
        self._cool_until_s = max(self._cool_until_s, until_s)

    def kept_prefix_slots(self) -> int:
        """Slots that cached prefixes keep when training grows."""
        return math.ceil(self.prefix_keep * self.geometry.slots)
