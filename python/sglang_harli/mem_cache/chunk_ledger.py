"""Who owns each stripe: the KV cache or one lease (docs/internals/memory.md). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_harli.errors import HarliError
from sglang_harli.mem_cache.geometry import PoolGeometry

KV = "kv"  # the owner of every stripe that is not lent


class LedgerError(HarliError, RuntimeError):
    """A move that the pool's rules forbid, or books that do not agree: a fault of the program."""

    code = "pool_ledger"


class ChunkLedger:
    """Owners of a pool's stripes; leases are taken and given back whole. ``moves_…`` only grow."""

    def __init__(self, geometry: PoolGeometry) -> None:
        self.geometry = geometry
        self.moves_to_train = self.moves_to_kv = 0
        self._leases: dict[str, tuple[int, ...]] = {}
        self._quota: int | None = None  # under which the last lease was granted

    @property
    def train_stripes(self) -> int:
        """Stripes that are lent."""
        return self.moves_to_train - self.moves_to_kv

    def owner(self, stripe: int) -> str:
        """``"kv"`` or the lease's name."""
        return next((name for name, stripes in self._leases.items() if stripe in stripes), KV)

    def lent(self) -> list[int]:
        """All lent stripes, ascending."""
        return sorted(stripe for stripes in self._leases.values() for stripe in stripes)

    def lend(self, lease: str, stripes: Sequence[int], *, quota: int | None = None) -> None:
        """Move the KV cache's (lendable) stripes to a new lease; ``quota``: of all together.

        Raises:
            LedgerError: a rule would be broken; nothing has moved.
        """
        fault = self._fault(lease, stripes, quota)
        if fault is not None:
            raise LedgerError(f"lease {lease!r} of stripes {list(stripes)}: {fault}")
        self._leases[lease] = tuple(stripes)
        self._quota = quota
        self.moves_to_train += len(stripes)

    def _fault(self, lease: str, stripes: Sequence[int], quota: int | None) -> str | None:
        """Which rule a new lease would break."""
        if lease == KV or not lease:
            return f"a lease cannot be named {lease!r}"
        if lease in self._leases:
            return f"the name is in use by a lease of stripes {list(self._leases[lease])}"
        if not stripes:
            return "a lease has at least one stripe"
        if len(set(stripes)) != len(stripes):
            return "a stripe is named twice"
        for stripe in stripes:
            if stripe not in self.geometry.lendable:
                return f"stripe {stripe} is not lendable ({self.geometry.lendable} are)"
            if (owner := self.owner(stripe)) != KV:
                return f"stripe {stripe} belongs to {owner!r}"
        if quota is not None and self.train_stripes + len(stripes) > quota:
            return f"{self.train_stripes} stripes are lent already and the quota is {quota}"
        return None

    def give_back(self, lease: str) -> tuple[int, ...]:
        """End a lease; its stripes are the KV cache's again.

        Raises:
            LedgerError: there is no such lease.
        """
        stripes = self._leases.pop(lease, None)
        if stripes is None:
            raise LedgerError(f"there is no lease {lease!r} to give back (there are {sorted(self._leases)})")
        self.moves_to_kv += len(stripes)
        return stripes

    def stripes_of(self, lease: str) -> tuple[int, ...]:
        """What the lease of this name holds; nothing where there is none."""
        return self._leases.get(lease, ())

    def check(self) -> None:
        """Compare the leases with the rules and with what was counted.

        Raises:
            LedgerError: an invariant is broken; the message says which.
        """
        lent = self.lent()
        if len(set(lent)) != len(lent):
            raise LedgerError(f"a stripe is in two leases: {self._leases}")
        if stray := [stripe for stripe in lent if stripe not in self.geometry.lendable]:
            raise LedgerError(f"stripes {stray} can never be lent, and are: {self._leases}")
        if len(lent) != self.train_stripes:
            raise LedgerError(f"{len(lent)} stripes are lent, but {self.train_stripes} moves are open")
        if self._quota is not None and self.train_stripes > self._quota:
            raise LedgerError(f"{self.train_stripes} stripes are lent above the quota of {self._quota}")
