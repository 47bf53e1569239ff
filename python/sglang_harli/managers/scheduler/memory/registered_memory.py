"""Which backing may lend KV memory that a transport writes into from outside. Pure.

A decode server registers its KV buffers, by address, with the transport that brings the KV of
prompts. TCP copies into the address when the bytes come. RDMA, GPUDirect and NVLink IPC pin the
physical pages that lay there at the start: where memory is remapped since, their writes would land
in pages that training has, or nobody. What was not read is taken to pin.

    transport      host   aliased   remapped   static
    none, fake     yes    yes       yes        yes
    tcp            yes    yes       yes        yes
    any other      no     no        no         yes

(Aliased memory never moves either; that it can be registered, which takes handles made for it, is
not shown.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALL = ("host", "aliased", "remapped", "static")
UNPINNED = {"none": ALL, "fake": ALL, "tcp": ALL}
PINNED = ("static",)
# Backings whose KV rows are the very bytes that training has while they are lent: a transfer that
# was given up may still write to slots that are free again.
IN_PLACE = ("aliased", "static")
FORCE_TCP_ENV = "MC_FORCE_TCP"


@dataclass(frozen=True, slots=True)
class Transport:
    """``name``: none, fake, tcp, or the back end's; ``text``: as SGLang's operator knows it."""

    name: str
    text: str

    @property
    def backings(self) -> tuple[str, ...]:
        """Names of the backings that may lend."""
        return UNPINNED.get(self.name, PINNED)


NONE = Transport("none", "none")


def transport_of(mode: str, backend: str, environment: Mapping[str, str]) -> Transport:
    """The transport that writes into this server's KV memory.

    Args:
        mode: SGLang's --disaggregation-mode (null, prefill, decode).
        backend: its --disaggregation-transfer-backend.
        environment: of the process; mooncake reads MC_FORCE_TCP there.
    """
    if mode != "decode":
        return NONE
    if backend == "fake":
        return Transport("fake", "fake")
    if backend == "mooncake_tcp" or (backend == "mooncake" and environment.get(FORCE_TCP_ENV) == "1"):
        return Transport("tcp", "mooncake over TCP")
    if backend == "mooncake":
        return Transport(backend, f"mooncake without {FORCE_TCP_ENV}=1")
    return Transport(backend, backend)
