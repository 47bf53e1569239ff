"""Places in the training window: intervals of a range of units, first fit.  Pure."""

from __future__ import annotations


class IntervalAllocator:
    """Free intervals of ``range(size)`` (bytes, stripes), ascending and never adjacent."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # [start, end)

    @property
    def free(self) -> int:
        """Units that are free, in however many intervals."""
        return sum(end - start for start, end in self._free)

    def allocate(self, length: int) -> int | None:
        """The start of the first free interval of ``length`` units, now taken, or None.

        Raises:
            ValueError: ``length`` is not positive.
        """
        if length < 1:
            raise ValueError(f"an interval has at least one unit, not {length}")
        for index, (start, end) in enumerate(self._free):
            if end - start >= length:
                self._free[index : index + 1] = [(start + length, end)] if end - start > length else []
                return start
        return None

    def release(self, start: int, length: int) -> None:
        """Free an interval that ``allocate`` gave, and join it to its free neighbours.

        Raises:
            ValueError: it lies outside, or part of it is free already.
        """
        end = start + length
        if length < 1 or start < 0 or end > self.size:
            raise ValueError(f"[{start}, {end}) is not an interval of {self.size} units")
        after = next((i for i, (_, e) in enumerate(self._free) if e >= start), len(self._free))
        last = after
        low, high = start, end
        while last < len(self._free) and self._free[last][0] <= end:
            free_start, free_end = self._free[last]
            if free_start < end and free_end > start:
                raise ValueError(f"[{start}, {end}) is free already from {free_start} to {free_end}")
            low, high = min(low, free_start), max(high, free_end)
            last += 1
        self._free[after:last] = [(low, high)]
