"""Requests for the pool's stress test: shared beginnings, ebb and flow, aborts, and every answer
compared."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import orjson

from survive.traffic import Seen, Traffic

MOST_TOKENS = 48  # of an answer
FLOW_S, EBB_S = (6.0, 15.0), (3.0, 9.0)  # how long requests come, and how long none do
HANG_UP, ABORT = 0.10, 0.20  # below: the client goes away; below: it asks for an abort


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that is asked again and again."""

    prompt: tuple[int, ...]


def catalogue(seed: int, pool_tokens: int, vocab: int) -> list[Question]:
    """Prompts for a pool of ``pool_tokens`` slots: most share one of three beginnings, some need
    most of it (pure)."""
    rng = random.Random(f"catalogue {seed}")

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, vocab) for _ in range(count))

    beginnings = [ids(pool_tokens // 12) for _ in range(3)]
    made = [Question(rng.choice(beginnings) + ids(rng.randint(2, pool_tokens // 8))) for _ in range(18)]
    made += [Question(ids(rng.randint(2, pool_tokens // 6))) for _ in range(6)]
    made += [Question(ids(int(share * pool_tokens))) for share in (0.4, 0.6, 0.8, 0.9)]
    return made


def tide(seed: int, seconds: float) -> list[tuple[float, float]]:
    """(from, to) of the spells in which requests come (pure)."""
    rng = random.Random(f"tide {seed}")
    spells, at = [], 0.0
    while at < seconds:
        end = at + rng.uniform(*FLOW_S)
        spells.append((at, min(end, seconds)))
        at = end + rng.uniform(*EBB_S)
    return spells


def fault(got: Sequence[int], expected: Sequence[int], wanted: int, ended: bool) -> str | None:
    """What is wrong with an answer (pure).

    Args:
        expected: the reference, of ``MOST_TOKENS`` tokens.
        wanted: tokens asked for.
        ended: it was to come whole (False: cut by an abort or by the client's going).
    """
    if list(got) != list(expected[: len(got)]):
        place = next(n for n, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
        return f"token {place} of {len(got)} is {got[place]} and was {expected[place]}"
    if ended and len(got) != wanted:
        return f"{len(got)} tokens came, {wanted} were asked for"
    return None


class Askers(Traffic):
    """``soak_traffic.Traffic`` that asks the catalogue's questions and compares every answer with
    its reference.

    Args:
        references: greedy answers of the questions, ``MOST_TOKENS`` tokens each, from a quiet
            server.
        flowing: whether requests come now.

    Attributes:
        differing: answers that differ, in words.
        cut: requests that were aborted or left.
    """

    def __init__(
        self,
        url: str,
        questions: Sequence[Question],
        references: Sequence[Sequence[int]],
        *,
        streams: int,
        seed: int,
        flowing: Callable[[], bool],
    ) -> None:
        super().__init__(url, [], streams=streams, seed=seed, pause_s=0.3)
        self.differing: list[str] = []
        self.cut = 0
        self._questions, self._references, self._flowing = questions, references, flowing

    async def _one(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        if not self._flowing():
            await asyncio.sleep(0.2)
            return
        number = rng.randrange(len(self._questions))
        wanted = rng.randint(4, MOST_TOKENS)
        fate = rng.random()
        seen = Seen(time.time())
        got: list[int] = []
        try:
            await self._ask(session, rng, self._questions[number], wanted, fate, got, seen)
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.error = f"{type(error).__name__}: {error}"
        seen.ended = time.time()
        self.cut += fate < ABORT
        wrong = fault(got, self._references[number], wanted, ended=fate >= ABORT)
        if wrong is not None and seen.error is None:
            self.differing.append(
                f"question {number} ({len(self._questions[number].prompt)} tokens): {wrong}"
            )
        self.seen.append(seen)

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        rng: random.Random,
        question: Question,
        wanted: int,
        fate: float,
        got: list[int],
        seen: Seen,
    ) -> None:
        """One streamed request; ``got`` takes its tokens as they come."""
        name = uuid.uuid4().hex
        body = {
            "rid": name,
            "input_ids": list(question.prompt),
            "stream": True,
            "sampling_params": {"max_new_tokens": wanted, "temperature": 0, "ignore_eos": True},
        }
        leave_at, abort_s, abort = rng.randint(0, wanted - 1), rng.uniform(0, 1.5), None
        if HANG_UP <= fate < ABORT:
            abort = asyncio.create_task(self._abort(session, name, abort_s))
        try:
            async with session.post(f"{self._url}/generate", json=body) as answer:
                if answer.status != 200 and fate >= ABORT:
                    seen.error = f"HTTP {answer.status}: {(await answer.text())[:300]}"
                    return
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    self._take(orjson.loads(line[6:]), fate, got, seen)
                    if fate < HANG_UP and len(got) > leave_at:
                        return
        finally:
            if abort is not None:
                abort.cancel()
                await asyncio.gather(abort, return_exceptions=True)

    def _take(self, chunk: dict, fate: float, got: list[int], seen: Seen) -> None:
        if "error" in chunk:
            seen.error = None if fate < ABORT else str(chunk["error"])[:300]
            return
        got[:] = chunk["output_ids"]
        reason = chunk["meta_info"].get("finish_reason") or {}
        if reason.get("type") == "abort" and fate >= ABORT:
            seen.error = f"aborted: {reason.get('message', '')[:300]}"

    async def _abort(self, session: aiohttp.ClientSession, name: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        async with session.post(f"{self._url}/abort_request", json={"rid": name}):
            pass
