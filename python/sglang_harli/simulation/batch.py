"""The requests of a simulated server: waiting, running, finished.

A request's clock starts with its first token: on a decode-only instance when the next step takes it
into the batch, else at the end of its prefill.
"""

from __future__ import annotations

from sglang_harli.core import StepLoad
from sglang_harli.simulation.traces import Trace, TraceRequest


class SimulatedRequest:
    """One request; the ledger reads ``first_token_s``, ``last_token_s`` and ``emitted``."""

    __slots__ = ("arrival_s", "emitted", "first_token_s", "last_token_s", "longest_gap_s", "output", "prompt")

    def __init__(self, request: TraceRequest) -> None:
        self.arrival_s = request.arrival_s
        self.prompt, self.output = request.prompt_tokens, request.output_tokens
        self.first_token_s = self.last_token_s = self.longest_gap_s = 0.0
        self.emitted = 0

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first, seconds; 0 for a request of one token."""
        return (self.last_token_s - self.first_token_s) / (self.emitted - 1) if self.emitted > 1 else 0.0


class Batch:
    """Requests by state, and the load that they make."""

    def __init__(self, trace: Trace, max_running: int) -> None:
        self._coming = [SimulatedRequest(request) for request in trace.requests]
        self._next = 0
        self.max_running = max_running
        self.waiting: list[SimulatedRequest] = []
        self.running: list[SimulatedRequest] = []
        self.finished: list[SimulatedRequest] = []
        self.context_tokens = 0

    @property
    def next_arrival_s(self) -> float | None:
        """When the next request comes, or None after the last."""
        return self._coming[self._next].arrival_s if self._next < len(self._coming) else None

    @property
    def over(self) -> bool:
        return self._next == len(self._coming) and not self.waiting and not self.running

    def arrive(self, now_s: float) -> None:
        """Requests that have come by now wait."""
        coming, at = self._coming, self._next
        while at < len(coming) and coming[at].arrival_s <= now_s:
            self.waiting.append(coming[at])
            at += 1
        self._next = at

    def take(self, max_tokens: int | None) -> list[SimulatedRequest]:
        """The next to run, in order: as many as fit the batch and ``max_tokens``, one at least."""
        room = self.max_running - len(self.running)
        taken, tokens = 0, 0
        for request in self.waiting[:room]:
            tokens += request.prompt
            if taken and max_tokens is not None and tokens > max_tokens:
                break
            taken += 1
        chosen, self.waiting = self.waiting[:taken], self.waiting[taken:]
        return chosen

    def start(self, requests: list[SimulatedRequest], now_s: float) -> None:
        """Their first token goes out."""
        for request in requests:
            request.first_token_s = request.last_token_s = now_s
            request.emitted = 1
            if request.output == 1:
                self.finished.append(request)
                continue
            self.running.append(request)
            self.context_tokens += request.prompt + 1

    def step(self, now_s: float) -> int:
        """Each running request has got a token; the number of them."""
        count, done = len(self.running), 0
        for request in self.running:
            gap_s = now_s - request.last_token_s
            if gap_s > request.longest_gap_s:
                request.longest_gap_s = gap_s
            request.last_token_s = now_s
            request.emitted += 1
            if request.emitted == request.output:
                done += 1
        self.context_tokens += count
        if done:
            going = []
            for request in self.running:
                if request.emitted < request.output:
                    going.append(request)
                else:
                    self.finished.append(request)
                    self.context_tokens -= request.prompt + request.emitted
            self.running = going
        return count

    def load(self) -> StepLoad:
        return StepLoad(len(self.running), self.context_tokens, len(self.waiting))
