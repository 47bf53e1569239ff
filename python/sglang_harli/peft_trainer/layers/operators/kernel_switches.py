"""Which families of our own kernels a base is trained with; shared by all that runs on it."""

from __future__ import annotations

from collections.abc import Mapping


class KernelSwitches:
    """By family, from ``--harli-kernels``: ``on`` is used from the beginning, ``auto`` once it was
    compared with torch's own (``allow``), ``off`` never. Without any: none is used.

    Attributes:
        used: families whose kernels run; read at each call.
        open: families that wait for their comparison.
    """

    def __init__(self, switches: Mapping[str, str] | None = None) -> None:
        given = {} if switches is None else switches
        self.used = {family for family, switch in given.items() if switch == "on"}
        self.open = {family for family, switch in given.items() if switch == "auto"}

    @property
    def any(self) -> bool:
        """Whether some family runs, or may yet."""
        return bool(self.used or self.open)

    def allow(self, family: str) -> None:
        """It computes what torch's own does: from now on it is used."""
        self.open.discard(family)
        self.used.add(family)

    def refuse(self, family: str) -> None:
        """It does not: torch's own are used."""
        self.open.discard(family)
        self.used.discard(family)
