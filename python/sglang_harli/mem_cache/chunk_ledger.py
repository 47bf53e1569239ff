"""Who owns each stripe: the KV cache or one lease.  Pure; the single truth about the pool (design section 6)."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_harli.errors import HarliError
from sglang_harli.mem_cache.geometry import PoolGeometry

KV = "kv"  # the owner of every stripe that is not lent


class LedgerError(HarliError, RuntimeError):
    """A move that the pool's rules forbid, or books that do not agree: a fault of the program."""

    code = "pool_ledger"


class ChunkLedger:
    """Owners of a pool's stripes.  A lease is taken whole and given back whole.

    Attributes:
        moves_to_train: stripes lent since the start.
        moves_to_kv: stripes given back since the start.
    """

    def __init__(self, geometry: PoolGeometry) -> None:
        self.geometry = geometry
        self.moves_to_train = self.moves_to_kv = 0
        self._owner = [KV] * geometry.stripes
        self._leases: dict[str, tuple[int, ...]] = {}
        self._quota: int | None = None  # under which the last lease was granted

    @property
    def train_stripes(self) -> int:
        """Stripes that are lent."""
        return self.moves_to_train - self.moves_to_kv

    @property
    def kv_stripes(self) -> int:
        """Full stripes of the KV cache, stripe 0 included."""
        return self.geometry.stripes - self.train_stripes

    def owner(self, stripe: int) -> str:
        """``"kv"`` or the lease's name."""
        return self._owner[stripe]

    def lent(self) -> list[int]:
        """All lent stripes, ascending."""
        return sorted(stripe for stripes in self._leases.values() for stripe in stripes)

    def lend(self, lease: str, stripes: Sequence[int], *, quota: int | None = None) -> None:
        """Move stripes from the KV cache to a new lease.

        Args:
            lease: its name, not in use.
            stripes: each lendable and the KV cache's.
            quota: stripes that all leases may hold together; None: no bound.

        Raises:
            LedgerError: a rule would be broken; nothing has moved.
        """
        fault = self._fault(lease, stripes, quota)
        if fault is not None:
            raise LedgerError(f"lease {lease!r} of stripes {list(stripes)}: {fault}")
        for stripe in stripes:
            self._owner[stripe] = lease
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
            if self._owner[stripe] != KV:
                return f"stripe {stripe} belongs to {self._owner[stripe]!r}"
        if quota is not None and self.train_stripes + len(stripes) > quota:
            return f"{self.train_stripes} stripes are lent already and the quota is {quota}"
        return None

    def give_back(self, lease: str) -> tuple[int, ...]:
        """End a lease.

        Returns:
            Its stripes, which are the KV cache's again.

        Raises:
            LedgerError: there is no such lease.
        """
        stripes = self._leases.pop(lease, None)
        if stripes is None:
            raise LedgerError(f"there is no lease {lease!r} to give back (there are {sorted(self._leases)})")
        for stripe in stripes:
            self._owner[stripe] = KV
        self.moves_to_kv += len(stripes)
        return stripes

    def bytes_by_owner(self) -> dict[str, int]:
        """Bytes of ``"kv"`` (stripe 0 and the tail included) and of each lease; they sum to the budget."""
        stripe_bytes = self.geometry.stripe_bytes
        lent = {name: len(stripes) * stripe_bytes for name, stripes in self._leases.items()}
        return {KV: self.geometry.total_bytes - sum(lent.values()), **lent}

    def check(self) -> None:
        """Compare the two books, owners by stripe and stripes by lease.

        Raises:
            LedgerError: an invariant is broken; the message says which.
        """
        by_lease = {stripe: name for name, stripes in self._leases.items() for stripe in stripes}
        if len(by_lease) != sum(len(stripes) for stripes in self._leases.values()):
            raise LedgerError(f"a stripe is in two leases: {self._leases}")
        for stripe, owner in enumerate(self._owner):
            if owner != by_lease.get(stripe, KV):
                raise LedgerError(
                    f"stripe {stripe} is {owner!r}'s, but {by_lease.get(stripe, KV)!r} lists it"
                )
            if owner != KV and stripe not in self.geometry.lendable:
                raise LedgerError(f"stripe {stripe} can never be lent, but is {owner!r}'s")
        if len(by_lease) != self.train_stripes:
            raise LedgerError(f"{len(by_lease)} stripes are lent, but {self.train_stripes} moves are open")
        if self._quota is not None and self.train_stripes > self._quota:
            raise LedgerError(f"{self.train_stripes} stripes are lent above the quota of {self._quota}")
        geometry = self.geometry
        tail = geometry.total_bytes - geometry.stripes * geometry.stripe_bytes
        counted = sum(owner == KV for owner in self._owner) * geometry.stripe_bytes + tail
        if self.bytes_by_owner()[KV] != counted:
            raise LedgerError(f"the KV cache has {counted} bytes, but the books say {self.bytes_by_owner()}")
