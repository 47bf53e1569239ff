"""Captured graphs by key, bounded in count and bytes: the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol


class Graph(Protocol):
    """A captured sequence of kernels."""

    def replay(self) -> None:
        """Launch all of it, on the current stream, with the contents that its memory has then."""
        ...


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph and what it is valid for.

    Attributes:
        nbytes: device memory that it holds.
        places: addresses that its kernels read or write outside of staging; a graph whose places
            are not those of now is of no use.
    """

    graph: Graph
    nbytes: int
    places: tuple[int, ...]


class GraphCache:
    """At most ``most`` graphs of at most ``most_bytes`` together.

    Attributes:
        nbytes: what they hold.
        evicted: graphs that went to make room; stale: graphs that went because their places moved.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.nbytes = self.evicted = self.stale = 0
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Hashable, places: tuple[int, ...]) -> Captured | None:
        """The graph of ``key``, now the most recently used; None: there is none for these
        places."""
        found = self._graphs.get(key)
        if found is None:
            return None
        if found.places != places:
            self._drop(key)
            self.stale += 1
            return None
        self._graphs.move_to_end(key)
        return found

    def put(self, key: Hashable, captured: Captured) -> bool:
        """Keep a graph, for which others may go; False: it alone is more than the bound."""
        if key in self._graphs:
            self._drop(key)
        if captured.nbytes > self.most_bytes or self.most < 1:
            return False
        while len(self._graphs) >= self.most or self.nbytes + captured.nbytes > self.most_bytes:
            self._drop(next(iter(self._graphs)))
            self.evicted += 1
        self._graphs[key] = captured
        self.nbytes += captured.nbytes
        return True

    def clear(self, which: Callable[[Hashable], bool] = lambda _key: True) -> None:
        """Let the graphs go whose key ``which`` names."""
        for key in [key for key in self._graphs if which(key)]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self.nbytes -= self._graphs.pop(key).nbytes
