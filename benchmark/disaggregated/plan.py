"""The conversation trace in pieces, scaled to a small machine (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_harli.simulation.traces import Trace, TraceRequest

SERVE, HARLI = "serve-only pair", "training on the decode server"


@dataclass(frozen=True, slots=True)
class Scale:
    """How the trace's lengths are cut down: ``prompts`` and ``outputs`` divide them, ``most``
    tokens is the longest prompt and output together."""

    prompts: float = 8.0
    outputs: float = 4.0
    most: int = 1024

    def apply(self, request: TraceRequest, arrival_s: float) -> TraceRequest:
        output = min(max(2, round(request.output_tokens / self.outputs)), self.most // 2)
        prompt = min(max(1, round(request.prompt_tokens / self.prompts)), self.most - output)
        return TraceRequest(arrival_s, prompt, output)


def piece(trace: Trace, number: int, count: int, rate: float, scale: Scale) -> list[TraceRequest]:
    """Requests ``number * count`` and those behind it, at ``rate`` per second on average: the gaps
    keep their proportions.

    Raises:
        ValueError: the trace has not as many.
    """
    rows = trace.requests[number * count : (number + 1) * count]
    if len(rows) < count:
        raise ValueError(
            f"{trace.name}: {len(trace.requests)} requests, {(number + 1) * count} are asked for"
        )
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    factor = (count - 1) / rate / span_s if span_s > 0 else 0.0
    return [scale.apply(row, (row.arrival_s - rows[0].arrival_s) * factor) for row in rows]


def mean_output(requests: list[TraceRequest]) -> float:
    return sum(request.output_tokens for request in requests) / len(requests)
