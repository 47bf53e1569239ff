"""Which backing holds the pool's memory here, and why (docs/internals/memory.md). Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_harli.errors import ConfigError
from sglang_harli.managers.scheduler.memory.registered_memory import NONE, Transport
from sglang_harli.mem_cache.backing import stray_reads

POOL_BACKING_ENV = "HARLI_POOL_BACKING"
HOST, ALIASED, REMAPPED, STATIC, OFF = "host", "aliased", "remapped", "static", "off"
ACCEPTED = (HOST, ALIASED, REMAPPED, STATIC, OFF)


@dataclass(frozen=True, slots=True)
class Choice:
    """``name``: of the backing; ``why``, as the end of a sentence."""

    name: str
    why: str


def choose(
    asked: str | None,
    device: str,
    attention: Sequence[str | None],
    refusal: Callable[[], str | None],
    transport: Transport = NONE,
) -> Choice:
    """The backing of a pool that may lend.

    Args:
        asked: the environment variable; None or empty: as fits best.
        device: ``cpu`` or ``cuda``.
        attention: SGLang's attention back ends, of prefill and of decode.
        refusal: tries the device's memory out; why it cannot be mapped, or None.
        transport: what writes into the KV memory from outside.

    Raises:
        ConfigError: a backing that does not exist, not on this device, or not with this transport.
    """
    if asked and asked not in ACCEPTED:
        raise ConfigError(
            f"{POOL_BACKING_ENV}={asked}: accepted are {', '.join(ACCEPTED)}", param=POOL_BACKING_ENV
        )
    pins = "" if len(transport.backings) > 1 else f"the transport ({transport.text}) may pin physical memory"
    if pins and asked in (HOST, ALIASED, REMAPPED):
        raise ConfigError(
            f"{POOL_BACKING_ENV}={asked}: the KV cache is registered with its transport ({transport.text}), "
            "which may pin the physical memory of each address; what is moved under it would be overwritten. "
            f"Accepted: {', '.join(transport.backings)}, {OFF}; with TCP "
            "(--disaggregation-transfer-backend mooncake_tcp) all",
            param=POOL_BACKING_ENV,
        )
    if asked == STATIC:
        return Choice(STATIC, f"{POOL_BACKING_ENV}={STATIC}")
    if device == "cpu":
        if asked in (ALIASED, REMAPPED):
            raise ConfigError(
                f"{POOL_BACKING_ENV}={asked} needs a GPU; on a CPU: {HOST}, {STATIC}, {OFF}",
                param=POOL_BACKING_ENV,
            )
        return Choice(STATIC, pins) if pins else Choice(HOST, "the CPU engine's")
    if asked == HOST:
        raise ConfigError(
            f"{POOL_BACKING_ENV}={HOST} is for the CPU engine; on a GPU: {ALIASED}, {REMAPPED}, {STATIC}, {OFF}",
            param=POOL_BACKING_ENV,
        )
    if pins:
        return Choice(STATIC, pins)
    if refused := refusal():
        return Choice(STATIC, f"memory cannot be mapped here: {refused}")
    if asked:
        return Choice(asked, f"{POOL_BACKING_ENV}={asked}")
    names = " and ".join(sorted({name or "?" for name in attention}))
    if unknown := stray_reads.unmasked(attention):
        return Choice(
            REMAPPED,
            f"whether attention by {', '.join(unknown)} masks reads past a sequence's end is not known",
        )
    return Choice(ALIASED, f"attention by {names} masks reads past a sequence's end")
