"""Part 3: does a server of 1B parameters keep its output, its decode speed and its target while a
LoRA job trains?

Plain SGLang (no plugin) and ours stand on the device together for the comparison of decode without
a job; everything else is of ours.  At last ours is started again with each other backing of the
pool, which tells the pool's trouble from the trainer's.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import jobs, servers
from common import load as bench_load
from common.servers import Server
from gpu import serving
from gpu.page import Page
from sglang_harli import FinetuneClient

POOL_BACKING_ENV = "HARLI_POOL_BACKING"
KV_TOKENS, DRY_KV_TOKENS = 262_144, 16_384  # of each of two servers on one device
SECOND = 0.8  # --mem-fraction-static of the server that starts second, of what the first left
ROUNDS, BLOCK_TOKENS, BLOCK_BATCH = 16, 128, 8
PREFILL_TIMES = 4  # a prompt of the prefills, in prompts of the load
TARGET_TIMES = 2.0  # the TPOT target, of serve-only's median, where none is given


def run(page: Page, options: Any) -> None:
    """Start both, measure, end them; then the other backings."""
    with tempfile.TemporaryDirectory(prefix="harli-check-") as name:
        folder = Path(name)
        size = options.size or ("tiny" if page.dry else "1b")
        model, vocab = serving.model_of(folder, size)
        data = jobs.write_data(folder / "data.jsonl", words=(4, 12) if page.dry else (8, 60))
        part = _Part(page, options, model, vocab, data)
        page.settings["model"] = f"Llama of {size}, bf16, random weights (--load-format dummy)"
        part.measure()


class _Part:
    """What the sections share."""

    def __init__(self, page: Page, options: Any, model: Path, vocab: int, data: Path) -> None:
        self.page, self.options, self.model, self.vocab, self.data = page, options, model, vocab, data
        dry = page.dry
        self.prompts, self.window_s = (2, 1.5) if dry else (12, options.seconds or 15.0)
        self.load = bench_load.Load(
            2 if dry else options.streams, 16 if dry else 128, 8 if dry else 128, vocab
        )
        self.rounds, self.tokens = (2, 8) if dry else (ROUNDS, BLOCK_TOKENS)

    def measure(self) -> None:
        page = self.page
        limit = ["--max-total-tokens", str(DRY_KV_TOKENS if page.dry else KV_TOKENS)]
        first = [] if page.dry else ["--mem-fraction-static", "0.45"]
        second = [] if page.dry else ["--mem-fraction-static", str(SECOND)]
        ours = serving.start(page, self.options, self.model, "ours", *limit, *first)
        up = page.measure("start", lambda: self._start(ours, [*limit, *second]))
        if up is None:
            return
        if self.plain is not None:
            page.measure("decode", functools.partial(self._by_turns, ours, self.plain), needs_s=2)
            page.measure(
                "prefill", functools.partial(self._by_turns, ours, self.plain, prefills=True), needs_s=2
            )
            self.plain.kill()
        with FinetuneClient(ours.endpoint) as client:
            self.before = serving.greedy(ours, self.vocab, self.prompts)
            page.measure("co_serving", functools.partial(self._co_serving, ours, client), needs_s=5)
            page.measure("adapter", functools.partial(serving.finish_one, ours, client, self.data), needs_s=5)
            after = serving.greedy(ours, self.vocab, self.prompts)
            if "co_serving" in page.sections:
                during = page.sections["co_serving"].pop("greedy_equal")
                page.sections["greedy"] = {"during": during, "after": after == self.before}
        ours.kill()
        for backing in self.options.backings.split(",") if not page.dry else []:
            work = functools.partial(self._backing, backing, limit)
            page.measure(f"backing {backing}", work, needs_s=75)

    def _start(self, ours: Server, flags: list[str]) -> dict[str, Any]:
        """Ours first, whose limits the plain server is given."""
        page, self.plain = self.page, None
        if page.dry:  # together: two cores load them no faster one after the other
            self.plain = serving.start(page, self.options, self.model, "plain", *flags, plain=True)
        found: dict[str, Any] = {"ours_s": serving.wait_ready(page, ours)}
        limits = servers.limits_of(ours)
        if self.plain is None:
            alike = servers.flags_for(limits, lora=False)
            given = {
                "--mem-fraction-static",
                "--max-total-tokens",
                "--attention-backend",
                "--sampling-backend",
            }
            alike = _without(alike, given)
            self.plain = serving.start(page, self.options, self.model, "plain", *flags, *alike, plain=True)
        found["plain_s"] = serving.wait_ready(page, self.plain)
        page.settings |= {
            "attention": limits["attention_backend"],
            "sampling": limits["sampling_backend"],
            "KV cache": f"{limits['max_total_num_tokens']} tokens",
        }
        return found

    def _by_turns(self, ours: Server, plain: Server, *, prefills: bool = False) -> dict[str, Any]:
        """Blocks of the same batch on both, no job, no adapter: the median ratio of a round.

        Decode: the prompts are in the prefix cache. Prefills: new prompts, one token each.
        """
        rng = random.Random(int(prefills))
        sides, times = {"ours": ours, "plain": plain}, {"ours": [], "plain": []}
        length = (self.load.prompt_tokens * PREFILL_TIMES) if prefills else 16
        tokens = 1 if prefills else self.tokens

        def batch() -> list[list[int]]:
            return [[rng.randrange(10, self.vocab) for _ in range(length)] for _ in range(BLOCK_BATCH)]

        prompts = batch()
        for number in range(self.rounds + 1):
            prompts = batch() if prefills else prompts
            order = list(sides)
            rng.shuffle(order)
            for name in order:
                seconds = _block(sides[name], prompts, tokens, warm=not prefills)
                if number:  # the first one fills caches
                    times[name].append(seconds)
        logs = sorted(math.log(a / b) for a, b in zip(times["ours"], times["plain"], strict=True))
        return {
            "ratio": math.exp(statistics.median(logs)),
            "smallest ratio": math.exp(logs[0]),
            "largest ratio": math.exp(logs[-1]),
            "ours_ms": statistics.median(times["ours"]) * 1e3,
            "plain_ms": statistics.median(times["plain"]) * 1e3,
            "batch": BLOCK_BATCH,
            "prompt_tokens": length,
            "rounds": self.rounds,
            "raw": times,
        }

    def _co_serving(self, server: Server, client: FinetuneClient) -> dict[str, Any]:
        """Serving alone, training alone, both together, under a target of TPOT."""
        bench_load.run(server.url, self.load, self.window_s / 3)  # discarded
        alone = bench_load.run(server.url, self.load, self.window_s)
        target_ms = self.options.tpot_slo_ms or TARGET_TIMES * alone["tpot_ms"][50]
        client.set(tpot_slo_ms=round(target_ms, 3))
        job = jobs.train(client, self.data)
        _, train_only = jobs.trained(client, job, functools.partial(time.sleep, self.window_s))
        during = serving.greedy(server, self.vocab, self.prompts)
        together, rate = jobs.trained(
            client, job, functools.partial(bench_load.run, server.url, self.load, self.window_s)
        )
        found = serving.status(client)
        jobs.cancel(client, job)
        for window in (alone, together):
            window["within_target"] = bench_load.attainment(window["tpots_ms"], target_ms)
        return {
            "target_ms": target_ms,
            "greedy_equal": during == self.before,
            "serve_only": alone,
            "together": together,
            "train_only_tokens_per_s": train_only,
            "finetune_tokens_per_s": rate,
            "harvest": rate / train_only if train_only else None,
            "reclaim_of_step": serving.reclaim_of_step(found, alone["tpot_ms"][50]),
            "status": found,
        }

    def _backing(self, backing: str, limit: list[str]) -> dict[str, Any]:
        """The same with another backing of the pool, in a shorter window."""
        self.window_s = min(self.window_s, 8.0)
        env = {POOL_BACKING_ENV: backing}
        server = serving.start(self.page, self.options, self.model, f"backing-{backing}", *limit, env=env)
        serving.wait_ready(self.page, server)
        try:
            with FinetuneClient(server.endpoint) as client:
                self.before = serving.greedy(server, self.vocab, self.prompts)
                found = self._co_serving(server, client)
                return {"greedy_equal": found.pop("greedy_equal"), "co_serving": found}
        finally:
            server.kill()


def _block(server: Server, prompts: list[list[int]], tokens: int, *, warm: bool) -> float:
    """Seconds per token of one block; ``warm``: the batch's prompts are in the prefix cache."""
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }
    if warm:
        first = body["sampling_params"] | {"max_new_tokens": 2}
        servers.post(server, "/generate", body | {"sampling_params": first})
    began = time.perf_counter()
    servers.post(server, "/generate", body)
    return (time.perf_counter() - began) / tokens


def _without(flags: list[str], names: set[str]) -> list[str]:
    """Flags with their values, but for those of ``names`` (pure)."""
    kept, skipping = [], False
    for word in flags:
        if word.startswith("--"):
            skipping = word in names
        if not skipping:
            kept.append(word)
    return kept
