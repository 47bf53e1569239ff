"""What the live picture of the pool must show, and its table (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at ``harli status --json``'s ``pool``.

    Attributes:
        at_s: since the first look.
        kv, train, free, total: bytes; ``kv`` is of requests and cached prefixes.
        purposes: bytes that training holds, by purpose (``state``, ``micro_batch``, ``kept``).
        reclaims: how often the KV cache took memory back at an allocation, so far.
        step: of the job.
    """

    at_s: float
    kv: int
    train: int
    free: int
    total: int
    purposes: dict[str, int]
    reclaims: int
    step: int

    @classmethod
    def of(cls, at_s: float, pool: dict[str, Any], step: int) -> Sample:
        owners = {name: size for name, size in pool["by_owner"].items() if name != "kv"}
        kv, train, free, total = (pool[f"{name}_bytes"] for name in ("kv", "train", "free", "total"))
        return cls(at_s, kv, train, free, total, owners, pool["reclaims"], step)


@dataclass(frozen=True, slots=True)
class Span:
    """A wave of long prompts: from the first one sent to the last one answered, seconds since the
    first look."""

    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Flow:
    """What a wave did to the memory, in bytes.

    Attributes:
        before: that training held when the wave began.
        least: that training held at least, from the wave's beginning until memory came back or the
            next wave.
        peak_kv: that requests and cached prefixes held at most.
        room: what they could have had if training had kept what it held before.
        after: that training held at most before the next wave.
        steps: of the job, from the wave's beginning to the next one.
    """

    before: int
    least: int
    peak_kv: int
    room: int
    after: int
    steps: int

    @property
    def to_kv(self) -> int:
        return self.before - self.least

    @property
    def to_train(self) -> int:
        return self.after - self.least


def flows(samples: Sequence[Sample], waves: Sequence[Span]) -> list[Flow]:
    """One for each wave; a wave without samples has no figures and counts as all zeros."""
    found = []
    for number, wave in enumerate(waves):
        following = waves[number + 1].began_s if number + 1 < len(waves) else float("inf")
        earlier = [s for s in samples if s.at_s <= wave.began_s]
        during = [s for s in samples if wave.began_s < s.at_s <= wave.ended_s]
        later = [s for s in samples if wave.ended_s < s.at_s <= following]
        if not (earlier and during and later):
            found.append(Flow(0, 0, 0, 0, 0, 0))
            continue
        before = earlier[-1]
        lowest = min(range(len(during + later)), key=lambda n: (during + later)[n].train)
        found.append(
            Flow(
                before=before.train,
                least=(during + later)[lowest].train,
                peak_kv=max(s.kv for s in during),
                room=before.total - before.train,
                after=max(s.train for s in (during + later)[lowest:]),
                steps=later[-1].step - before.step,
            )
        )
    return found


def judge(results: dict[str, Any]) -> list[str]:
    """What is wrong, one line each.

    Args:
        results: ``samples`` and ``waves`` (as ``Sample`` and ``Span``), ``failed`` (name -> error
            of each request that failed), ``job`` (its last status) and ``stripe_bytes``.
    """
    samples, waves = results["samples"], results["waves"]
    problems = [f"request {name} failed: {error}" for name, error in results["failed"].items()]
    unequal = [s for s in samples if s.kv + s.train + s.free != s.total]
    if unequal:
        problems.append(
            f"{len(unequal)} of {len(samples)} looks do not sum to the total, first {asdict(unequal[0])}"
        )
    if not waves:
        problems.append("no wave was sent")
    stripe = results["stripe_bytes"]
    for number, flow in enumerate(flows(samples, waves), 1):
        if flow.to_kv < stripe or flow.peak_kv <= flow.room:
            problems.append(
                f"wave {number}: memory did not flow to the KV cache: training went from {_mib(flow.before)} to "
                f"{_mib(flow.least)}, the KV cache to {_mib(flow.peak_kv)} of the {_mib(flow.room)} it had anyway"
            )
        if flow.to_train < stripe:
            problems.append(
                f"wave {number}: memory did not flow back: training held {_mib(flow.least)} at least and "
                f"{_mib(flow.after)} afterwards"
            )
        if flow.steps < 1:
            problems.append(f"wave {number}: the job made no step from there to the next")
    if results["job"] not in ("running", "queued", "succeeded"):
        problems.append(f"the job ended as {results['job']}")
    return problems


def table(results: dict[str, Any], problems: Sequence[str]) -> str:
    samples = results["samples"]
    lines = [
        "| wave | seconds | training before | at least | KV cache at most | training afterwards | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = zip(results["waves"], flows(samples, results["waves"]), strict=True)
    for number, (wave, flow) in enumerate(pairs, 1):
        sizes = (_mib(size) for size in (flow.before, flow.least, flow.peak_kv, flow.after))
        span = f"{wave.began_s:.0f} to {wave.ended_s:.0f}"
        lines.append(f"| {number} | {span} | {' | '.join(sizes)} | {flow.steps} |")
    last = samples[-1] if samples else None
    lines += [
        "",
        f"The pool has {_mib(last.total) if last else '-'}. {results['requests']} requests, "
        f"{len(results['failed'])} failed; {last.reclaims if last else 0} reclaims at an allocation, "
        f"{results['dropped']} micro-batches dropped; {len(samples)} looks.",
        f"Verdict: {'clean' if not problems else f'{len(problems)} problems'}.",
    ]
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
