"""Files are taken at a bounded rate, all of them together."""

from __future__ import annotations

import asyncio

import pytest

from sglang_harli.managers.http.openai.forms.byte_rate import BEHIND_S, ByteRate


def rests(takes: list[int], monkeypatch: pytest.MonkeyPatch, tasks: int = 1) -> list[float]:
    """What 1 MB/s makes of pieces of so many bytes, in each of some tasks."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def rest(seconds: float) -> None:
        found.append(seconds)
        await sleep(0)

    async def run() -> None:
        rate = ByteRate(1e6)

        async def take() -> None:
            for count in takes:
                await rate.take(count)

        await asyncio.gather(*(take() for _ in range(tasks)))

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "sleep", rest)
        asyncio.run(run())
    return found


def test_pieces_are_spread_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # No time passes here while it rests, so each rest is as long as all bytes until then take.
    assert rests([10_000] * 3, monkeypatch) == pytest.approx([0.01, 0.02, 0.03], abs=0.004)


def test_files_share_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(rests([10_000], monkeypatch, tasks=5)) == pytest.approx(0.05, abs=0.004)


def test_small_files_are_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rests([int(BEHIND_S * 1e6) - 1000], monkeypatch) == []
